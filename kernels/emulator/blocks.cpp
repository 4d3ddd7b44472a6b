// Kernels by name, and launches: one block after the other, each in shared memory that is poisoned first and whose end
// is checked afterwards.
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

// ---- blocks ----------------------------------------------------------------------------------------------------

Block::Block() {
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
  poison(__start_emulator_shared, static_cast<size_t>(__stop_emulator_shared - __start_emulator_shared));
}

static void check_shared_canary(const Block& block) {
  const char* end = block.dynamic_shared + block.dynamic_shared_bytes;
  if (is_poisoned(end, SHARED_CANARY_BYTES)) return;
  die_after(block, "a thread wrote past the end of dynamic shared memory");
}

static void run_block(Block& block, uint3 block_index) {
  block.index = block_index;
  reset(block);
  poison_shared(block);
  run_threads(block);
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

void launch(const Launch& launch, const Options& options) {
  static Block block;
  check_launch(launch);
  create_stack_arena();
  FaultHandler handler;
  enter(block, launch, options);
  uint64_t num_blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  for (uint64_t i = 0; i < num_blocks; i++) {
    uint64_t at = block_at(options, i, num_blocks);
    block.random = options.seed * 0x9e3779b97f4a7c15ull + at;
    uint64_t x = at % launch.grid.x, y = at / launch.grid.x % launch.grid.y;
    uint64_t z = at / (uint64_t{launch.grid.x} * launch.grid.y);
    run_block(block, uint3{static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)});
  }
  check_stacks(block);
}

}  // namespace emulator
