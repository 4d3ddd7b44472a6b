// The likeliest token of each row of f32 logits: the first of the largest. One block per row.
//
// A row that cannot be sampled from (a NaN, or no finite largest) gives NO_TOKEN.
#include "device.cuh"

constexpr int GREEDY_THREADS = 1024;
constexpr uint32_t NO_TOKEN = 0xffffffffu;

struct Best {
  float logit;
  uint32_t token;
};

// NaN wins over everything, so that it is still there at the end; then the larger logit, then the lower token.
DEVICE Best better(Best a, Best b) {
  if (a.logit != a.logit) return a;
  if (b.logit != b.logit) return b;
  bool take_b = b.logit > a.logit || (b.logit == a.logit && b.token < a.token);
  return take_b ? b : a;
}

DEVICE Best warp_best(Best best) {
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
    Best other = {__shfl_xor_sync(ALL_LANES, best.logit, offset), __shfl_xor_sync(ALL_LANES, best.token, offset)};
    best = better(best, other);
  }
  return best;
}

KERNEL(GREEDY_THREADS, greedy)(const float* logits, int vocab, int stride, uint32_t* tokens) {
  __shared__ float warp_logits[WARP];
  __shared__ uint32_t warp_tokens[WARP];
  const float* row = logits + static_cast<int64_t>(blockIdx.x) * stride;
  Best best = {-INFINITY, NO_TOKEN};
  for (int i = threadIdx.x; i < vocab; i += GREEDY_THREADS) best = better(best, Best{row[i], static_cast<uint32_t>(i)});
  best = warp_best(best);
  if (threadIdx.x % WARP == 0) {
    warp_logits[threadIdx.x / WARP] = best.logit;
    warp_tokens[threadIdx.x / WARP] = best.token;
  }
  __syncthreads();
  if (threadIdx.x >= WARP) return;
  best = warp_best(Best{warp_logits[threadIdx.x], warp_tokens[threadIdx.x]});
  bool finite = best.logit == best.logit && best.logit < INFINITY && best.logit > -INFINITY;
  if (threadIdx.x == 0) tokens[blockIdx.x] = finite ? best.token : NO_TOKEN;
}
REGISTER_KERNEL(greedy)
