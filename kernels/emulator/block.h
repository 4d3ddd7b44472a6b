// The state of a block while it runs, for the files that share it:
//
//   fibers.cpp      stacks, the switch between them, the choice of the next thread
//   meetings.cpp    barriers and warp operations: where threads wait for each other
//   blocks.cpp      kernels, launches, one block after the other, poison and canaries
//   reports.cpp     what is said before the process aborts
#pragma once

#include <signal.h>

#include "fibers.h"

namespace emulator {

constexpr int POISON = 0xff;  // NaN in float and in bf16, -1 as an integer

// Lanes that come together for one warp operation.
struct Meeting {
  uint32_t mask, arrived;
  Operation operation;
  void* arguments[LANES];
};

struct Warp {
  static constexpr uint32_t MAX_MEETINGS = 8;
  uint32_t ready;          // lanes that can run, or have not begun
  uint32_t begun;          // lanes that have a stack, or had one
  uint32_t open_meetings;  // bits of `meetings` in use
  Meeting meetings[MAX_MEETINGS];
};

struct Barrier {
  uint32_t expected, arrived;
  // A thread may come to the next use of a barrier before another has left this one: two tokens for the sanitizer.
  uint32_t num_uses;
  char tokens[2];
  uint32_t waiting[MAX_WARPS];  // lanes; all zero whenever `arrived` is
};

constexpr uint32_t NO_STACK = ~0u;

struct Thread : ThreadPlace {
  Wait wait = Wait::NONE;
  Operation operation;
  uint32_t barrier_id;
  uint32_t stack = NO_STACK;  // index in the arena
  const uint64_t* mbarrier;
  bool has_waited;  // for the previous kernel
  void* stack_pointer;
  SanitizerFiber sanitizer;
};

// One block at a time of a launch, reused for the one after the next: stacks, shared memory and threads outlive it.
struct Block : BlockPlace {
  const Launch* launch = nullptr;
  Options options;
  uint64_t random = 0;

  uint32_t num_threads = 0, live = 0, ready_warps = 0, current_warp = 0;
  Thread threads[MAX_THREADS];
  Warp warps[MAX_WARPS];
  Barrier barriers[NUM_BARRIERS];
  PlainVector<Thread*> mbarrier_waiters;

  // Before the previous kernel has run: threads that wait for it, and __shared__ arrays while others use their place.
  bool is_early = false;
  uint32_t num_held = 0;
  PlainVector<char> shared_arrays;
  bool has_waited = false;

  const uint32_t first_stack;  // of MAX_THREADS in the arena
  uint32_t num_stacks = 0;     // of them in use
  PlainVector<uint32_t> free_stacks;

  void* os_stack_pointer = nullptr;
  SanitizerFiber os_thread;
  char start_token, end_token;

  explicit Block(uint32_t first_stack);
};

inline Thread& this_thread() { return static_cast<Thread&>(here()); }
inline Block& this_block() { return static_cast<Block&>(*here().block); }

// ---- fibers.cpp ------------------------------------------------------------------------------------------------

void create_stack_arena();
void make_ready(Block& block, uint32_t warp, uint32_t lanes);
// Gives the OS thread to another fiber until this one is made ready.
void park(Block& block, Thread& thread, Wait wait);
// Runs all threads of a block that has been reset; of an early one, as far as they come. Those that waited for the
// previous kernel are made ready before it is called again.
void run_threads(Block& block);
void check_stacks(const Block& block);

// ---- meetings.cpp ----------------------------------------------------------------------------------------------

// Takes note that a thread has ended: __syncthreads waits only for those that still run.
void leave_barriers(Block& block);

// ---- reports.cpp -----------------------------------------------------------------------------------------------

const char* name_of(Operation operation);
[[noreturn]] void die_after(const Block& block, const char* what);
[[noreturn]] void report_deadlock(const Block& block);

// Reports a fault of a kernel with its place, as long as the object lives. The sanitizers report their own.
class FaultHandler {
 public:
  FaultHandler();
  ~FaultHandler();
  FaultHandler(const FaultHandler&) = delete;
  FaultHandler& operator=(const FaultHandler&) = delete;

 private:
  static constexpr int SIGNALS[2] = {SIGSEGV, SIGBUS};
  struct sigaction saved_[2];
};

}  // namespace emulator
