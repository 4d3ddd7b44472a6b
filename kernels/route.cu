// The router, in one launch: gate logits, top-k, softmax over the chosen, then all assignments grouped by expert.
//
//   topk_ids, topk_weights   [tokens, top_k]      heaviest first; weights sum to one
//   expert_offsets           [experts + 1]        first row of each expert
//   permutation              [tokens · top_k]     row -> assignment (token · top_k + rank), by expert, then by token
//   rows                     [tokens · top_k]     assignment -> row, its inverse
//
// One block per token computes its choice; the block that finishes last groups them all, one warp per expert: ballots
// keep the order of tokens, so the result does not depend on which block that is. Counts never leave the device.
//
// Source: MixtralSparseMoeBlock in transformers; Mixtral of Experts (arXiv 2401.04088), section 2.1.
#include "device.cuh"

constexpr int ROUTE_THREADS = 256;
constexpr int ROUTE_WARPS = ROUTE_THREADS / WARP;
constexpr int MAX_EXPERTS = 256;

struct RoutingTables {
  uint32_t* topk_ids;
  float* topk_weights;
  uint32_t* expert_offsets;
  uint32_t* permutation;
  uint32_t* rows;
  // Blocks that have made their choice; zero between launches.
  uint32_t* finished_blocks;
};

struct RouteShape {
  int num_tokens;
  int num_experts;
  int top_k;
  int stride;
};

// x · w over a padded row, in an order that depends on its width alone; every lane gets the sum.
DEVICE float warp_dot(const bf16* x, const bf16* w, int stride) {
  const uint4* x_row = reinterpret_cast<const uint4*>(x);
  const uint4* w_row = reinterpret_cast<const uint4*>(w);
  float sum = 0.0f;
#pragma unroll 4
  for (int i = threadIdx.x % WARP; i < stride / 8; i += WARP) {
    uint4 a = x_row[i], b = w_row[i];
    sum = __fmaf_rn(low_to_f32(a.x), low_to_f32(b.x), __fmaf_rn(high_to_f32(a.x), high_to_f32(b.x), sum));
    sum = __fmaf_rn(low_to_f32(a.y), low_to_f32(b.y), __fmaf_rn(high_to_f32(a.y), high_to_f32(b.y), sum));
    sum = __fmaf_rn(low_to_f32(a.z), low_to_f32(b.z), __fmaf_rn(high_to_f32(a.z), high_to_f32(b.z), sum));
    sum = __fmaf_rn(low_to_f32(a.w), low_to_f32(b.w), __fmaf_rn(high_to_f32(a.w), high_to_f32(b.w), sum));
  }
  return warp_sum(sum);
}

// The `top_k` largest logits, the lower id on a tie; the logits are used up.
DEVICE void choose_experts(float* logits, int token, RouteShape shape, RoutingTables tables) {
  uint32_t* ids = tables.topk_ids + token * shape.top_k;
  float* weights = tables.topk_weights + token * shape.top_k;
  float largest = 0.0f, sum = 0.0f;
  for (int rank = 0; rank < shape.top_k; rank++) {
    int best = -1;
    for (int expert = 0; expert < shape.num_experts; expert++) {
      // A NaN marks an expert already taken: it compares false with everything.
      bool open = logits[expert] == logits[expert];
      if (open && (best < 0 || logits[expert] > logits[best])) best = expert;
    }
    // Logits that are all NaN choose the first experts: the row's logits will tell, nothing may fault here.
    if (best < 0) best = rank;
    if (rank == 0) largest = logits[best];
    weights[rank] = expf(logits[best] - largest);
    sum += weights[rank];
    ids[rank] = best;
    logits[best] = __uint_as_float(0x7fffffffu);
  }
  for (int rank = 0; rank < shape.top_k; rank++) weights[rank] /= sum;
}

DEVICE uint32_t lanes_with(const uint32_t* topk_ids, int first, int num_assignments, int expert) {
  int assignment = first + threadIdx.x % WARP;
  bool here = assignment < num_assignments && __ldcg(topk_ids + assignment) == static_cast<uint32_t>(expert);
  return __ballot_sync(ALL_LANES, here);
}

DEVICE void group_by_expert(uint32_t* counts, RouteShape shape, RoutingTables tables) {
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  int num_assignments = shape.num_tokens * shape.top_k;
  for (int expert = warp; expert < shape.num_experts; expert += ROUTE_WARPS) {
    uint32_t count = 0;
    for (int first = 0; first < num_assignments; first += WARP) {
      count += __popc(lanes_with(tables.topk_ids, first, num_assignments, expert));
    }
    if (lane == 0) counts[expert] = count;
  }
  __syncthreads();
  for (int expert = warp; expert < shape.num_experts; expert += ROUTE_WARPS) {
    uint32_t next_row = 0;
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
      }
      next_row += __popc(here);
    }
  }
}

KERNEL(ROUTE_THREADS, route)(const bf16* x, const bf16* router, RoutingTables tables, RouteShape shape) {
  __shared__ float logits[MAX_EXPERTS];
  __shared__ uint32_t counts[MAX_EXPERTS];
  __shared__ bool is_last;
  int token = blockIdx.x;
  // A launch without tokens still has a block, which writes the empty groups.
  if (token < shape.num_tokens) {
    for (int expert = threadIdx.x / WARP; expert < shape.num_experts; expert += ROUTE_WARPS) {
      float logit = 0.0f;
      if (router) {
        logit = warp_dot(x + static_cast<int64_t>(token) * shape.stride,
                         router + static_cast<int64_t>(expert) * shape.stride, shape.stride);
      }
      if (threadIdx.x % WARP == 0) logits[expert] = logit;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    if (token < shape.num_tokens) choose_experts(logits, token, shape, tables);
    __threadfence();
    is_last = atomicAdd(tables.finished_blocks, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  group_by_expert(counts, shape, tables);
  if (threadIdx.x == 0) *tables.finished_blocks = 0;
}
REGISTER_KERNEL(route)
