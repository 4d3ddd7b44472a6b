// What the kernels of attention agree on: the work as the host plans it, and the arithmetic, to the bit.
//
// Fixed splits. A row's softmax is taken per chunk of 256 cached tokens, counted from the sequence's start, 64 tokens at
// a time, and the chunks are folded from the first to the last. An item of work is a tile of queries over a run of
// chunks: over all of them, it folds in registers and writes its result; over one of them, it writes the chunk's
// maximum, sum and output, and `attention_fold` folds those of all chunks by the same arithmetic. So neither how work
// was cut nor which kernel did it shows in a bit of the result.
//
// The weights of the softmax are multiplied as the sum of two bf16 numbers, which keeps 16 bits of each: the second
// product costs nothing where memory is the limit.
//
// Keys and values of e4m3 become bf16 in registers, which has all their numbers; a key's scale is multiplied to its
// scores, a value's to its weights. So nothing but what the cache keeps is rounded to eight bits. A word of shared
// memory has four elements and a register of a fragment two, and `widen_e4m3` gives every second one: along k, where
// queries lie in the same order, that does not matter; of values it gives a fragment of the even features and one of
// the odd.
//
// Source: FlashAttention-2 (arXiv 2307.08691), GQA (2305.13245), paging (2309.06180).
#pragma once
#include "kv_cache.cuh"
#include "shared_tile.cuh"

#if __CUDA_ARCH__ >= 1000
// There the compiler needs more registers for addresses, and with 64 keys the accumulators of a wide head spill.
constexpr int TILE_KEYS = 32;
#else
constexpr int TILE_KEYS = 64;
#endif
constexpr int CHUNK_KEYS = 256;
constexpr int NO_PARTIAL = -1;
// Rows of a warp: the tokens of an item times the query heads that share a kv head.
constexpr int WARP_ROWS = 16;

// A tile of queries and a run of chunks, as the host plans them; without tokens there is nothing to do, so that a
// recorded launch may have more blocks than a step needs.
struct AttentionItem {
  // First entry of the sequence's block table.
  int block_table_start;
  // First query token of the batch, how many, and the first one's position.
  int first_token;
  int num_tokens;
  int first_position;
  // Chunks `first_chunk..end_chunk`; all that a row sees, or one.
  int first_chunk;
  int end_chunk;
  // Row of the partial results where [token][head] of this item starts, or NO_PARTIAL.
  int first_partial;
};

struct AttentionShape {
  KvShape kv;
  int q_stride;
  int out_stride;
  // A token sees this many, itself included.
  int window;
  // log2(e) / sqrt(head_dim).
  float scale;
};

// The running softmax of one row: largest score (unscaled), sum of weights relative to it.
struct Softmax {
  float largest;
  float sum;
};
DEVICE Softmax nothing_seen() { return {-INFINITY, 0.0f}; }

// What exponents are taken relative to: the largest score, or anything finite while there is none.
DEVICE float exponent_base(float largest) { return largest == -INFINITY ? 0.0f : largest; }

// Factors that bring the sums and outputs of two softmaxes to one base.
struct Fold {
  float first;
  float second;
};

// first = first ∪ second; a `second` that saw nothing changes no bit.
DEVICE Fold fold_softmax(Softmax& first, const Softmax& second, float scale) {
  float largest = fmaxf(first.largest, second.largest);
  float base = exponent_base(largest);
  Fold fold = {exp2_approx(__fmul_rn(__fsub_rn(first.largest, base), scale)),
               exp2_approx(__fmul_rn(__fsub_rn(second.largest, base), scale))};
  first.sum = __fmaf_rn(second.sum, fold.second, __fmul_rn(first.sum, fold.first));
  first.largest = largest;
  return fold;
}

DEVICE float fold_output(float first, float second, Fold fold) {
  return __fmaf_rn(second, fold.second, __fmul_rn(first, fold.first));
}

// Sum and maximum over the four lanes that share a row of a fragment.
DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(ALL_LANES, x, 1);
  return x + __shfl_xor_sync(ALL_LANES, x, 2);
}
DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
  return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

// The keys an item walks: from the first one that any of its rows sees, cut to a tile, to the last.
DEVICE int first_key_of(const AttentionItem& item, int window) {
  int first_visible = max(item.first_chunk * CHUNK_KEYS, item.first_position + 1 - window);
  return max(first_visible, 0) / TILE_KEYS * TILE_KEYS;
}
DEVICE int end_key_of(const AttentionItem& item) {
  return min(item.end_chunk * CHUNK_KEYS, item.first_position + item.num_tokens);
}

// Bytes of a head's row, in units of bf16.
template <class Element, int HEAD>
constexpr int ROW_UNITS = HEAD * sizeof(Element) / sizeof(bf16);

// Rows of keys or values in shared memory, in such units, and the scales of e4m3.
template <class Element, int HEAD, class Layout = WholeRows<ROW_UNITS<Element, HEAD>>>
struct KvTile {
  bf16* rows;
  float* scales;

  DEVICE KvTile from(int row) const { return {rows + row * ROW_UNITS<Element, HEAD>, scales + row}; }
};

// The keys and values of one sequence and kv head.
template <class Element>
struct KvSource {
  KvCache<Element> cache;
  const uint32_t* block_table;
  int kv_head;
  // From this one on there are zeros.
  int end_key;
};

// Starts copying keys (part 0) or values (part 1) from `first_key` on to the first rows of a tile, as many as there are
// THREADS that do it: whole warps, in which every lane finds where one key lies and all learn it from it. Dividing by the
// block size for every 16 bytes would cost more than all that is done with them.
template <int THREADS, class Element, int HEAD, class Layout>
DEVICE void load_rows(KvTile<Element, HEAD, Layout> tile, const KvSource<Element>& source, const KvShape& kv,
                      int part, int first_key) {
  constexpr int UNITS = ROW_UNITS<Element, HEAD>, CHUNKS = UNITS / CHUNK;
  int lane = threadIdx.x % WARP, first_row = threadIdx.x % THREADS - lane, chunk = lane % CHUNKS;
  int key = first_key + first_row + lane, table_index = key / kv.block_size;
  int block = key < source.end_key ? source.block_table[table_index] : 0;
  int cache_row = kv_row(kv, block, part, source.kv_head, key - table_index * kv.block_size);
  if constexpr (IS_E4M3<Element>) {
    cp_async_4(tile.scales + first_row + lane, source.cache.scales + cache_row, key < source.end_key);
  }
  // Where chunks lie in a warp's rows does not depend on the warp, and the compiler knows most of it.
  bf16* warp_rows = tile.rows + first_row * Layout::PITCH;
  int num_valid = source.end_key - first_key - first_row;
  const uint8_t* chunks = reinterpret_cast<const uint8_t*>(source.cache.rows) + chunk * 16;
  // Of all at once the addresses would fill the registers.
#pragma unroll 4
  for (int i = 0; i < WARP; i += WARP / CHUNKS) {
    int row = i + lane / CHUNKS;
    const uint8_t* from = chunks + static_cast<int64_t>(__shfl_sync(ALL_LANES, cache_row, row)) * (UNITS * 2);
    cp_async_16(Layout::chunk(warp_rows, row, chunk), from, row < num_valid);
  }
}

// One warp's 16 rows: which query each of this thread's two rows is.
struct QueryRow {
  bool exists;
  int token;
  int head;
  int position;
};

DEVICE QueryRow query_row(const AttentionItem& item, const KvShape& kv, int kv_head, int row) {
  int group = kv.num_heads / kv.num_kv_heads;
  int token = row / group;
  return {token < item.num_tokens, item.first_token + token, kv_head * group + row % group,
          item.first_position + token};
}

// Writes a warp's queries to a tile in shared memory from row `first_row` on; rows that do not exist and features beyond
// the head are zeros. For keys of e4m3 the even ones of 16 features come before the odd ones. Two lanes have a row
// each, and every other four of its features.
template <class Element, int HEAD, class Layout = WholeRows<HEAD>>
DEVICE void load_queries(bf16* queries, const bf16* q, const AttentionShape& shape, const AttentionItem& item,
                         int kv_head, int first_row) {
  int lane = threadIdx.x % WARP, row = first_row + lane / 2;
  QueryRow query = query_row(item, shape.kv, kv_head, row);
  const bf16* source = q + static_cast<int64_t>(query.token) * shape.q_stride + query.head * shape.kv.head_dim;
  auto load = [&](int feature) {
    bool exists = query.exists && feature < shape.kv.head_dim;
    return exists ? *reinterpret_cast<const uint32_t*>(source + feature) : 0;
  };
  auto store = [&](int place, uint32_t pair) {
    *reinterpret_cast<uint32_t*>(Layout::chunk(queries, row, place / CHUNK) + place % CHUNK) = pair;
  };
#pragma unroll
  for (int i = 0; i < HEAD / 8; i++) {
    int feature = 8 * i + lane % 2 * 4;
    uint32_t first = load(feature), second = load(feature + 2);
    if constexpr (IS_E4M3<Element>) {
      int place = feature / 16 * 16 + feature % 16 / 2;
      store(place, __byte_perm(first, second, 0x5410));
      store(place + 8, __byte_perm(first, second, 0x7632));
    } else {
      store(feature, first);
      store(feature + 2, second);
    }
  }
  __syncwarp();
}

// Four e4m3 as bf16, exactly: bytes 0 and 2 of a word, and bytes 1 and 3. With exponent and mantissa where bf16 has
// them, a number is too small by the difference of the exponents' biases, 127 - 7, one that is subnormal too. NaN
// becomes 480, and a row that has it has scale NaN.
DEVICE void widen_e4m3(uint32_t word, uint32_t& even, uint32_t& odd) {
  constexpr uint32_t SIGNS = 0x80008000, MAGNITUDES = 0x07f007f0, TWO_TO_120 = 0x7b807b80;
  even = multiply_bf16((word << 8 & SIGNS) | (word << 4 & MAGNITUDES), TWO_TO_120);
  odd = multiply_bf16((word & SIGNS) | (word >> 4 & MAGNITUDES), TWO_TO_120);
}

// The scales of the two columns that this lane has of eight.
DEVICE float2 column_scales(const float* scales) {
  return *reinterpret_cast<const float2*>(scales + threadIdx.x % WARP % 4 * 2);
}

// Multiplies scores with the scales of their keys.
template <int KEYS>
DEVICE void scale_scores(float (*scores)[4], const float* scales) {
#pragma unroll
  for (int j = 0; j < KEYS / 8; j++) {
    float2 scale = column_scales(scales + 8 * j);
#pragma unroll
    for (int i = 0; i < 4; i++) scores[j][i] = __fmul_rn(scores[j][i], i % 2 == 0 ? scale.x : scale.y);
  }
}

// scores[16, KEYS] = queries · keysᵀ, queries from a row on; scores of eight keys after those of the eight before.
template <int KEYS, class Element, int HEAD>
DEVICE void score_keys(float (*scores)[4], bf16* queries, int first_row, KvTile<Element, HEAD> keys) {
  int lane = threadIdx.x % WARP;
#pragma unroll
  for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
    for (int i = 0; i < 4; i++) scores[j][i] = 0.0f;
  }
  // Of a whole tile, addresses would fill the registers if this were unrolled, and accumulators spill; what widens e4m3
  // would fill the instruction cache.
#pragma unroll(KEYS > 32 ? 1 : IS_E4M3<Element> ? 2 : HEAD / 16)
  for (int step = 0; step < HEAD / 16; step++) {
    uint32_t a[4];
    load_left<HEAD>(a, queries, first_row, step);
    if constexpr (IS_E4M3<Element>) {
      // A chunk of 16 features of 32 keys; a word of it makes both registers of a fragment.
#pragma unroll
      for (int j = 0; j < KEYS / 8; j += 4) {
        uint32_t words[4];
        ldmatrix_x4(words, tile_chunk<ROW_UNITS<Element, HEAD>>(keys.rows, 8 * j + lane, step));
#pragma unroll
        for (int i = 0; i < 4; i++) {
          uint32_t even, odd;
          widen_e4m3(words[i], even, odd);
          mma_m16n8k16(scores[j + i], a, even, odd);
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < KEYS / 8; j += 2) {
        uint32_t b[4];
        load_right_pair<HEAD>(b, keys.rows, 8 * j, step);
        mma_m16n8k16(scores[j], a, b[0], b[1]);
        mma_m16n8k16(scores[j + 1], a, b[2], b[3]);
      }
    }
  }
  if constexpr (IS_E4M3<Element>) scale_scores<KEYS>(scores, keys.scales);
}

// Hides the keys that a row does not see; most tiles have none.
DEVICE void mask_tile(float (&scores)[TILE_KEYS / 8][4], const AttentionItem& item, const int (&positions)[2],
                      int first_key, int window) {
  int last_position = item.first_position + item.num_tokens - 1;
  bool all_see_all = first_key + TILE_KEYS <= item.first_position + 1 && first_key > last_position - window;
  if (all_see_all) return;
  int lane = threadIdx.x % WARP;
#pragma unroll
  for (int j = 0; j < TILE_KEYS / 8; j++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int distance = positions[i / 2] - (first_key + 8 * j + 2 * (lane % 4) + i % 2);
      if (distance < 0 || distance >= window) scores[j][i] = -INFINITY;
    }
  }
}

// Turns the scores of this thread's two rows into weights relative to the new largest, and brings the sums to it;
// what was summed of values has to be multiplied with `shrink`.
DEVICE void weigh_scores(Softmax (&softmax)[2], float (&scores)[TILE_KEYS / 8][4], float scale, float (&shrink)[2]) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float largest = softmax[h].largest;
#pragma unroll
    for (int j = 0; j < TILE_KEYS / 8; j++) largest = fmaxf(largest, fmaxf(scores[j][2 * h], scores[j][2 * h + 1]));
    largest = quad_max(largest);
    float base = exponent_base(largest);
    shrink[h] = exp2_approx(__fmul_rn(__fsub_rn(softmax[h].largest, base), scale));
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < TILE_KEYS / 8; j++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float& score = scores[j][2 * h + i];
        score = exp2_approx(__fmul_rn(__fsub_rn(score, base), scale));
        sum += score;
      }
    }
    softmax[h] = {largest, __fmaf_rn(softmax[h].sum, shrink[h], quad_sum(sum))};
  }
}

// A pair of weights as bf16, and what that leaves.
DEVICE void split_pair(float a, float b, uint32_t& high, uint32_t& low) {
  high = pack_bf16(a, b);
  low = pack_bf16(a - low_to_f32(high), b - high_to_f32(high));
}

// The weights of the 16 keys from `row` of a tile on as two left operands; `scales` are those of the values of e4m3.
template <class Element>
DEVICE void split_weights(const float (&weights)[TILE_KEYS / 8][4], const float* scales, int row, uint32_t (&high)[4],
                          uint32_t (&low)[4]) {
#pragma unroll
  for (int part = 0; part < 4; part++) {
    const float(&pair)[4] = weights[row / 8 + part / 2];
    float first = pair[part % 2 * 2], second = pair[part % 2 * 2 + 1];
    if constexpr (IS_E4M3<Element>) {
      float2 scale = column_scales(scales + row + part / 2 * 8);
      first = __fmul_rn(first, scale.x), second = __fmul_rn(second, scale.y);
    }
    split_pair(first, second, high[part], low[part]);
  }
}

// Two features of a row that lie side by side, the first one even.
struct FeaturePair {
  int feature;
  float first;
  float second;
};

// Everything a warp accumulates over its rows, as a fragment has them: this thread's rows are lane / 4 and 8 below it.
// An `output` has eight features of bf16 values; of e4m3 the even ones of 16, and the next one the odd ones.
template <class Element, int HEAD>
struct Accumulator {
  static constexpr int TILES = HEAD / 8;
  Softmax softmax[2];
  float output[TILES][4];

  DEVICE void clear() {
#pragma unroll
    for (int h = 0; h < 2; h++) softmax[h] = nothing_seen();
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) output[n][i] = 0.0f;
    }
  }

  // Turns a tile's scores into weights relative to the new largest, and brings sum and output to it.
  DEVICE void weigh(float (&scores)[TILE_KEYS / 8][4], float scale) {
    float factors[2];
    weigh_scores(softmax, scores, scale, factors);
    shrink(factors);
  }

  DEVICE void shrink(const float (&factors)[2]) {
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) output[n][i] *= factors[i / 2];
    }
  }

  // This thread's `n`-th pair of row `h`.
  DEVICE FeaturePair features(int n, int h) const {
    int column = 2 * (threadIdx.x % WARP % 4);
    if constexpr (IS_E4M3<Element>) {
      int even = n / 2 * 2, i = 2 * h + n % 2;
      return {8 * even + 2 * column + n % 2 * 2, output[even][i], output[even + 1][i]};
    } else {
      return {8 * n + column, output[n][2 * h], output[n][2 * h + 1]};
    }
  }

  // output[16, HEAD] += weights[16, 16] · values[16, HEAD], of the 16 keys from `row` of a tile on.
  DEVICE void add_values(const float (&weights)[TILE_KEYS / 8][4], KvTile<Element, HEAD> values, int row) {
    int lane = threadIdx.x % WARP;
    uint32_t high[4], low[4];
    split_weights<Element>(weights, values.scales, row, high, low);
    // Several tiles at a time, since the second product of a tile has to wait for the first.
    constexpr int AT_ONCE = TILES < 8 ? TILES : 8;
#pragma unroll
    for (int first = 0; first < TILES; first += AT_ONCE) {
      uint32_t b[AT_ONCE / 2][4];
      if constexpr (IS_E4M3<Element>) {
#pragma unroll
        for (int n = 0; n < AT_ONCE; n += 4) {
          // Of the narrowest head there is one chunk of 16 features, and the other two matrices are not used.
          int chunk = (first + n) / 2 + (HEAD == 16 ? 0 : lane / 16);
          uint32_t words[4];
          ldmatrix_x4_trans(words, tile_chunk<ROW_UNITS<Element, HEAD>>(values.rows, row + lane % 16, chunk));
#pragma unroll
          for (int i = 0; i < (HEAD == 16 ? 2 : 4); i++) {
            widen_e4m3(words[i], b[n / 2 + i / 2][i % 2], b[n / 2 + i / 2][i % 2 + 2]);
          }
        }
      } else {
#pragma unroll
        for (int n = 0; n < AT_ONCE; n += 2) {
          ldmatrix_x4_trans(b[n / 2], tile_chunk<HEAD>(values.rows, row + lane % 16, first + n + lane / 16));
        }
      }
#pragma unroll
      for (int part = 0; part < 2; part++) {
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++) {
          const uint32_t* column = &b[n / 2][n % 2 * 2];
          mma_m16n8k16(output[first + n], part == 0 ? high : low, column[0], column[1]);
        }
      }
    }
  }

  DEVICE void fold(const Accumulator& chunk, float scale) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      Fold factors = fold_softmax(softmax[h], chunk.softmax[h], scale);
#pragma unroll
      for (int n = 0; n < TILES; n++) {
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; i++) output[n][i] = fold_output(output[n][i], chunk.output[n][i], factors);
      }
    }
  }

  // Writes the rows' features, of softmaxes over all that they see.
  DEVICE void write_result(const QueryRow (&rows)[2], const AttentionShape& shape, bf16* out) const {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (!rows[h].exists) continue;
      bf16* row = out + static_cast<int64_t>(rows[h].token) * shape.out_stride + rows[h].head * shape.kv.head_dim;
      float inverse = __frcp_rn(softmax[h].sum);
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        FeaturePair pair = features(n, h);
        if (pair.feature >= shape.kv.head_dim) continue;
        *reinterpret_cast<uint32_t*>(row + pair.feature) =
            pack_bf16(__fmul_rn(pair.first, inverse), __fmul_rn(pair.second, inverse));
      }
    }
  }

  // Writes what `attention_fold` folds.
  DEVICE void write_partial(const QueryRow (&rows)[2], const AttentionItem& item, const KvShape& kv,
                            Softmax* partial_softmax, float* partial_output) const {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (!rows[h].exists) continue;
      int64_t row = item.first_partial + (rows[h].token - item.first_token) * kv.num_heads + rows[h].head;
      if (lane % 4 == 0) partial_softmax[row] = softmax[h];
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        FeaturePair pair = features(n, h);
        *reinterpret_cast<float2*>(partial_output + row * kv.head_stride + pair.feature) =
            make_float2(pair.first, pair.second);
      }
    }
  }
};

// The kernels attention_KIND_HEAD and, of a cache in e4m3, attention_KIND_e4m3_HEAD: a block attends to one item and kv
// head by the file's `attend`.
#define ATTENTION_KERNEL(NAME, THREADS, ELEMENT, HEAD)                                                               \
  KERNEL(THREADS, NAME)(const bf16* q, KvCache<ELEMENT> cache, const uint32_t* block_tables,                         \
                        const AttentionItem* items, AttentionShape shape, bf16* out, Softmax* partial_softmax,       \
                        float* partial_output) {                                                                     \
    wait_for_previous_kernel();                                                                                      \
    let_next_kernel_start();                                                                                         \
    const AttentionItem& item = items[blockIdx.x];                                                                   \
    if (item.num_tokens == 0) return;                                                                                \
    attend<HEAD>(item, q, cache, block_tables, shape, out, partial_softmax, partial_output);                         \
  }                                                                                                                  \
  REGISTER_KERNEL(NAME)

#define ATTENTION_BF16_KERNELS(KIND, THREADS)                                                                        \
  ATTENTION_KERNEL(attention_##KIND##_16, THREADS, bf16, 16)                                                         \
  ATTENTION_KERNEL(attention_##KIND##_32, THREADS, bf16, 32)                                                         \
  ATTENTION_KERNEL(attention_##KIND##_64, THREADS, bf16, 64)                                                         \
  ATTENTION_KERNEL(attention_##KIND##_128, THREADS, bf16, 128)

#ifdef HAS_E4M3
#define ATTENTION_KERNELS(KIND, THREADS)                                                                             \
  ATTENTION_BF16_KERNELS(KIND, THREADS)                                                                              \
  ATTENTION_KERNEL(attention_##KIND##_e4m3_16, THREADS, e4m3, 16)                                                    \
  ATTENTION_KERNEL(attention_##KIND##_e4m3_32, THREADS, e4m3, 32)                                                    \
  ATTENTION_KERNEL(attention_##KIND##_e4m3_64, THREADS, e4m3, 64)                                                    \
  ATTENTION_KERNEL(attention_##KIND##_e4m3_128, THREADS, e4m3, 128)
#else
#define ATTENTION_KERNELS(KIND, THREADS) ATTENTION_BF16_KERNELS(KIND, THREADS)
#endif
