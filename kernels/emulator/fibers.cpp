// The scheduler: stacks, the switch between them, and the choice of the next thread.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "block.h"

// Saves the callee-saved registers on this stack, its pointer in *save, and goes on where `to` was saved.
extern "C" void emulator_switch_stack(void** save, void* to);
#if defined(__x86_64__)
asm(".text\n.globl emulator_switch_stack\n.hidden emulator_switch_stack\n"
    ".type emulator_switch_stack,@function\nemulator_switch_stack:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
    ".size emulator_switch_stack,.-emulator_switch_stack\n");
constexpr int SAVED_REGISTERS = 6;
#else
#error "write emulator_switch_stack for this architecture"
#endif

namespace emulator {

char* stack_arena;
ThreadPlace* stack_owners[NUM_STACKS];

constexpr uint64_t STACK_CANARY = 0x57494e44524f5345;
// ThreadSanitizer takes two threads that use one stack after the other for a race.
#if defined(EMULATOR_TSAN)
constexpr bool SHARE_STACKS = false;
#else
constexpr bool SHARE_STACKS = true;
#endif

// ---- stacks ----------------------------------------------------------------------------------------------------

[[noreturn]] static void thread_main();

void create_stack_arena() {
  if (stack_arena != nullptr) return;
  constexpr int FLAGS = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, NUM_STACKS * STACK_BYTES, PROT_READ | PROT_WRITE, FLAGS, -1, 0);
  if (memory == MAP_FAILED) die("no memory for the stacks of threads");
  stack_arena = static_cast<char*>(memory);
}

static char* bottom_of(uint32_t stack) { return stack_arena + stack * STACK_BYTES; }

// Tops are spread over the cache's sets: at one power of two apart all would fall on the same few lines.
static char* top_of(uint32_t stack) { return bottom_of(stack) + STACK_BYTES - stack % 61 * 192; }

// The stack that was left last comes first, while it is in the cache.
static uint32_t take_stack(Block& block, const Thread& thread) {
  if (!SHARE_STACKS && thread.stack != NO_STACK) return thread.stack;
  if (!block.free_stacks.empty()) {
    uint32_t stack = block.free_stacks.back();
    block.free_stacks.pop_back();
    return stack;
  }
  uint32_t stack = block.first_stack + block.num_stacks++;
  memcpy(bottom_of(stack), &STACK_CANARY, sizeof STACK_CANARY);
  return stack;
}

static void own_stack(Thread& thread, uint32_t stack) {
  thread.stack = stack;
  stack_owners[stack] = &thread;
  if (!SANITIZED) return;
  thread.sanitizer.fake_stack = nullptr;
  thread.sanitizer.stack_bottom = bottom_of(stack);
  thread.sanitizer.stack_bytes = STACK_BYTES;
}

static bool has_begun(const Block& block, const Thread& thread) {
  return (block.warps[thread.warp].begun >> thread.lane & 1) != 0;
}

static void set_begun(Block& block, const Thread& thread) { block.warps[thread.warp].begun |= 1u << thread.lane; }

static void begin(Block& block, Thread& thread) {
  set_begun(block, thread);
  own_stack(thread, take_stack(block, thread));
  // As emulator_switch_stack leaves a stack: saved registers, then where to return to. The ABI wants the stack pointer
  // 8 bytes past a multiple of 16 at the start of a function.
  void** top = reinterpret_cast<void**>(top_of(thread.stack)) - 2;
  *top = reinterpret_cast<void*>(thread_main);
  thread.stack_pointer = top - SAVED_REGISTERS;
  memset(thread.stack_pointer, 0, SAVED_REGISTERS * sizeof(void*));
}

// Once per launch: the canaries lie at one power of two apart, and so on few lines of the cache.
void check_stacks(const Block& block) {
  for (uint32_t i = 0; i < block.num_stacks; i++) {
    const char* bottom = bottom_of(block.first_stack + i);
    if (memcmp(bottom, &STACK_CANARY, sizeof STACK_CANARY) != 0) die_after(block, "a thread overflowed its stack");
  }
}

// ---- the schedule ----------------------------------------------------------------------------------------------

static uint32_t next_random(uint64_t& state) {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<uint32_t>(state >> 33);
}

// The first bit at or after `from`, around the end. `bits` is not 0.
static uint32_t bit_from(uint32_t bits, uint32_t from) {
  uint32_t rotated = from == 0 ? bits : bits >> from | bits << (32 - from);
  return (from + static_cast<uint32_t>(__builtin_ctz(rotated))) % 32;
}

// The first bit at or before `from`, around the end.
static uint32_t bit_back_from(uint32_t bits, uint32_t from) {
  uint32_t shift = 31 - from;
  uint32_t rotated = shift == 0 ? bits : bits << shift | bits >> (32 - shift);
  return (from - static_cast<uint32_t>(__builtin_clz(rotated))) % 32;
}

static uint32_t choose_warp(Block& block) {
  if (block.options.order == Order::FORWARD) return bit_from(block.ready_warps, block.current_warp);
  if (block.options.order == Order::BACKWARD) return bit_back_from(block.ready_warps, block.current_warp);
  bool stays = (block.ready_warps >> block.current_warp & 1) != 0 && next_random(block.random) % 8 != 0;
  return stays ? block.current_warp : bit_from(block.ready_warps, next_random(block.random) % 32);
}

static uint32_t choose_lane(Block& block, uint32_t ready) {
  if (block.options.order == Order::FORWARD) return bit_from(ready, 0);
  if (block.options.order == Order::BACKWARD) return bit_back_from(ready, 31);
  return bit_from(ready, next_random(block.random) % 32);
}

// The thread that runs next, no longer ready; null when all have ended, or can only go on after the previous kernel.
static Thread* next_ready(Block& block) {
  bool hurries = block.options.order == Order::SEEDED && next_random(block.random) % 16 == 0;
  if (hurries) advance_engines(*block.engines);
  while (block.ready_warps == 0) {
    if (block.live == 0) return nullptr;
    if (advance_engines(*block.engines)) continue;
    if (block.num_held == 0) report_deadlock(block);
    return nullptr;
  }
  block.current_warp = choose_warp(block);
  Warp& warp = block.warps[block.current_warp];
  uint32_t lane = choose_lane(block, warp.ready);
  warp.ready &= ~(1u << lane);
  if (warp.ready == 0) block.ready_warps &= ~(1u << block.current_warp);
  return &block.threads[block.current_warp * LANES + lane];
}

void make_ready(Block& block, uint32_t warp, uint32_t lanes) {
  if (lanes == 0) return;
  block.warps[warp].ready |= lanes;
  block.ready_warps |= 1u << warp;
}

static void switch_from(Block& block, Thread& thread) {
  Thread* next = next_ready(block);
  if (next == nullptr) {
    before_switch(thread.sanitizer, block.os_thread, false);
    emulator_switch_stack(&thread.stack_pointer, block.os_stack_pointer);
    after_switch(thread.sanitizer, nullptr);
  } else if (next != &thread) {
    if (!has_begun(block, *next)) begin(block, *next);
    before_switch(thread.sanitizer, next->sanitizer, false);
    emulator_switch_stack(&thread.stack_pointer, next->stack_pointer);
    after_switch(thread.sanitizer, nullptr);
  }
  thread.wait = Wait::NONE;
}

void park(Block& block, Thread& thread, Wait wait) {
  thread.wait = wait;
  switch_from(block, thread);
}

void yield() {
  Block& block = this_block();
  Thread& thread = this_thread();
  make_ready(block, thread.warp, 1u << thread.lane);
  block.current_warp = (thread.warp + 1) % MAX_WARPS;
  switch_from(block, thread);
}

[[noreturn]] static void leave_for_good(Block& block, Thread& thread, Thread* next) {
  if (SHARE_STACKS) block.free_stacks.push_back(thread.stack);
  void* unused;
  if (next != nullptr) {
    if (!has_begun(block, *next)) begin(block, *next);
    before_switch(thread.sanitizer, next->sanitizer, true);
    emulator_switch_stack(&unused, next->stack_pointer);
  } else {
    before_switch(thread.sanitizer, block.os_thread, true);
    emulator_switch_stack(&unused, block.os_stack_pointer);
  }
  abort();
}

// Runs one thread of the block after the other on this stack, as long as the next one has not begun elsewhere: a block
// whose threads return at once costs hardly more than their calls.
static void thread_main() {
  Block& block = this_block();
  bool from_os_thread = block.os_thread.stack_bottom == nullptr;
  after_switch(this_thread().sanitizer, from_os_thread ? &block.os_thread : nullptr);
  for (;;) {
    order_acquire(&block.start_token);
    block.launch->kernel->call(block.launch->arguments);
    order_release(&block.end_token);
    block.live--;
    leave_barriers(block);
    Thread& ended = this_thread();
    Thread* next = next_ready(block);
    if (!SHARE_STACKS || next == nullptr || has_begun(block, *next)) leave_for_good(block, ended, next);
    set_begun(block, *next);
    own_stack(*next, ended.stack);
  }
}

void run_threads(Block& block) {
  order_release(&block.start_token);
  Thread* first = next_ready(block);
  if (!has_begun(block, *first)) begin(block, *first);
  before_switch(block.os_thread, first->sanitizer, false);
  emulator_switch_stack(&block.os_stack_pointer, first->stack_pointer);
  after_switch(block.os_thread, nullptr);
  order_acquire(&block.end_token);
}

Order order() { return this_block().options.order; }

uint32_t random_below(uint32_t bound) {
  return order() == Order::SEEDED ? next_random(this_block().random) % bound : 0;
}

}  // namespace emulator
