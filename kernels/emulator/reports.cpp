// What is said before the process aborts: the kernel, the block, the thread, and what went wrong.
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "block.h"

namespace emulator {

// The thread whose stack holds an address; null if it is the stack of none.
static const ThreadPlace* owner_of(const void* stack_pointer) {
  size_t offset = static_cast<size_t>(static_cast<const char*>(stack_pointer) - stack_arena);
  return stack_arena != nullptr && offset < NUM_STACKS * STACK_BYTES ? stack_owners[offset / STACK_BYTES] : nullptr;
}

static void print_block(const BlockPlace& place) {
  const Block& block = static_cast<const Block&>(place);
  fprintf(stderr, "emulator: kernel %s, block (%u, %u, %u)", block.launch->kernel->name, block.index.x, block.index.y,
          block.index.z);
}

[[noreturn]] static void die_at(const ThreadPlace* place, const char* format, va_list arguments) {
  if (place == nullptr) {
    fprintf(stderr, "emulator: ");
  } else {
    print_block(*place->block);
    fprintf(stderr, ", thread (%u, %u, %u): ", place->index.x, place->index.y, place->index.z);
  }
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  fflush(stderr);
  abort();
}

void die(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  die_at(owner_of(__builtin_frame_address(0)), format, arguments);
}

const char* name_of(Operation operation) {
  static const char* const NAMES[] = {"__syncwarp", "a shuffle", "a vote", "a reduction",
                                      "ldmatrix",   "mma",       "wgmma_wait"};
  return NAMES[static_cast<int>(operation)];
}

static void print_wait(const Thread& thread) {
  if (thread.wait == Wait::BARRIER) fprintf(stderr, "barrier %u", thread.barrier_id);
  if (thread.wait == Wait::WARP_OPERATION) fprintf(stderr, "%s", name_of(thread.operation));
  if (thread.wait == Wait::MBARRIER) fprintf(stderr, "the mbarrier at %p", static_cast<const void*>(thread.mbarrier));
  if (thread.wait == Wait::PREVIOUS_KERNEL) fprintf(stderr, "the previous kernel");
}

static bool waits_alike(const Thread& a, const Thread& b) {
  if (a.wait != b.wait) return false;
  if (a.wait == Wait::BARRIER) return a.barrier_id == b.barrier_id;
  if (a.wait == Wait::WARP_OPERATION) return a.operation == b.operation;
  return a.wait != Wait::MBARRIER || a.mbarrier == b.mbarrier;
}

// Prints runs of threads that wait for the same, and aborts.
void report_deadlock(const Block& block) {
  print_block(block);
  fprintf(stderr, ": deadlock, %u of %u threads left", block.live, block.num_threads);
  for (uint32_t first = 0; first < block.num_threads;) {
    uint32_t end = first + 1;
    while (end < block.num_threads && waits_alike(block.threads[first], block.threads[end])) end++;
    if (block.threads[first].wait != Wait::NONE) {
      fprintf(stderr, "\n  threads %u to %u wait for ", first, end - 1);
      print_wait(block.threads[first]);
    }
    first = end;
  }
  fputc('\n', stderr);
  fflush(stderr);
  abort();
}

void die_after(const Block& block, const char* what) {
  print_block(block);
  fprintf(stderr, ": %s\n", what);
  fflush(stderr);
  abort();
}

// ---- faults ----------------------------------------------------------------------------------------------------

static void die_in(const ThreadPlace* place, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  die_at(place, format, arguments);
}

static void report_fault(int, siginfo_t* info, void* context) {
  greg_t stack_pointer = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RSP];
  const ThreadPlace* place = owner_of(reinterpret_cast<void*>(stack_pointer));
  die_in(place, "illegal address %p", info->si_addr);
}

FaultHandler::FaultHandler() {
  if (SANITIZED) return;
  struct sigaction action = {};
  action.sa_sigaction = report_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < 2; i++) sigaction(SIGNALS[i], &action, &saved_[i]);
}

FaultHandler::~FaultHandler() {
  if (SANITIZED) return;
  for (int i = 0; i < 2; i++) sigaction(SIGNALS[i], &saved_[i], nullptr);
}

}  // namespace emulator
