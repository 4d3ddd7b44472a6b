// Kernels by name, and launches: one block after the other, each in shared memory that is poisoned first and whose end
// is checked afterwards. The first block of a dependent launch begins before the launch that it follows has run, so
// that what it reads too early is stale, and ThreadSanitizer sees that nothing orders it.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>

#include "block.h"

namespace emulator {

constexpr size_t SHARED_CANARY_BYTES = 1024;

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

// ---- shared memory ---------------------------------------------------------------------------------------------

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

// Where __shared__ arrays are: the bounds of a section are given by the linker, if anything is in it.
extern "C" char __start_emulator_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_emulator_shared[] __attribute__((weak, visibility("hidden")));

static size_t shared_arrays_bytes() { return static_cast<size_t>(__stop_emulator_shared - __start_emulator_shared); }

// ---- blocks ----------------------------------------------------------------------------------------------------

Block::Block(uint32_t first_stack_) : first_stack(first_stack_) {
  constexpr size_t BYTES = (MAX_SHARED_BYTES + SHARED_CANARY_BYTES + 1023) / 1024 * 1024;
  void* memory = mmap(nullptr, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) die("no memory for shared memory");
  dynamic_shared = static_cast<char*>(memory);
  engines = create_engines();
  mbarrier_waiters.reserve(MAX_THREADS);
  free_stacks.reserve(MAX_THREADS);
}

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
  block.has_waited = false;
  for (uint32_t i = 0; i < block.num_threads; i++) block.threads[i].has_waited = false;
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
  poison(__start_emulator_shared, shared_arrays_bytes());
}

static void check_shared_canary(const Block& block) {
  const char* end = block.dynamic_shared + block.dynamic_shared_bytes;
  if (is_poisoned(end, SHARED_CANARY_BYTES)) return;
  die_after(block, "a thread wrote past the end of dynamic shared memory");
}

// Runs a block, an early one as far as it comes.
static void start_block(Block& block, uint3 block_index) {
  block.index = block_index;
  reset(block);
  poison_shared(block);
  run_threads(block);
}

static void hold_block(Block& block) {
  block.shared_arrays.assign(__start_emulator_shared, __start_emulator_shared + shared_arrays_bytes());
}

// Goes on with a block that was held.
static void resume_block(Block& block) {
  memcpy(__start_emulator_shared, block.shared_arrays.data(), block.shared_arrays.size());
  block.is_early = false;
  block.num_held = 0;
  for (uint32_t i = 0; i < block.num_threads; i++) {
    Thread& thread = block.threads[i];
    if (thread.wait == Wait::PREVIOUS_KERNEL) make_ready(block, thread.warp, 1u << thread.lane);
  }
  if (block.ready_warps != 0) run_threads(block);
}

static void check_block(const Block& block) {
  check_shared_canary(block);
  const char* unfinished = unfinished_work(*block.engines);
  if (unfinished != nullptr) die_after(block, unfinished);
  bool waited = block.has_waited || !block.launch->is_dependent;
  if (!waited) die_after(block, "a dependent launch ended without wait_for_previous_kernel");
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
  block.block_dim = launch.block;
  block.grid_dim = launch.grid;
  block.dynamic_shared_bytes = launch.shared_bytes;
  block.early = options.asynchrony == Asynchrony::EARLY;
  shape(block, launch.block);
}

static void check_launch(const Launch& launch) {
  const Kernel& kernel = *launch.kernel;
  uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  if (threads == 0 || threads > kernel.max_threads || threads > MAX_THREADS) {
    die("kernel %s: a block of %llu threads", kernel.name, static_cast<unsigned long long>(threads));
  }
  if (launch.shared_bytes > MAX_SHARED_BYTES) die("kernel %s: too much shared memory", kernel.name);
}

static Block& block_of(uint32_t index) {
  static Block blocks[NUM_BLOCKS] = {Block(0), Block(MAX_THREADS)};
  return blocks[index];
}

// The one that has begun a launch, or one that has begun none.
static Block& block_for(const Launch& launch) {
  for (uint32_t i = 0; i < NUM_BLOCKS; i++) {
    if (block_of(i).is_early && block_of(i).launch == &launch) return block_of(i);
  }
  uint32_t free = 0;
  while (block_of(free).is_early) free++;
  return block_of(free);
}

static uint3 index_at(const Launch& launch, uint64_t at) {
  uint64_t x = at % launch.grid.x, y = at / launch.grid.x % launch.grid.y;
  uint64_t z = at / (uint64_t{launch.grid.x} * launch.grid.y);
  return uint3{static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
}

// The index of the block that comes `i`th, and a generator for it.
static uint3 next_index(Block& block, uint64_t i) {
  const Launch& launch = *block.launch;
  uint64_t num_blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  uint64_t at = block_at(block.options, i, num_blocks);
  block.random = block.options.seed * 0x9e3779b97f4a7c15ull + at;
  return index_at(launch, at);
}

void begin(const Launch& launch, const Kernel& previous, const Options& options) {
  // ThreadSanitizer would take the __shared__ arrays of both for one.
  if (CHECKS_ORDER && launch.kernel == &previous) return;
  Block& block = block_for(launch);
  check_launch(launch);
  create_stack_arena();
  FaultHandler handler;
  enter(block, launch, options);
  block.is_early = true;
  start_block(block, next_index(block, 0));
  hold_block(block);
}

void launch(const Launch& launch, const Options& options) {
  Block& block = block_for(launch);
  bool has_begun = block.is_early;
  check_launch(launch);
  create_stack_arena();
  FaultHandler handler;
  if (!has_begun) enter(block, launch, options);
  uint64_t num_blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  for (uint64_t i = 0; i < num_blocks; i++) {
    if (i == 0 && has_begun) {
      resume_block(block);
    } else {
      start_block(block, next_index(block, i));
    }
    check_block(block);
  }
  check_stacks(block);
}

}  // namespace emulator
