// Kernels that try each wrapper of device.cuh and wgmma.cuh, and kernels with planted bugs. tests.cpp runs them on the
// emulator and knows what they should give; tests/gpu/wrappers.py runs those without bugs on a GPU too, and compares.
//
// The two pipelines are small versions of the matrix products in use: cp.async into ldmatrix and mma.sync, and bulk
// tensor copies into wgmma. A `Bug` leaves out one of their steps; on a GPU those are not even compiled.
#include "device.cuh"
#include "shared_tile.cuh"

// ---- warps -----------------------------------------------------------------------------------------------------

// out[operation][lane]: shuffles, votes and reductions over one warp, whole and in segments of eight.
KERNEL(32, warp_operations)(const int* in, int* out) {
  int lane = threadIdx.x, value = in[lane];
  int results[] = {
      __shfl_sync(ALL_LANES, value, lane * 7 % 32),
      __shfl_xor_sync(ALL_LANES, value, 5),
      __shfl_up_sync(ALL_LANES, value, 3),
      __shfl_down_sync(ALL_LANES, value, 3),
      __shfl_sync(ALL_LANES, value, 2, 8),
      __shfl_up_sync(ALL_LANES, value, 3, 8),
      __shfl_down_sync(ALL_LANES, value, 3, 8),
      static_cast<int>(__ballot_sync(ALL_LANES, value % 3 == 0)),
      __any_sync(ALL_LANES, lane == 31),
      __all_sync(ALL_LANES, lane != 31),
      __reduce_add_sync(ALL_LANES, value),
      __reduce_min_sync(ALL_LANES, value),
      __reduce_max_sync(ALL_LANES, value),
  };
  for (int i = 0; i < 13; i++) out[i * 32 + lane] = results[i];
}
REGISTER_KERNEL(warp_operations)

// The two halves of each warp go their own ways: sums over the lanes of one's own half.
KERNEL(64, half_warps)(const int* in, int* out) {
  int lane = threadIdx.x % 32;
  int value = in[threadIdx.x];
  if (lane < 16) {
    for (int offset = 8; offset > 0; offset /= 2) value += __shfl_xor_sync(0x0000ffffu, value, offset);
  } else {
    value = __reduce_add_sync(0xffff0000u, value);
  }
  out[threadIdx.x] = value;
}
REGISTER_KERNEL(half_warps)

// The sums of many blocks, through shared and global atomics.
KERNEL(256, atomics)(const int* in, int count, int* sum, unsigned* largest, int* least, float* float_sum,
                     unsigned long long* long_sum) {
  __shared__ int block_sum;
  if (threadIdx.x == 0) block_sum = 0;
  __syncthreads();
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) {
    atomicAdd(&block_sum, in[i]);
    atomicMax(largest, static_cast<unsigned>(in[i]));
    atomicMin(least, in[i]);
    atomicAdd(float_sum, static_cast<float>(in[i]));
    atomicAdd(long_sum, static_cast<unsigned long long>(in[i]));
  }
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(sum, block_sum);
}
REGISTER_KERNEL(atomics)

// ---- barriers --------------------------------------------------------------------------------------------------

// Threads past `count` leave at once; the others reverse their values through shared memory.
KERNEL(256, reverse_after_exit)(const int* in, int count, int* out) {
  __shared__ int values[256];
  int i = threadIdx.x;
  if (i >= count) return;
  values[i] = in[blockIdx.x * count + i];
  __syncthreads();
  out[blockIdx.x * count + i] = values[count - 1 - i];
}
REGISTER_KERNEL(reverse_after_exit)

// Two pairs of warps, each behind a barrier of its own, hand values on round after round.
KERNEL(128, named_barriers)(int* out, int rounds) {
  __shared__ int values[128];
  int pair = threadIdx.x / 64, in_pair = threadIdx.x % 64;
  values[threadIdx.x] = in_pair;
  for (int round = 0; round < rounds * (pair + 1); round++) {
    named_barrier_sync(1 + pair, 64);
    int next = values[pair * 64 + (in_pair + 1) % 64];
    named_barrier_sync(1 + pair, 64);
    values[threadIdx.x] = next;
  }
  out[threadIdx.x] = values[threadIdx.x];
}
REGISTER_KERNEL(named_barriers)

#ifdef EMULATOR
// What a block finds in shared memory that it never wrote, and then leaves there for the next: here poison.
KERNEL(32, unwritten_shared)(unsigned* out) {
  __shared__ unsigned fixed[32];
  DYNAMIC_SHARED(unsigned, dynamic);
  out[(blockIdx.x * 2 + 0) * 32 + threadIdx.x] = fixed[threadIdx.x];
  out[(blockIdx.x * 2 + 1) * 32 + threadIdx.x] = dynamic[threadIdx.x];
  fixed[threadIdx.x] = dynamic[threadIdx.x] = 7;
}
REGISTER_KERNEL(unwritten_shared)
#endif

// Where each thread of a grid of three dimensions is.
KERNEL(24, coordinates)(uint4* out) {
  int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * 24 + thread] = make_uint4(threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z,
                                        blockIdx.x + 10 * blockIdx.y + 100 * blockIdx.z, blockDim.y, gridDim.z);
}
REGISTER_KERNEL(coordinates)

// ---- numbers ---------------------------------------------------------------------------------------------------

KERNEL(256, numbers)(const float* in, int count, uint32_t* packed, uint16_t* eighths, float* rounded, float* powers) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  packed[i] = pack_bf16(in[i], -in[i]);
  rounded[i] = to_f32(to_bf16(in[i]));
  powers[i] = exp2_approx(in[i]);
  eighths[i] = pack_e4m3(in[i] / 8.0f, -in[i]);
}
REGISTER_KERNEL(numbers)

KERNEL(256, bf16_products)(const uint32_t* a, const uint32_t* b, int count, uint32_t* products) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) products[i] = multiply_bf16(a[i], b[i]);
}
REGISTER_KERNEL(bf16_products)

// ---- fragments -------------------------------------------------------------------------------------------------

// The registers of ldmatrix and of its transposed form, for 32 rows of eight elements.
KERNEL(32, matrices)(const uint4* rows, uint32_t* out) {
  __shared__ uint4 shared[32];
  shared[threadIdx.x] = rows[threadIdx.x];
  __syncwarp();
  uint32_t plain[4], transposed[4];
  ldmatrix_x4(plain, &shared[threadIdx.x]);
  ldmatrix_x4_trans(transposed, &shared[threadIdx.x]);
  for (int i = 0; i < 4; i++) {
    // Transposed in registers it must be the same; a difference spoils what the host compares.
    if (transpose_8x8(plain[i]) != transposed[i]) transposed[i] = ~transposed[i];
    out[threadIdx.x * 8 + i] = plain[i];
    out[threadIdx.x * 8 + 4 + i] = transposed[i];
  }
}
REGISTER_KERNEL(matrices)

// ---- cp.async --------------------------------------------------------------------------------------------------

// Four groups of two copies, each read as soon as no more than those behind it are in flight. Every third copy is not
// valid, and must write zeros over what was there.
KERNEL(32, async_copies)(const uint4* in, uint4* out) {
  constexpr int GROUPS = 4;
  __shared__ uint4 slots[GROUPS * 64];
  for (int i = threadIdx.x; i < GROUPS * 64; i += 32) slots[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
  __syncwarp();
  for (int group = 0; group < GROUPS; group++) {
    for (int half = 0; half < 2; half++) {
      int i = group * 64 + half * 32 + threadIdx.x;
      cp_async_16(&slots[i], &in[i], i % 3 != 0);
    }
    cp_async_commit();
  }
  auto read = [&](int group) {
    for (int half = 0; half < 2; half++) {
      int i = group * 64 + half * 32 + threadIdx.x;
      out[i] = slots[i];
    }
  };
  cp_async_wait<3>();
  read(0);
  cp_async_wait<2>();
  read(1);
  cp_async_wait<1>();
  read(2);
  cp_async_wait<0>();
  read(3);
}
REGISTER_KERNEL(async_copies)

// Two groups of a copy of four bytes for each lane, turned by a lane and by two; every third is not valid.
KERNEL(32, word_copies)(const uint32_t* in, uint32_t* out) {
  __shared__ uint32_t slots[64];
  for (int group = 0; group < 2; group++) {
    int i = group * 32 + (threadIdx.x + 1 + group) % 32;
    slots[i] = ~0u;
    cp_async_4(&slots[i], &in[i], i % 3 != 0);
    cp_async_commit();
  }
  cp_async_wait<1>();
  __syncwarp();
  out[threadIdx.x] = slots[threadIdx.x];
  cp_async_wait<0>();
  __syncwarp();
  out[32 + threadIdx.x] = slots[32 + threadIdx.x];
}
REGISTER_KERNEL(word_copies)

// ---- mma.sync --------------------------------------------------------------------------------------------------

// Four bytes of a fragment: those of this lane's quad, in the 16 bytes at `byte` of a row.
DEVICE uint32_t fragment_word(const uint8_t* matrix, int row, int row_bytes, int byte) {
  return *reinterpret_cast<const uint32_t*>(matrix + static_cast<int64_t>(row) * row_bytes + byte +
                                            threadIdx.x % 4 * 4);
}

// c[16, 8] tiles of a · bᵀ, one warp each, in one chain of mma.sync from the first 32 bytes of a row to the last. Rows
// are of bf16 or e4m3; fragments come straight from global memory.
template <bool IS_E4M3>
DEVICE void mma_chain(const uint8_t* a, const uint8_t* b, float* c, int columns, int row_bytes) {
  int group = threadIdx.x / 4, first_row = blockIdx.y * 16, first_column = blockIdx.x * 8;
  float d[4] = {};
  for (int byte = 0; byte < row_bytes; byte += 32) {
    uint32_t fragment[4];
    for (int i = 0; i < 4; i++) {
      fragment[i] = fragment_word(a, first_row + group + i % 2 * 8, row_bytes, byte + i / 2 * 16);
    }
    uint32_t low = fragment_word(b, first_column + group, row_bytes, byte);
    uint32_t high = fragment_word(b, first_column + group, row_bytes, byte + 16);
    if constexpr (IS_E4M3) {
      mma_m16n8k32(d, fragment, low, high);
    } else {
      mma_m16n8k16(d, fragment, low, high);
    }
  }
  for (int i = 0; i < 4; i++) {
    int row = first_row + group + i / 2 * 8, column = first_column + threadIdx.x % 4 * 2 + i % 2;
    c[row * columns + column] = d[i];
  }
}

KERNEL(32, mma_chain_bf16)(const uint8_t* a, const uint8_t* b, float* c, int columns, int row_bytes) {
  mma_chain<false>(a, b, c, columns, row_bytes);
}
REGISTER_KERNEL(mma_chain_bf16)
KERNEL(32, mma_chain_e4m3)(const uint8_t* a, const uint8_t* b, float* c, int columns, int row_bytes) {
  mma_chain<true>(a, b, c, columns, row_bytes);
}
REGISTER_KERNEL(mma_chain_e4m3)

// ---- cp.async into mma.sync ------------------------------------------------------------------------------------

enum MmaBug { MMA_RIGHT, NO_COPY_WAIT, NO_SYNC_AFTER_COPY, NO_SYNC_BEFORE_COPY };

// Sixteen bytes at `chunk` of a row of 32 elements.
DEVICE bf16* mma_chunk(bf16* tile, int row, int chunk) { return tile + row * 32 + (chunk ^ (row / 2 & 3)) * 8; }

// c[rows, 8 n] = a · bᵀ for tiles of 64 rows and 32 columns; a [rows, k], b [columns, k], k a multiple of 32.
template <MmaBug BUG>
DEVICE void mma_gemm(const bf16* a, const bf16* b, float* c, int rows, int columns, int k_end) {
  constexpr int STAGE = (64 + 32) * 32;
  DYNAMIC_SHARED(bf16, stages);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int first_row = blockIdx.y * 64, first_column = blockIdx.x * 32;
  auto load = [&](int step) {
    bf16* stage = stages + step % 2 * STAGE;
    for (int i = threadIdx.x; i < 96 * 4 && step * 32 < k_end; i += 128) {
      int row = i / 4, chunk = i % 4;
      bool is_a = row < 64;
      bool valid = is_a ? first_row + row < rows : first_column + row - 64 < columns;
      int source_row = valid ? (is_a ? first_row + row : first_column + row - 64) : 0;
      const bf16* source = (is_a ? a : b) + static_cast<int64_t>(source_row) * k_end + step * 32 + chunk * 8;
      cp_async_16(mma_chunk(stage, row, chunk), source, valid);
    }
    cp_async_commit();
  };
  float d[4][4] = {};
  load(0);
  for (int step = 0; step * 32 < k_end; step++) {
    load(step + 1);
    if (BUG != NO_COPY_WAIT) cp_async_wait<1>();
    if (BUG != NO_SYNC_AFTER_COPY) __syncthreads();
    bf16* stage = stages + step % 2 * STAGE;
    for (int half = 0; half < 2; half++) {
      uint32_t fragment[4];
      ldmatrix_x4(fragment, mma_chunk(stage, 16 * warp + lane % 16, 2 * half + lane / 16));
      for (int j = 0; j < 4; j += 2) {
        uint32_t other[4];
        ldmatrix_x4(other, mma_chunk(stage, 64 + 8 * j + lane % 8 + lane / 16 * 8, 2 * half + lane / 8 % 2));
        mma_m16n8k16(d[j], fragment, other[0], other[1]);
        mma_m16n8k16(d[j + 1], fragment, other[2], other[3]);
      }
    }
    if (BUG != NO_SYNC_BEFORE_COPY) __syncthreads();
  }
  for (int j = 0; j < 4; j++) {
    for (int i = 0; i < 4; i++) {
      int row = first_row + 16 * warp + lane / 4 + i / 2 * 8, column = first_column + 8 * j + lane % 4 * 2 + i % 2;
      if (row < rows && column < columns) c[row * columns + column] = d[j][i];
    }
  }
}

#define MMA_GEMM(NAME, BUG)                                                                          \
  KERNEL(128, NAME)(const bf16* a, const bf16* b, float* c, int rows, int columns, int k) {          \
    mma_gemm<BUG>(a, b, c, rows, columns, k);                                                        \
  }                                                                                                  \
  REGISTER_KERNEL(NAME)
MMA_GEMM(mma_gemm_right, MMA_RIGHT)
#ifdef EMULATOR
MMA_GEMM(mma_gemm_no_copy_wait, NO_COPY_WAIT)
MMA_GEMM(mma_gemm_no_sync_after_copy, NO_SYNC_AFTER_COPY)
MMA_GEMM(mma_gemm_no_sync_before_copy, NO_SYNC_BEFORE_COPY)
#endif

// ---- barriers in memory ----------------------------------------------------------------------------------------

// Values go round by one place a round; two barriers take turns, so that each goes through many phases.
KERNEL(64, mbarrier_phases)(int* out, int rounds) {
  __shared__ int values[2][64];
  __shared__ __align__(8) uint64_t barriers[2];
  int thread = threadIdx.x;
  if (thread == 0) {
    for (int side = 0; side < 2; side++) mbarrier_init(&barriers[side], 64);
    mbarrier_init_fence();
  }
  values[0][thread] = thread;
  __syncthreads();
  mbarrier_wait(&barriers[0], 1);  // the phase before the first counts as completed
  for (int round = 0; round < rounds; round++) {
    int side = round % 2;
    if (thread == 17) {
      mbarrier_arrive_expect(&barriers[side], 0);
    } else {
      mbarrier_arrive(&barriers[side]);
    }
    mbarrier_wait(&barriers[side], round / 2 % 2);
    values[side ^ 1][thread] = values[side][(thread + 1) % 64];
  }
  out[thread] = values[rounds % 2][thread];
}
REGISTER_KERNEL(mbarrier_phases)

// One warpgroup gives registers back, and two take them: all there are, as a block of 384 threads starts with 168 each.
KERNEL(384, register_budget)(const int* in, int* out) {
  int i = threadIdx.x;
  if (i < 128) {
    registers_release<24>();
    out[i] = in[i] + 1;
  } else {
    registers_acquire<240>();
    out[i] = in[i] + 2;
  }
}
REGISTER_KERNEL(register_budget)

// ---- bulk tensor copies ----------------------------------------------------------------------------------------

DEVICE void load_and_read_box(const TensorMap* map, int rank, int x, int y, int z, int box_bytes, uint4* out) {
  DYNAMIC_SHARED(uint4, box);
  __shared__ __align__(8) uint64_t arrived;
  if (threadIdx.x == 0) {
    mbarrier_init(&arrived, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(&arrived, box_bytes);
    if (rank == 2) tma_load_2d(box, map, &arrived, x, y);
    if (rank == 3) tma_load_3d(box, map, &arrived, x, y, z);
  }
  __syncthreads();
  mbarrier_wait(&arrived, 0);
  for (int i = threadIdx.x; i < box_bytes / 16; i += 64) out[i] = box[i];
}

// A box of a map, as it lies in shared memory.
KERNEL(64, copy_box)(const __grid_constant__ TensorMap map, int rank, int x, int y, int z, int box_bytes, uint4* out) {
  load_and_read_box(&map, rank, x, y, z, box_bytes, out);
}
REGISTER_KERNEL(copy_box)

// ---- bulk tensor copies into wgmma -----------------------------------------------------------------------------

enum WgmmaBug {
  WGMMA_RIGHT,
  NO_FULL_WAIT,
  NO_EMPTY_WAIT,
  RELEASES_EARLY,
  TOO_MANY_ARRIVALS_EXPECTED,
  TOO_FEW_ARRIVALS_EXPECTED,
  TOO_FEW_BYTES_EXPECTED,
  WARPS_DIFFER,
  NO_FINAL_WAIT,
  NO_INIT_SYNC,
};

// c[64, N] tiles of a · bᵀ: warps 0 to 3 multiply, one thread of warp 4 copies. a [rows][k] with a map of rank 3 of one
// slice, b [columns][k], both in boxes of 64 units of two bytes: one bf16 or two e4m3. k in units, a multiple of 64.
template <int N, bool IS_E4M3, WgmmaBug BUG>
DEVICE void wgmma_gemm(const TensorMap* a, const TensorMap* b, float* c, int columns, int k_end) {
  constexpr int STAGES = 2, A_BYTES = 64 * 128, STAGE_BYTES = A_BYTES + (N * 128 + 1023) / 1024 * 1024;
  constexpr int ARRIVALS = BUG == TOO_MANY_ARRIVALS_EXPECTED ? 5 : BUG == TOO_FEW_ARRIVALS_EXPECTED ? 3 : 4;
  DYNAMIC_SHARED(uint8_t, stages);
  __shared__ __align__(8) uint64_t full[STAGES], empty[STAGES];
  if (threadIdx.x == (BUG == NO_INIT_SYNC ? 159 : 0)) {
    for (int stage = 0; stage < STAGES; stage++) {
      mbarrier_init(&full[stage], 1);
      mbarrier_init(&empty[stage], ARRIVALS);
    }
    mbarrier_init_fence();
  }
  if (BUG != NO_INIT_SYNC) __syncthreads();
  int first_row = blockIdx.y * 64, first_column = blockIdx.x * N;
  if (threadIdx.x >= 128) {
    if (threadIdx.x != 128) return;
    for (int step = 0; step < k_end / 64; step++) {
      int stage = step % STAGES;
      if (BUG != NO_EMPTY_WAIT) mbarrier_wait(&empty[stage], step / STAGES % 2 ^ 1);
      mbarrier_arrive_expect(&full[stage], (BUG == TOO_FEW_BYTES_EXPECTED ? 32 : 64 + N) * 128);
      tma_load_3d(stages + stage * STAGE_BYTES, a, &full[stage], step * 64, first_row, 0);
      tma_load_2d(stages + stage * STAGE_BYTES + A_BYTES, b, &full[stage], step * 64, first_column);
    }
    return;
  }
  float d[N / 2];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int step = 0; step < k_end / 64; step++) {
    int stage = step % STAGES;
    if (BUG != NO_FULL_WAIT) mbarrier_wait(&full[stage], step / STAGES % 2);
    uint8_t* tile = stages + stage * STAGE_BYTES;
    registers_changed(d);
    wgmma_fence();
    for (int i = 0; i < 4; i++) {
      int skew = BUG == WARPS_DIFFER && warp == 2;
      uint64_t left = wgmma_descriptor(tile + 32 * (i ^ skew)), right = wgmma_descriptor(tile + A_BYTES + 32 * i);
      if constexpr (IS_E4M3) {
        wgmma_m64k32<N>(d, left, right, step > 0 || i > 0);
      } else {
        wgmma_m64k16<N>(d, left, right, step > 0 || i > 0);
      }
    }
    wgmma_commit();
    if (BUG == RELEASES_EARLY && lane == 0) mbarrier_arrive(&empty[stage]);
    if (BUG != NO_FINAL_WAIT) wgmma_wait<0>();
    registers_changed(d);
    if (BUG != RELEASES_EARLY && lane == 0) mbarrier_arrive(&empty[stage]);
  }
  for (int j = 0; j < N / 8; j++) {
    for (int i = 0; i < 4; i++) {
      int row = first_row + 16 * warp + lane / 4 + i / 2 * 8, column = first_column + 8 * j + lane % 4 * 2 + i % 2;
      c[row * columns + column] = d[4 * j + i];
    }
  }
}

#define WGMMA_GEMM(NAME, N, IS_E4M3, BUG)                                                                          \
  KERNEL(160, NAME)(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, float* c, int columns, \
                    int k) {                                                                                       \
    wgmma_gemm<N, IS_E4M3, BUG>(&a, &b, c, columns, k);                                                            \
  }                                                                                                                \
  REGISTER_KERNEL(NAME)
#define WGMMA_GEMMS(N)                                      \
  WGMMA_GEMM(wgmma_gemm_##N, N, false, WGMMA_RIGHT)         \
  WGMMA_GEMM(wgmma_gemm_e4m3_##N, N, true, WGMMA_RIGHT)
WGMMA_GEMMS(8)
WGMMA_GEMMS(16)
WGMMA_GEMMS(32)
WGMMA_GEMMS(64)
WGMMA_GEMMS(128)
WGMMA_GEMMS(256)

// ---- registers and a transposed tile into wgmma ----------------------------------------------------------------

enum TransposedBug { TRANSPOSED_RIGHT, WEIGHTS_CHANGE };

// c[64, N] tiles of a [rows][k] · b [k][columns], one warpgroup each: a straight from global memory into registers, b
// by cp.async into panels of 64 rows. k is a multiple of 64.
template <int N, TransposedBug BUG>
DEVICE void wgmma_transposed(const uint32_t* a, const bf16* b, float* c, int columns, int k_end) {
  DYNAMIC_SHARED(bf16, tile);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int first_row = blockIdx.y * 64 + 16 * warp + lane / 4, first_column = blockIdx.x * N;
  float d[N / 2];
  for (int k = 0; k < k_end; k += 64) {
    for (int i = threadIdx.x; i < 64 * N / 8; i += 128) {
      int row = i / (N / 8), chunk = i % (N / 8);
      cp_async_16(Panels<64>::chunk(tile, row, chunk),
                  b + static_cast<int64_t>(k + row) * columns + first_column + 8 * chunk);
    }
    cp_async_commit();
    uint32_t fragments[4][4];
    for (int i = 0; i < 16; i++) {
      int row = first_row + i % 2 * 8, word = k / 2 + i / 2 * 4 + lane % 4;
      fragments[i / 4][i % 4] = a[row * (k_end / 2) + word];
    }
    cp_async_wait<0>();
    async_proxy_fence();
    __syncthreads();
    registers_changed(d);
    for (int step = 0; step < 4; step++) registers_changed(fragments[step]);
    wgmma_fence();
    for (int step = 0; step < 4; step++) {
      uint64_t right = wgmma_descriptor(tile + 16 * step * 64, Panels<64>::SIZE * sizeof(bf16));
      wgmma_m64k16_transposed<N>(d, fragments[step], right, k > 0 || step > 0);
    }
    wgmma_commit();
    if (BUG == WEIGHTS_CHANGE) fragments[3][lane % 4] = 0;
    wgmma_wait<0>();
    registers_changed(d);
    for (int step = 0; step < 4; step++) registers_changed(fragments[step]);
    __syncthreads();
  }
  for (int j = 0; j < N / 8; j++) {
    for (int i = 0; i < 4; i++) {
      c[(first_row + i / 2 * 8) * columns + first_column + 8 * j + lane % 4 * 2 + i % 2] = d[4 * j + i];
    }
  }
}

#define WGMMA_TRANSPOSED_TEST(NAME, N, BUG)                                                                  \
  KERNEL(128, NAME)(const uint32_t* a, const bf16* b, float* c, int columns, int k) {                       \
    wgmma_transposed<N, BUG>(a, b, c, columns, k);                                                           \
  }                                                                                                          \
  REGISTER_KERNEL(NAME)
WGMMA_TRANSPOSED_TEST(wgmma_transposed_64, 64, TRANSPOSED_RIGHT)
WGMMA_TRANSPOSED_TEST(wgmma_transposed_128, 128, TRANSPOSED_RIGHT)

#ifdef EMULATOR
WGMMA_TRANSPOSED_TEST(wgmma_transposed_weights_change, 64, WEIGHTS_CHANGE)

// wgmma.cuh has no such width.
WGMMA_GEMM(wgmma_gemm_24, 24, false, WGMMA_RIGHT)

WGMMA_GEMM(wgmma_gemm_no_full_wait, 64, false, NO_FULL_WAIT)
WGMMA_GEMM(wgmma_gemm_no_empty_wait, 64, false, NO_EMPTY_WAIT)
WGMMA_GEMM(wgmma_gemm_releases_early, 64, false, RELEASES_EARLY)
WGMMA_GEMM(wgmma_gemm_too_many_arrivals_expected, 64, false, TOO_MANY_ARRIVALS_EXPECTED)
WGMMA_GEMM(wgmma_gemm_too_few_arrivals_expected, 64, false, TOO_FEW_ARRIVALS_EXPECTED)
WGMMA_GEMM(wgmma_gemm_too_few_bytes_expected, 64, false, TOO_FEW_BYTES_EXPECTED)
WGMMA_GEMM(wgmma_gemm_warps_differ, 64, false, WARPS_DIFFER)
WGMMA_GEMM(wgmma_gemm_no_final_wait, 64, false, NO_FINAL_WAIT)
WGMMA_GEMM(wgmma_gemm_no_init_sync, 64, false, NO_INIT_SYNC)

// ---- dependent launches ----------------------------------------------------------------------------------------

enum class Chained { RIGHT, RIGHT_TOO, NO_WAIT, READS_EARLY, WRITES_EARLY, LETS_NEXT_FIRST };

// Reverses the numbers of each block; where from is found before the previous kernel is done.
template <Chained bug>
DEVICE void reverse_chained(const int* in, int count, int* out) {
  __shared__ int sources[256];
  int i = threadIdx.x, first = blockIdx.x * count, value = 0;
  sources[i] = count - 1 - i;
  if (bug == Chained::READS_EARLY) value = in[first + count - 1 - i];
  if (bug == Chained::WRITES_EARLY) out[first + i] = 0;
  if (bug == Chained::LETS_NEXT_FIRST) let_next_kernel_start();
  if (bug != Chained::NO_WAIT) {
    wait_for_previous_kernel();
    let_next_kernel_start();
  }
  __syncthreads();
  if (bug != Chained::READS_EARLY) value = in[first + sources[i]];
  out[first + i] = value;
}

#define REVERSE_CHAINED(name, bug)                        \
  KERNEL(256, name)(const int* in, int count, int* out) { \
    reverse_chained<Chained::bug>(in, count, out);        \
  }                                                       \
  REGISTER_KERNEL(name)
REVERSE_CHAINED(chained_right, RIGHT)
REVERSE_CHAINED(chained_right_too, RIGHT_TOO)
REVERSE_CHAINED(chained_no_wait, NO_WAIT)
REVERSE_CHAINED(chained_reads_early, READS_EARLY)
REVERSE_CHAINED(chained_writes_early, WRITES_EARLY)
REVERSE_CHAINED(chained_lets_next_first, LETS_NEXT_FIRST)

// ---- other planted bugs ----------------------------------------------------------------------------------------

KERNEL(256, reverse_without_sync)(const int* in, int count, int* out) {
  __shared__ int values[256];
  int i = threadIdx.x;
  values[i] = in[i];
  out[i] = values[count - 1 - i];
}
REGISTER_KERNEL(reverse_without_sync)

KERNEL(256, write_past_global)(const int* in, int count, int* out) {
  int i = threadIdx.x;
  out[count - 1 - i] = in[i];
  if (i == 0) out[count] = 1;
}
REGISTER_KERNEL(write_past_global)

KERNEL(256, write_past_dynamic_shared)(const int* in, int count, int* out) {
  DYNAMIC_SHARED(int, values);
  int i = threadIdx.x;
  values[i + 1] = in[i];
  __syncthreads();
  out[count - 1 - i] = values[i + 1];
}
REGISTER_KERNEL(write_past_dynamic_shared)

// Half of the lanes call with a mask of all.
KERNEL(256, shuffle_with_absent_lanes)(const int* in, int count, int* out) {
  int i = threadIdx.x;
  int value = in[count - 1 - i];
  if (i % 32 < 16) value = __shfl_xor_sync(ALL_LANES, value, 0);
  out[i] = value;
}
REGISTER_KERNEL(shuffle_with_absent_lanes)

// Lanes of the upper half name only the lower half.
KERNEL(256, shuffle_with_foreign_mask)(const int* in, int count, int* out) {
  int i = threadIdx.x;
  out[i] = __shfl_sync(0x0000ffffu, in[count - 1 - i], i % 32);
}
REGISTER_KERNEL(shuffle_with_foreign_mask)

// Warps wait at two barriers for each other.
KERNEL(256, crossed_barriers)(const int* in, int count, int* out) {
  int i = threadIdx.x;
  named_barrier_sync(1 + i / 128, 256);
  out[i] = in[count - 1 - i];
}
REGISTER_KERNEL(crossed_barriers)

KERNEL(256, read_unwritten_shared)(const int* in, int count, int* out) {
  DYNAMIC_SHARED(int, values);
  int i = threadIdx.x;
  out[i] = in[count - 1 - i] + (values[i] & 1);
}
REGISTER_KERNEL(read_unwritten_shared)

#endif  // EMULATOR
