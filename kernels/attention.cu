// Causal attention of a step's query tokens over the paged cache, on tensor cores; prompts and single tokens alike.
//
// A tile is up to 64 query rows: the tokens of one sequence times the query heads that share a kv head, so each key and
// value is read once for the whole group. Four warps take 16 rows each and walk the cache 64 tokens at a time, copies
// one tile ahead. Where there are no more than 16 rows, as for a single token, the warps share them: each scores a
// quarter of the keys, all weigh the scores of all, and each adds up a quarter of the features. That is the same
// arithmetic for every score and every feature, so it does not show in a bit of the result.
//
// Fixed splits. A row's softmax is taken per chunk of 256 cached tokens, counted from the sequence's start, and the
// chunks are folded from the first to the last. An item of work is a tile over a run of chunks: over all of them, it
// folds in registers and writes its result; over one of them, it writes the chunk's maximum, sum and output, and
// `attention_fold` folds those of all chunks by the same arithmetic. So how work was cut does not show in a bit of the
// result.
//
// The weights of the softmax are multiplied as the sum of two bf16 numbers, which keeps 16 bits of each: the second
// product costs nothing where memory is the limit.
//
// Source: FlashAttention-2 (arXiv 2307.08691), GQA (2305.13245), paging (2309.06180).
#include "kv_cache.cuh"
#include "shared_tile.cuh"

constexpr int ATTENTION_THREADS = 4 * WARP;
#if __CUDA_ARCH__ >= 1200
// There the compiler needs more registers for addresses, and with 64 keys the accumulators of a wide head spill.
constexpr int TILE_KEYS = 32;
#else
constexpr int TILE_KEYS = 64;
#endif
constexpr int CHUNK_KEYS = 256;
constexpr int NO_PARTIAL = -1;
// Rows of a warp, and keys that one scores of a tile whose rows are shared.
constexpr int WARP_ROWS = 16;
constexpr int WARP_KEYS = 16;
// Shared scores; the padding puts the rows of a fragment into different banks.
constexpr int SCORE_STRIDE = TILE_KEYS + 8;

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

// Starts copying keys and values `first_key..first_key + 64`; those from `end_key` on are zeros.
template <int HEAD>
DEVICE void load_keys_and_values(bf16* keys, bf16* values, const bf16* cache, const uint32_t* block_table,
                                 const KvShape& kv, int kv_head, int first_key, int end_key) {
  constexpr int CHUNKS = HEAD / 8;
  constexpr int ROWS = ATTENTION_THREADS / CHUNKS;
  int chunk = threadIdx.x % CHUNKS;
  for (int row = threadIdx.x / CHUNKS; row < TILE_KEYS; row += ROWS) {
    int key = first_key + row;
    bool valid = key < end_key;
    uint32_t block = valid ? block_table[key / kv.block_size] : 0;
    const bf16* source = cache + kv_row(kv, block, 0, kv_head, key % kv.block_size) + chunk * 8;
    cp_async_16(tile_chunk<HEAD>(keys, row, chunk), source, valid);
    source = cache + kv_row(kv, block, 1, kv_head, key % kv.block_size) + chunk * 8;
    cp_async_16(tile_chunk<HEAD>(values, row, chunk), source, valid);
  }
  cp_async_commit();
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

// What of a tile a warp has: rows from `first_row` on, and tiles of eight features from `first_tile` on.
template <int HEAD, bool SHARED>
struct Share {
  // An even number, because a load takes two; of a narrow head some warps have none.
  static constexpr int TILES = !SHARED ? HEAD / 8 : HEAD >= 64 ? HEAD / 32 : 2;

  DEVICE int first_row() const { return SHARED ? 0 : WARP_ROWS * (threadIdx.x / WARP); }
  DEVICE int first_tile() const { return SHARED ? TILES * (threadIdx.x / WARP) : 0; }
  DEVICE bool has_features() const { return first_tile() < HEAD / 8; }
};

// Writes the queries of the warp, or of all, to shared memory; rows that do not exist and features beyond the head are
// zeros. They stay there and not in registers, of which the two accumulators leave too few.
template <int HEAD, bool SHARED>
DEVICE void load_queries(bf16* queries, const bf16* q, const AttentionShape& shape, const AttentionItem& item,
                         int kv_head) {
  constexpr int THREADS = SHARED ? ATTENTION_THREADS : WARP;
  int first_row = Share<HEAD, SHARED>().first_row();
  for (int i = threadIdx.x % THREADS; i < WARP_ROWS * HEAD / 2; i += THREADS) {
    int row = first_row + i / (HEAD / 2), feature = i % (HEAD / 2) * 2;
    QueryRow query = query_row(item, shape.kv, kv_head, row);
    const bf16* source = q + static_cast<int64_t>(query.token) * shape.q_stride + query.head * shape.kv.head_dim;
    bool exists = query.exists && feature < shape.kv.head_dim;
    uint32_t pair = exists ? *reinterpret_cast<const uint32_t*>(source + feature) : 0;
    *reinterpret_cast<uint32_t*>(tile_chunk<HEAD>(queries, row, feature / 8) + feature % 8) = pair;
  }
  // Shared ones are waited for with the first keys.
  if (!SHARED) __syncwarp();
}

// scores[16, KEYS] = queries · keysᵀ, from a row of either on.
template <int HEAD, int KEYS>
DEVICE void score_keys(float (&scores)[KEYS / 8][4], bf16* queries, int first_row, bf16* keys, int first_key) {
#pragma unroll
  for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
    for (int i = 0; i < 4; i++) scores[j][i] = 0.0f;
  }
  // Unrolled, addresses fill the registers and accumulators spill.
#pragma unroll 1
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

// The same for a whole tile; a warp scores its own rows, or some keys of shared rows, which go through `exchange`.
template <int HEAD, bool SHARED>
DEVICE void score_tile(float (&scores)[TILE_KEYS / 8][4], bf16* queries, bf16* keys, float* exchange) {
  if constexpr (!SHARED) {
    score_keys<HEAD, TILE_KEYS>(scores, queries, Share<HEAD, SHARED>().first_row(), keys, 0);
    return;
  }
  int lane = threadIdx.x % WARP, first_key = WARP_KEYS * (threadIdx.x / WARP);
  float* place = exchange + lane / 4 * SCORE_STRIDE + 2 * (lane % 4);
  if (first_key < TILE_KEYS) {
    float own[WARP_KEYS / 8][4];
    score_keys<HEAD, WARP_KEYS>(own, queries, 0, keys, first_key);
#pragma unroll
    for (int j = 0; j < WARP_KEYS / 8; j++) {
      float* pair = place + first_key + 8 * j;
      *reinterpret_cast<float2*>(pair) = make_float2(own[j][0], own[j][1]);
      *reinterpret_cast<float2*>(pair + 8 * SCORE_STRIDE) = make_float2(own[j][2], own[j][3]);
    }
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < TILE_KEYS / 8; j++) {
    float2 upper = *reinterpret_cast<const float2*>(place + 8 * j);
    float2 lower = *reinterpret_cast<const float2*>(place + 8 * j + 8 * SCORE_STRIDE);
    scores[j][0] = upper.x, scores[j][1] = upper.y, scores[j][2] = lower.x, scores[j][3] = lower.y;
  }
}

DEVICE void mask_tile(float (&scores)[TILE_KEYS / 8][4], const int (&positions)[2], int first_key, int window) {
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

// Turns scores into weights relative to the new largest, and brings sum and output to it.
template <int TILES>
DEVICE void weigh_tile(float (&scores)[TILE_KEYS / 8][4], float (&output)[TILES][4], Softmax (&softmax)[2],
                       float scale) {
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

// A pair of weights as bf16, and what that leaves.
DEVICE void split_pair(float a, float b, uint32_t& high, uint32_t& low) {
  high = pack_bf16(a, b);
  low = pack_bf16(a - low_to_f32(high), b - high_to_f32(high));
}

// output[16, 8 TILES] += weights[16, 64] · values, of the features from a tile on
template <int HEAD, int TILES>
DEVICE void add_values(float (&output)[TILES][4], const float (&weights)[TILE_KEYS / 8][4], bf16* values,
                       int first_tile) {
  int lane = threadIdx.x % WARP;
#pragma unroll
  for (int step = 0; step < TILE_KEYS / 16; step++) {
    uint32_t high[4], low[4];
#pragma unroll
    for (int part = 0; part < 4; part++) {
      const float(&pair)[4] = weights[2 * step + part / 2];
      split_pair(pair[part % 2 * 2], pair[part % 2 * 2 + 1], high[part], low[part]);
    }
#pragma unroll
    for (int n = 0; n < TILES; n += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, tile_chunk<HEAD>(values, 16 * step + lane % 16, first_tile + n + lane / 16));
      mma_m16n8k16(output[n], high, b[0], b[1]);
      mma_m16n8k16(output[n], low, b[0], b[1]);
      mma_m16n8k16(output[n + 1], high, b[2], b[3]);
      mma_m16n8k16(output[n + 1], low, b[2], b[3]);
    }
  }
}

// Everything a warp accumulates over its rows.
template <int TILES>
struct Accumulator {
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
};

template <int TILES>
DEVICE void write_result(const Accumulator<TILES>& total, const QueryRow (&rows)[2], const AttentionShape& shape,
                         int first_tile, bf16* out) {
  int lane = threadIdx.x % WARP;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if (!rows[h].exists) continue;
    bf16* row = out + static_cast<int64_t>(rows[h].token) * shape.out_stride + rows[h].head * shape.kv.head_dim;
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      int feature = 8 * (first_tile + n) + 2 * (lane % 4);
      if (feature >= shape.kv.head_dim) continue;
      float sum = total.softmax[h].sum;
      *reinterpret_cast<uint32_t*>(row + feature) =
          pack_bf16(__fdiv_rn(total.output[n][2 * h], sum), __fdiv_rn(total.output[n][2 * h + 1], sum));
    }
  }
}

template <int TILES>
DEVICE void write_partial(const Accumulator<TILES>& chunk, const QueryRow (&rows)[2], const AttentionItem& item,
                          const KvShape& kv, int first_tile, Softmax* partial_softmax, float* partial_output) {
  int lane = threadIdx.x % WARP;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if (!rows[h].exists) continue;
    int64_t row = item.first_partial + (rows[h].token - item.first_token) * kv.num_heads + rows[h].head;
    if (lane % 4 == 0 && first_tile == 0) partial_softmax[row] = chunk.softmax[h];
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      *reinterpret_cast<float2*>(partial_output + row * kv.head_stride + 8 * (first_tile + n) + 2 * (lane % 4)) =
          make_float2(chunk.output[n][2 * h], chunk.output[n][2 * h + 1]);
    }
  }
}

template <int HEAD, bool SHARED>
DEVICE void attend(const AttentionItem& item, const bf16* q, const bf16* cache, const uint32_t* block_tables,
                   const AttentionShape& shape, bf16* out, Softmax* partial_softmax, float* partial_output) {
  constexpr int TILE = TILE_KEYS * HEAD;
  constexpr Share<HEAD, SHARED> share;
  DYNAMIC_SHARED(bf16, shared);
  const uint32_t* block_table = block_tables + item.block_table_start;
  int kv_head = blockIdx.y, lane = threadIdx.x % WARP, first_row = share.first_row();
  int positions[2] = {query_row(item, shape.kv, kv_head, first_row + lane / 4).position,
                      query_row(item, shape.kv, kv_head, first_row + lane / 4 + 8).position};
  // A warp without rows copies and waits with the others.
  bool has_rows = query_row(item, shape.kv, kv_head, first_row).exists;
  bf16* queries = shared + 4 * TILE;
  float* exchange = reinterpret_cast<float*>(queries + 4 * WARP_ROWS * HEAD);
  load_queries<HEAD, SHARED>(queries, q, shape, item, kv_head);

  int last_position = item.first_position + item.num_tokens - 1;
  int end_key = min(item.end_chunk * CHUNK_KEYS, last_position + 1);
  int first_visible = max(item.first_chunk * CHUNK_KEYS, item.first_position + 1 - shape.window);
  int first_key = max(first_visible, 0) / TILE_KEYS * TILE_KEYS;

  Accumulator<share.TILES> total, chunk;
  total.clear();
  chunk.clear();
  auto tile_at = [&](int key) { return shared + key / TILE_KEYS % 2 * 2 * TILE; };
  auto load = [&](int key) {
    load_keys_and_values<HEAD>(tile_at(key), tile_at(key) + TILE, cache, block_table, shape.kv, kv_head, key, end_key);
  };
  load(first_key);
  for (int key = first_key; key < end_key; key += TILE_KEYS) {
    int next = key + TILE_KEYS;
    if (next < end_key) {
      load(next);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    bf16* keys = tile_at(key);
    float scores[TILE_KEYS / 8][4];
    if (has_rows) score_tile<HEAD, SHARED>(scores, queries, keys, exchange);
    if (has_rows && share.has_features()) {
      mask_tile(scores, positions, key, shape.window);
      weigh_tile(scores, chunk.output, chunk.softmax, shape.scale);
      add_values<HEAD>(chunk.output, scores, keys + TILE, share.first_tile());
      bool chunk_ends = next % CHUNK_KEYS == 0 || next >= end_key;
      if (chunk_ends && item.first_partial == NO_PARTIAL) {
        total.fold(chunk, shape.scale);
        chunk.clear();
      }
    }
    __syncthreads();
  }
  if (!share.has_features()) return;
  QueryRow rows[2] = {query_row(item, shape.kv, kv_head, first_row + lane / 4),
                      query_row(item, shape.kv, kv_head, first_row + lane / 4 + 8)};
  if (item.first_partial == NO_PARTIAL) {
    write_result(total, rows, shape, share.first_tile(), out);
  } else {
    write_partial(chunk, rows, item, shape.kv, share.first_tile(), partial_softmax, partial_output);
  }
}

template <int HEAD>
DEVICE void attend_item(const bf16* q, const bf16* cache, const uint32_t* block_tables, const AttentionItem* items,
                        const AttentionShape& shape, bf16* out, Softmax* partial_softmax, float* partial_output) {
  const AttentionItem& item = items[blockIdx.x];
  int num_rows = item.num_tokens * (shape.kv.num_heads / shape.kv.num_kv_heads);
  if (num_rows == 0) return;
  if (num_rows <= WARP_ROWS) {
    attend<HEAD, true>(item, q, cache, block_tables, shape, out, partial_softmax, partial_output);
  } else {
    attend<HEAD, false>(item, q, cache, block_tables, shape, out, partial_softmax, partial_output);
  }
}

#define ATTENTION(HEAD)                                                                                             \
  KERNEL(ATTENTION_THREADS, attention_##HEAD)(const bf16* q, const bf16* cache, const uint32_t* block_tables,      \
                                              const AttentionItem* items, AttentionShape shape, bf16* out,         \
                                              Softmax* partial_softmax, float* partial_output) {                   \
    attend_item<HEAD>(q, cache, block_tables, items, shape, out, partial_softmax, partial_output);                      \
  }                                                                                                                 \
  REGISTER_KERNEL(attention_##HEAD)

ATTENTION(16)
ATTENTION(32)
ATTENTION(64)
ATTENTION(128)

// Partial results of one token: those of chunk c start at row `first_partial` + c · `chunk_rows`. Without chunks there
// is no token.
struct FoldItem {
  int token;
  int first_partial;
  int chunk_rows;
  int num_chunks;
};

// Folds the chunks of a token's head, one block per token and head, one thread per feature.
KERNEL(128, attention_fold)(const FoldItem* items, const Softmax* partial_softmax, const float* partial_output,
                            AttentionShape shape, bf16* out) {
  const FoldItem item = items[blockIdx.x];
  int head = blockIdx.y, feature = threadIdx.x;
  if (item.num_chunks == 0 || feature >= shape.kv.head_dim) return;
  Softmax total = {-INFINITY, 0.0f};
  float output = 0.0f;
  for (int chunk = 0; chunk < item.num_chunks; chunk++) {
    int64_t row = item.first_partial + static_cast<int64_t>(chunk) * item.chunk_rows + head;
    Fold factors = fold_softmax(total, partial_softmax[row], shape.scale);
    output = fold_output(output, partial_output[row * shape.kv.head_stride + feature], factors);
  }
  bf16* row = out + static_cast<int64_t>(item.token) * shape.out_stride + head * shape.kv.head_dim;
  row[feature] = to_bf16(__fdiv_rn(output, total.sum));
}
REGISTER_KERNEL(attention_fold)
