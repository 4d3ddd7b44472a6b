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

// The keys and values of one sequence and kv head.
struct KvSource {
  const bf16* cache;
  const uint32_t* block_table;
  int kv_head;
  // From this one on there are zeros.
  int end_key;
};

// Starts copying keys (part 0) or values (part 1) from `first_key` on to the first rows of a tile, as many as there are
// THREADS that do it: whole warps, in which every lane finds where one key lies and all learn it from it. Dividing by the
// block size for every 16 bytes would cost more than all that is done with them.
template <int HEAD, int THREADS>
DEVICE void load_rows(bf16* tile, const KvSource& source, const KvShape& kv, int part, int first_key) {
  constexpr int CHUNKS = HEAD / CHUNK;
  int lane = threadIdx.x % WARP, first_row = threadIdx.x % THREADS - lane, chunk = lane % CHUNKS;
  int key = first_key + first_row + lane;
  int block = key < source.end_key ? source.block_table[key / kv.block_size] : 0;
  int cache_row = kv_row(kv, block, part, source.kv_head, key % kv.block_size);
  // Of all at once the addresses would fill the registers.
#pragma unroll 4
  for (int i = 0; i < WARP; i += WARP / CHUNKS) {
    int row = i + lane / CHUNKS;
    const bf16* from = source.cache + static_cast<int64_t>(__shfl_sync(ALL_LANES, cache_row, row)) * HEAD;
    row += first_row;
    cp_async_16(tile_chunk<HEAD>(tile, row, chunk), from + chunk * CHUNK, first_key + row < source.end_key);
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
// the head are zeros. Two lanes have a row each, and every other pair of its features.
template <int HEAD>
DEVICE void load_queries(bf16* queries, const bf16* q, const AttentionShape& shape, const AttentionItem& item,
                         int kv_head, int first_row) {
  int lane = threadIdx.x % WARP, row = first_row + lane / 2;
  QueryRow query = query_row(item, shape.kv, kv_head, row);
  const bf16* source = q + static_cast<int64_t>(query.token) * shape.q_stride + query.head * shape.kv.head_dim;
#pragma unroll
  for (int i = 0; i < HEAD / 4; i++) {
    int feature = 4 * i + lane % 2 * 2;
    bool exists = query.exists && feature < shape.kv.head_dim;
    uint32_t pair = exists ? *reinterpret_cast<const uint32_t*>(source + feature) : 0;
    *reinterpret_cast<uint32_t*>(tile_chunk<HEAD>(queries, row, feature / CHUNK) + feature % CHUNK) = pair;
  }
  __syncwarp();
}

// scores[16, KEYS] = queries · keysᵀ, from a row of either on; the scores of eight keys after those of the eight before.
template <int HEAD, int KEYS>
DEVICE void score_keys(float (*scores)[4], bf16* queries, int first_row, bf16* keys, int first_key) {
#pragma unroll
  for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
    for (int i = 0; i < 4; i++) scores[j][i] = 0.0f;
  }
  // Of a whole tile, addresses would fill the registers if this were unrolled, and accumulators spill.
#pragma unroll(KEYS > 32 ? 1 : HEAD / 16)
  for (int step = 0; step < HEAD / 16; step++) {
    uint32_t a[4];
    load_left<HEAD>(a, queries, first_row, step);
#pragma unroll
    for (int j = 0; j < KEYS / 8; j += 2) {
      uint32_t b[4];
      load_right_pair<HEAD>(b, keys, first_key + 8 * j, step);
      mma_m16n8k16(scores[j], a, b[0], b[1]);
      mma_m16n8k16(scores[j + 1], a, b[2], b[3]);
    }
  }
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

// A pair of weights as bf16, and what that leaves.
DEVICE void split_pair(float a, float b, uint32_t& high, uint32_t& low) {
  high = pack_bf16(a, b);
  low = pack_bf16(a - low_to_f32(high), b - high_to_f32(high));
}

// Everything a warp accumulates over its rows, as a fragment has them: this thread's rows are lane / 4 and 8 below it.
template <int HEAD>
struct Accumulator {
  static constexpr int TILES = HEAD / 8;
  Softmax softmax[2];
  float output[TILES][4];

  DEVICE void clear() {
#pragma unroll
    for (int h = 0; h < 2; h++) softmax[h] = {-INFINITY, 0.0f};
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) output[n][i] = 0.0f;
    }
  }

  // Turns a tile's scores into weights relative to the new largest, and brings sum and output to it.
  DEVICE void weigh(float (&scores)[TILE_KEYS / 8][4], float scale) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float largest = softmax[h].largest;
#pragma unroll
      for (int j = 0; j < TILE_KEYS / 8; j++) largest = fmaxf(largest, fmaxf(scores[j][2 * h], scores[j][2 * h + 1]));
      largest = quad_max(largest);
      float base = exponent_base(largest);
      float shrink = exp2_approx(__fmul_rn(__fsub_rn(softmax[h].largest, base), scale));
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
      softmax[h].sum = __fmaf_rn(softmax[h].sum, shrink, quad_sum(sum));
      softmax[h].largest = largest;
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        output[n][2 * h] *= shrink;
        output[n][2 * h + 1] *= shrink;
      }
    }
  }

  // output[16, HEAD] += weights[16, 16] · values[16, HEAD], of the 16 keys from `row` of a tile on.
  DEVICE void add_values(const float (&weights)[TILE_KEYS / 8][4], bf16* values, int row) {
    int lane = threadIdx.x % WARP;
    uint32_t high[4], low[4];
#pragma unroll
    for (int part = 0; part < 4; part++) {
      const float(&pair)[4] = weights[row / 8 + part / 2];
      split_pair(pair[part % 2 * 2], pair[part % 2 * 2 + 1], high[part], low[part]);
    }
    // Several tiles at a time, since the second product of a tile has to wait for the first.
    constexpr int AT_ONCE = TILES < 8 ? TILES : 8;
#pragma unroll
    for (int first = 0; first < TILES; first += AT_ONCE) {
      uint32_t b[AT_ONCE / 2][4];
#pragma unroll
      for (int n = 0; n < AT_ONCE; n += 2) {
        ldmatrix_x4_trans(b[n / 2], tile_chunk<HEAD>(values, row + lane % 16, first + n + lane / 16));
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
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (!rows[h].exists) continue;
      bf16* row = out + static_cast<int64_t>(rows[h].token) * shape.out_stride + rows[h].head * shape.kv.head_dim;
      float inverse = __frcp_rn(softmax[h].sum);
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        int feature = 8 * n + 2 * (lane % 4);
        if (feature >= shape.kv.head_dim) continue;
        *reinterpret_cast<uint32_t*>(row + feature) =
            pack_bf16(__fmul_rn(output[n][2 * h], inverse), __fmul_rn(output[n][2 * h + 1], inverse));
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
        *reinterpret_cast<float2*>(partial_output + row * kv.head_stride + 8 * n + 2 * (lane % 4)) =
            make_float2(output[n][2 * h], output[n][2 * h + 1]);
      }
    }
  }
};
