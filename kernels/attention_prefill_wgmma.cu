// Causal attention of prompts on Hopper: items of up to 128 query rows, heads of 64 and 128.
//
//   warps 0..3, 4..7   two consumer warpgroups, 64 query rows each, with wgmma
//   warps 8, 9         the producers of keys, which keep a ring of stages full
//   warps 10, 11       those of values, with a ring of their own
//
//   shared memory      queries [128 rows] · keys [STAGES][64 rows] · values [STAGES][64 rows], all in panels of 64
//                      features under the 128-byte swizzle; of e4m3 rows as the cache has them, and scales, too
//
// A consumer asks for the scores of the next tile before the products with the values of this one, and takes their
// softmax while these run: the tensor cores have work all the time. Weights become the left operand where the softmax
// leaves them, in registers.
//
// Chains of wgmma along K give the bits of chains of mma.sync, so the result is that of the other kernels, to the bit.
// Tiles in which no row of a warpgroup sees a key are left out, which changes none.
//
// Keys lie in blocks all over the cache, and behind the last one there must be zeros: cp.async does both, where a bulk
// copy of a tensor would need a map for each cache and would leave what lies behind the end. Rows of e4m3 come into a
// ring of their own, from which the producers widen them into the stages, so that the consumers have bf16 either way.
#include "attention.cuh"

#ifdef HAS_WGMMA

constexpr int CONSUMERS = 2;
constexpr int CONSUMER_THREADS = 4 * WARP;
constexpr int CONSUMER_ROWS = 64;
constexpr int PREFILL_ROWS = CONSUMERS * CONSUMER_ROWS;
constexpr int PREFILL_THREADS = (CONSUMERS + 1) * CONSUMER_THREADS;
constexpr int PRODUCER_THREADS = CONSUMER_THREADS / 2;
// All that a multiprocessor has, as a block of 384 threads starts with 168 each.
constexpr int CONSUMER_REGISTERS = 232;
constexpr int PRODUCER_REGISTERS = 40;
constexpr int STAGES = 4;
// Tiles that a producer has in flight behind the one it waits for, and the room for those of e4m3.
constexpr int TILES_AHEAD = 2;
constexpr int ARRIVING_TILES = TILES_AHEAD + 1;
static_assert(TILE_KEYS == PRODUCER_THREADS);

using QueryPanels = Panels<PREFILL_ROWS>;
using KeyPanels = Panels<TILE_KEYS>;

// Stages of keys or of values; the tiles of an item go round.
template <class Element, int HEAD>
struct TileRing {
  bf16* stages;
  // Of e4m3.
  float* stage_scales;
  KvTile<Element, HEAD> arriving;
  uint64_t* full;
  uint64_t* empty;

  DEVICE bf16* tile(int index) const { return stages + index % STAGES * TILE_KEYS * HEAD; }
  DEVICE float* scales(int index) const { return stage_scales + index % STAGES * TILE_KEYS; }
  DEVICE KvTile<Element, HEAD> arriving_tile(int index) const {
    return arriving.from(index % ARRIVING_TILES * TILE_KEYS);
  }
  DEVICE void wait_full(int index) const { mbarrier_wait(&full[index % STAGES], index / STAGES % 2); }
  // The first round finds the stages empty: the wait for the phase before the first returns at once.
  DEVICE void wait_empty(int index) const { mbarrier_wait(&empty[index % STAGES], index / STAGES % 2 ^ 1); }
  DEVICE void announce(int index) const { mbarrier_arrive(&full[index % STAGES]); }
  // By every warp that reads tiles.
  DEVICE void release(int index) const {
    if constexpr (IS_E4M3<Element>) __syncwarp();
    if (threadIdx.x % WARP == 0) mbarrier_arrive(&empty[index % STAGES]);
  }
};

// The tiles of an item that some of its rows see, by their place among those that the item walks.
struct TileRange {
  int first;
  int end;
};

DEVICE int num_tiles_of(int first_key, int end_key) { return ceil_div(max(end_key - first_key, 0), TILE_KEYS); }

// Widens the 32 rows of a tile that this warp has loaded. The even features of 16 come before the odd ones, as
// `load_queries` puts those of queries and `Accumulator` takes those of values.
template <int HEAD>
DEVICE void widen_rows(bf16* tile, float* scales, KvTile<e4m3, HEAD> arrived) {
  constexpr int UNITS = ROW_UNITS<e4m3, HEAD>, CHUNKS = UNITS / CHUNK;
  int lane = threadIdx.x % WARP, first_row = threadIdx.x % PRODUCER_THREADS - lane;
  __syncwarp();
  scales[first_row + lane] = arrived.scales[first_row + lane];
#pragma unroll 1
  for (int i = 0; i < CHUNKS; i++) {
    int row = first_row + (i * WARP + lane) / CHUNKS, chunk = lane % CHUNKS;
    uint4 words = *reinterpret_cast<const uint4*>(tile_chunk<UNITS>(arrived.rows, row, chunk)), even, odd;
    widen_e4m3(words.x, even.x, odd.x);
    widen_e4m3(words.y, even.y, odd.y);
    widen_e4m3(words.z, even.z, odd.z);
    widen_e4m3(words.w, even.w, odd.w);
    *reinterpret_cast<uint4*>(KeyPanels::chunk(tile, row, 2 * chunk)) = even;
    *reinterpret_cast<uint4*>(KeyPanels::chunk(tile, row, 2 * chunk + 1)) = odd;
  }
  // The next tile to arrive takes the place of this one.
  __syncwarp();
}

template <class Element, int HEAD>
DEVICE void produce(TileRing<Element, HEAD> ring, const KvSource<Element>& source, const KvShape& kv, int part,
                    int first_key) {
  int num_tiles = num_tiles_of(first_key, source.end_key);
  for (int tile = 0; tile < num_tiles + TILES_AHEAD; tile++) {
    int key = first_key + tile * TILE_KEYS, arrived = tile - TILES_AHEAD;
    if (tile < num_tiles) {
      if constexpr (IS_E4M3<Element>) {
        load_rows<PRODUCER_THREADS>(ring.arriving_tile(tile), source, kv, part, key);
      } else {
        ring.wait_empty(tile);
        load_rows<PRODUCER_THREADS>(KvTile<Element, HEAD, KeyPanels>{ring.tile(tile), nullptr}, source, kv, part,
                                    key);
      }
    }
    cp_async_commit();
    if (arrived < 0) continue;
    cp_async_wait<TILES_AHEAD>();
    if constexpr (IS_E4M3<Element>) {
      ring.wait_empty(arrived);
      widen_rows<HEAD>(ring.tile(arrived), ring.scales(arrived), ring.arriving_tile(arrived));
    }
    async_proxy_fence();
    ring.announce(arrived);
  }
}

// The registers of a fragment in one row, as wgmma takes them.
template <int TILES>
DEVICE float (&registers_of(float (&fragment)[TILES][4]))[4 * TILES] {
  return reinterpret_cast<float(&)[4 * TILES]>(fragment);
}

// Asks for scores[64, 64] = queries · keysᵀ.
template <int HEAD>
DEVICE void start_scores(float (&scores)[TILE_KEYS / 8][4], const bf16* queries, const bf16* keys) {
#pragma unroll
  for (int feature = 0; feature < HEAD; feature += 16) {
    int panel = feature / KeyPanels::WIDTH, column = feature % KeyPanels::WIDTH;
    uint64_t left = wgmma_descriptor(queries + panel * QueryPanels::SIZE + column);
    uint64_t right = wgmma_descriptor(keys + panel * KeyPanels::SIZE + column);
    wgmma_m64k16<TILE_KEYS>(registers_of(scores), left, right, feature > 0);
  }
  wgmma_commit();
}

// A tile's weights as left operands, of 16 keys each.
struct SplitWeights {
  static constexpr int STEPS = TILE_KEYS / 16;
  uint32_t high[STEPS][4];
  uint32_t low[STEPS][4];

  // `scales` are those of the values of e4m3.
  template <class Element>
  DEVICE void split(const float (&weights)[TILE_KEYS / 8][4], const float* scales) {
#pragma unroll
    for (int step = 0; step < STEPS; step++) split_weights<Element>(weights, scales, 16 * step, high[step], low[step]);
  }
  DEVICE void changed() {
#pragma unroll
    for (int step = 0; step < STEPS; step++) registers_changed(high[step]), registers_changed(low[step]);
  }
};

// Asks for output[64, HEAD] += weights · values.
template <class Element, int HEAD>
DEVICE void start_values(Accumulator<Element, HEAD>& sums, const SplitWeights& weights, const bf16* values) {
#pragma unroll
  for (int step = 0; step < SplitWeights::STEPS; step++) {
    const bf16* rows = values + 16 * step * KeyPanels::WIDTH;
    uint64_t right = wgmma_descriptor(rows, KeyPanels::SIZE * sizeof(bf16));
    wgmma_m64k16_transposed<HEAD>(registers_of(sums.output), weights.high[step], right, true);
    wgmma_m64k16_transposed<HEAD>(registers_of(sums.output), weights.low[step], right, true);
  }
  wgmma_commit();
}

// What a consumer needs to turn scores into weights: its share of the item, and where its thread's two rows stand.
struct Consumer {
  AttentionItem share;
  int positions[2];
  int first_key;
  int window;
  float scale;

  DEVICE int key(int tile) const { return first_key + tile * TILE_KEYS; }

  DEVICE void weigh(Softmax (&softmax)[2], float (&scores)[TILE_KEYS / 8][4], int tile, float (&shrink)[2]) const {
    mask_tile(scores, share, positions, key(tile), window);
    weigh_scores(softmax, scores, scale, shrink);
  }
};

// Attends to the tiles of `range`, one at least: folds their chunks into `total`, but leaves the last one in `chunk`.
template <class Element, int HEAD>
DEVICE void consume(Accumulator<Element, HEAD>& total, Accumulator<Element, HEAD>& chunk, const Consumer& consumer,
                    const bf16* queries, TileRing<Element, HEAD> keys, TileRing<Element, HEAD> values,
                    TileRange range) {
  float scores[TILE_KEYS / 8][4], shrink[2];
  SplitWeights weights;
  // When the scores of a tile are there.
  auto take_scores = [&](int tile) {
    registers_changed(registers_of(scores));
    if constexpr (IS_E4M3<Element>) scale_scores<TILE_KEYS>(scores, keys.scales(tile));
    keys.release(tile);
  };
  keys.wait_full(range.first);
  wgmma_fence();
  start_scores<HEAD>(scores, queries, keys.tile(range.first));
  wgmma_wait<0>();
  take_scores(range.first);
  // There is no output yet to be shrunk.
  consumer.weigh(chunk.softmax, scores, range.first, shrink);
  values.wait_full(range.first);
  weights.split<Element>(scores, values.scales(range.first));
  for (int tile = range.first; tile + 1 < range.end; tile++) {
    int next = tile + 1;
    keys.wait_full(next);
    registers_changed(registers_of(chunk.output));
    weights.changed();
    wgmma_fence();
    start_scores<HEAD>(scores, queries, keys.tile(next));
    wgmma_fence();
    start_values(chunk, weights, values.tile(tile));
    wgmma_wait<1>();
    take_scores(next);
    bool chunk_ends = consumer.key(next) % CHUNK_KEYS == 0;
    Softmax softmax[2];
#pragma unroll
    for (int h = 0; h < 2; h++) softmax[h] = chunk_ends ? nothing_seen() : chunk.softmax[h];
    consumer.weigh(softmax, scores, next, shrink);
    // Here rather than in the next turn: past this the compiler moves nothing of the softmax, behind the products.
    values.wait_full(next);
    wgmma_wait<0>();
    registers_changed(registers_of(chunk.output));
    weights.changed();
    values.release(tile);
    if (chunk_ends) {
      total.fold(chunk, consumer.scale);
      chunk.clear();
    } else {
      chunk.shrink(shrink);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) chunk.softmax[h] = softmax[h];
    weights.split<Element>(scores, values.scales(next));
  }
  registers_changed(registers_of(chunk.output));
  wgmma_fence();
  start_values(chunk, weights, values.tile(range.end - 1));
  wgmma_wait<0>();
  registers_changed(registers_of(chunk.output));
  values.release(range.end - 1);
}

// The part of an item that has the tokens of CONSUMER_ROWS rows, none where it has fewer.
DEVICE AttentionItem share_of(const AttentionItem& item, const KvShape& kv, int first_row) {
  int group = kv.num_heads / kv.num_kv_heads;
  int first = min(first_row / group, item.num_tokens);
  int end = min(ceil_div(first_row + CONSUMER_ROWS, group), item.num_tokens);
  AttentionItem share = item;
  share.first_token += first;
  share.first_position += first;
  share.num_tokens = end - first;
  return share;
}

template <int HEAD, class Element>
DEVICE void attend(const AttentionItem& item, const bf16* q, const KvCache<Element>& cache,
                   const uint32_t* block_tables, const AttentionShape& shape, bf16* out, Softmax* partial_softmax,
                   float* partial_output) {
  DYNAMIC_SHARED(bf16, shared);
  __shared__ __align__(8) uint64_t full[2][STAGES];
  __shared__ __align__(8) uint64_t empty[2][STAGES];
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * STAGES; i++) {
      mbarrier_init(&full[0][0] + i, PRODUCER_THREADS);
      mbarrier_init(&empty[0][0] + i, CONSUMERS * CONSUMER_THREADS / WARP);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  bf16* stages = shared + PREFILL_ROWS * HEAD;
  bf16* arriving = stages + 2 * STAGES * TILE_KEYS * HEAD;
  float* arriving_scales =
      reinterpret_cast<float*>(arriving + 2 * ARRIVING_TILES * TILE_KEYS * ROW_UNITS<Element, HEAD>);
  float* scales = arriving_scales + 2 * ARRIVING_TILES * TILE_KEYS;
  auto ring = [&](int part) {
    KvTile<Element, HEAD> first = {arriving, arriving_scales};
    return TileRing<Element, HEAD>{stages + part * STAGES * TILE_KEYS * HEAD, scales + part * STAGES * TILE_KEYS,
                                   first.from(part * ARRIVING_TILES * TILE_KEYS), full[part], empty[part]};
  };
  if (threadIdx.x >= CONSUMERS * CONSUMER_THREADS) {
    registers_release<PRODUCER_REGISTERS>();
    int part = threadIdx.x / PRODUCER_THREADS % 2;
    KvSource<Element> source = {cache, block_tables + item.block_table_start, static_cast<int>(blockIdx.y),
                                end_key_of(item)};
    produce(ring(part), source, shape.kv, part, first_key_of(item, shape.window));
    return;
  }
  registers_acquire<CONSUMER_REGISTERS>();
  int kv_head = blockIdx.y, lane = threadIdx.x % WARP;
  int first_key = first_key_of(item, shape.window), num_tiles = num_tiles_of(first_key, end_key_of(item));
  int warpgroup = threadIdx.x / CONSUMER_THREADS, first_row = WARP_ROWS * (threadIdx.x / WARP);
  load_queries<Element, HEAD, QueryPanels>(shared, q, shape, item, kv_head, first_row);
  async_proxy_fence();
  named_barrier_sync(1 + warpgroup, CONSUMER_THREADS);

  auto row_of = [&](int h) { return query_row(item, shape.kv, kv_head, first_row + lane / 4 + 8 * h); };
  AttentionItem share = share_of(item, shape.kv, warpgroup * CONSUMER_ROWS);
  Consumer consumer = {share, {row_of(0).position, row_of(1).position}, first_key, shape.window, shape.scale};
  TileRange range = {0, 0};
  if (share.num_tokens > 0) {
    range.first = min((first_key_of(share, shape.window) - first_key) / TILE_KEYS, num_tiles);
    range.end = ceil_div(end_key_of(share) - first_key, TILE_KEYS);
  }
  TileRing<Element, HEAD> keys = ring(0), values = ring(1);
  // What comes to one warpgroup comes to both, in turn.
  auto pass = [&](int first, int end) {
    for (int tile = first; tile < end; tile++) {
      keys.wait_full(tile);
      keys.release(tile);
      values.wait_full(tile);
      values.release(tile);
    }
  };
  Accumulator<Element, HEAD> total, chunk;
  total.clear();
  chunk.clear();
  pass(0, range.first);
  if (range.first < range.end) {
    const bf16* queries = shared + warpgroup * CONSUMER_ROWS * QueryPanels::WIDTH;
    consume(total, chunk, consumer, queries, keys, values, range);
  }
  pass(max(range.first, range.end), num_tiles);
  QueryRow rows[2] = {row_of(0), row_of(1)};
  if (item.first_partial == NO_PARTIAL) {
    total.fold(chunk, shape.scale);
    total.write_result(rows, shape, out);
  } else {
    chunk.write_partial(rows, item, shape.kv, partial_softmax, partial_output);
  }
}

ATTENTION_KERNEL(attention_prefill_wgmma_64, PREFILL_THREADS, bf16, 64)
ATTENTION_KERNEL(attention_prefill_wgmma_128, PREFILL_THREADS, bf16, 128)
ATTENTION_KERNEL(attention_prefill_wgmma_e4m3_64, PREFILL_THREADS, e4m3, 64)
ATTENTION_KERNEL(attention_prefill_wgmma_e4m3_128, PREFILL_THREADS, e4m3, 128)

#endif  // HAS_WGMMA
