// Causal attention of prompts: items of up to 64 query rows, whose keys and values are read once for all of them.
//
// Four warps take 16 rows each and walk the cache 64 tokens at a time, copies one tile ahead.
#include "attention.cuh"

constexpr int PREFILL_THREADS = 4 * WARP;
constexpr int PREFILL_ROWS = 4 * WARP_ROWS;

template <int HEAD, class Element>
DEVICE void attend(const AttentionItem& item, const bf16* q, const KvCache<Element>& cache,
                   const uint32_t* block_tables, const AttentionShape& shape, bf16* out, Softmax* partial_softmax,
                   float* partial_output) {
  // Two tiles of keys and values, the queries, and the scales of e4m3.
  DYNAMIC_SHARED(bf16, shared);
  bf16* queries = shared + 4 * TILE_KEYS * ROW_UNITS<Element, HEAD>;
  KvTile<Element, HEAD> tiles = {shared, reinterpret_cast<float*>(queries + PREFILL_ROWS * HEAD)};
  int kv_head = blockIdx.y, lane = threadIdx.x % WARP, first_row = WARP_ROWS * (threadIdx.x / WARP);
  int end_key = end_key_of(item), first_key = first_key_of(item, shape.window);
  KvSource<Element> source = {cache, block_tables + item.block_table_start, kv_head, end_key};
  auto tile_at = [&](int key) { return tiles.from(key / TILE_KEYS % 2 * 2 * TILE_KEYS); };
  auto load = [&](int key) {
    int part = threadIdx.x / TILE_KEYS;
    if (part < 2) load_rows<TILE_KEYS>(tile_at(key).from(part * TILE_KEYS), source, shape.kv, part, key);
    cp_async_commit();
  };
  load(first_key);

  load_queries<Element, HEAD>(queries, q, shape, item, kv_head, first_row);
  auto row_of = [&](int h) { return query_row(item, shape.kv, kv_head, first_row + lane / 4 + 8 * h); };
  int positions[2] = {row_of(0).position, row_of(1).position};
  // A warp without rows copies and waits with the others.
  bool has_rows = query_row(item, shape.kv, kv_head, first_row).exists;

  Accumulator<Element, HEAD> total, chunk;
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
      KvTile<Element, HEAD> keys = tile_at(key), values = keys.from(TILE_KEYS);
      float scores[TILE_KEYS / 8][4];
      score_keys<TILE_KEYS>(scores, queries, first_row, keys);
      mask_tile(scores, item, positions, key, shape.window);
      chunk.weigh(scores, shape.scale);
#pragma unroll
      for (int row = 0; row < TILE_KEYS; row += 16) chunk.add_values(scores, values, row);
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

ATTENTION_KERNELS(prefill, PREFILL_THREADS)
