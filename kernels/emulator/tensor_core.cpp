// mma.sync of a warp and wgmma of a warpgroup, on bf16 and e4m3 operands with float sums.
//
// A product of two such numbers is exact in float. Each operation sums its 16 or 32 products along k in order, from
// zero, and then adds the accumulator; a real tensor core sums in an order and with a rounding of its own, so results
// are compared by relative error, or bit for bit where every sum is exact.
//
// Lanes do not wait for each other when they issue a wgmma: each notes its accumulators, and the warp's share of the
// work, 16 of 64 rows, is done by the last lane (early) or where the warp waits for it (late).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "asynchronous.h"
#include "instructions.h"
#include "sanitizers.h"

namespace emulator {

namespace {

typedef float Octet __attribute__((vector_size(8 * sizeof(float))));

}  // namespace

// Elements in four bytes.
static uint32_t elements_per_word(Format format) { return format == Format::BF16 ? 2 : 4; }
static uint32_t depth_of(Format format) { return 8 * elements_per_word(format); }

static float decode_e4m3(uint8_t bits) {
  int exponent = bits >> 3 & 15, mantissa = bits & 7;
  float magnitude = exponent == 0 ? ldexpf(static_cast<float>(mantissa), -9)
                                  : ldexpf(static_cast<float>(8 + mantissa), exponent - 10);
  if (exponent == 15 && mantissa == 7) magnitude = NAN;
  return bits & 0x80 ? -magnitude : magnitude;
}

static const float* e4m3_table() {
  static const std::vector<float> table = [] {
    std::vector<float> values(256);
    for (uint32_t i = 0; i < 256; i++) values[i] = decode_e4m3(static_cast<uint8_t>(i));
    return values;
  }();
  return table.data();
}

static float element_of(Format format, uint32_t packed, uint32_t index) {
  if (format == Format::BF16) return bits_to_float(index != 0 ? packed & 0xffff0000u : packed << 16);
  return e4m3_table()[packed >> (8 * index) & 0xff];
}

// ---- mma.sync --------------------------------------------------------------------------------------------------

namespace {

struct MmaOperands {
  Format format;
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

}  // namespace

// What a lane has of a[16, k], as the PTX ISA draws it for m16n8k16 and m16n8k32.
static void gather_left(Format format, uint32_t lane, const uint32_t* fragment, float (&a)[16][MAX_K]) {
  uint32_t per_word = elements_per_word(format), half_depth = 4 * per_word;
  for (uint32_t word = 0; word < 4; word++) {
    for (uint32_t i = 0; i < per_word; i++) {
      uint32_t k = lane % 4 * per_word + i + word / 2 * half_depth;
      a[lane / 4 + word % 2 * 8][k] = element_of(format, fragment[word], i);
    }
  }
}

// a[16, k] and b[k, 8] from the fragments of all lanes.
static void gather_fragments(Format format, void* const* arguments, float (&a)[16][MAX_K], float (&b)[MAX_K][8]) {
  uint32_t per_word = elements_per_word(format);
  for (uint32_t lane = 0; lane < LANES; lane++) {
    const auto& operands = *static_cast<MmaOperands*>(arguments[lane]);
    if (operands.format != format) die("mma: lanes differ in format");
    uint32_t group = lane / 4, half_depth = 4 * per_word;
    gather_left(format, lane, operands.a, a);
    for (uint32_t i = 0; i < per_word; i++) {
      uint32_t k = lane % 4 * per_word + i;
      b[k][group] = element_of(format, operands.b[0], i);
      b[k + half_depth][group] = element_of(format, operands.b[1], i);
    }
  }
}

static Resume act_mma(uint32_t, void* const* arguments) {
  Format format = static_cast<MmaOperands*>(arguments[0])->format;
  float a[16][MAX_K];
  alignas(32) float b[MAX_K][8];
  gather_fragments(format, arguments, a, b);
  for (uint32_t row = 0; row < 16; row++) {
    Octet sum = {};
    for (uint32_t k = 0; k < depth_of(format); k++) {
      Octet b_row;
      memcpy(&b_row, b[k], sizeof b_row);
      sum += a[row][k] * b_row;
    }
    for (uint32_t column = 0; column < 8; column++) {
      uint32_t lane = row % 8 * 4 + column / 2;
      static_cast<MmaOperands*>(arguments[lane])->d[row / 8 * 2 + column % 2] += sum[column];
    }
  }
  return Resume::NOW;
}

void multiply_m16n8(Format format, float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  MmaOperands operands{format, d, a, {b0, b1}};
  meet(~0u, Operation::MMA, &operands, act_mma);
}

// ---- descriptors -----------------------------------------------------------------------------------------------

namespace {

struct Tile {
  uint32_t start;         // offset in dynamic shared memory
  uint32_t group_stride;  // bytes from one group of eight rows to the next
  uint32_t panel_stride;  // and from 64 columns to the next, of a transposed tile
};

}  // namespace

// The fields of PTX ISA's "matrix descriptor", the address as an offset in dynamic shared memory.
uint64_t describe_wgmma_tile(const void* tile, uint32_t leading_bytes) {
  uint64_t address = shared_offset(tile);
  return address >> 4 | static_cast<uint64_t>(leading_bytes >> 4) << 16 | static_cast<uint64_t>(1024 >> 4) << 32 |
         1ull << 62;
}

static Tile read_descriptor(uint64_t descriptor) {
  constexpr uint64_t SWIZZLE_128 = 1;
  if (descriptor >> 62 != SWIZZLE_128) die("wgmma: a descriptor without the 128-byte swizzle");
  Tile tile;
  tile.start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  tile.group_stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  tile.panel_stride = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
  if (tile.start % 1024 >= ROW_BYTES) die("wgmma: a tile at offset %u, not a multiple of 1024", tile.start);
  return tile;
}

static void decode_chunk(Format format, float* out, const void* chunk) {
  if (format == Format::E4M3) {
    uint8_t bits[16];
    memcpy(bits, chunk, sizeof bits);
    const float* table = e4m3_table();
    for (int i = 0; i < 16; i++) out[i] = table[bits[i]];
    return;
  }
  uint16_t bits[8];
  memcpy(bits, chunk, sizeof bits);
  uint32_t wide[8];
  for (int i = 0; i < 8; i++) wide[i] = static_cast<uint32_t>(bits[i]) << 16;
  memcpy(out, wide, sizeof wide);
}

// The 16 bytes of a tile at an offset before the swizzle.
static const char* tile_chunk(uint32_t offset) {
  bool fits = (offset | (ROW_BYTES - 1)) < here().block->dynamic_shared_bytes;
  if (!fits) die("wgmma: a tile reaches past dynamic shared memory");
  const char* chunk = here().block->dynamic_shared + swizzle_128(offset);
  note_read(chunk, 16);
  return chunk;
}

// Rows [first_row, first_row + num_rows) of a tile, 32 bytes each.
static void decode_rows(Format format, float (*out)[MAX_K], const Tile& tile, uint32_t first_row, uint32_t num_rows) {
  for (uint32_t i = 0; i < num_rows; i++) {
    uint32_t row = first_row + i;
    uint32_t offset = tile.start + row / 8 * tile.group_stride + row % 8 * ROW_BYTES;
    for (uint32_t half = 0; half < 2; half++) {
      decode_chunk(format, out[i] + half * depth_of(format) / 2, tile_chunk(offset + half * 16));
    }
  }
}

// The 16 rows of a transposed tile of bf16, each of one k: out[n][k].
static void decode_transposed(float (*out)[MAX_K], const Tile& tile, uint32_t num_columns) {
  if (tile.start % 1024 != 0) die("wgmma: a transposed tile at offset %u, not a multiple of 1024", tile.start);
  for (uint32_t k = 0; k < depth_of(Format::BF16); k++) {
    uint32_t row = tile.start + k / 8 * tile.group_stride + k % 8 * ROW_BYTES;
    for (uint32_t column = 0; column < num_columns; column += 8) {
      float elements[8];
      decode_chunk(Format::BF16, elements, tile_chunk(row + column / 64 * tile.panel_stride + column % 64 * 2));
      for (uint32_t i = 0; i < 8; i++) out[column + i][k] = elements[i];
    }
  }
}

// ---- accumulators ----------------------------------------------------------------------------------------------

// Lane l holds in accumulators[l][4 j + 2 h + i] row l / 4 + 8 h, column 8 j + 2 (l % 4) + i.
static void load_accumulators(Column* columns, uint32_t num_columns, float* const* accumulators) {
  for (uint32_t lane = 0; lane < LANES; lane++) {
    const float* d = accumulators[lane];
    for (uint32_t column = lane % 4 * 2; column < num_columns; column += 8, d += 4) {
      columns[column][lane / 4] = d[0];
      columns[column + 1][lane / 4] = d[1];
      columns[column][lane / 4 + 8] = d[2];
      columns[column + 1][lane / 4 + 8] = d[3];
    }
  }
}

static void store_accumulators(const Column* columns, uint32_t num_columns, float* const* accumulators) {
  for (uint32_t lane = 0; lane < LANES; lane++) {
    float* d = accumulators[lane];
    for (uint32_t column = lane % 4 * 2; column < num_columns; column += 8, d += 4) {
      d[0] = columns[column][lane / 4];
      d[1] = columns[column + 1][lane / 4];
      d[2] = columns[column][lane / 4 + 8];
      d[3] = columns[column + 1][lane / 4 + 8];
    }
  }
}

// ---- wgmma -----------------------------------------------------------------------------------------------------

// columns[n] = Σ_k a_transposed[k] · b[n][k], plus columns[n] if `accumulate`. Eight columns at once hide the latency.
static void multiply_columns(Column* columns, const Column* a_transposed, const float (*b)[MAX_K],
                             const WgmmaOperation& operation) {
  for (uint32_t n = 0; n < operation.columns; n += 8) {
    Column sums[8] = {};
    for (uint32_t k = 0; k < depth_of(operation.format); k++) {
      for (uint32_t i = 0; i < 8; i++) sums[i] += a_transposed[k] * b[n + i][k];
    }
    for (uint32_t i = 0; i < 8; i++) columns[n + i] = operation.accumulate ? columns[n + i] + sums[i] : sums[i];
  }
}

static void multiply_tiles(WgmmaScratch& scratch, const WarpWgmma& wgmma, uint32_t warp) {
  const WgmmaOperation& operation = wgmma.operation;
  float a[WARP_ROWS][MAX_K];
  if (operation.is_transposed) {
    for (uint32_t lane = 0; lane < LANES; lane++) gather_left(operation.format, lane, wgmma.fragments[lane], a);
    decode_transposed(scratch.b, read_descriptor(operation.b), operation.columns);
  } else {
    decode_rows(operation.format, a, read_descriptor(operation.a), warp % Warpgroup::WARPS * WARP_ROWS, WARP_ROWS);
    decode_rows(operation.format, scratch.b, read_descriptor(operation.b), 0, operation.columns);
  }
  Column a_transposed[MAX_K];
  for (uint32_t k = 0; k < depth_of(operation.format); k++) {
    for (uint32_t row = 0; row < WARP_ROWS; row++) a_transposed[k][row] = a[row][k];
  }
  multiply_columns(scratch.columns, a_transposed, scratch.b, operation);
}

// Does a run of operations; accumulators are loaded and stored once for a run that shares them.
static void perform(WarpTensorCore& core, WarpWgmma* first, WarpWgmma* end, uint32_t warp) {
  AsEngine as_engine(core.order);
  WgmmaScratch& scratch = here().block->engines->scratch;
  for (WarpWgmma* wgmma = first; wgmma != end; wgmma++) {
    if (wgmma->lanes != ~0u) die("wgmma: only lanes %08x of warp %u issued it", wgmma->lanes, warp);
    auto shares = [&](const WarpWgmma& other) {
      return other.operation.columns == wgmma->operation.columns &&
             memcmp(other.accumulators, wgmma->accumulators, sizeof wgmma->accumulators) == 0;
    };
    uint32_t num_columns = wgmma->operation.columns;
    bool starts = wgmma == first || !shares(wgmma[-1]);
    bool ends = wgmma + 1 == end || !shares(wgmma[1]);
    if (starts && wgmma->operation.accumulate) load_accumulators(scratch.columns, num_columns, wgmma->accumulators);
    multiply_tiles(scratch, *wgmma, warp);
    if (ends) store_accumulators(scratch.columns, num_columns, wgmma->accumulators);
    wgmma->done = true;
  }
}

// The warps of a warpgroup issue the same operations; they need not do so at the same time.
static void check_warpgroup(uint32_t warp, const WgmmaOperation& operation) {
  Warpgroup& group = here().block->engines->warpgroups[warp / Warpgroup::WARPS];
  if (warp / Warpgroup::WARPS * Warpgroup::WARPS + Warpgroup::WARPS > here().block->num_warps) {
    die("wgmma: warp %u is in a warpgroup of fewer than four warps", warp);
  }
  uint32_t at = group.num_issued[warp % Warpgroup::WARPS]++ - group.num_forgotten;
  if (at == group.recent.size()) group.recent.push_back(operation);
  if (!(group.recent[at] == operation)) die("wgmma: the warps of a warpgroup differ in operands");
  uint32_t least = *std::min_element(group.num_issued, group.num_issued + Warpgroup::WARPS);
  group.recent.erase(group.recent.begin(), group.recent.begin() + (least - group.num_forgotten));
  group.num_forgotten = least;
}

static void issue(const WgmmaOperation& operation, float* d, const uint32_t* fragment) {
  here().block->engines->used = true;
  WarpTensorCore& core = here().block->engines->tensor_cores[here().warp];
  uint32_t at = core.num_issued[here().lane]++ - core.num_retired;
  uint32_t group = core.num_committed[here().lane];
  if (at == core.pending.size()) {
    check_warpgroup(here().warp, operation);
    core.pending.push_back(WarpWgmma{operation, group, 0, false, {}, {}});
  }
  WarpWgmma& wgmma = core.pending[at];
  if (!(wgmma.operation == operation) || wgmma.group != group) die("wgmma: lanes of warp %u differ", here().warp);
  wgmma.accumulators[here().lane] = d;
  wgmma.fragments[here().lane] = fragment;
  wgmma.lanes |= 1u << here().lane;
  order_release(&core.order.issued);
  if (here().block->early && wgmma.lanes == ~0u) perform(core, &wgmma, &wgmma + 1, here().warp);
}

void issue_wgmma(Format format, float* d, uint64_t a, uint64_t b, uint32_t columns, bool accumulate) {
  issue({a, b, columns, format, accumulate, false}, d, nullptr);
}

void issue_transposed_wgmma(float* d, const uint32_t* a, uint64_t b, uint32_t columns, bool accumulate) {
  issue({0, b, columns, Format::BF16, accumulate, true}, d, a);
}

void commit_wgmma() {
  here().block->engines->used = true;
  here().block->engines->tensor_cores[here().warp].num_committed[here().lane]++;
}

// Does what of the awaited operations is not done yet, and forgets them.
static void retire_awaited(Engines& engines, uint32_t warp) {
  WarpTensorCore& core = engines.tensor_cores[warp];
  WarpWgmma* first = core.pending.data();
  WarpWgmma* end = first + core.num_awaited;
  while (first != end && first->done) first++;
  if (first != end) perform(core, first, end, warp);
  core.pending.erase(core.pending.begin(), core.pending.begin() + static_cast<ptrdiff_t>(core.num_awaited));
  core.num_retired += static_cast<uint32_t>(core.num_awaited);
  core.num_awaited = 0;
}

void finish_awaited_wgmma(Engines& engines, uint32_t warp) {
  retire_awaited(engines, warp);
  engines.waiting_warps &= ~(1u << warp);
  wake_lanes(warp, ~0u);
}

static Resume act_wgmma_wait(uint32_t, void* const* arguments) {
  uint32_t max_in_flight = *static_cast<uint32_t*>(arguments[0]);
  for (uint32_t lane = 0; lane < LANES; lane++) {
    if (*static_cast<uint32_t*>(arguments[lane]) != max_in_flight) die("wgmma_wait: lanes differ");
  }
  WarpTensorCore& core = here().block->engines->tensor_cores[here().warp];
  auto is_awaited = [&](const WarpWgmma& wgmma) { return wgmma.group + max_in_flight < core.num_committed[0]; };
  while (core.num_awaited < core.pending.size() && is_awaited(core.pending[core.num_awaited])) core.num_awaited++;
  if (here().block->early) retire_awaited((*here().block->engines), here().warp);
  if (core.num_awaited == 0) return Resume::NOW;
  here().block->engines->waiting_warps |= 1u << here().warp;
  return Resume::LATER;
}

void wait_wgmma(uint32_t max_in_flight) {
  meet(~0u, Operation::WGMMA_WAIT, &max_in_flight, act_wgmma_wait);
  order_acquire(&here().block->engines->tensor_cores[here().warp].order.finished);
}

const char* unfinished_wgmma(const Engines& engines) {
  for (const WarpTensorCore& core : engines.tensor_cores) {
    if (!core.pending.empty()) return "the block ended before a wgmma that it never waited for";
  }
  for (const Warpgroup& group : engines.warpgroups) {
    if (!group.recent.empty()) return "a warp issued fewer wgmma than others of its warpgroup";
  }
  return nullptr;
}

}  // namespace emulator
