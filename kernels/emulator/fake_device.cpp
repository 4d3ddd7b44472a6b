// The device, its context, and what it says of itself.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fake_driver.h"

namespace fake {

// ---- settings --------------------------------------------------------------------------------------------------

static const char* setting(const char* name, const char* otherwise) {
  const char* value = getenv(name);
  return value != nullptr && *value != '\0' ? value : otherwise;
}

static uint64_t number_setting(const char* name, uint64_t otherwise) {
  const char* text = setting(name, nullptr);
  if (text == nullptr) return otherwise;
  char* end;
  uint64_t value = strtoull(text, &end, 10);
  if (*end != '\0') emulator::die("%s: %s is not a number", name, text);
  return value;
}

static emulator::Options read_options() {
  emulator::Options options;
  const char* schedule = setting("FAKE_CUDA_SCHEDULE", "forward");
  if (strcmp(schedule, "backward") == 0) {
    options.order = emulator::Order::BACKWARD;
  } else if (strcmp(schedule, "forward") != 0) {
    options.order = emulator::Order::SEEDED;
    options.seed = number_setting("FAKE_CUDA_SCHEDULE", 0);
  }
  const char* async = setting("FAKE_CUDA_ASYNC", "late");
  if (strcmp(async, "late") != 0 && strcmp(async, "early") != 0) {
    emulator::die("FAKE_CUDA_ASYNC: %s is neither late nor early", async);
  }
  options.asynchrony = strcmp(async, "early") == 0 ? emulator::Asynchrony::EARLY : emulator::Asynchrony::LATE;
  return options;
}

namespace {

// CUDA programming guide, "technical specifications per compute capability".
struct Limits {
  int capability;
  int block_shared_kib, multiprocessor_shared_kib, multiprocessor_threads;
};
constexpr Limits LIMITS[] = {
    {80, 163, 164, 2048}, {86, 99, 100, 1536},   {89, 99, 100, 1536},
    {90, 227, 228, 2048}, {100, 227, 228, 2048}, {103, 227, 228, 2048}, {120, 99, 100, 1536},
};

}  // namespace

static Device read_device() {
  Device device{};
  device.capability = static_cast<int>(number_setting("FAKE_CUDA_CAPABILITY", 90));
  device.multiprocessors = static_cast<int>(number_setting("FAKE_CUDA_MULTIPROCESSORS", 132));
  device.memory_bytes = number_setting("FAKE_CUDA_MEMORY_MIB", 2048) << 20;
  device.fail_after = number_setting("FAKE_CUDA_FAIL_AFTER", 0);
  device.options = read_options();
  for (const Limits& limits : LIMITS) {
    if (limits.capability != device.capability) continue;
    device.max_dynamic_shared_bytes = limits.block_shared_kib * 1024;
    device.multiprocessor_shared_bytes = limits.multiprocessor_shared_kib * 1024;
    device.multiprocessor_threads = limits.multiprocessor_threads;
    return device;
  }
  emulator::die("FAKE_CUDA_CAPABILITY: no device has capability %d", device.capability);
}

const Device& device() {
  static const Device device = read_device();
  return device;
}

// ---- context and sticky error ----------------------------------------------------------------------------------

std::recursive_mutex& state_mutex() {
  static std::recursive_mutex mutex;
  return mutex;
}

static thread_local void* current_context;
static char primary_context;
static std::atomic<uint64_t> num_launches;

static bool has_failed() { return device().fail_after != 0 && num_launches >= device().fail_after; }

Result context_status() {
  if (current_context == nullptr) return INVALID_CONTEXT;
  return has_failed() ? ILLEGAL_ADDRESS : SUCCESS;
}

Result count_launch() {
  num_launches++;
  return has_failed() ? ILLEGAL_ADDRESS : SUCCESS;
}

static int attribute(int which) {
  const Device& d = device();
  switch (which) {
    case 1:  // MAX_THREADS_PER_BLOCK
    case 2:  // MAX_BLOCK_DIM_X
    case 3:  // MAX_BLOCK_DIM_Y
      return 1024;
    case 4:  // MAX_BLOCK_DIM_Z
      return 64;
    case 5:  // MAX_GRID_DIM_X
      return 0x7fffffff;
    case 6:  // MAX_GRID_DIM_Y
    case 7:  // MAX_GRID_DIM_Z
      return 65535;
    case 8:  // MAX_SHARED_MEMORY_PER_BLOCK
      return 48 * 1024;
    case 10:  // WARP_SIZE
      return 32;
    case 12:  // MAX_REGISTERS_PER_BLOCK
    case 82:  // MAX_REGISTERS_PER_MULTIPROCESSOR
      return 65536;
    case 13:  // CLOCK_RATE, kHz
      return 1980000;
    case 16:  // MULTIPROCESSOR_COUNT
      return d.multiprocessors;
    case 36:  // MEMORY_CLOCK_RATE, kHz
      return 2619000;
    case 37:  // GLOBAL_MEMORY_BUS_WIDTH, bits
      return 5120;
    case 38:  // L2_CACHE_SIZE
      return 50 << 20;
    case 39:  // MAX_THREADS_PER_MULTIPROCESSOR
      return d.multiprocessor_threads;
    case 41:   // UNIFIED_ADDRESSING
    case 95:   // COOPERATIVE_LAUNCH
    case 115:  // MEMORY_POOLS_SUPPORTED
      return 1;
    case 75:  // COMPUTE_CAPABILITY_MAJOR
      return d.capability / 10;
    case 76:  // COMPUTE_CAPABILITY_MINOR
      return d.capability % 10;
    case 81:  // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
      return d.multiprocessor_shared_bytes;
    case 97:  // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
      return d.max_dynamic_shared_bytes;
    case 106:  // MAX_BLOCKS_PER_MULTIPROCESSOR
      return 32;
    case 111:  // RESERVED_SHARED_MEMORY_PER_BLOCK
      return 1024;
    default:
      return 0;
  }
}

static const char* name_of(Result result) {
  switch (result) {
    case SUCCESS:
      return "CUDA_SUCCESS";
    case INVALID_VALUE:
      return "CUDA_ERROR_INVALID_VALUE";
    case OUT_OF_MEMORY:
      return "CUDA_ERROR_OUT_OF_MEMORY";
    case INVALID_DEVICE:
      return "CUDA_ERROR_INVALID_DEVICE";
    case INVALID_CONTEXT:
      return "CUDA_ERROR_INVALID_CONTEXT";
    case INVALID_HANDLE:
      return "CUDA_ERROR_INVALID_HANDLE";
    case NOT_FOUND:
      return "CUDA_ERROR_NOT_FOUND";
    case NOT_READY:
      return "CUDA_ERROR_NOT_READY";
    case ILLEGAL_ADDRESS:
      return "CUDA_ERROR_ILLEGAL_ADDRESS";
    case LAUNCH_OUT_OF_RESOURCES:
      return "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES";
    case NOT_SUPPORTED:
      return "CUDA_ERROR_NOT_SUPPORTED";
    case STREAM_CAPTURE_UNSUPPORTED:
      return "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED";
  }
  return "CUDA_ERROR_UNKNOWN";
}

}  // namespace fake

using namespace fake;

DRIVER_API cuInit(unsigned) {
  device();
  return SUCCESS;
}
DRIVER_API cuDriverGetVersion(int* version) {
  *version = 13000;
  return SUCCESS;
}
DRIVER_API cuGetErrorName(Result result, const char** name) {
  *name = name_of(result);
  return SUCCESS;
}
DRIVER_API cuGetErrorString(Result result, const char** text) { return cuGetErrorName(result, text); }

// ---- device ----------------------------------------------------------------------------------------------------

DRIVER_API cuDeviceGetCount(int* count) {
  *count = 1;
  return SUCCESS;
}
DRIVER_API cuDeviceGet(int* found, int ordinal) {
  if (ordinal != 0) return INVALID_DEVICE;
  *found = 0;
  return SUCCESS;
}
DRIVER_API cuDeviceGetName(char* name, int bytes, int) {
  snprintf(name, static_cast<size_t>(bytes), "emulated sm_%d", device().capability);
  return SUCCESS;
}
DRIVER_API cuDeviceGetUuid_v2(char* uuid, int) {
  memset(uuid, 7, 16);
  return SUCCESS;
}
DRIVER_API cuDeviceGetUuid(char* uuid, int ordinal) { return cuDeviceGetUuid_v2(uuid, ordinal); }
DRIVER_API cuDeviceTotalMem_v2(size_t* bytes, int) {
  *bytes = device().memory_bytes;
  return SUCCESS;
}
DRIVER_API cuDeviceGetAttribute(int* value, int which, int) {
  *value = attribute(which);
  return SUCCESS;
}
DRIVER_API cuDeviceGetPCIBusId(char* text, int bytes, int) {
  snprintf(text, static_cast<size_t>(bytes), "0000:00:00.0");
  return SUCCESS;
}

// NVRTC asks a driver that is there for NVIDIA's private tables, and calls a missing function.
DRIVER_API cuGetExportTable(const void** table, const void*) {
  *table = nullptr;
  return NOT_FOUND;
}

// ---- context ---------------------------------------------------------------------------------------------------

DRIVER_API cuDevicePrimaryCtxRetain(void** context, int) {
  *context = &primary_context;
  return SUCCESS;
}
DRIVER_API cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
DRIVER_API cuCtxGetCurrent(void** context) {
  *context = current_context;
  return SUCCESS;
}
DRIVER_API cuCtxSetCurrent(void* context) {
  current_context = context;
  return SUCCESS;
}
DRIVER_API cuCtxGetDevice(int* found) {
  *found = 0;
  return SUCCESS;
}
DRIVER_API cuCtxSetFlags(unsigned) { return SUCCESS; }
DRIVER_API cuCtxSetCacheConfig(int) { return SUCCESS; }
DRIVER_API cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  *least = *greatest = 0;
  return SUCCESS;
}
DRIVER_API cuCtxSynchronize() {
  std::lock_guard lock(state_mutex());
  if (Result status = context_status()) return status;
  drain();
  return SUCCESS;
}
DRIVER_API cuProfilerStart() { return SUCCESS; }
DRIVER_API cuProfilerStop() { return SUCCESS; }
