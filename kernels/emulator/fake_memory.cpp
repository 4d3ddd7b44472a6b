// Allocations, copies and fills. New memory is poisoned, and what lies behind an allocation is checked after each
// launch.
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#include "fake_driver.h"
#include "sanitizers.h"

namespace fake {

constexpr size_t ALIGNMENT = 512;
// AddressSanitizer has red zones of its own, which must begin where the allocation ends.
constexpr size_t CANARY_BYTES = emulator::HAS_RED_ZONES ? 0 : 256;
constexpr unsigned char CANARY = 0xa5;
constexpr int POISON = 0xff;
// Larger ones (caches of keys and values) are left to the kernel's zero pages, which cost nothing until touched.
constexpr size_t MAX_POISONED_BYTES = 32 << 20;

namespace {

struct Memory {
  std::map<DevicePointer, size_t> device;
  std::map<uintptr_t, size_t> pinned;
  size_t used_bytes = 0;
};

}  // namespace

static Memory& memory() {
  static Memory memory;
  return memory;
}

template <class Key>
static bool lies_inside(const std::map<Key, size_t>& allocations, Key pointer, size_t bytes) {
  auto after = allocations.upper_bound(pointer);
  if (after == allocations.begin()) return false;
  auto found = std::prev(after);
  return pointer - found->first <= found->second && bytes <= found->second - (pointer - found->first);
}

bool is_device_memory(DevicePointer pointer, size_t bytes) { return lies_inside(memory().device, pointer, bytes); }

static bool is_pinned(const void* pointer, size_t bytes) {
  return lies_inside(memory().pinned, reinterpret_cast<uintptr_t>(pointer), bytes);
}

static void* host_pointer(DevicePointer pointer) { return reinterpret_cast<void*>(pointer); }

void check_allocations(const char* kernel) {
  static const std::vector<unsigned char> intact(CANARY_BYTES, CANARY);
  for (auto [pointer, bytes] : memory().device) {
    if (memcmp(host_pointer(pointer + bytes), intact.data(), CANARY_BYTES) == 0) continue;
    emulator::die("%s wrote past the end of the allocation of %zu bytes at %#llx", kernel, bytes,
                  static_cast<unsigned long long>(pointer));
  }
}

static Result allocate(DevicePointer* pointer, size_t bytes) {
  if (bytes == 0) return INVALID_VALUE;
  Memory& all = memory();
  if (bytes > device().memory_bytes - all.used_bytes) return OUT_OF_MEMORY;
  void* allocated;
  if (posix_memalign(&allocated, ALIGNMENT, bytes + CANARY_BYTES) != 0) return OUT_OF_MEMORY;
  if (bytes <= MAX_POISONED_BYTES) memset(allocated, POISON, bytes);
  memset(static_cast<char*>(allocated) + bytes, CANARY, CANARY_BYTES);
  *pointer = reinterpret_cast<DevicePointer>(allocated);
  all.device[*pointer] = bytes;
  all.used_bytes += bytes;
  return SUCCESS;
}

static Result release(DevicePointer pointer) {
  Memory& all = memory();
  auto found = all.device.find(pointer);
  if (found == all.device.end()) return INVALID_VALUE;
  check_allocations("something");
  all.used_bytes -= found->second;
  all.device.erase(found);
  free(host_pointer(pointer));
  return SUCCESS;
}

// Copies that the caller waits for: the driver waits for pageable memory too, but not for pinned memory.
static Result copy_to_device(DevicePointer to, const void* from, size_t bytes, void* stream, bool waits) {
  std::lock_guard lock(state_mutex());
  if (Result status = context_status()) return status;
  if (!is_device_memory(to, bytes)) return INVALID_VALUE;
  if (waits || is_capturing(stream_of(stream)) || is_pinned(from, bytes)) {
    Result submitted = submit(stream, {[=] { memcpy(host_pointer(to), from, bytes); }});
    if (waits) drain();
    return submitted;
  }
  const char* begin = static_cast<const char*>(from);
  std::vector<char> staged(begin, begin + bytes);
  return submit(stream, {[=] { memcpy(host_pointer(to), staged.data(), bytes); }});
}

static Result copy_to_host(void* to, DevicePointer from, size_t bytes, void* stream, bool waits) {
  std::lock_guard lock(state_mutex());
  if (Result status = context_status()) return status;
  if (!is_device_memory(from, bytes)) return INVALID_VALUE;
  Result submitted = submit(stream, {[=] { memcpy(to, host_pointer(from), bytes); }});
  bool captured = is_capturing(stream_of(stream));
  if (waits || (!captured && !is_pinned(to, bytes))) drain();
  return submitted;
}

static Result copy_on_device(DevicePointer to, DevicePointer from, size_t bytes, void* stream) {
  std::lock_guard lock(state_mutex());
  if (Result status = context_status()) return status;
  if (!is_device_memory(to, bytes) || !is_device_memory(from, bytes)) return INVALID_VALUE;
  return submit(stream, {[=] { memmove(host_pointer(to), host_pointer(from), bytes); }});
}

template <class T>
static Result fill(DevicePointer to, T value, size_t count, void* stream) {
  std::lock_guard lock(state_mutex());
  if (Result status = context_status()) return status;
  if (to % sizeof(T) != 0 || !is_device_memory(to, count * sizeof(T))) return INVALID_VALUE;
  return submit(stream, {[=] {
    T* begin = static_cast<T*>(host_pointer(to));
    for (size_t i = 0; i < count; i++) begin[i] = value;
  }});
}

}  // namespace fake

using namespace fake;

// ---- allocation ------------------------------------------------------------------------------------------------

DRIVER_API cuMemAlloc_v2(DevicePointer* pointer, size_t bytes) {
  std::lock_guard lock(state_mutex());
  if (Result status = context_status()) return status;
  return allocate(pointer, bytes);
}
DRIVER_API cuMemAllocAsync(DevicePointer* pointer, size_t bytes, void* stream) {
  std::lock_guard lock(state_mutex());
  if (Result status = context_status()) return status;
  if (is_capturing(stream_of(stream))) return STREAM_CAPTURE_UNSUPPORTED;
  return allocate(pointer, bytes);
}
DRIVER_API cuMemFree_v2(DevicePointer pointer) {
  std::lock_guard lock(state_mutex());
  if (Result status = context_status()) return status;
  drain();
  return release(pointer);
}
DRIVER_API cuMemFreeAsync(DevicePointer pointer, void* stream) {
  std::lock_guard lock(state_mutex());
  if (Result status = context_status()) return status;
  if (is_capturing(stream_of(stream))) return STREAM_CAPTURE_UNSUPPORTED;
  drain();
  return release(pointer);
}
DRIVER_API cuMemGetInfo_v2(size_t* free_bytes, size_t* total_bytes) {
  std::lock_guard lock(state_mutex());
  if (Result status = context_status()) return status;
  *total_bytes = device().memory_bytes;
  *free_bytes = *total_bytes - memory().used_bytes;
  return SUCCESS;
}
DRIVER_API cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
  std::lock_guard lock(state_mutex());
  if (Result status = context_status()) return status;
  if (bytes == 0) return INVALID_VALUE;
  if (posix_memalign(pointer, 4096, bytes) != 0) return OUT_OF_MEMORY;
  memory().pinned[reinterpret_cast<uintptr_t>(*pointer)] = bytes;
  return SUCCESS;
}
DRIVER_API cuMemAllocHost_v2(void** pointer, size_t bytes) { return cuMemHostAlloc(pointer, bytes, 0); }
DRIVER_API cuMemFreeHost(void* pointer) {
  std::lock_guard lock(state_mutex());
  drain();
  if (memory().pinned.erase(reinterpret_cast<uintptr_t>(pointer)) == 0) return INVALID_VALUE;
  free(pointer);
  return SUCCESS;
}
DRIVER_API cuDeviceGetDefaultMemPool(void** pool, int) {
  static char default_pool;
  *pool = &default_pool;
  return SUCCESS;
}
DRIVER_API cuMemPoolSetAttribute(void*, int, void*) { return SUCCESS; }
DRIVER_API cuMemPoolTrimTo(void*, size_t) { return SUCCESS; }

// ---- copies ----------------------------------------------------------------------------------------------------

DRIVER_API cuMemcpyHtoD_v2(DevicePointer to, const void* from, size_t bytes) {
  return copy_to_device(to, from, bytes, nullptr, true);
}
DRIVER_API cuMemcpyHtoDAsync_v2(DevicePointer to, const void* from, size_t bytes, void* stream) {
  return copy_to_device(to, from, bytes, stream, false);
}
DRIVER_API cuMemcpyDtoH_v2(void* to, DevicePointer from, size_t bytes) {
  return copy_to_host(to, from, bytes, nullptr, true);
}
DRIVER_API cuMemcpyDtoHAsync_v2(void* to, DevicePointer from, size_t bytes, void* stream) {
  return copy_to_host(to, from, bytes, stream, false);
}
DRIVER_API cuMemcpyDtoD_v2(DevicePointer to, DevicePointer from, size_t bytes) {
  return copy_on_device(to, from, bytes, nullptr);
}
DRIVER_API cuMemcpyDtoDAsync_v2(DevicePointer to, DevicePointer from, size_t bytes, void* stream) {
  return copy_on_device(to, from, bytes, stream);
}

// ---- fills -----------------------------------------------------------------------------------------------------

DRIVER_API cuMemsetD8_v2(DevicePointer to, unsigned char value, size_t count) {
  return fill(to, value, count, nullptr);
}
DRIVER_API cuMemsetD8Async(DevicePointer to, unsigned char value, size_t count, void* stream) {
  return fill(to, value, count, stream);
}
DRIVER_API cuMemsetD16_v2(DevicePointer to, unsigned short value, size_t count) {
  return fill(to, value, count, nullptr);
}
DRIVER_API cuMemsetD16Async(DevicePointer to, unsigned short value, size_t count, void* stream) {
  return fill(to, value, count, stream);
}
DRIVER_API cuMemsetD32_v2(DevicePointer to, unsigned value, size_t count) { return fill(to, value, count, nullptr); }
DRIVER_API cuMemsetD32Async(DevicePointer to, unsigned value, size_t count, void* stream) {
  return fill(to, value, count, stream);
}
