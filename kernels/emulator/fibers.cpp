// The scheduler behind fibers.h: stacks, the switch between them, the choice of the next fiber, and barriers.
#include "fibers.h"

#include <dlfcn.h>
#include <link.h>
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#include "sanitizers.h"

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

namespace {

constexpr uint64_t STACK_CANARY = 0x57494e44524f5345;
constexpr int POISON = 0xff;  // NaN in float and in bf16, -1 as an integer
constexpr size_t SHARED_CANARY_BYTES = 1024;
// ThreadSanitizer takes two threads that use one stack after the other for a race.
#if defined(EMULATOR_TSAN)
constexpr bool SHARE_STACKS = false;
#else
constexpr bool SHARE_STACKS = true;
#endif

struct Range {
  char* begin = nullptr;
  char* end = nullptr;
};

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
  void* stack_pointer;
  SanitizerFiber sanitizer;
};

// One block at a time of a launch, reused for the next: stacks, shared memory and threads outlive it.
struct Block : BlockPlace {
  const Launch* launch = nullptr;
  Options options;
  uint64_t random = 0;

  uint32_t num_threads = 0, live = 0, ready_warps = 0, current_warp = 0;
  Thread threads[MAX_THREADS];
  Warp warps[MAX_WARPS];
  Barrier barriers[NUM_BARRIERS];
  PlainVector<Thread*> mbarrier_waiters;

  uint32_t first_stack, num_stacks = 0;  // of this block in the arena
  PlainVector<uint32_t> free_stacks;
  Range static_shared;  // of the OS thread that runs the block

  void* os_stack_pointer = nullptr;
  SanitizerFiber os_thread;
  char start_token, end_token;

  explicit Block(uint32_t worker);
  Thread* next_ready();
  uint32_t take_stack(const Thread& thread);
};

}  // namespace

static Thread& this_thread() { return static_cast<Thread&>(here()); }
static Block& this_block() { return static_cast<Block&>(*here().block); }

// ---- kernels ---------------------------------------------------------------------------------------------------

static const Kernel* first_kernel;  // zero before any constructor runs

Kernel::Kernel(const char* name_, uint32_t max_threads_, size_t arguments_bytes_,
               void (*copy_arguments_)(void* const*, void*), void (*call_)(const void*))
    : name(name_),
      max_threads(max_threads_),
      arguments_bytes(arguments_bytes_),
      copy_arguments(copy_arguments_),
      call(call_),
      next(first_kernel) {
  if (find_kernel(name) != nullptr) die("two kernels are called %s", name);
  first_kernel = this;
}

const Kernel* find_kernel(const char* name) {
  const Kernel* kernel = first_kernel;
  while (kernel != nullptr && strcmp(kernel->name, name) != 0) kernel = kernel->next;
  return kernel;
}

// ---- reports ---------------------------------------------------------------------------------------------------

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

static const char* name_of(Operation operation) {
  static const char* const NAMES[] = {"__syncwarp", "a shuffle", "a vote", "a reduction",
                                      "ldmatrix",   "mma",       "wgmma_wait"};
  return NAMES[static_cast<int>(operation)];
}

static void print_wait(const Thread& thread) {
  if (thread.wait == Wait::BARRIER) fprintf(stderr, "barrier %u", thread.barrier_id);
  if (thread.wait == Wait::WARP_OPERATION) fprintf(stderr, "%s", name_of(thread.operation));
  if (thread.wait == Wait::MBARRIER) fprintf(stderr, "the mbarrier at %p", static_cast<const void*>(thread.mbarrier));
}

static bool waits_alike(const Thread& a, const Thread& b) {
  return a.wait == b.wait && a.barrier_id == b.barrier_id && a.operation == b.operation && a.mbarrier == b.mbarrier;
}

// Prints runs of threads that wait for the same, and aborts.
[[noreturn]] static void report_deadlock(const Block& block) {
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

// ---- stacks ----------------------------------------------------------------------------------------------------

[[noreturn]] static void thread_main();

Block::Block(uint32_t worker) : first_stack(worker * MAX_THREADS) {
  constexpr size_t BYTES = (MAX_SHARED_BYTES + SHARED_CANARY_BYTES + 1023) / 1024 * 1024;
  void* memory = mmap(nullptr, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) die("no memory for shared memory");
  dynamic_shared = static_cast<char*>(memory);
  engines = create_engines();
  mbarrier_waiters.reserve(MAX_THREADS);
  free_stacks.reserve(MAX_THREADS);
}

static void create_arena() {
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
uint32_t Block::take_stack(const Thread& thread) {
  if (!SHARE_STACKS && thread.stack != NO_STACK) return thread.stack;
  if (!free_stacks.empty()) {
    uint32_t stack = free_stacks.back();
    free_stacks.pop_back();
    return stack;
  }
  uint32_t stack = first_stack + num_stacks++;
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
  own_stack(thread, block.take_stack(thread));
  // As emulator_switch_stack leaves a stack: saved registers, then where to return to. The ABI wants the stack pointer
  // 8 bytes past a multiple of 16 at the start of a function.
  void** top = reinterpret_cast<void**>(top_of(thread.stack)) - 2;
  *top = reinterpret_cast<void*>(thread_main);
  thread.stack_pointer = top - SAVED_REGISTERS;
  memset(thread.stack_pointer, 0, SAVED_REGISTERS * sizeof(void*));
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

// The thread that runs next, no longer ready; null when all have ended.
Thread* Block::next_ready() {
  bool hurries = options.order == Order::SEEDED && next_random(random) % 16 == 0;
  if (hurries) advance_engines(*engines);
  while (ready_warps == 0) {
    if (live == 0) return nullptr;
    if (!advance_engines(*engines)) report_deadlock(*this);
  }
  current_warp = choose_warp(*this);
  Warp& warp = warps[current_warp];
  uint32_t lane = choose_lane(*this, warp.ready);
  warp.ready &= ~(1u << lane);
  if (warp.ready == 0) ready_warps &= ~(1u << current_warp);
  return &threads[current_warp * LANES + lane];
}

static void make_ready(Block& block, uint32_t warp, uint32_t lanes) {
  if (lanes == 0) return;
  block.warps[warp].ready |= lanes;
  block.ready_warps |= 1u << warp;
}

static void switch_from(Block& block, Thread& thread) {
  Thread* next = block.next_ready();
  if (next != &thread) {
    if (!has_begun(block, *next)) begin(block, *next);
    before_switch(thread.sanitizer, next->sanitizer, false);
    emulator_switch_stack(&thread.stack_pointer, next->stack_pointer);
    after_switch(thread.sanitizer, nullptr);
  }
  thread.wait = Wait::NONE;
}

static void park(Block& block, Thread& thread, Wait wait) {
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

static void complete(Block& block, Barrier& barrier) {
  barrier.arrived = 0;
  barrier.num_uses++;
  for (uint32_t warp = 0; warp < block.num_warps; warp++) {
    make_ready(block, warp, barrier.waiting[warp]);
    barrier.waiting[warp] = 0;
  }
}

static void end_thread(Block& block) {
  order_release(&block.end_token);
  block.live--;
  // __syncthreads counts the threads that still run: it may be complete now.
  Barrier& barrier = block.barriers[0];
  if (barrier.arrived != 0 && barrier.expected == 0 && barrier.arrived == block.live) complete(block, barrier);
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
    end_thread(block);
    Thread& ended = this_thread();
    Thread* next = block.next_ready();
    if (!SHARE_STACKS || next == nullptr || has_begun(block, *next)) leave_for_good(block, ended, next);
    set_begun(block, *next);
    own_stack(*next, ended.stack);
  }
}

// ---- barriers and warp operations ------------------------------------------------------------------------------

void barrier_sync(uint32_t id, uint32_t threads) {
  Block& block = this_block();
  Thread& thread = this_thread();
  if (id >= NUM_BARRIERS) die("barrier %u does not exist", id);
  if (threads % LANES != 0) die("barrier %u joins %u threads, not whole warps", id, threads);
  Barrier& barrier = block.barriers[id];
  if (barrier.arrived != 0 && barrier.expected != threads) {
    die("barrier %u is joined with %u threads and with %u", id, barrier.expected, threads);
  }
  char* token = &barrier.tokens[barrier.num_uses % 2];
  order_release(token);
  barrier.expected = threads;
  uint32_t awaited = threads == 0 ? block.live : threads;
  if (++barrier.arrived == awaited) {
    complete(block, barrier);
  } else {
    barrier.waiting[thread.warp] |= 1u << thread.lane;
    thread.barrier_id = id;
    park(block, thread, Wait::BARRIER);
  }
  order_acquire(token);
}

static void refuse_meeting(const Thread& thread, const Meeting& meeting, uint32_t mask, Operation operation) {
  if (meeting.mask == mask && meeting.operation != operation) {
    die("lanes of warp %u meet in %s and in %s", thread.warp, name_of(meeting.operation), name_of(operation));
  }
  if ((meeting.mask & mask) != 0) {
    die("lane %u calls %s with mask %08x while %s with mask %08x is under way", thread.lane, name_of(operation), mask,
        name_of(meeting.operation), meeting.mask);
  }
}

// The meeting that lanes of `mask` hold already, or a new one.
static uint32_t find_meeting(const Thread& thread, Warp& warp, uint32_t mask, Operation operation) {
  for (uint32_t open = warp.open_meetings; open != 0; open &= open - 1) {
    uint32_t index = static_cast<uint32_t>(__builtin_ctz(open));
    const Meeting& meeting = warp.meetings[index];
    if (meeting.mask == mask && meeting.operation == operation) return index;
    refuse_meeting(thread, meeting, mask, operation);
  }
  uint32_t index = static_cast<uint32_t>(__builtin_ctz(~warp.open_meetings));
  if (index >= Warp::MAX_MEETINGS) die("too many warp operations at once in warp %u", thread.warp);
  warp.open_meetings |= 1u << index;
  warp.meetings[index].mask = mask;
  warp.meetings[index].arrived = 0;
  warp.meetings[index].operation = operation;
  return index;
}

void meet(uint32_t mask, Operation operation, void* argument, Act act) {
  Block& block = this_block();
  Thread& thread = this_thread();
  Warp& warp = block.warps[thread.warp];
  uint32_t own = 1u << thread.lane;
  if ((mask & own) == 0) die("lane %u calls %s with mask %08x, without itself", thread.lane, name_of(operation), mask);
  uint32_t index = find_meeting(thread, warp, mask, operation);
  Meeting& meeting = warp.meetings[index];
  bool orders_memory = operation == Operation::SYNC;
  if (orders_memory) order_release(&meeting);
  meeting.arguments[thread.lane] = argument;
  meeting.arrived |= own;
  bool is_over = false;
  if (meeting.arrived == mask) {
    is_over = act == nullptr || act(mask, meeting.arguments) == Resume::NOW;
    warp.open_meetings &= ~(1u << index);
    if (is_over) make_ready(block, thread.warp, mask & ~own);
  }
  if (!is_over) {
    thread.operation = operation;
    park(block, thread, Wait::WARP_OPERATION);
  }
  if (orders_memory) order_acquire(&meeting);
}

void wake_lanes(uint32_t warp, uint32_t mask) { make_ready(this_block(), warp, mask); }

void wait_for_mbarrier(const uint64_t* barrier) {
  Block& block = this_block();
  Thread& thread = this_thread();
  thread.mbarrier = barrier;
  block.mbarrier_waiters.push_back(&thread);
  park(block, thread, Wait::MBARRIER);
}

void wake_mbarrier_waiters(const uint64_t* barrier) {
  Block& block = this_block();
  size_t num_left = 0;
  for (Thread* thread : block.mbarrier_waiters) {
    if (thread->mbarrier == barrier) {
      make_ready(block, thread->warp, 1u << thread->lane);
    } else {
      block.mbarrier_waiters[num_left++] = thread;
    }
  }
  block.mbarrier_waiters.resize(num_left);
}

Order order() { return this_block().options.order; }

uint32_t random_below(uint32_t bound) {
  return order() == Order::SEEDED ? next_random(this_block().random) % bound : 0;
}

// ---- blocks ----------------------------------------------------------------------------------------------------

static bool is_poisoned(const char* begin, size_t bytes) {
  unsigned char all = POISON;
  for (size_t i = 0; i < bytes; i++) all &= static_cast<unsigned char>(begin[i]);
  return all == POISON;
}

// Writes only where the block before has written: most blocks of a persistent kernel find no work in a small launch,
// and reading all of shared memory is several times as fast as writing it.
static void poison(char* begin, size_t bytes) {
  constexpr size_t PIECE_BYTES = 1024;
  for (size_t at = 0; at < bytes; at += PIECE_BYTES) {
    size_t piece = std::min(PIECE_BYTES, bytes - at);
    if (!is_poisoned(begin + at, piece)) memset(begin + at, POISON, piece);
  }
}

#if defined(EMULATOR_ASAN) || defined(EMULATOR_TSAN)
// Under the sanitizers __shared__ arrays are plain statics in this section.
extern "C" char __start_emulator_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_emulator_shared[] __attribute__((weak, visibility("hidden")));
static Range find_static_shared() { return Range{__start_emulator_shared, __stop_emulator_shared}; }
#else
// __shared__ arrays are thread_local: they are all that this library's part of a thread's storage holds.
static thread_local char any_static_shared;

static Range find_static_shared() {
  Range found;
  auto visit = [](dl_phdr_info* info, size_t, void* data) {
    for (int i = 0; i < info->dlpi_phnum; i++) {
      if (info->dlpi_phdr[i].p_type != PT_TLS || info->dlpi_tls_data == nullptr) continue;
      char* begin = static_cast<char*>(info->dlpi_tls_data);
      Range range{begin, begin + info->dlpi_phdr[i].p_memsz};
      if (&any_static_shared >= range.begin && &any_static_shared < range.end) *static_cast<Range*>(data) = range;
    }
    return 0;
  };
  dl_iterate_phdr(visit, &found);
  return found;
}
#endif

static void shape(Block& block, dim3 dim) {
  block.num_threads = dim.x * dim.y * dim.z;
  block.num_warps = (block.num_threads + LANES - 1) / LANES;
  for (uint32_t i = 0; i < block.num_threads; i++) {
    Thread& thread = block.threads[i];
    thread.index = uint3{i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y)};
    thread.linear = i;
    thread.lane = i % LANES;
    thread.warp = i / LANES;
    thread.block = &block;
    thread.sanitizer.create();
  }
}

static void reset(Block& block) {
  block.live = block.num_threads;
  block.ready_warps = 0;
  block.mbarrier_waiters.clear();
  for (uint32_t i = 0; i < block.num_warps; i++) {
    uint32_t num_lanes = std::min(LANES, block.num_threads - i * LANES);
    block.warps[i].ready = block.warps[i].begun = block.warps[i].open_meetings = 0;
    make_ready(block, i, num_lanes == LANES ? ~0u : (1u << num_lanes) - 1);
  }
  for (Barrier& barrier : block.barriers) barrier.expected = barrier.num_uses = 0;
  block.current_warp = block.options.order == Order::BACKWARD ? block.num_warps - 1 : 0;
  reset_engines(*block.engines, block.num_threads);
}

static void poison_shared(Block& block) {
  char* shared = block.dynamic_shared;
  size_t bytes = block.dynamic_shared_bytes;
  allow_access(shared, MAX_SHARED_BYTES + SHARED_CANARY_BYTES);
  poison(shared, bytes + SHARED_CANARY_BYTES);
  forbid_access(shared + bytes, MAX_SHARED_BYTES + SHARED_CANARY_BYTES - bytes);
  poison(block.static_shared.begin, static_cast<size_t>(block.static_shared.end - block.static_shared.begin));
}

[[noreturn]] static void die_after(const Block& block, const char* what) {
  print_block(block);
  fprintf(stderr, ": %s\n", what);
  fflush(stderr);
  abort();
}

static void check_shared_canary(const Block& block) {
  const char* end = block.dynamic_shared + block.dynamic_shared_bytes;
  if (is_poisoned(end, SHARED_CANARY_BYTES)) return;
  die_after(block, "a thread wrote past the end of dynamic shared memory");
}

// Once per launch: the canaries lie at one power of two apart, and so on few lines of the cache.
static void check_stacks(const Block& block) {
  for (uint32_t i = 0; i < block.num_stacks; i++) {
    const char* bottom = bottom_of(block.first_stack + i);
    if (memcmp(bottom, &STACK_CANARY, sizeof STACK_CANARY) != 0) die_after(block, "a thread overflowed its stack");
  }
}

static void run_block(Block& block, uint3 block_index) {
  block.index = block_index;
  reset(block);
  poison_shared(block);
  order_release(&block.start_token);
  Thread* first = block.next_ready();
  begin(block, *first);
  before_switch(block.os_thread, first->sanitizer, false);
  emulator_switch_stack(&block.os_stack_pointer, first->stack_pointer);
  after_switch(block.os_thread, nullptr);
  order_acquire(&block.end_token);
  check_shared_canary(block);
  const char* unfinished = unfinished_work(*block.engines);
  if (unfinished != nullptr) die_after(block, unfinished);
}

// ---- launches --------------------------------------------------------------------------------------------------

// A stride that visits every block once.
static uint64_t seeded_stride(uint64_t seed, uint64_t num_blocks) {
  uint64_t stride = seed * 0x9e3779b97f4a7c15ull % num_blocks;
  while (std::gcd(stride, num_blocks) != 1) stride++;
  return stride;
}

static uint64_t block_at(const Options& options, uint64_t i, uint64_t num_blocks) {
  if (options.order == Order::FORWARD) return i;
  if (options.order == Order::BACKWARD) return num_blocks - 1 - i;
  return (options.seed + i * seeded_stride(options.seed, num_blocks)) % num_blocks;
}

static void enter(Block& block, const Launch& launch, const Options& options) {
  block.launch = &launch;
  block.options = options;
  block.os_thread.adopt_os_thread();
  block.os_thread.stack_bottom = nullptr;
  block.static_shared = find_static_shared();
  block.block_dim = launch.block;
  block.grid_dim = launch.grid;
  block.dynamic_shared_bytes = launch.shared_bytes;
  block.early = options.asynchrony == Asynchrony::EARLY;
  shape(block, launch.block);
}

static void run_blocks(Block& block, const Launch& launch, const Options& options, std::atomic<uint64_t>& next) {
  enter(block, launch, options);
  uint64_t num_blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  for (uint64_t i; (i = next++) < num_blocks;) {
    uint64_t at = block_at(options, i, num_blocks);
    block.random = options.seed * 0x9e3779b97f4a7c15ull + at;
    uint64_t x = at % launch.grid.x, y = at / launch.grid.x % launch.grid.y;
    uint64_t z = at / (uint64_t{launch.grid.x} * launch.grid.y);
    run_block(block, uint3{static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)});
  }
  check_stacks(block);
}

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

// Reports a fault of a kernel with its place, as long as the object lives. The sanitizers report their own.
class FaultHandler {
 public:
  FaultHandler() {
    if (SANITIZED) return;
    struct sigaction action = {};
    action.sa_sigaction = report_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 2; i++) sigaction(SIGNALS[i], &action, &saved_[i]);
  }
  ~FaultHandler() {
    if (SANITIZED) return;
    for (int i = 0; i < 2; i++) sigaction(SIGNALS[i], &saved_[i], nullptr);
  }

 private:
  static constexpr int SIGNALS[2] = {SIGSEGV, SIGBUS};
  struct sigaction saved_[2];
};

static Block& block_of_worker(uint32_t worker) {
  static std::unique_ptr<Block> blocks[MAX_OS_THREADS];
  if (blocks[worker] == nullptr) blocks[worker] = std::make_unique<Block>(worker);
  return *blocks[worker];
}

static void check_launch(const Launch& launch) {
  const Kernel& kernel = *launch.kernel;
  uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  if (threads == 0 || threads > kernel.max_threads || threads > MAX_THREADS) {
    die("kernel %s: a block of %llu threads", kernel.name, static_cast<unsigned long long>(threads));
  }
  if (launch.shared_bytes > MAX_SHARED_BYTES) die("kernel %s: too much shared memory", kernel.name);
}

void launch(const Launch& launch, const Options& options) {
  check_launch(launch);
  create_arena();
  FaultHandler handler;
  std::atomic<uint64_t> next{0};
  uint64_t num_blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  uint64_t wanted = std::min<uint64_t>(std::max(1u, options.os_threads), num_blocks);
  uint32_t num_workers = static_cast<uint32_t>(std::min<uint64_t>(wanted, MAX_OS_THREADS));
  std::vector<std::thread> workers;
  for (uint32_t worker = 1; worker < num_workers; worker++) {
    Block& block = block_of_worker(worker);
    workers.emplace_back([&] { run_blocks(block, launch, options, next); });
  }
  run_blocks(block_of_worker(0), launch, options, next);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace emulator
