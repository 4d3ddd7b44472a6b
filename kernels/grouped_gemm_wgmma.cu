// The grouped matrix product on Hopper: persistent, warp-specialised, bulk tensor copies into wgmma.
//
//   warps 0..4·C    C consumer warpgroups, 64 weight rows each; accumulators in registers
//   last warp       the producer: one thread keeps a ring of shared-memory stages full
//
//   stage           C tiles of weights [64 rows, 128 bytes] · one tile of tokens [TOKENS, 128 bytes], swizzled
//
// The producer runs ahead of the consumers, across tiles too, so memory stays busy while a tile is written out. With
// few tokens per expert this streams weights: about 180 KB of them are in flight on every multiprocessor. With many,
// two consumers share 256 tokens, and the tensor cores are the limit.
//
// It starts while the previous kernel still makes its tokens (device.cuh), and fills the ring with weights meanwhile.
// So `offsets` must come from the last kernel but one, or from before: in a layer, a gather or a quantisation lies
// between the route and the first product.
//
// The launch: one block per multiprocessor; STAGES stages of shared memory; maps with boxes of [64 units, 64 rows] over
// the weights [expert][row][k] and of [64 units, TOKENS] over the tokens [row][k].
#include "grouped_gemm.cuh"

#ifdef HAS_WGMMA

template <int CONSUMERS, int TOKENS>
struct Stage {
  static constexpr int WEIGHT_TILE_BYTES = 64 * TILE_K * 2;
  static constexpr int TOKEN_TILE_BYTES = TOKENS * TILE_K * 2;
  static constexpr int BYTES = CONSUMERS * WEIGHT_TILE_BYTES + TOKEN_TILE_BYTES;
};

// A position in the ring of stages: waits alternate between the two parities from one round to the next.
template <int STAGES>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  DEVICE void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <int CONSUMERS, int TOKENS, int STAGES>
DEVICE void produce(const TensorMap* weights, const TensorMap* x, const GroupedShape& shape, uint8_t* stages,
                    uint64_t* full, uint64_t* empty) {
  using S = Stage<CONSUMERS, TOKENS>;
  Ring<STAGES> ring;
  Tile tile;
  auto load_weights = [&](int stage, int k) {
    // Both parts are expected here: the stage is full when its tokens have come too.
    mbarrier_arrive_expect(&full[stage], S::BYTES);
    for (int c = 0; c < CONSUMERS; c++) {
      tma_load_3d(stages + stage * S::BYTES + c * S::WEIGHT_TILE_BYTES, weights, &full[stage], k,
                  tile.weight_row + 64 * c, tile.expert);
    }
  };
  auto load_tokens = [&](int stage, int k) {
    tma_load_2d(stages + stage * S::BYTES + CONSUMERS * S::WEIGHT_TILE_BYTES, x, &full[stage], k, tile.row);
  };
  // The previous kernel makes the tokens, not the weights: these fill the ring once while it still runs.
  int num_ahead = 0;
  if (find_tile<64 * CONSUMERS, TOKENS>(shape, blockIdx.x, tile)) {
    for (; num_ahead < min(STAGES, shape.stride / TILE_K); num_ahead++) load_weights(num_ahead, num_ahead * TILE_K);
  }
  wait_for_previous_kernel();
  for (int index = blockIdx.x; find_tile<64 * CONSUMERS, TOKENS>(shape, index, tile); index += gridDim.x) {
    for (int k = 0; k < shape.stride; k += TILE_K) {
      if (num_ahead > 0) {
        num_ahead--;
      } else {
        // The first round finds the stages empty: the wait for the phase before the first returns at once.
        mbarrier_wait(&empty[ring.stage], ring.parity ^ 1);
        load_weights(ring.stage, k);
      }
      load_tokens(ring.stage, k);
      ring.advance();
    }
  }
}

template <Format FORMAT, int CONSUMERS, int TOKENS, int STAGES, Epilogue EPILOGUE>
DEVICE void consume(const GroupedShape& shape, void* out, uint8_t* stages, uint64_t* full, uint64_t* empty) {
  using S = Stage<CONSUMERS, TOKENS>;
  int consumer = threadIdx.x / (4 * WARP);
  Ring<STAGES> ring;
  Tile tile;
  float d[TOKENS / 2];
  wait_for_previous_kernel();
  let_next_kernel_start();
  for (int index = blockIdx.x; find_tile<64 * CONSUMERS, TOKENS>(shape, index, tile); index += gridDim.x) {
    int previous = -1;
    for (int k = 0; k < shape.stride; k += TILE_K) {
      uint8_t* stage = stages + ring.stage * S::BYTES;
      mbarrier_wait(&full[ring.stage], ring.parity);
      registers_changed(d);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < TILE_K / STEP_K; step++) {
        uint64_t left = wgmma_descriptor(stage + consumer * S::WEIGHT_TILE_BYTES + 32 * step);
        uint64_t right = wgmma_descriptor(stage + CONSUMERS * S::WEIGHT_TILE_BYTES + 32 * step);
        bool accumulate = k > 0 || step > 0;
        if constexpr (FORMAT == E4M3) {
          wgmma_m64k32<TOKENS>(d, left, right, accumulate);
        } else {
          wgmma_m64k16<TOKENS>(d, left, right, accumulate);
        }
      }
      wgmma_commit();
      // The products of the previous stage are done once only this one's are in flight.
      wgmma_wait<1>();
      if (previous >= 0 && threadIdx.x % WARP == 0) mbarrier_arrive(&empty[previous]);
      previous = ring.stage;
      ring.advance();
    }
    wgmma_wait<0>();
    registers_changed(d);
    if (threadIdx.x % WARP == 0) mbarrier_arrive(&empty[previous]);
    store_tile<FORMAT, TOKENS, EPILOGUE>(d, shape, tile, tile.weight_row + 64 * consumer, out);
  }
}

template <Format FORMAT, int CONSUMERS, int TOKENS, int STAGES, Epilogue EPILOGUE>
DEVICE void grouped_gemm(const TensorMap* weights, const TensorMap* x, GroupedShape shape, void* out) {
  DYNAMIC_SHARED(uint8_t, stages);
  __shared__ __align__(8) uint64_t full[STAGES];
  __shared__ __align__(8) uint64_t empty[STAGES];
  __shared__ uint32_t offsets[MAX_EXPERTS + 1];
  if (shape.offsets) {
    for (int i = threadIdx.x; i <= shape.num_experts; i += blockDim.x) offsets[i] = __ldcg(shape.offsets + i);
    shape.offsets = offsets;
  }
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; stage++) {
      mbarrier_init(&full[stage], 1);
      mbarrier_init(&empty[stage], 4 * CONSUMERS);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= 4 * WARP * CONSUMERS) {
    if (threadIdx.x % WARP == 0) {
      produce<CONSUMERS, TOKENS, STAGES>(weights, x, shape, stages, full, empty);
    }
  } else {
    consume<FORMAT, CONSUMERS, TOKENS, STAGES, EPILOGUE>(shape, out, stages, full, empty);
  }
}

// A name ends with TOKENS; CONSUMERS and STAGES the host must know by it (tests/gpu/launches.py, TILES).
#define GROUPED_GEMM(NAME, FORMAT, CONSUMERS, TOKENS, STAGES, EPILOGUE)                                           \
  KERNEL(WARP * (4 * CONSUMERS + 1), NAME)(const __grid_constant__ TensorMap weights,                             \
                                           const __grid_constant__ TensorMap x, GroupedShape shape, void* out) { \
    grouped_gemm<FORMAT, CONSUMERS, TOKENS, STAGES, EPILOGUE>(&weights, &x, shape, out);                          \
  }                                                                                                               \
  REGISTER_KERNEL(NAME)

#define GROUPED_GEMMS(NAME, FORMAT, EPILOGUE)            \
  GROUPED_GEMM(NAME##_8, FORMAT, 1, 8, 20, EPILOGUE)     \
  GROUPED_GEMM(NAME##_16, FORMAT, 1, 16, 18, EPILOGUE)   \
  GROUPED_GEMM(NAME##_32, FORMAT, 1, 32, 16, EPILOGUE)   \
  GROUPED_GEMM(NAME##_64, FORMAT, 1, 64, 12, EPILOGUE)   \
  GROUPED_GEMM(NAME##_128, FORMAT, 2, 128, 6, EPILOGUE)  \
  GROUPED_GEMM(NAME##_256, FORMAT, 2, 256, 4, EPILOGUE)

GROUPED_GEMMS(wgmma_f32, BF16, STORE_F32)
GROUPED_GEMMS(wgmma_bf16, BF16, STORE_BF16)
GROUPED_GEMMS(wgmma_swiglu, BF16, SWIGLU)
GROUPED_GEMMS(wgmma_e4m3_f32, E4M3, STORE_F32)
GROUPED_GEMMS(wgmma_e4m3_bf16, E4M3, STORE_BF16)
GROUPED_GEMMS(wgmma_e4m3_swiglu, E4M3, SWIGLU)

#endif  // HAS_WGMMA
