// What runs beside the threads of a block: the cp.async groups of each thread, the bulk tensor copies (TMA) of the
// block, and the wgmma operations of each warp.
//
// LATE does a thread's copies where it waits for them, and the rest when no thread of the block can run: copies before
// wgmma in forward schedules, the other way round and the newest first in backward ones, in any order in seeded ones,
// which also do some sooner. EARLY does all where it is issued. A missing wait before the data is used shows in the
// first, a missing wait before the memory is reused in the second.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fibers.h"
#include "instructions.h"
#include "sanitizers.h"

namespace emulator {

// cuTensorMapEncodeTiled's result as the emulator reads it back.
struct TensorMapFields {
  static constexpr uint32_t MAGIC = 0x50414d54;
  static constexpr uint32_t MAX_RANK = 3;
  const char* address;
  uint64_t dims[MAX_RANK];     // in elements
  uint64_t strides[MAX_RANK];  // in bytes, of dimensions 1 and up; strides[0] is the size of an element
  uint32_t box[MAX_RANK];      // in elements
  uint32_t rank;
  uint32_t element_bytes;
  uint32_t swizzle_128;
  uint32_t magic;
};

struct BulkCopy {
  TensorMapFields map;
  uint32_t shared_offset;
  uint64_t* barrier;
  int64_t start[TensorMapFields::MAX_RANK];
};

struct AsyncCopy {
  char* shared;
  const char* global;
  uint32_t group;
  uint32_t num_bytes;
  bool valid;
};

// The copies of one thread that were issued and not yet done, oldest first.
struct AsyncCopies {
  PlainVector<AsyncCopy> pending;
  uint32_t num_committed = 0;
};

struct WgmmaOperation {
  uint64_t a, b;  // descriptors; a is not used where it comes from registers
  uint32_t columns;
  Format format;
  bool accumulate;
  bool is_transposed;  // b, and a comes from registers
  bool operator==(const WgmmaOperation& other) const {
    return a == other.a && b == other.b && columns == other.columns && format == other.format &&
           accumulate == other.accumulate && is_transposed == other.is_transposed;
  }
};

// A warp's share, 16 of the 64 rows, of a wgmma.
struct WarpWgmma {
  WgmmaOperation operation;
  uint32_t group;
  uint32_t lanes;  // those that have issued it
  bool done;
  float* accumulators[LANES];
  const uint32_t* fragments[LANES];  // of a, if it comes from registers
};

struct WarpTensorCore {
  PlainVector<WarpWgmma> pending;  // oldest first
  uint32_t num_retired = 0;        // operations that have left `pending`
  size_t num_awaited = 0;          // operations at the front of `pending` that the warp waits for
  EngineOrder order;
  uint32_t num_issued[LANES] = {};
  uint32_t num_committed[LANES] = {};
};

// The operations of a warpgroup that some of its warps have not issued yet: all four must issue the same.
struct Warpgroup {
  static constexpr uint32_t WARPS = 4;
  PlainVector<WgmmaOperation> recent;
  uint32_t num_forgotten = 0;
  uint32_t num_issued[WARPS] = {};
};

constexpr uint32_t MAX_K = 32;  // of one operation, in e4m3; 16 in bf16
constexpr uint32_t WARP_ROWS = 16;
constexpr uint32_t MAX_COLUMNS = 256;

// 16 rows of one column, or of one k: the unit in which the compiler vectorises on every target.
typedef float Column __attribute__((vector_size(WARP_ROWS * sizeof(float))));

// What a wgmma works in; too large for the stack of a thread, and better in the cache where it is.
struct WgmmaScratch {
  Column columns[MAX_COLUMNS];
  float b[MAX_COLUMNS][MAX_K];
};

struct Engines {
  AsyncCopies copies[MAX_THREADS];
  WarpTensorCore tensor_cores[MAX_WARPS];
  Warpgroup warpgroups[MAX_WARPS / Warpgroup::WARPS];
  PlainVector<BulkCopy> bulk_copies;
  EngineOrder copy_order;
  uint32_t waiting_warps = 0;  // those with awaited wgmma
  WgmmaScratch scratch;
  bool used = false;  // whether the block has left anything to reset
};

constexpr uint32_t ROW_BYTES = 128;
// The 128-byte swizzle: the 16-byte chunk of a row is exclusive-ored with the row's place in its group of eight.
constexpr uint32_t swizzle_128(uint32_t offset) { return offset ^ ((offset >> 7 & 7) << 4); }

// Does what the warp waits for, and wakes it.
void finish_awaited_wgmma(Engines& engines, uint32_t warp);
const char* unfinished_wgmma(const Engines& engines);

}  // namespace emulator
