// Runs the blocks of a kernel on the CPU: each CUDA thread is a fiber, and one block runs at a time; the first block of
// a dependent launch begins before the launch that it follows, and is held where it waits for it.
//
// A fiber runs until it must wait: at a barrier, in an operation of its warp, for an mbarrier. The schedule then picks
// the next one, first in the same warp, so that a warp runs as far ahead of the others as it can: the schedules that
// show races are the unfair ones. When no fiber can run, a piece of asynchronous work is done (asynchronous.h); when
// there is none either, the block is deadlocked and the process aborts and says where.
//
// It does not emulate spinning on memory (a spinning fiber never yields), blocks that wait for each other, clusters,
// or the memory model beyond what ThreadSanitizer sees: blocks of one launch are ordered one after the other.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sanitizers.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulator {

constexpr uint32_t LANES = 32;
constexpr uint32_t MAX_THREADS = 1024;
constexpr uint32_t MAX_WARPS = MAX_THREADS / LANES;
constexpr uint32_t NUM_BLOCKS = 2;  // that have begun: one of a launch, and one of the next
constexpr uint32_t NUM_BARRIERS = 16;
constexpr size_t MAX_SHARED_BYTES = 227 * 1024;

// ---- kernels and launches --------------------------------------------------------------------------------------

// A kernel as the driver finds it. Kernels register themselves when the library is loaded.
struct Kernel {
  const char* name;
  uint32_t max_threads;
  size_t arguments_bytes;
  void (*copy_arguments)(void* const* from, void* to);  // `to` is aligned to 64 bytes
  void (*call)(const void* arguments);
  const Kernel* next;

  Kernel(const char* name, uint32_t max_threads, size_t arguments_bytes, void (*copy_arguments)(void* const*, void*),
         void (*call)(const void*));
};
const Kernel* find_kernel(const char* name);

enum class Order { FORWARD, BACKWARD, SEEDED };
// Whether asynchronous copies and wgmma take effect as late or as early as they may.
enum class Asynchrony { LATE, EARLY };

struct Options {
  Order order = Order::FORWARD;
  uint64_t seed = 0;
  Asynchrony asynchrony = Asynchrony::LATE;
};

struct Launch {
  const Kernel* kernel;
  const void* arguments;
  dim3 grid, block;
  size_t shared_bytes;
  bool is_dependent = false;  // it may start while the launch before it still runs
};
// Returns when all blocks are done. Aborts the process, with a message, on whatever a GPU would fault or hang on.
void launch(const Launch& launch, const Options& options);
// Runs the first block of a dependent launch up to its waits for the previous kernel, as early as it may: call this
// before `previous` is launched, and `launch` with the same object after it.
void begin(const Launch& launch, const Kernel& previous, const Options& options);

// ---- what instructions use -------------------------------------------------------------------------------------

enum class Wait : uint8_t { NONE, BARRIER, WARP_OPERATION, MBARRIER, PREVIOUS_KERNEL };

struct Engines;  // of asynchronous.cpp and tensor_core.cpp

// What a block's threads share.
struct BlockPlace {
  uint3 index;
  dim3 block_dim, grid_dim;
  uint32_t num_warps;
  bool early;
  char* dynamic_shared;
  size_t dynamic_shared_bytes;
  Engines* engines;
};

struct ThreadPlace {
  uint3 index;
  uint32_t linear, lane, warp;
  BlockPlace* block;
};

// All stacks lie side by side, and the stack pointer tells which one the code is on: much cheaper than a thread_local
// object in a library.
constexpr size_t STACK_BYTES = SANITIZED ? 256 << 10 : 64 << 10;  // frames grow red zones under the sanitizers
constexpr uint32_t NUM_STACKS = NUM_BLOCKS * MAX_THREADS;
extern char* stack_arena;
extern ThreadPlace* stack_owners[NUM_STACKS];

inline size_t current_stack() {
#if defined(__x86_64__)
  char* stack_pointer;
  asm("movq %%rsp, %0" : "=r"(stack_pointer));
#else
  char* stack_pointer = static_cast<char*>(__builtin_frame_address(0));
#endif
  return static_cast<size_t>(stack_pointer - stack_arena) / STACK_BYTES;
}

// The CUDA thread that this code runs for.
inline ThreadPlace& here() { return *stack_owners[current_stack()]; }

[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));

// The kinds of warp operation: lanes that meet in different kinds are an error.
enum class Operation : uint8_t { SYNC, SHUFFLE, BALLOT, REDUCE, LDMATRIX, MMA, WGMMA_WAIT };

// The lanes of `mask` meet; the last to come calls `act` for all of them with the `argument` of each lane. They go on
// at once, or, if `act` returns LATER, when `wake_lanes` is called for them.
enum class Resume { NOW, LATER };
using Act = Resume (*)(uint32_t mask, void* const* arguments);
void meet(uint32_t mask, Operation operation, void* argument, Act act);
void wake_lanes(uint32_t warp, uint32_t mask);

// The barrier of `threads` threads; 0 stands for all threads of the block that still run.
void barrier_sync(uint32_t id, uint32_t threads);

// Waits until `wake_mbarrier_waiters` is called for the barrier.
void wait_for_mbarrier(const uint64_t* barrier);
void wake_mbarrier_waiters(const uint64_t* barrier);

// Lets another thread run.
void yield();

// A number of the schedule's own generator, 0 but in seeded schedules.
uint32_t random_below(uint32_t bound);
Order order();

// ---- what the scheduler uses of the instructions ---------------------------------------------------------------

Engines* create_engines();
void reset_engines(Engines& engines, uint32_t num_threads);
// Does one piece of asynchronous work; false if there is none.
bool advance_engines(Engines& engines);
// What asynchronous work the block left behind; null if none.
const char* unfinished_work(const Engines& engines);

}  // namespace emulator
