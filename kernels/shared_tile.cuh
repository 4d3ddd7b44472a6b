// Tiles of bf16 in shared memory that cp.async fills and tensor cores read: rows of WIDTH elements whose 16-byte chunks
// are exchanged by the row, so that the eight rows of an ldmatrix fall into different banks.
#pragma once
#include "device.cuh"

constexpr int CHUNK = 8;  // bf16 in 16 bytes

// Chunk `chunk` of row `row`. Rows of 128 bytes or more are exchanged by their low three bits; of narrower ones several
// share a line of banks, and are exchanged together.
template <int WIDTH>
DEVICE bf16* tile_chunk(bf16* tile, int row, int chunk) {
  constexpr int CHUNKS = WIDTH / CHUNK;
  constexpr int ROWS_PER_LINE = CHUNKS >= 8 ? 1 : 8 / CHUNKS;
  constexpr int MASK = CHUNKS >= 8 ? 7 : CHUNKS - 1;
  return tile + row * WIDTH + ((chunk ^ (row / ROWS_PER_LINE & MASK)) * CHUNK);
}

// Where the chunks of a tile lie: rows one behind the other, as mma.sync reads them.
template <int WIDTH>
struct WholeRows {
  static constexpr int PITCH = WIDTH;
  static DEVICE bf16* chunk(bf16* tile, int row, int chunk) { return tile_chunk<WIDTH>(tile, row, chunk); }
};

// Or panels of 64 elements of all ROWS rows, as wgmma reads them: the exchange is its 128-byte swizzle.
template <int ROWS>
struct Panels {
  static constexpr int WIDTH = 64;
  static constexpr int PITCH = WIDTH;
  static constexpr int SIZE = ROWS * WIDTH;
  static DEVICE bf16* chunk(bf16* tile, int row, int chunk) {
    constexpr int CHUNKS = WIDTH / CHUNK;
    return tile_chunk<WIDTH>(tile + chunk / CHUNKS * SIZE, row, chunk % CHUNKS);
  }
};

// The left operand of m16n8k16: rows `row`.. and elements 16 `step`.. of a tile.
template <int WIDTH>
DEVICE void load_left(uint32_t (&a)[4], bf16* tile, int row, int step) {
  int lane = threadIdx.x % WARP;
  ldmatrix_x4(a, tile_chunk<WIDTH>(tile, row + lane % 16, 2 * step + lane / 16));
}

// The right operands of two m16n8k16: b[0], b[1] have rows `row`.. of a tile as columns, b[2], b[3] the next eight.
template <int WIDTH>
DEVICE void load_right_pair(uint32_t (&b)[4], bf16* tile, int row, int step) {
  int lane = threadIdx.x % WARP;
  ldmatrix_x4(b, tile_chunk<WIDTH>(tile, row + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
}
