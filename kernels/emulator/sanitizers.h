// Tells AddressSanitizer and ThreadSanitizer what the emulator does: switches of fibers, accesses that instructions
// make to the memory of kernels, and the order that barriers establish.
//
// Only kernels are compiled with -fsanitize. The emulator itself is not, so that its own bookkeeping is never mistaken
// for accesses of a kernel; instead its instructions report with `note_read` and `note_write` what they touch. The
// build script defines EMULATOR_ASAN or EMULATOR_TSAN beside the sanitizer; without them all of this is empty.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#if defined(EMULATOR_ASAN)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack_save, const void** bottom_old, size_t* size_old);
void* __asan_region_is_poisoned(void* begin, size_t size);
void __asan_report_error(void* pc, void* bp, void* sp, void* address, int is_write, size_t access_size);
void __asan_poison_memory_region(const volatile void* begin, size_t size);
void __asan_unpoison_memory_region(const volatile void* begin, size_t size);
}
#elif defined(EMULATOR_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, size_t size);
void __tsan_write_range(void* address, size_t size);
void* __libc_malloc(size_t bytes);
void __libc_free(void* memory);
}
#endif

namespace emulator {

#if defined(EMULATOR_ASAN) || defined(EMULATOR_TSAN)
constexpr bool SANITIZED = true;
#else
constexpr bool SANITIZED = false;
#endif
// Whether the order of accesses is checked.
#if defined(EMULATOR_TSAN)
constexpr bool CHECKS_ORDER = true;
#else
constexpr bool CHECKS_ORDER = false;
#endif
// Whether accesses past the end of memory are found where they happen; otherwise by canaries, afterwards.
#if defined(EMULATOR_ASAN)
constexpr bool HAS_RED_ZONES = true;
#else
constexpr bool HAS_RED_ZONES = false;
#endif

#if defined(EMULATOR_ASAN)
inline void note_access(const void* address, size_t bytes, bool is_write) {
  void* bad = __asan_region_is_poisoned(const_cast<void*>(address), bytes);
  if (bad == nullptr) return;
  void* frame = __builtin_frame_address(0);
  __asan_report_error(__builtin_return_address(0), frame, frame, bad, is_write, bytes);
}
inline void note_read(const void* address, size_t bytes) { note_access(address, bytes, false); }
inline void note_write(const void* address, size_t bytes) { note_access(address, bytes, true); }
#elif defined(EMULATOR_TSAN)
inline void note_read(const void* address, size_t bytes) { __tsan_read_range(const_cast<void*>(address), bytes); }
inline void note_write(const void* address, size_t bytes) { __tsan_write_range(const_cast<void*>(address), bytes); }
#else
inline void note_read(const void*, size_t) {}
inline void note_write(const void*, size_t) {}
#endif

// What came before a release of a token is ordered before what follows an acquire of the same token.
#if defined(EMULATOR_TSAN)
inline void order_release(const void* token) { __tsan_release(const_cast<void*>(token)); }
inline void order_acquire(const void* token) { __tsan_acquire(const_cast<void*>(token)); }
#else
inline void order_release(const void*) {}
inline void order_acquire(const void*) {}
#endif

// The emulator's own lists. Fibers fill them in turn, and ThreadSanitizer would take malloc and free, which it
// replaces, for accesses of different threads.
template <class T>
struct PlainAllocator {
  using value_type = T;
  PlainAllocator() = default;
  template <class U>
  PlainAllocator(const PlainAllocator<U>&) {}
  T* allocate(size_t count) {
#if defined(EMULATOR_TSAN)
    void* memory = __libc_malloc(count * sizeof(T));
#else
    void* memory = malloc(count * sizeof(T));
#endif
    if (memory == nullptr) throw std::bad_alloc();
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, size_t) {
#if defined(EMULATOR_TSAN)
    __libc_free(memory);
#else
    free(memory);
#endif
  }
  bool operator==(const PlainAllocator&) const { return true; }
  bool operator!=(const PlainAllocator&) const { return false; }
};
template <class T>
using PlainVector = std::vector<T, PlainAllocator<T>>;

// The memory of the block behind the end of its dynamic shared memory.
inline void forbid_access([[maybe_unused]] void* begin, [[maybe_unused]] size_t bytes) {
#if defined(EMULATOR_ASAN)
  __asan_poison_memory_region(begin, bytes);
#endif
}
inline void allow_access([[maybe_unused]] void* begin, [[maybe_unused]] size_t bytes) {
#if defined(EMULATOR_ASAN)
  __asan_unpoison_memory_region(begin, bytes);
#endif
}

// What the sanitizers know of one fiber (or of the OS thread that runs the fibers).
struct SanitizerFiber {
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  void* thread = nullptr;

  void create() {
#if defined(EMULATOR_TSAN)
    if (thread == nullptr) thread = __tsan_create_fiber(0);
#endif
  }
  void adopt_os_thread() {
#if defined(EMULATOR_TSAN)
    thread = __tsan_get_current_fiber();
#endif
  }
};

// An engine beside the threads is a thread of its own to ThreadSanitizer: what it does is ordered after the code that
// released `issued`, before the code that acquires `finished`, and with nothing else.
struct EngineOrder {
  SanitizerFiber fiber;
  char issued, finished;
};

// Attributes what happens in its life to an engine.
class AsEngine {
 public:
  explicit AsEngine([[maybe_unused]] EngineOrder& engine) : engine_(engine) {
#if defined(EMULATOR_TSAN)
    caller_ = __tsan_get_current_fiber();
    engine.fiber.create();
    __tsan_switch_to_fiber(engine.fiber.thread, NO_SYNC);
    order_acquire(&engine.issued);
#endif
  }
  ~AsEngine() {
    order_release(&engine_.finished);
#if defined(EMULATOR_TSAN)
    __tsan_switch_to_fiber(caller_, NO_SYNC);
#endif
  }
  AsEngine(const AsEngine&) = delete;
  AsEngine& operator=(const AsEngine&) = delete;

 private:
  static constexpr unsigned NO_SYNC = 1;
  EngineOrder& engine_;
  [[maybe_unused]] void* caller_ = nullptr;
};

// Called before a switch of stacks; `ends` if the leaving fiber never comes back.
inline void before_switch([[maybe_unused]] SanitizerFiber& from, [[maybe_unused]] SanitizerFiber& to,
                          [[maybe_unused]] bool ends) {
#if defined(EMULATOR_ASAN)
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to.stack_bottom, to.stack_bytes);
#elif defined(EMULATOR_TSAN)
  constexpr unsigned NO_SYNC = 1;
  __tsan_switch_to_fiber(to.thread, NO_SYNC);
#endif
}

// Called after a switch, on the stack of `to`. The OS thread's stack is known only from the fiber it left first.
inline void after_switch([[maybe_unused]] SanitizerFiber& to, [[maybe_unused]] SanitizerFiber* os_thread) {
#if defined(EMULATOR_ASAN)
  if (os_thread != nullptr) {
    __sanitizer_finish_switch_fiber(to.fake_stack, &os_thread->stack_bottom, &os_thread->stack_bytes);
  } else {
    __sanitizer_finish_switch_fiber(to.fake_stack, nullptr, nullptr);
  }
#endif
}

}  // namespace emulator
