// Causal attention of prompts: items of up to 64 query rows, whose keys and values are read once for all of them.
//
// Four warps take 16 rows each and walk the cache 64 tokens at a time, copies one tile ahead.
#include "attention.cuh"

constexpr int PREFILL_THREADS = 4 * WARP;

template <int HEAD>
DEVICE void attend(const AttentionItem& item, const bf16* q, const bf16* cache, const uint32_t* block_tables,
                   const AttentionShape& shape, bf16* out, Softmax* partial_softmax, float* partial_output) {
  constexpr int TILE = TILE_KEYS * HEAD;
  DYNAMIC_SHARED(bf16, shared);
  int kv_head = blockIdx.y, lane = threadIdx.x % WARP, first_row = WARP_ROWS * (threadIdx.x / WARP);
  int end_key = end_key_of(item), first_key = first_key_of(item, shape.window);
  KvSource source = {cache, block_tables + item.block_table_start, kv_head, end_key};
  auto tile_at = [&](int key) { return shared + key / TILE_KEYS % 2 * 2 * TILE; };
  auto load = [&](int key) {
    int part = threadIdx.x / TILE_KEYS;
    if (part < 2) load_rows<HEAD, TILE_KEYS>(tile_at(key) + part * TILE, source, shape.kv, part, key);
    cp_async_commit();
  };
  load(first_key);

  bf16* queries = shared + 4 * TILE;
  load_queries<HEAD>(queries, q, shape, item, kv_head, first_row);
  auto row_of = [&](int h) { return query_row(item, shape.kv, kv_head, first_row + lane / 4 + 8 * h); };
  int positions[2] = {row_of(0).position, row_of(1).position};
  // A warp without rows copies and waits with the others.
  bool has_rows = query_row(item, shape.kv, kv_head, first_row).exists;

  Accumulator<HEAD> total, chunk;
  total.clear();
  chunk.clear();
  for (int key = first_key; key < end_key; key += TILE_KEYS) {
    int next = key + TILE_KEYS;
    if (next < end_key) {
      load(next);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    if (has_rows) {
      bf16* keys = tile_at(key);
      float scores[TILE_KEYS / 8][4];
      score_keys<HEAD, TILE_KEYS>(scores, queries, first_row, keys, 0);
      mask_tile(scores, item, positions, key, shape.window);
      chunk.weigh(scores, shape.scale);
#pragma unroll
      for (int row = 0; row < TILE_KEYS; row += 16) chunk.add_values(scores, keys + TILE, row);
      bool chunk_ends = next % CHUNK_KEYS == 0 || next >= end_key;
      if (chunk_ends && item.first_partial == NO_PARTIAL) {
        total.fold(chunk, shape.scale);
        chunk.clear();
      }
    }
    __syncthreads();
  }
  QueryRow rows[2] = {row_of(0), row_of(1)};
  if (item.first_partial == NO_PARTIAL) {
    total.write_result(rows, shape, out);
  } else {
    chunk.write_partial(rows, item, shape.kv, partial_softmax, partial_output);
  }
}

#define ATTENTION_PREFILL(HEAD)                                                                                      \
  KERNEL(PREFILL_THREADS, attention_prefill_##HEAD)(const bf16* q, const bf16* cache, const uint32_t* block_tables,  \
                                                    const AttentionItem* items, AttentionShape shape, bf16* out,     \
                                                    Softmax* partial_softmax, float* partial_output) {               \
    wait_for_previous_kernel();                                                                                      \
    let_next_kernel_start();                                                                                         \
    const AttentionItem& item = items[blockIdx.x];                                                                   \
    if (item.num_tokens == 0) return;                                                                                \
    attend<HEAD>(item, q, cache, block_tables, shape, out, partial_softmax, partial_output);                         \
  }                                                                                                                  \
  REGISTER_KERNEL(attention_prefill_##HEAD)

ATTENTION_PREFILL(16)
ATTENTION_PREFILL(32)
ATTENTION_PREFILL(64)
ATTENTION_PREFILL(128)
