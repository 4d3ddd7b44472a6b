// Turns queries and keys by their positions' angles, in f32; writes queries, rounded to bf16, to a tensor and keys and
// values to the paged cache: rounded to bf16, or each row divided by its scale and rounded to e4m3, once and from f32.
// A token has a block, or several along y if there are few; a warp has a head, a lane one or two of its pairs of
// features.
//
// Source: RoFormer (arXiv 2104.09864), feature i paired with i + head_dim / 2 as in Hugging Face's rotate_half.
#include "device.cuh"
#include "e4m3_rows.cuh"
#include "kv_cache.cuh"

constexpr int ROPE_THREADS = 256;
// Of 128 features, the most that a head has.
constexpr int PAIRS_PER_LANE = 2;

// A lane's features of a head: pair `lane`, and the one 32 behind it.
struct LanePairs {
  float first[PAIRS_PER_LANE];
  float second[PAIRS_PER_LANE];
};

template <class Store>
DEVICE void for_each_pair(int half, Store store) {
#pragma unroll
  for (int i = 0; i < PAIRS_PER_LANE; i++) {
    int pair = threadIdx.x % WARP + i * WARP;
    if (pair < half) store(i, pair);
  }
}

DEVICE void store_row(bf16* row, int half, const LanePairs& x) {
  for_each_pair(half, [&](int i, int pair) {
    row[pair] = to_bf16(x.first[i]);
    row[pair + half] = to_bf16(x.second[i]);
  });
}

DEVICE void store_head(const KvCache<bf16>& cache, int row, const KvShape& shape, const LanePairs& x) {
  store_row(cache.rows + static_cast<int64_t>(row) * shape.head_stride, shape.head_dim / 2, x);
}

#ifdef HAS_E4M3
DEVICE void store_head(const KvCache<e4m3>& cache, int row, const KvShape& shape, const LanePairs& x) {
  int half = shape.head_dim / 2;
  float largest = 0.0f;
  for_each_pair(half, [&](int i, int) {
    largest = fmaxf(largest, fmaxf(e4m3_magnitude(x.first[i]), e4m3_magnitude(x.second[i])));
  });
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, offset));
  }
  float scale = e4m3_scale(largest), inverse = 1.0f / scale;
  if (threadIdx.x % WARP == 0) cache.scales[row] = scale;
  e4m3* to = cache.rows + static_cast<int64_t>(row) * shape.head_stride;
  for_each_pair(half, [&](int i, int pair) {
    uint16_t packed = pack_e4m3(x.first[i] * inverse, x.second[i] * inverse);
    to[pair].bits = static_cast<uint8_t>(packed & 0xff);
    to[pair + half].bits = static_cast<uint8_t>(packed >> 8);
  });
}
#endif

template <class Element>
DEVICE void rope_and_store(const float* qkv_row, const float* cosines, const float* sines, int slot, bf16* query_row,
                           const KvCache<Element>& cache, const KvShape& shape) {
  int half = shape.head_dim / 2, first_value = shape.num_heads + shape.num_kv_heads;
  int block = slot / shape.block_size, offset = slot % shape.block_size;
  int warp = (blockIdx.y * ROPE_THREADS + threadIdx.x) / WARP, num_warps = gridDim.y * ROPE_THREADS / WARP;
  for (int head = warp; head < first_value + shape.num_kv_heads; head += num_warps) {
    const float* from = qkv_row + head * shape.head_dim;
    LanePairs x = {};
    for_each_pair(half, [&](int i, int pair) {
      float first = from[pair], second = from[pair + half];
      bool turns = head < first_value;
      x.first[i] = turns ? first * cosines[pair] - second * sines[pair] : first;
      x.second[i] = turns ? second * cosines[pair] + first * sines[pair] : second;
    });
    int kv_head = head - shape.num_heads;
    if (kv_head < 0) {
      store_row(query_row + head * shape.head_dim, half, x);
    } else {
      int part = kv_head / shape.num_kv_heads;
      store_head(cache, kv_row(shape, block, part, kv_head % shape.num_kv_heads, offset), shape, x);
    }
  }
}

#define ROPE_STORE_KV(NAME, ELEMENT)                                                                                 \
  KERNEL(ROPE_THREADS, NAME)(const float* qkv, int qkv_stride, const float* cos_table, const float* sin_table,       \
                             const uint32_t* positions, const uint32_t* slots, bf16* queries, int queries_stride,    \
                             KvCache<ELEMENT> cache, KvShape shape) {                                                \
    /* Copied to the device before the first kernel of a step: no kernel's end is waited for. */                     \
    int64_t token = blockIdx.x, angle = static_cast<int64_t>(__ldcg(positions + token)) * (shape.head_dim / 2);      \
    int slot = __ldcg(slots + token);                                                                                \
    wait_for_previous_kernel();                                                                                      \
    let_next_kernel_start();                                                                                         \
    rope_and_store(qkv + token * qkv_stride, cos_table + angle, sin_table + angle, slot,                             \
                   queries + token * queries_stride, cache, shape);                                                  \
  }                                                                                                                  \
  REGISTER_KERNEL(NAME)

ROPE_STORE_KV(rope_store_kv, bf16)
#ifdef HAS_E4M3
ROPE_STORE_KV(rope_store_kv_e4m3, e4m3)
#endif
