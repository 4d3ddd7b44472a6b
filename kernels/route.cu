// The router, in one launch: gate logits, top-k, softmax over the chosen, then all assignments grouped by expert.
//
//   topk_ids, topk_weights   [tokens, width]      heaviest first; weights sum to one; NONE and 0 in an empty entry
//   expert_offsets           [experts + 1]        first row of each expert
//   gate_sums                [experts]            sum of the weights of each expert's rows
//   permutation              [tokens · width]     row -> assignment (token · width + rank), by expert, then by token;
//                                                 0 behind the last row
//   rows                     [tokens · width]     assignment -> row, its inverse; NONE for an empty entry
//
// The width is top_k, unless some tokens are steered: then it is the most experts that one of them may visit. A rule is
// what backend/src/steering.rs makes of a request for one token and layer.
//
// One block per token computes its choice; the block that finishes last groups them all, one warp per expert: ballots
// keep the order of tokens, so the result does not depend on which block that is. Counts never leave the device.
//
// Source: MixtralSparseMoeBlock in transformers; Mixtral of Experts (arXiv 2401.04088), section 2.1.
#include "device.cuh"

constexpr int ROUTE_THREADS = 256;
constexpr int ROUTE_WARPS = ROUTE_THREADS / WARP;
constexpr int MAX_EXPERTS = 256;
constexpr int MAX_TOP_K = 64;
constexpr uint32_t NONE = 0xffffffffu;

struct RoutingTables {
  uint32_t* topk_ids;
  float* topk_weights;
  uint32_t* expert_offsets;
  float* gate_sums;
  uint32_t* permutation;
  uint32_t* rows;
  // Blocks that have made their choice; zero between launches.
  uint32_t* finished_blocks;
};

struct RouteShape {
  int num_tokens;
  int num_experts;
  int top_k;
  int width;
  int stride;
};

struct RouteRule {
  uint64_t banned;
  uint64_t forced;
  uint32_t top_k;
  float temperature;
  uint32_t first_given;
  uint32_t padding;
};

// The steered tokens of the step; no rows if there are none.
struct StepSteering {
  const uint32_t* token_rows;
  // [rows, layers], from this layer on.
  const RouteRule* rules;
  const uint32_t* given_ids;
  const float* given_weights;
  int num_token_rows;
  int num_layers;
};

// What a lane has of a padded row: every 32nd vector of eight numbers from `first` on; zeros behind the row.
template <int N>
DEVICE void load_part(uint4 (&part)[N], const bf16* row, int first, int stride) {
  const uint4* vectors = reinterpret_cast<const uint4*>(row);
#pragma unroll
  for (int turn = 0; turn < N; turn++) {
    int i = first + turn * WARP + threadIdx.x % WARP;
    part[turn] = i < stride / 8 ? vectors[i] : make_uint4(0, 0, 0, 0);
  }
}

// Vectors of a lane's part of weights and of activations. Of a row of 4096, all weights are on their way at once.
constexpr int WEIGHT_VECTORS = 16, TOKEN_VECTORS = 8;

// x · w over a padded row, in an order that depends on its width alone; every lane gets the sum. `part` holds the
// first of the weights.
DEVICE float warp_dot(const bf16* x, const bf16* w, uint4 (&part)[WEIGHT_VECTORS], int stride) {
  float sum = 0.0f;
  for (int first = 0; first < stride / 8; first += WEIGHT_VECTORS * WARP) {
    if (first > 0) load_part(part, w, first, stride);
#pragma unroll
    for (int turn = 0; turn < WEIGHT_VECTORS; turn += TOKEN_VECTORS) {
      uint4 x_part[TOKEN_VECTORS];
      load_part(x_part, x, first + turn * WARP, stride);
#pragma unroll
      for (int i = 0; i < TOKEN_VECTORS; i++) {
        uint4 a = x_part[i], b = part[turn + i];
        sum = __fmaf_rn(low_to_f32(a.x), low_to_f32(b.x), __fmaf_rn(high_to_f32(a.x), high_to_f32(b.x), sum));
        sum = __fmaf_rn(low_to_f32(a.y), low_to_f32(b.y), __fmaf_rn(high_to_f32(a.y), high_to_f32(b.y), sum));
        sum = __fmaf_rn(low_to_f32(a.z), low_to_f32(b.z), __fmaf_rn(high_to_f32(a.z), high_to_f32(b.z), sum));
        sum = __fmaf_rn(low_to_f32(a.w), low_to_f32(b.w), __fmaf_rn(high_to_f32(a.w), high_to_f32(b.w), sum));
      }
    }
  }
  return warp_sum(sum);
}

// A set of experts, one bit each. In shared memory, for its words are indexed, which registers cannot be.
struct ExpertSet {
  uint64_t words[MAX_EXPERTS / 64];
};

// The largest logit's expert in a set, the lower id on a tie.
DEVICE int largest(const float* logits, const ExpertSet* open, int num_experts) {
  int best = -1;
  float best_logit = 0.0f;
  for (int first = 0; first < num_experts; first += 64) {
    uint64_t word = open->words[first / 64];
#pragma unroll 8
    for (int expert = first; expert < min(first + 64, num_experts); expert++) {
      float logit = logits[expert];
      bool is_open = word >> (expert - first) & 1;
      if (is_open && (best < 0 || logit > best_logit)) best = expert, best_logit = logit;
    }
  }
  return best;
}

// The `count` largest of the open experts, heaviest first, with the softmax over their logits.
DEVICE void choose(const float* logits, ExpertSet* open, int count, float temperature, int num_experts, uint32_t* ids,
                   float* weights) {
  __shared__ float chosen[MAX_TOP_K];
  float max = 0.0f, sum = 0.0f;
  for (int rank = 0; rank < count; rank++) {
    int best = largest(logits, open, num_experts);
    if (rank == 0) max = logits[best];
    float weight = expf((logits[best] - max) / temperature);
    sum += weight;
    chosen[rank] = weight;
    ids[rank] = best;
    open->words[best / 64] &= ~(1ull << best % 64);
  }
  for (int rank = 0; rank < count; rank++) weights[rank] = chosen[rank] / sum;
}

// The experts that a rule chooses, one bit each: those it forces, then the largest that it leaves open.
DEVICE uint64_t chosen_experts(const float* logits, const RouteRule& rule, ExpertSet* open, int num_experts) {
  uint64_t chosen = rule.forced;
  while (__popcll(chosen) < static_cast<int>(rule.top_k)) {
    open->words[0] = ~(chosen | rule.banned);
    chosen |= 1ull << largest(logits, open, num_experts);
  }
  return chosen;
}

// One token's experts and weights.
DEVICE void choose_experts(const float* logits, ExpertSet* open, int token, RouteShape shape, RoutingTables tables,
                           StepSteering steering) {
  uint32_t* ids = tables.topk_ids + token * shape.width;
  float* weights = tables.topk_weights + token * shape.width;
  uint32_t row = token < steering.num_token_rows ? steering.token_rows[token] : NONE;
  int count = shape.top_k;
  if (row == NONE) {
    for (uint64_t& word : open->words) word = ~0ull;
    choose(logits, open, count, 1.0f, shape.num_experts, ids, weights);
  } else {
    RouteRule rule = steering.rules[static_cast<int64_t>(row) * steering.num_layers];
    count = rule.top_k;
    if (rule.first_given == NONE) {
      // A model with more experts than a word has bits is not steered.
      open->words[0] = chosen_experts(logits, rule, open, shape.num_experts);
      choose(logits, open, count, rule.temperature, shape.num_experts, ids, weights);
    } else {
      for (int rank = 0; rank < count; rank++) {
        ids[rank] = steering.given_ids[rule.first_given + rank];
        weights[rank] = steering.given_weights[rule.first_given + rank];
      }
    }
  }
  for (int rank = count; rank < shape.width; rank++) {
    ids[rank] = NONE;
    weights[rank] = 0.0f;
    tables.rows[token * shape.width + rank] = NONE;
  }
}

DEVICE uint32_t lanes_with(const uint32_t* topk_ids, int first, int num_assignments, int expert) {
  int assignment = first + threadIdx.x % WARP;
  bool here = assignment < num_assignments && __ldcg(topk_ids + assignment) == static_cast<uint32_t>(expert);
  return __ballot_sync(ALL_LANES, here);
}

DEVICE void group_by_expert(uint32_t* counts, RouteShape shape, RoutingTables tables) {
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  int num_assignments = shape.num_tokens * shape.width;
  for (int expert = warp; expert < shape.num_experts; expert += ROUTE_WARPS) {
    uint32_t count = 0;
#pragma unroll 4
    for (int first = 0; first < num_assignments; first += WARP) {
      count += __popc(lanes_with(tables.topk_ids, first, num_assignments, expert));
    }
    if (lane == 0) counts[expert] = count;
  }
  __syncthreads();
  for (int expert = warp; expert < shape.num_experts; expert += ROUTE_WARPS) {
    uint32_t next_row = 0;
    float gate_sum = 0.0f;
    for (int other = 0; other < expert; other++) next_row += counts[other];
    if (lane == 0) {
      tables.expert_offsets[expert] = next_row;
      if (expert == shape.num_experts - 1) tables.expert_offsets[expert + 1] = next_row + counts[expert];
    }
    for (int first = 0; first < num_assignments; first += WARP) {
      uint32_t here = lanes_with(tables.topk_ids, first, num_assignments, expert);
      if (here >> lane & 1) {
        uint32_t row = next_row + __popc(here & ((1u << lane) - 1));
        tables.permutation[row] = first + lane;
        tables.rows[first + lane] = row;
        gate_sum += __ldcg(tables.topk_weights + first + lane);
      }
      next_row += __popc(here);
    }
    gate_sum = warp_sum(gate_sum);
    if (lane == 0) tables.gate_sums[expert] = gate_sum;
  }
  // Launches cover all entries, so what stands behind the last row has to be an assignment too.
  uint32_t num_rows = 0;
  for (int expert = 0; expert < shape.num_experts; expert++) num_rows += counts[expert];
  for (int row = num_rows + threadIdx.x; row < num_assignments; row += ROUTE_THREADS) tables.permutation[row] = 0;
}

// Whether this block is the last one of the launch to make its choice; then it sees the choices of all. Thread 0 asks.
DEVICE bool finishes_last(uint32_t* finished_blocks) {
  if (gridDim.x == 1) return true;
  __threadfence();
  bool is_last = atomicAdd(finished_blocks, 1u) == gridDim.x - 1;
  __threadfence();
  if (is_last) *finished_blocks = 0;
  return is_last;
}

KERNEL(ROUTE_THREADS, route)(const bf16* x, const bf16* router, RoutingTables tables, RouteShape shape,
                             StepSteering steering) {
  __shared__ float logits[MAX_EXPERTS];
  __shared__ uint32_t counts[MAX_EXPERTS];
  __shared__ ExpertSet open;
  __shared__ bool is_last;
  int token = blockIdx.x, warp = threadIdx.x / WARP;
  auto weights_of = [=](int expert) { return router + static_cast<int64_t>(expert) * shape.stride; };
  // No kernel writes weights, so those of the warp's first expert can be on their way before there is a token.
  uint4 part[WEIGHT_VECTORS];
  if (router && warp < shape.num_experts) load_part(part, weights_of(warp), 0, shape.stride);
  wait_for_previous_kernel();
  let_next_kernel_start();
  // A launch without tokens still has a block, which writes the empty groups.
  if (token < shape.num_tokens) {
    const bf16* row = x + static_cast<int64_t>(token) * shape.stride;
    for (int expert = warp; expert < shape.num_experts; expert += ROUTE_WARPS) {
      float logit = 0.0f;
      if (router) {
        if (expert != warp) load_part(part, weights_of(expert), 0, shape.stride);
        logit = warp_dot(row, weights_of(expert), part, shape.stride);
      }
      if (threadIdx.x % WARP == 0) logits[expert] = logit;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    if (token < shape.num_tokens) choose_experts(logits, &open, token, shape, tables, steering);
    is_last = finishes_last(tables.finished_blocks);
  }
  __syncthreads();
  if (is_last) group_by_expert(counts, shape, tables);
}
REGISTER_KERNEL(route)
