// What the lanes of a warp do together: each lane brings a small struct of its operands, and the last to come fills in
// the results of all.
#include "warp_operations.h"

#include <cstring>

#include "fibers.h"
#include "instructions.h"
#include "sanitizers.h"

namespace emulator {

static bool holds(uint32_t mask, uint32_t lane) { return (mask >> lane & 1) != 0; }

void sync_warp(uint32_t mask) { meet(mask, Operation::SYNC, nullptr, nullptr); }

// ---- shuffles --------------------------------------------------------------------------------------------------

namespace {

struct ShuffleOperands {
  Shuffle kind;
  uint64_t bits;
  int by, width;
  uint64_t result;
};

}  // namespace

// The lane that `lane` reads from: itself where the source falls outside its segment of `width` lanes.
static int source_of(const ShuffleOperands& operands, int lane) {
  int segment = lane & ~(operands.width - 1);
  int last = segment + operands.width - 1;
  switch (operands.kind) {
    case Shuffle::INDEX:
      return segment + (operands.by & (operands.width - 1));
    case Shuffle::XOR:
      return (lane ^ operands.by) > last ? lane : lane ^ operands.by;
    case Shuffle::UP:
      return lane - operands.by < segment ? lane : lane - operands.by;
    case Shuffle::DOWN:
      return lane + operands.by > last ? lane : lane + operands.by;
  }
  return lane;
}

static Resume act_shuffle(uint32_t mask, void* const* arguments) {
  for (uint32_t lane = 0; lane < LANES; lane++) {
    if (!holds(mask, lane)) continue;
    auto* operands = static_cast<ShuffleOperands*>(arguments[lane]);
    uint32_t source = static_cast<uint32_t>(source_of(*operands, static_cast<int>(lane)));
    if (source >= LANES || !holds(mask, source)) die("a shuffle reads lane %u, which mask %08x omits", source, mask);
    operands->result = static_cast<ShuffleOperands*>(arguments[source])->bits;
  }
  return Resume::NOW;
}

uint64_t shuffle(uint32_t mask, Shuffle kind, uint64_t bits, int by, int width) {
  ShuffleOperands operands{kind, bits, by, width, 0};
  meet(mask, Operation::SHUFFLE, &operands, act_shuffle);
  return operands.result;
}

// ---- votes and reductions --------------------------------------------------------------------------------------

namespace {

struct ReduceOperands {
  Reduction kind;
  uint32_t value;  // then the result
};

}  // namespace

static Resume act_ballot(uint32_t mask, void* const* arguments) {
  uint32_t votes = 0;
  for (uint32_t lane = 0; lane < LANES; lane++) {
    if (holds(mask, lane) && *static_cast<uint32_t*>(arguments[lane]) != 0) votes |= 1u << lane;
  }
  for (uint32_t lane = 0; lane < LANES; lane++) {
    if (holds(mask, lane)) *static_cast<uint32_t*>(arguments[lane]) = votes;
  }
  return Resume::NOW;
}

uint32_t ballot(uint32_t mask, bool predicate) {
  uint32_t vote = predicate;
  meet(mask, Operation::BALLOT, &vote, act_ballot);
  return vote;
}

static uint32_t combine(Reduction kind, uint32_t a, uint32_t b) {
  int32_t signed_a = static_cast<int32_t>(a), signed_b = static_cast<int32_t>(b);
  switch (kind) {
    case Reduction::ADD:
      return a + b;
    case Reduction::MIN:
      return a < b ? a : b;
    case Reduction::MAX:
      return a > b ? a : b;
    case Reduction::MIN_SIGNED:
      return signed_a < signed_b ? a : b;
    case Reduction::MAX_SIGNED:
      return signed_a > signed_b ? a : b;
    case Reduction::AND:
      return a & b;
    case Reduction::OR:
      return a | b;
    case Reduction::XOR:
      return a ^ b;
  }
  return a;
}

static Resume act_reduce(uint32_t mask, void* const* arguments) {
  uint32_t first = static_cast<uint32_t>(__builtin_ctz(mask));
  ReduceOperands total = *static_cast<ReduceOperands*>(arguments[first]);
  for (uint32_t lane = first + 1; lane < LANES; lane++) {
    if (!holds(mask, lane)) continue;
    auto* operands = static_cast<ReduceOperands*>(arguments[lane]);
    if (operands->kind != total.kind) die("lanes meet in different reductions");
    total.value = combine(total.kind, total.value, operands->value);
  }
  for (uint32_t lane = 0; lane < LANES; lane++) {
    if (holds(mask, lane)) static_cast<ReduceOperands*>(arguments[lane])->value = total.value;
  }
  return Resume::NOW;
}

uint32_t reduce(uint32_t mask, Reduction kind, uint32_t value) {
  ReduceOperands operands{kind, value};
  meet(mask, Operation::REDUCE, &operands, act_reduce);
  return operands.value;
}

// ---- ldmatrix --------------------------------------------------------------------------------------------------

namespace {

struct LdmatrixOperands {
  uint32_t* registers;
  const void* row;
  uint32_t num_matrices;
  bool transposed;
};

}  // namespace

// Lane l gets from each matrix row l / 4, columns 2 (l % 4) and the next; or column l / 4 and those rows.
static void distribute_matrix(const uint16_t (&matrix)[8][8], uint32_t index, bool transposed, void* const* arguments) {
  for (uint32_t lane = 0; lane < LANES; lane++) {
    uint32_t i = lane / 4, j = lane % 4 * 2;
    uint32_t low = transposed ? matrix[j][i] : matrix[i][j];
    uint32_t high = transposed ? matrix[j + 1][i] : matrix[i][j + 1];
    static_cast<LdmatrixOperands*>(arguments[lane])->registers[index] = low | high << 16;
  }
}

static Resume act_ldmatrix(uint32_t, void* const* arguments) {
  auto& first = *static_cast<LdmatrixOperands*>(arguments[0]);
  uint16_t matrices[4][8][8];
  // All rows are read before a register is written: nothing keeps a kernel from overlaying them.
  for (uint32_t lane = 0; lane < first.num_matrices * 8; lane++) {
    const void* row = static_cast<LdmatrixOperands*>(arguments[lane])->row;
    note_read(row, 16);
    memcpy(matrices[lane / 8][lane % 8], row, 16);
  }
  for (uint32_t i = 0; i < first.num_matrices; i++) distribute_matrix(matrices[i], i, first.transposed, arguments);
  return Resume::NOW;
}

void load_matrices(uint32_t* registers, const void* row, uint32_t num_matrices, bool transposed) {
  bool gives_address = here().lane < num_matrices * 8;
  if (gives_address && reinterpret_cast<uintptr_t>(row) % 16 != 0) die("ldmatrix: row %p is not a multiple of 16", row);
  LdmatrixOperands operands{registers, row, num_matrices, transposed};
  meet(~0u, Operation::LDMATRIX, &operands, act_ldmatrix);
}

}  // namespace emulator
