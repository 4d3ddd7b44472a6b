// The grouped matrix product where there is no wgmma: mma.sync fed by cp.async, on every GPU from sm_80 on.
//
// One block of four warps per tile of 64 weight rows and TOKENS tokens; warp w has weight rows 16 w and all tokens, so
// its accumulators lie as wgmma's would and the epilogue is shared. A stage is a tile of weights and one of tokens, 128
// bytes wide (shared_tile.cuh), of bf16 or, from sm_89 on, of e4m3: fragments of both lie in the same bytes.
//
// The launch: a fixed number of blocks walk all tiles; weights [expert][weight_rows][stride], x [rows][stride].
#include "grouped_gemm.cuh"
#include "shared_tile.cuh"

constexpr int MMA_THREADS = 4 * WARP;
constexpr int MMA_STAGES = 3;

template <int ROWS>
DEVICE void load_tile(bf16* tile, const bf16* rows, int num_valid, int stride) {
  for (int i = threadIdx.x; i < ROWS * (TILE_K / CHUNK); i += MMA_THREADS) {
    int row = i / (TILE_K / CHUNK), chunk = i % (TILE_K / CHUNK);
    bool valid = row < num_valid;
    const bf16* source = rows + static_cast<int64_t>(valid ? row : 0) * stride + chunk * CHUNK;
    cp_async_16(tile_chunk<TILE_K>(tile, row, chunk), source, valid);
  }
}

template <Format FORMAT>
DEVICE void multiply_tile(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef HAS_E4M3
  if constexpr (FORMAT == E4M3) return mma_m16n8k32(d, a, b0, b1);
#endif
  mma_m16n8k16(d, a, b0, b1);
}

template <Format FORMAT, int TOKENS>
DEVICE void multiply_stage(float (&d)[TOKENS / 2], bf16* weights, bf16* x) {
  int warp = threadIdx.x / WARP;
#pragma unroll
  for (int step = 0; step < TILE_K / STEP_K; step++) {
    uint32_t a[4];
    load_left<TILE_K>(a, weights, 16 * warp, step);
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j += 2) {
      uint32_t b[4];
      load_right_pair<TILE_K>(b, x, 8 * j, step);
      multiply_tile<FORMAT>(reinterpret_cast<float(&)[4]>(d[4 * j]), a, b[0], b[1]);
      multiply_tile<FORMAT>(reinterpret_cast<float(&)[4]>(d[4 * j + 4]), a, b[2], b[3]);
    }
  }
}

template <Format FORMAT, int TOKENS, Epilogue EPILOGUE>
DEVICE void grouped_gemm(const bf16* weights, const bf16* x, const GroupedShape& shape, void* out) {
  constexpr int STAGE = (64 + TOKENS) * TILE_K;
  DYNAMIC_SHARED(bf16, stages);
  int num_steps = shape.stride / TILE_K;
  Tile tile;
  for (int index = blockIdx.x; find_tile<64, TOKENS>(shape, index, tile); index += gridDim.x) {
    const bf16* tile_weights =
        weights + (static_cast<int64_t>(tile.expert) * shape.weight_rows + tile.weight_row) * shape.stride;
    const bf16* tile_x = x + static_cast<int64_t>(tile.row) * shape.stride;
    auto load = [&](int step) {
      bf16* stage = stages + step % MMA_STAGES * STAGE;
      if (step < num_steps) {
        load_tile<64>(stage, tile_weights + step * TILE_K, shape.weight_rows - tile.weight_row, shape.stride);
        load_tile<TOKENS>(stage + 64 * TILE_K, tile_x + step * TILE_K, tile.row_end - tile.row, shape.stride);
      }
      // Empty groups keep the count of groups in step with the count of stages.
      cp_async_commit();
    };
    float d[TOKENS / 2] = {};
    for (int step = 0; step < MMA_STAGES - 1; step++) load(step);
    for (int step = 0; step < num_steps; step++) {
      cp_async_wait<MMA_STAGES - 2>();
      // Stage `step` has arrived for all, and all are done with the stage that the next load overwrites.
      __syncthreads();
      load(step + MMA_STAGES - 1);
      bf16* stage = stages + step % MMA_STAGES * STAGE;
      multiply_stage<FORMAT, TOKENS>(d, stage, stage + 64 * TILE_K);
    }
    cp_async_wait<0>();
    __syncthreads();
    store_tile<FORMAT, TOKENS, EPILOGUE>(d, shape, tile, tile.weight_row, out);
  }
}

#define GROUPED_GEMM_MMA(NAME, FORMAT, TOKENS, EPILOGUE)                                           \
  KERNEL(MMA_THREADS, NAME)(const bf16* weights, const bf16* x, GroupedShape shape, void* out) { \
    wait_for_previous_kernel();                                                                    \
    let_next_kernel_start();                                                                       \
    grouped_gemm<FORMAT, TOKENS, EPILOGUE>(weights, x, shape, out);                                \
  }                                                                                                \
  REGISTER_KERNEL(NAME)

#define GROUPED_GEMMS_MMA(NAME, FORMAT, EPILOGUE)       \
  GROUPED_GEMM_MMA(NAME##_16, FORMAT, 16, EPILOGUE)     \
  GROUPED_GEMM_MMA(NAME##_64, FORMAT, 64, EPILOGUE)

GROUPED_GEMMS_MMA(mma_f32, BF16, STORE_F32)
GROUPED_GEMMS_MMA(mma_bf16, BF16, STORE_BF16)
GROUPED_GEMMS_MMA(mma_swiglu, BF16, SWIGLU)
#ifdef HAS_E4M3
GROUPED_GEMMS_MMA(mma_e4m3_f32, E4M3, STORE_F32)
GROUPED_GEMMS_MMA(mma_e4m3_bf16, E4M3, STORE_BF16)
GROUPED_GEMMS_MMA(mma_e4m3_swiglu, E4M3, SWIGLU)
#endif
