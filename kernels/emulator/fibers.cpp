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

thread_local Here here;

namespace {

// Frames grow red zones under the sanitizers.
constexpr size_t STACK_BYTES = SANITIZED ? 256 << 10 : 64 << 10;
constexpr uint64_t STACK_CANARY = 0x57494e44524f5345;
constexpr int POISON = 0xff;  // NaN in float and in bf16, -1 as an integer
constexpr size_t SHARED_CANARY_BYTES = 1024;
// ThreadSanitizer takes two threads that use one stack after the other for a race.
#if defined(EMULATOR_TSAN)
constexpr bool SHARE_STACKS = false;
#else
constexpr bool SHARE_STACKS = true;
#endif

struct Stack {
  char* bottom = nullptr;
  char* top = nullptr;
};

struct Range {
  char* begin = nullptr;
  char* end = nullptr;
};

struct Meeting {
  uint32_t mask, arrived;  // mask 0: free
  Operation operation;
  void* arguments[LANES];
};

struct Warp {
  static constexpr int MAX_MEETINGS = 8;
  uint32_t ready;  // lanes that can run, or have not begun
  Meeting meetings[MAX_MEETINGS];
};

struct Barrier {
  uint32_t expected, arrived;
  // A thread may come to the next use of a barrier before another has left this one: two tokens for the sanitizer.
  uint32_t num_uses;
  char tokens[2];
  uint32_t waiting[MAX_WARPS];
};

}  // namespace

struct Thread {
  uint3 index;
  uint32_t linear, lane, warp;
  bool begun;
  Wait wait;
  uint32_t barrier_id;
  Operation operation;
  const uint64_t* mbarrier;
  void* stack_pointer;
  Stack stack;
  SanitizerFiber sanitizer;
};

// One block at a time of a launch, reused for the next: stacks, shared memory and threads outlive it.
struct Block {
  const Launch* launch = nullptr;
  Options options;
  uint64_t random = 0;

  uint32_t num_threads = 0, num_warps = 0, live = 0, ready_warps = 0, current_warp = 0;
  Thread threads[MAX_THREADS];
  Warp warps[MAX_WARPS];
  Barrier barriers[NUM_BARRIERS];
  PlainVector<Thread*> mbarrier_waiters;

  PlainVector<Stack> all_stacks, free_stacks;
  char* shared = nullptr;
  Range static_shared;  // of the OS thread that runs the block
  Engines* engines = nullptr;

  void* os_stack_pointer = nullptr;
  SanitizerFiber os_thread;
  char start_token, end_token;

  Block();
  Thread* next_ready();
  Stack take_stack(const Thread& thread);
};

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

static void print_place() {
  fprintf(stderr, "emulator: ");
  if (here.block == nullptr) return;
  const Launch& launch = *here.block->launch;
  fprintf(stderr, "kernel %s, block (%u, %u, %u)", launch.kernel->name, here.block_index.x, here.block_index.y,
          here.block_index.z);
  const uint3& thread = here.thread_index;
  if (here.thread != nullptr) fprintf(stderr, ", thread (%u, %u, %u)", thread.x, thread.y, thread.z);
  fprintf(stderr, ": ");
}

void die(const char* format, ...) {
  print_place();
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fputc('\n', stderr);
  fflush(stderr);
  abort();
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
  here.thread = nullptr;
  print_place();
  fprintf(stderr, "deadlock, %u of %u threads left", block.live, block.num_threads);
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

Block::Block() {
  size_t bytes = (MAX_SHARED_BYTES + SHARED_CANARY_BYTES + 1023) / 1024 * 1024;
  shared = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (shared == MAP_FAILED) die("no memory for shared memory");
  engines = create_engines();
}

// Tops are spread over the cache's sets: stacks at one power of two apart would all fall on the same few lines.
static Stack create_stack(size_t stack_index) {
  void* memory =
      mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) die("no memory for the stacks of threads");
  char* bottom = static_cast<char*>(memory);
  memcpy(bottom, &STACK_CANARY, sizeof STACK_CANARY);
  size_t colour = stack_index % 61 * 192;
  return Stack{bottom, bottom + STACK_BYTES - colour};
}

// The stack that was left last comes first, while it is in the cache.
Stack Block::take_stack(const Thread& thread) {
  if (!SHARE_STACKS && thread.stack.bottom != nullptr) return thread.stack;
  if (free_stacks.empty()) {
    all_stacks.push_back(create_stack(all_stacks.size()));
    return all_stacks.back();
  }
  Stack stack = free_stacks.back();
  free_stacks.pop_back();
  return stack;
}

static void begin(Block& block, Thread& thread) {
  thread.begun = true;
  thread.stack = block.take_stack(thread);
  // As emulator_switch_stack leaves a stack: saved registers, then where to return to. The ABI wants the stack pointer
  // 8 bytes past a multiple of 16 at the start of a function.
  void** top = reinterpret_cast<void**>(thread.stack.top) - 2;
  *top = reinterpret_cast<void*>(thread_main);
  thread.stack_pointer = top - SAVED_REGISTERS;
  memset(thread.stack_pointer, 0, SAVED_REGISTERS * sizeof(void*));
  thread.sanitizer.stack_bottom = thread.stack.bottom;
  thread.sanitizer.stack_bytes = STACK_BYTES;
}

static void set_here(Thread& thread) {
  here.thread = &thread;
  here.thread_index = thread.index;
  here.lane = thread.lane;
  here.warp = thread.warp;
}

static void resume(Block& block, Thread& thread) {
  if (!thread.begun) begin(block, thread);
  thread.wait = Wait::NONE;
  set_here(thread);
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

static void switch_from(Thread& thread) {
  Block& block = *here.block;
  Thread* next = block.next_ready();
  if (next == &thread) {
    resume(block, thread);
    return;
  }
  resume(block, *next);
  before_switch(thread.sanitizer, next->sanitizer, false);
  emulator_switch_stack(&thread.stack_pointer, next->stack_pointer);
  after_switch(thread.sanitizer, nullptr);
}

static void park(Wait wait) {
  Thread& thread = *here.thread;
  thread.wait = wait;
  switch_from(thread);
}

void yield() {
  Thread& thread = *here.thread;
  make_ready(*here.block, thread.warp, 1u << thread.lane);
  here.block->current_warp = (thread.warp + 1) % MAX_WARPS;
  switch_from(thread);
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

static void leave_for_good(Block& block, Thread& thread, Thread* next) {
  if (SHARE_STACKS) block.free_stacks.push_back(thread.stack);
  void* unused;
  if (next != nullptr) {
    resume(block, *next);
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
  Block& block = *here.block;
  bool from_os_thread = block.os_thread.stack_bottom == nullptr;
  after_switch(here.thread->sanitizer, from_os_thread ? &block.os_thread : nullptr);
  for (;;) {
    order_acquire(&block.start_token);
    block.launch->kernel->call(block.launch->arguments);
    end_thread(block);
    Thread& ended = *here.thread;
    Thread* next = block.next_ready();
    if (!SHARE_STACKS || next == nullptr || next->begun) leave_for_good(block, ended, next);
    next->begun = true;
    next->stack = ended.stack;
    next->sanitizer = ended.sanitizer;
    resume(block, *next);
  }
}

// ---- barriers and warp operations ------------------------------------------------------------------------------

void barrier_sync(uint32_t id, uint32_t threads) {
  Block& block = *here.block;
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
    barrier.waiting[here.warp] |= 1u << here.lane;
    here.thread->barrier_id = id;
    park(Wait::BARRIER);
  }
  order_acquire(token);
}

// The meeting that the lanes of `mask` hold already, or a new one.
static Meeting& find_meeting(Warp& warp, uint32_t mask, Operation operation) {
  Meeting* unused = nullptr;
  for (Meeting& meeting : warp.meetings) {
    if (meeting.mask == 0) {
      if (unused == nullptr) unused = &meeting;
      continue;
    }
    if (meeting.mask == mask && (meeting.arrived >> here.lane & 1) == 0) {
      if (meeting.operation == operation) return meeting;
      die("lanes of warp %u meet in %s and in %s", here.warp, name_of(meeting.operation), name_of(operation));
    }
    if ((meeting.mask & mask) != 0) {
      die("lane %u calls %s with mask %08x while %s with mask %08x is under way", here.lane, name_of(operation), mask,
          name_of(meeting.operation), meeting.mask);
    }
  }
  if (unused == nullptr) die("too many warp operations at once in warp %u", here.warp);
  unused->mask = mask;
  unused->operation = operation;
  return *unused;
}

void meet(uint32_t mask, Operation operation, void* argument, Act act) {
  Block& block = *here.block;
  Warp& warp = block.warps[here.warp];
  uint32_t own = 1u << here.lane;
  if ((mask & own) == 0) die("lane %u calls %s with mask %08x, without itself", here.lane, name_of(operation), mask);
  Meeting& meeting = find_meeting(warp, mask, operation);
  bool orders_memory = operation == Operation::SYNC;
  bool is_over = false;
  if (orders_memory) order_release(&meeting);
  meeting.arguments[here.lane] = argument;
  meeting.arrived |= own;
  if (meeting.arrived == mask) {
    Resume resume = act == nullptr ? Resume::NOW : act(mask, meeting.arguments);
    meeting.mask = meeting.arrived = 0;
    if (resume == Resume::NOW) make_ready(block, here.warp, mask & ~own);
    is_over = resume == Resume::NOW;
  }
  if (!is_over) {
    here.thread->operation = operation;
    park(Wait::WARP_OPERATION);
  }
  if (orders_memory) order_acquire(&meeting);
}

void wake_lanes(uint32_t warp, uint32_t mask) { make_ready(*here.block, warp, mask); }

void wait_for_mbarrier(const uint64_t* barrier) {
  here.thread->mbarrier = barrier;
  here.block->mbarrier_waiters.push_back(here.thread);
  park(Wait::MBARRIER);
}

void wake_mbarrier_waiters(const uint64_t* barrier) {
  PlainVector<Thread*>& waiters = here.block->mbarrier_waiters;
  size_t num_left = 0;
  for (Thread* thread : waiters) {
    if (thread->mbarrier == barrier) {
      make_ready(*here.block, thread->warp, 1u << thread->lane);
    } else {
      waiters[num_left++] = thread;
    }
  }
  waiters.resize(num_left);
}

Engines& engines() { return *here.block->engines; }
uint32_t linear_thread() { return here.thread->linear; }
uint32_t num_warps() { return here.block->num_warps; }
Order order() { return here.block->options.order; }

uint32_t random_below(uint32_t bound) {
  return order() == Order::SEEDED ? next_random(here.block->random) % bound : 0;
}

// ---- blocks ----------------------------------------------------------------------------------------------------

static void poison(void* begin, size_t bytes) {
  // Not memset: the sanitizers intercept it.
  asm volatile("rep stosb" : "+D"(begin), "+c"(bytes) : "a"(POISON) : "memory");
}

#if defined(EMULATOR_ASAN) || defined(EMULATOR_TSAN)
// Under the sanitizers __shared__ arrays are plain statics in this section.
extern "C" char __start_emulator_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_emulator_shared[] __attribute__((weak, visibility("hidden")));
static Range find_static_shared() { return Range{__start_emulator_shared, __stop_emulator_shared}; }
#else
// __shared__ arrays are thread_local: beside `here` they are all that this library's part of a thread's storage holds.
static Range find_static_shared() {
  Range found;
  auto visit = [](dl_phdr_info* info, size_t, void* data) {
    for (int i = 0; i < info->dlpi_phnum; i++) {
      if (info->dlpi_phdr[i].p_type != PT_TLS || info->dlpi_tls_data == nullptr) continue;
      char* begin = static_cast<char*>(info->dlpi_tls_data);
      Range range{begin, begin + info->dlpi_phdr[i].p_memsz};
      char* ours = reinterpret_cast<char*>(&here);
      if (ours >= range.begin && ours < range.end) *static_cast<Range*>(data) = range;
    }
    return 0;
  };
  dl_iterate_phdr(visit, &found);
  return found;
}
#endif

static void poison_static_shared(const Range& range) {
  static_assert(std::is_trivially_copyable_v<Here>);
  Here saved = here;
  poison(range.begin, static_cast<size_t>(range.end - range.begin));
  here = saved;
}

// The three coordinates of every thread change only with the shape of blocks.
static void shape(Block& block, dim3 dim) {
  block.num_threads = dim.x * dim.y * dim.z;
  block.num_warps = (block.num_threads + LANES - 1) / LANES;
  for (uint32_t i = 0; i < block.num_threads; i++) {
    Thread& thread = block.threads[i];
    thread.index = uint3{i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y)};
    thread.linear = i;
    thread.lane = i % LANES;
    thread.warp = i / LANES;
    thread.sanitizer.create();
  }
}

static void reset(Block& block) {
  block.live = block.num_threads;
  block.ready_warps = 0;
  block.mbarrier_waiters.clear();
  for (uint32_t i = 0; i < block.num_threads; i++) {
    block.threads[i].begun = false;
    block.threads[i].wait = Wait::NONE;
  }
  for (uint32_t warp = 0; warp < block.num_warps; warp++) {
    for (Meeting& meeting : block.warps[warp].meetings) meeting.mask = meeting.arrived = 0;
    uint32_t num_lanes = std::min(LANES, block.num_threads - warp * LANES);
    block.warps[warp].ready = 0;
    make_ready(block, warp, num_lanes == LANES ? ~0u : (1u << num_lanes) - 1);
  }
  for (Barrier& barrier : block.barriers) {
    barrier.arrived = barrier.expected = barrier.num_uses = 0;
    std::fill_n(barrier.waiting, block.num_warps, 0u);
  }
  block.current_warp = block.options.order == Order::BACKWARD ? block.num_warps - 1 : 0;
  reset_engines(*block.engines, block.num_threads);
}

static void poison_shared(Block& block) {
  size_t bytes = block.launch->shared_bytes;
  allow_access(block.shared, MAX_SHARED_BYTES + SHARED_CANARY_BYTES);
  poison(block.shared, bytes + SHARED_CANARY_BYTES);
  forbid_access(block.shared + bytes, MAX_SHARED_BYTES + SHARED_CANARY_BYTES - bytes);
  poison_static_shared(block.static_shared);
}

static void check_canaries(const Block& block) {
  here.thread = nullptr;
  for (const Stack& stack : block.all_stacks) {
    if (memcmp(stack.bottom, &STACK_CANARY, sizeof STACK_CANARY) != 0) die("a thread overflowed its stack");
  }
  if (HAS_RED_ZONES) return;
  const char* end = block.shared + block.launch->shared_bytes;
  for (size_t i = 0; i < SHARED_CANARY_BYTES; i++) {
    if (end[i] != static_cast<char>(POISON)) die("a thread wrote %zu bytes past the end of dynamic shared memory", i);
  }
}

static void run_block(Block& block, uint3 block_index) {
  here.block_index = block_index;
  reset(block);
  poison_shared(block);
  order_release(&block.start_token);
  Thread* first = block.next_ready();
  resume(block, *first);
  before_switch(block.os_thread, first->sanitizer, false);
  emulator_switch_stack(&block.os_stack_pointer, first->stack_pointer);
  after_switch(block.os_thread, nullptr);
  order_acquire(&block.end_token);
  check_canaries(block);
  check_engines_idle(*block.engines);
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
  shape(block, launch.block);
  here = Here{};
  here.block = &block;
  here.block_dim = launch.block;
  here.grid_dim = launch.grid;
  here.dynamic_shared = block.shared;
  here.dynamic_shared_bytes = launch.shared_bytes;
  here.early = options.asynchrony == Asynchrony::EARLY;
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
  here.block = nullptr;
}

static void report_fault(int, siginfo_t* info, void*) {
  if (here.block != nullptr) die("illegal address %p", info->si_addr);
  abort();
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

static Block& block_of_worker(size_t worker) {
  static std::vector<std::unique_ptr<Block>> blocks;
  while (blocks.size() <= worker) blocks.push_back(std::make_unique<Block>());
  return *blocks[worker];
}

void launch(const Launch& launch, const Options& options) {
  uint64_t num_threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  if (num_threads == 0 || num_threads > launch.kernel->max_threads || num_threads > MAX_THREADS) {
    die("kernel %s: a block of %llu threads", launch.kernel->name, static_cast<unsigned long long>(num_threads));
  }
  if (launch.shared_bytes > MAX_SHARED_BYTES) die("kernel %s: too much shared memory", launch.kernel->name);
  FaultHandler handler;
  std::atomic<uint64_t> next{0};
  uint64_t num_blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  uint64_t num_workers = SANITIZED ? 1 : std::min<uint64_t>(std::max(1u, options.os_threads), num_blocks);
  std::vector<std::thread> workers;
  for (size_t worker = 1; worker < num_workers; worker++) {
    Block& block = block_of_worker(worker);
    workers.emplace_back([&] { run_blocks(block, launch, options, next); });
  }
  run_blocks(block_of_worker(0), launch, options, next);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace emulator
