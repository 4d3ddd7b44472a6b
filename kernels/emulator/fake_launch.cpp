// Modules, functions, launches and tensor maps.
//
// A module is whatever was loaded: its functions are the kernels that this library was built with, by their names.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>

#include "asynchronous.h"
#include "fake_driver.h"

namespace fake {

constexpr int DEFAULT_DYNAMIC_SHARED_BYTES = 48 * 1024;

namespace {

struct Function {
  const emulator::Kernel* kernel;
  int max_dynamic_shared_bytes = DEFAULT_DYNAMIC_SHARED_BYTES;
};

struct Module {
  std::map<std::string, std::unique_ptr<Function>> functions;
};

struct LaunchConfig {  // CUlaunchConfig
  unsigned grid[3], block[3];
  unsigned shared_bytes;
  void* stream;
  void* attributes;
  unsigned num_attributes;
};

struct LaunchAttribute {  // CUlaunchAttribute
  int id;
  char padding[4];
  unsigned value[16];
};
static_assert(sizeof(LaunchAttribute) == 72);
constexpr int CLUSTER_DIMENSION = 4, PROGRAMMATIC_STREAM_SERIALIZATION = 6;

// The arguments of a launch, copied when it is submitted, at the alignment that kernels count on.
struct Arguments {
  void* storage;
  Arguments(const emulator::Kernel& kernel, void* const* from) {
    constexpr size_t ALIGNMENT = 64;
    size_t bytes = std::max<size_t>(kernel.arguments_bytes, 1);
    storage = aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    kernel.copy_arguments(from, storage);
  }
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;
  ~Arguments() { free(storage); }
};

}  // namespace

// ---- launches --------------------------------------------------------------------------------------------------

static Result check_launch(const Function& function, const LaunchConfig& config) {
  uint64_t threads = uint64_t{config.block[0]} * config.block[1] * config.block[2];
  for (unsigned extent : config.grid) {
    if (extent == 0) return INVALID_VALUE;
  }
  bool fits = config.grid[0] <= 0x7fffffff && config.grid[1] <= 65535 && config.grid[2] <= 65535;
  bool block_fits = threads != 0 && threads <= emulator::MAX_THREADS && config.block[2] <= 64;
  if (!fits || !block_fits) return INVALID_VALUE;
  if (threads > function.kernel->max_threads) return LAUNCH_OUT_OF_RESOURCES;
  if (config.shared_bytes > static_cast<unsigned>(function.max_dynamic_shared_bytes)) return INVALID_VALUE;
  return SUCCESS;
}

// Whether a launch may start while the kernel before it in the stream still runs.
static bool is_dependent(const LaunchConfig& config) {
  const auto* attributes = static_cast<const LaunchAttribute*>(config.attributes);
  for (unsigned i = 0; i < config.num_attributes; i++) {
    if (attributes[i].id == PROGRAMMATIC_STREAM_SERIALIZATION && attributes[i].value[0] != 0) return true;
  }
  return false;
}

static Result launch(const Function& function, const LaunchConfig& config, void* const* arguments) {
  std::lock_guard lock(state_mutex());
  if (Result status = context_status()) return status;
  if (Result status = check_launch(function, config)) return status;
  if (!is_capturing(stream_of(config.stream))) {
    if (Result status = count_launch()) return status;
  }
  const emulator::Kernel* kernel = function.kernel;
  auto copied = std::make_shared<Arguments>(*kernel, arguments);
  // `begin` and `run` must have the same object.
  auto launch = std::make_shared<emulator::Launch>(emulator::Launch{
      kernel, copied->storage, dim3(config.grid[0], config.grid[1], config.grid[2]),
      dim3(config.block[0], config.block[1], config.block[2]), config.shared_bytes, is_dependent(config)});
  auto run = [=] {
    emulator::launch(*launch, device().options);
    check_allocations(kernel->name);
    (void)copied;
  };
  auto begin = [=](const emulator::Kernel& previous) { emulator::begin(*launch, previous, device().options); };
  Work work{run, kernel};
  if (launch->is_dependent) work.begin = begin;
  return submit(config.stream, std::move(work));
}

static Result check_attributes(const LaunchConfig& config) {
  const auto* attributes = static_cast<const LaunchAttribute*>(config.attributes);
  for (unsigned i = 0; i < config.num_attributes; i++) {
    const unsigned* extent = attributes[i].value;
    bool is_cluster = attributes[i].id == CLUSTER_DIMENSION && extent[0] * extent[1] * extent[2] != 1;
    if (is_cluster) return NOT_SUPPORTED;
  }
  return is_dependent(config) && device().capability < 90 ? NOT_SUPPORTED : SUCCESS;
}

// Kernels for wgmma are compiled for sm_90a alone: other devices' modules lack them.
static bool exists_on_device(const char* name) {
  return device().capability == 90 || strncmp(name, "wgmma_", strlen("wgmma_")) != 0;
}

static int active_blocks(const Function& function, int block_threads, size_t shared_bytes) {
  constexpr int MAX_BLOCKS = 32, RESERVED_SHARED_BYTES = 1024;
  if (block_threads <= 0 || static_cast<uint32_t>(block_threads) > function.kernel->max_threads) return 0;
  if (shared_bytes > static_cast<size_t>(function.max_dynamic_shared_bytes)) return 0;
  int by_threads = device().multiprocessor_threads / ((block_threads + 31) / 32 * 32);
  int by_shared = device().multiprocessor_shared_bytes / (static_cast<int>(shared_bytes) + RESERVED_SHARED_BYTES);
  return std::min({by_threads, by_shared, MAX_BLOCKS});
}

// ---- tensor maps -----------------------------------------------------------------------------------------------

namespace {

struct TensorMapRequest {
  int type;
  unsigned rank;
  void* address;
  const uint64_t* dims;
  const uint64_t* strides;
  const uint32_t* box;
  const uint32_t* element_strides;
  int interleave, swizzle, l2_promotion, fill;
};

}  // namespace

constexpr int SWIZZLE_NONE = 0, SWIZZLE_128 = 3;

// In the order of CUtensorMapDataType; 0 past its end.
static uint32_t element_bytes(int type) {
  constexpr uint32_t BYTES[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  return type >= 0 && type < static_cast<int>(std::size(BYTES)) ? BYTES[type] : 0;
}

// CUDA driver API, cuTensorMapEncodeTiled: what it demands of dimensions, strides and boxes.
static bool dimensions_are_valid(const TensorMapRequest& request) {
  for (unsigned i = 0; i < request.rank; i++) {
    if (request.dims[i] == 0 || request.dims[i] > 1ull << 32) return false;
    if (request.box[i] == 0 || request.box[i] > 256) return false;
    if (request.element_strides[i] == 0 || request.element_strides[i] > 8) return false;
  }
  for (unsigned i = 0; i + 1 < request.rank; i++) {
    if (request.strides[i] % 16 != 0 || request.strides[i] >= 1ull << 40) return false;
    // Of strides, each is a multiple of the one before.
    if (i > 0 && (request.strides[i - 1] == 0 || request.strides[i] % request.strides[i - 1] != 0)) return false;
  }
  return true;
}

static Result check_tensor_map(const TensorMapRequest& request, const void* map) {
  uint32_t element = element_bytes(request.type);
  bool aligned = reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(request.address) % 16 == 0;
  if (!aligned || element == 0 || request.rank == 0 || request.rank > 5) return INVALID_VALUE;
  if (request.address == nullptr || !dimensions_are_valid(request)) return INVALID_VALUE;
  uint32_t row_bytes = request.box[0] * element;
  if (row_bytes % 16 != 0) return INVALID_VALUE;
  bool known = request.swizzle >= 0 && request.swizzle <= 6 && request.interleave >= 0 && request.interleave <= 2 &&
               request.l2_promotion >= 0 && request.l2_promotion <= 3 && request.fill >= 0 && request.fill <= 1;
  if (!known || (request.swizzle == SWIZZLE_128 && row_bytes > 128)) return INVALID_VALUE;
  return SUCCESS;
}

// What a driver encodes but the emulator does not read.
static bool is_emulated(const TensorMapRequest& request) {
  bool dense = true;
  for (unsigned i = 0; i < request.rank; i++) dense = dense && request.element_strides[i] == 1;
  bool swizzle = request.swizzle == SWIZZLE_NONE || request.swizzle == SWIZZLE_128;
  return (request.rank == 2 || request.rank == 3) && dense && swizzle && request.interleave == 0 && request.fill == 0;
}

// A driver does not look, and a copy outside an allocation faults or reads what lies there.
static void check_tensor_extent(const TensorMapRequest& request) {
  uint64_t bytes = request.dims[0] * element_bytes(request.type);
  for (unsigned i = 1; i < request.rank; i++) bytes += (request.dims[i] - 1) * request.strides[i - 1];
  if (is_device_memory(reinterpret_cast<DevicePointer>(request.address), bytes)) return;
  emulator::die("a tensor map of %llu bytes at %p reaches outside its allocation",
                static_cast<unsigned long long>(bytes), request.address);
}

static emulator::TensorMapFields encode(const TensorMapRequest& request) {
  emulator::TensorMapFields fields{};
  fields.address = static_cast<const char*>(request.address);
  fields.rank = request.rank;
  fields.element_bytes = element_bytes(request.type);
  fields.swizzle_128 = request.swizzle == SWIZZLE_128;
  fields.magic = emulator::TensorMapFields::MAGIC;
  for (unsigned i = 0; i < request.rank; i++) {
    fields.dims[i] = request.dims[i];
    fields.strides[i] = i == 0 ? fields.element_bytes : request.strides[i - 1];
    fields.box[i] = request.box[i];
  }
  return fields;
}

}  // namespace fake

using namespace fake;

// ---- modules and functions -------------------------------------------------------------------------------------

DRIVER_API cuModuleLoadData(void** module, const void*) {
  if (Result status = context_status()) return status;
  *module = new Module;
  return SUCCESS;
}
DRIVER_API cuModuleLoadDataEx(void** module, const void* image, unsigned, void*, void*) {
  return cuModuleLoadData(module, image);
}
DRIVER_API cuModuleLoad(void** module, const char*) { return cuModuleLoadData(module, nullptr); }
DRIVER_API cuModuleUnload(void* module) {
  std::lock_guard lock(state_mutex());
  drain();
  delete static_cast<Module*>(module);
  return SUCCESS;
}
DRIVER_API cuModuleGetFunction(void** function, void* handle, const char* name) {
  std::lock_guard lock(state_mutex());
  if (Result status = context_status()) return status;
  const emulator::Kernel* kernel = emulator::find_kernel(name);
  if (kernel == nullptr || !exists_on_device(name)) return NOT_FOUND;
  std::unique_ptr<Function>& found = static_cast<Module*>(handle)->functions[name];
  if (found == nullptr) found = std::make_unique<Function>(Function{kernel});
  *function = found.get();
  return SUCCESS;
}
DRIVER_API cuModuleGetGlobal_v2(DevicePointer*, size_t*, void*, const char*) { return NOT_FOUND; }

DRIVER_API cuFuncSetAttribute(void* function, int attribute, int value) {
  constexpr int MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;
  std::lock_guard lock(state_mutex());
  if (Result status = context_status()) return status;
  if (attribute != MAX_DYNAMIC_SHARED_SIZE_BYTES) return SUCCESS;
  if (value < 0 || value > device().max_dynamic_shared_bytes) return INVALID_VALUE;
  static_cast<Function*>(function)->max_dynamic_shared_bytes = value;
  return SUCCESS;
}
DRIVER_API cuFuncGetAttribute(int* value, int attribute, void* handle) {
  constexpr int MAX_THREADS_PER_BLOCK = 0, NUM_REGS = 4, BINARY_VERSION = 6, MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;
  const Function& function = *static_cast<Function*>(handle);
  *value = 0;
  if (attribute == MAX_THREADS_PER_BLOCK) *value = static_cast<int>(function.kernel->max_threads);
  if (attribute == NUM_REGS) *value = 64;
  if (attribute == BINARY_VERSION) *value = device().capability;
  if (attribute == MAX_DYNAMIC_SHARED_SIZE_BYTES) *value = function.max_dynamic_shared_bytes;
  return SUCCESS;
}
DRIVER_API cuFuncSetCacheConfig(void*, int) { return SUCCESS; }

DRIVER_API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int block_threads,
                                                       size_t shared_bytes) {
  *blocks = active_blocks(*static_cast<Function*>(function), block_threads, shared_bytes);
  return SUCCESS;
}
DRIVER_API cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, void* function, int block_threads,
                                                                size_t shared_bytes, unsigned) {
  return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, block_threads, shared_bytes);
}

// ---- launches --------------------------------------------------------------------------------------------------

DRIVER_API cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** arguments,
                          void** extra) {
  if (extra != nullptr) return NOT_SUPPORTED;
  LaunchConfig config{
      {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, stream, nullptr, 0,
  };
  return launch(*static_cast<Function*>(function), config, arguments);
}
DRIVER_API cuLaunchKernelEx(const LaunchConfig* config, void* function, void** arguments, void** extra) {
  if (extra != nullptr) return NOT_SUPPORTED;
  if (Result status = check_attributes(*config)) return status;
  return launch(*static_cast<Function*>(function), *config, arguments);
}

// ---- tensor maps -----------------------------------------------------------------------------------------------

DRIVER_API cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* address, const uint64_t* dims,
                                  const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                                  int interleave, int swizzle, int l2_promotion, int fill) {
  std::lock_guard lock(state_mutex());
  if (device().capability < 90) return NOT_SUPPORTED;
  TensorMapRequest request{type, rank,       address, dims,         strides, box, element_strides,
                           interleave, swizzle, l2_promotion, fill};
  if (Result status = check_tensor_map(request, map)) return status;
  if (!is_emulated(request)) {
    fprintf(stderr, "emulator: this kind of tensor map is not emulated\n");
    return NOT_SUPPORTED;
  }
  check_tensor_extent(request);
  emulator::TensorMapFields fields = encode(request);
  static_assert(sizeof fields <= 128);
  memset(map, 0, 128);
  memcpy(map, &fields, sizeof fields);
  return SUCCESS;
}
