// Causal attention of items of no more than 16 query rows, as a single token of a sequence is: one warp each.
//
// This streams the cache. A tile of 64 keys and values lies in shared memory as a ring of pieces of 32 rows, and a piece
// is filled for the next tile as soon as the one behind it is in use, so a warp has three of four in flight and waits
// for nobody. Six such warps on a multiprocessor ask for several times of what its memory answers, and have the
// arithmetic of 192 instructions of the tensor cores per tile done long before.
//
// Every chunk is an item of its own where the host has room for partial results, so that a long context is many warps.
#include "attention.cuh"

constexpr int PIECE_KEYS = 32;
constexpr int KEY_PIECES = TILE_KEYS / PIECE_KEYS;
constexpr int PIECES = 2 * KEY_PIECES;

// The ring of pieces; the first half of them holds keys, the second values.
template <class Element, int HEAD>
struct PieceRing {
  KvTile<Element, HEAD> tile;
  KvSource<Element> source;
  const KvShape& kv;

  DEVICE KvTile<Element, HEAD> values() const { return tile.from(TILE_KEYS); }

  DEVICE void load(int first_key, int piece) const {
    if (first_key < source.end_key) {
      load_rows<PIECE_KEYS>(tile.from(piece * PIECE_KEYS), source, kv, piece / KEY_PIECES,
                            first_key + piece % KEY_PIECES * PIECE_KEYS);
    }
    cp_async_commit();
  }

  // Fills all but one, of the tile that starts at `first_key`.
  DEVICE void start(int first_key) const {
#pragma unroll
    for (int piece = 0; piece < PIECES - 1; piece++) load(first_key, piece);
  }

  // Waits for a piece of the tile at `first_key`, then fills the one before it, which all lanes are done with.
  DEVICE void wait(int first_key, int piece) const {
    cp_async_wait<PIECES - 2>();
    __syncwarp();
    load(piece == 0 ? first_key : first_key + TILE_KEYS, (piece + PIECES - 1) % PIECES);
  }
};

template <int HEAD, class Element>
DEVICE void attend(const AttentionItem& item, const bf16* q, const KvCache<Element>& cache,
                   const uint32_t* block_tables, const AttentionShape& shape, bf16* out, Softmax* partial_softmax,
                   float* partial_output) {
  // The tile, the queries, and the scales of e4m3.
  DYNAMIC_SHARED(bf16, shared);
  bf16* queries = shared + 2 * TILE_KEYS * ROW_UNITS<Element, HEAD>;
  float* scales = reinterpret_cast<float*>(queries + WARP_ROWS * HEAD);
  int kv_head = blockIdx.y, lane = threadIdx.x % WARP;
  int end_key = end_key_of(item), first_key = first_key_of(item, shape.window);
  KvSource<Element> source = {cache, block_tables + item.block_table_start, kv_head, end_key};
  PieceRing<Element, HEAD> ring = {{shared, scales}, source, shape.kv};
  ring.start(first_key);

  load_queries<Element, HEAD>(queries, q, shape, item, kv_head, 0);
  QueryRow rows[2] = {query_row(item, shape.kv, kv_head, lane / 4), query_row(item, shape.kv, kv_head, lane / 4 + 8)};
  int positions[2] = {rows[0].position, rows[1].position};

  Accumulator<Element, HEAD> total, chunk;
  total.clear();
  chunk.clear();
  for (int key = first_key; key < end_key; key += TILE_KEYS) {
    float scores[TILE_KEYS / 8][4];
#pragma unroll
    for (int piece = 0; piece < KEY_PIECES; piece++) {
      ring.wait(key, piece);
      score_keys<PIECE_KEYS>(&scores[piece * PIECE_KEYS / 8], queries, 0, ring.tile.from(piece * PIECE_KEYS));
    }
    mask_tile(scores, item, positions, key, shape.window);
    chunk.weigh(scores, shape.scale);
#pragma unroll
    for (int piece = 0; piece < KEY_PIECES; piece++) {
      ring.wait(key, KEY_PIECES + piece);
#pragma unroll
      for (int row = piece * PIECE_KEYS; row < (piece + 1) * PIECE_KEYS; row += 16) {
        chunk.add_values(scores, ring.values(), row);
      }
    }
    int next = key + TILE_KEYS;
    bool chunk_ends = next % CHUNK_KEYS == 0 || next >= end_key;
    if (chunk_ends && item.first_partial == NO_PARTIAL) {
      total.fold(chunk, shape.scale);
      chunk.clear();
    }
  }
  if (item.first_partial == NO_PARTIAL) {
    total.write_result(rows, shape, out);
  } else {
    chunk.write_partial(rows, item, shape.kv, partial_softmax, partial_output);
  }
}

ATTENTION_KERNELS(decode, WARP)
