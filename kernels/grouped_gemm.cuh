// What the grouped matrix products have in common: how a launch is cut into tiles, and what is done with a finished
// one.
//
//   y[row, feature] = Σ_k weights[expert(row), feature, k] · x[row, k]      rows sorted by expert
//
// A product without experts is one group. The weights are the left operand (their rows are the M of the tensor core's
// tile) and the tokens the right one, so that a step of one token fills a tile of eight columns and not one of 64 rows.
// Every element is the sum over K in steps of 32 bytes, from the first to the last, whatever tile it falls into: a
// row's result does not depend on its batch.
//
// Operands are both bf16 or both e4m3. The latter have a scale per row, with which a finished sum is multiplied; all
// else is the same bytes, so widths and strides are counted in units of two bytes: one bf16 or two e4m3.
//
// Expert counts are read on the device: a fixed number of blocks walk all tiles.
#pragma once
#include "device.cuh"

constexpr int TILE_K = 64;  // units of two bytes
constexpr int STEP_K = 16;  // of one operation of the tensor cores
constexpr int MAX_EXPERTS = 256;

// Shape of a product; `offsets` is null for a product without experts, whose rows are 0..num_rows.
struct GroupedShape {
  const uint32_t* offsets;
  int num_experts;
  int num_rows;
  // Rows of one expert's weights.
  int weight_rows;
  // Width of x and of the weights in units of two bytes, a multiple of TILE_K.
  int stride;
  // Columns of the output that exist, and its row stride.
  int features;
  int out_stride;
  // Of e4m3: [experts, weight_rows] and [rows].
  const float* weight_scales;
  const float* row_scales;
};

enum Format { BF16, E4M3 };

// One tile: weights from row `weight_row` of `expert` on, times tokens from `row` on; the expert's end at `row_end`.
struct Tile {
  int expert;
  int weight_row;
  int row;
  int row_end;
};

// Tiles that share tokens or weights run at the same time: up to this many token tiles of a weight tile follow one
// another, then the next weight tile meets the same tokens, which are in the L2 cache by then.
constexpr int TOKEN_TILES_PER_BAND = 16;

// Finds tile `index`; false if there are fewer.
template <int TILE_ROWS, int TILE_TOKENS>
DEVICE bool find_tile(const GroupedShape& shape, int index, Tile& tile) {
  int weight_tiles = ceil_div(shape.weight_rows, TILE_ROWS);
  for (int expert = 0; expert < shape.num_experts; expert++) {
    int start = shape.offsets ? static_cast<int>(shape.offsets[expert]) : 0;
    int end = shape.offsets ? static_cast<int>(shape.offsets[expert + 1]) : shape.num_rows;
    int token_tiles = ceil_div(end - start, TILE_TOKENS);
    if (index >= token_tiles * weight_tiles) {
      index -= token_tiles * weight_tiles;
      continue;
    }
    int band = index / (TOKEN_TILES_PER_BAND * weight_tiles);
    int in_band = index - band * TOKEN_TILES_PER_BAND * weight_tiles;
    int band_tiles = min(TOKEN_TILES_PER_BAND, token_tiles - band * TOKEN_TILES_PER_BAND);
    tile.expert = expert;
    tile.weight_row = in_band / band_tiles * TILE_ROWS;
    tile.row = start + (band * TOKEN_TILES_PER_BAND + in_band % band_tiles) * TILE_TOKENS;
    tile.row_end = end;
    return true;
  }
  return false;
}

enum Epilogue {
  STORE_F32,
  STORE_BF16,
  // Weight rows are gate and up, interleaved by eight: out = silu(gate) · up, bf16.
  SWIGLU,
};

// A full division here costs a prompt's gate and up a quarter of their time; this one is right to two units in the last
// place, and a result is rounded to bf16.
DEVICE float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

// Both epilogues write 64 rows of the weights times TILE_TOKENS tokens. Thread t of four warps holds in d[4 j + 2 h +
// i] weight row 16 (t / 32) + (t % 32) / 4 + 8 h and token 8 j + 2 (t % 4) + i: the layout of wgmma and of mma.sync
// alike.

// What a finished sum of this thread is multiplied with: the scales of its weight row and of its token.
template <Format FORMAT>
struct Scales {
  const float* of_rows;
  float of_weights[2];

  DEVICE Scales(const GroupedShape& shape, const Tile& tile, int weight_row) : of_rows(shape.row_scales) {
    if constexpr (FORMAT == E4M3) {
      int first = weight_row + 16 * (threadIdx.x / WARP % 4) + threadIdx.x % WARP / 4;
      const float* scales = shape.weight_scales + static_cast<int64_t>(tile.expert) * shape.weight_rows;
#pragma unroll
      for (int h = 0; h < 2; h++) of_weights[h] = first + 8 * h < shape.weight_rows ? scales[first + 8 * h] : 0.0f;
    }
  }

  DEVICE float apply(float sum, int h, int row) const {
    return FORMAT == E4M3 ? __fmul_rn(sum, __fmul_rn(of_weights[h], of_rows[row])) : sum;
  }
};

template <Format FORMAT, int TILE_TOKENS>
DEVICE void store_swiglu(const float (&d)[TILE_TOKENS / 2], const GroupedShape& shape, const Tile& tile, int weight_row,
                         bf16* out) {
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
  int feature = (weight_row + 16 * warp) / 2 + 2 * (lane % 4);
  Scales<FORMAT> scales(shape, tile, weight_row);
#pragma unroll
  for (int j = 0; j < TILE_TOKENS / 8; j++) {
    float act[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      // Sums of rows past the expert's end are written nowhere, but their scales may not exist.
      int row = min(tile.row + 8 * j + 2 * (lane % 4) + i, tile.row_end - 1);
      act[i] = silu(scales.apply(d[4 * j + i], 0, row)) * scales.apply(d[4 * j + 2 + i], 1, row);
    }
    // Features run over the lanes and tokens within a thread; the output wants it the other way round.
    uint32_t pair = transpose_8x8(pack_bf16(act[0], act[1]));
    int row = tile.row + 8 * j + lane / 4;
    // The second of a pair may be padding: weights there are zeros, and so is the result.
    if (row >= tile.row_end || feature >= shape.features) continue;
    *reinterpret_cast<uint32_t*>(out + static_cast<int64_t>(row) * shape.out_stride + feature) = pair;
  }
}

template <Format FORMAT, int TILE_TOKENS, typename T>
DEVICE void store_products(const float (&d)[TILE_TOKENS / 2], const GroupedShape& shape, const Tile& tile,
                           int weight_row, T* out) {
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
  Scales<FORMAT> scales(shape, tile, weight_row);
#pragma unroll
  for (int j = 0; j < TILE_TOKENS / 8; j++) {
#pragma unroll
    for (int part = 0; part < 4; part++) {
      int row = tile.row + 8 * j + 2 * (lane % 4) + part % 2;
      int feature = weight_row + 16 * warp + lane / 4 + 8 * (part / 2);
      if (row >= tile.row_end || feature >= shape.features) continue;
      float product = scales.apply(d[4 * j + part], part / 2, row);
      T& element = out[static_cast<int64_t>(row) * shape.out_stride + feature];
      if constexpr (sizeof(T) == sizeof(float)) {
        element = product;
      } else {
        element = to_bf16(product);
      }
    }
  }
}

template <Format FORMAT, int TILE_TOKENS, Epilogue EPILOGUE>
DEVICE void store_tile(const float (&d)[TILE_TOKENS / 2], const GroupedShape& shape, const Tile& tile, int weight_row,
                       void* out) {
  if constexpr (EPILOGUE == SWIGLU) {
    store_swiglu<FORMAT, TILE_TOKENS>(d, shape, tile, weight_row, static_cast<bf16*>(out));
  } else if constexpr (EPILOGUE == STORE_BF16) {
    store_products<FORMAT, TILE_TOKENS>(d, shape, tile, weight_row, static_cast<bf16*>(out));
  } else {
    store_products<FORMAT, TILE_TOKENS>(d, shape, tile, weight_row, static_cast<float*>(out));
  }
}
