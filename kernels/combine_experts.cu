// The weighted sum of a token's experts: out[t] = Σ weight(t, e) · y[row(t, e)], by ascending expert, in f32.
//
// A scatter with atomics would sum in the order in which blocks happen to finish; this reads each row once more and
// sums in one order. Rows are grouped by expert, so ascending rows are ascending experts. A token may have fewer experts
// than entries: an empty entry's row is the largest number. A token has a block, or several along y if there are few.
//
// Rows and weights are the routing's, at least one kernel older than the product that this one follows: so they are put
// in order while the product still runs.
#include "device.cuh"

constexpr int MAX_WIDTH = 64;
constexpr uint32_t NONE = 0xffffffffu;  // the row of an empty entry

KERNEL(256, combine_experts)(const float4* y, const uint32_t* rows, const float* weights, int width, float4* out,
                             int row_quads) {
  __shared__ uint32_t sorted_rows[MAX_WIDTH];
  __shared__ float sorted_weights[MAX_WIDTH];
  int64_t first_entry = static_cast<int64_t>(blockIdx.x) * width;
  int num_rows = 0, place = 0, mine = threadIdx.x;
  uint32_t my_row = mine < width ? __ldcg(rows + first_entry + mine) : NONE;
  float my_weight = mine < width ? __ldcg(weights + first_entry + mine) : 0.0f;
#pragma unroll 4
  for (int k = 0; k < width; k++) {
    uint32_t row = __ldcg(rows + first_entry + k);
    num_rows += row != NONE;
    place += row < my_row;
  }
  if (my_row != NONE) {
    sorted_rows[place] = my_row;
    sorted_weights[place] = my_weight;
  }
  __syncthreads();
  wait_for_previous_kernel();
  let_next_kernel_start();
  for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < row_quads; i += gridDim.y * blockDim.x) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 2
    for (int k = 0; k < num_rows; k++) {
      float4 v = y[static_cast<int64_t>(sorted_rows[k]) * row_quads + i];
      float w = sorted_weights[k];
      sum = make_float4(__fmaf_rn(w, v.x, sum.x), __fmaf_rn(w, v.y, sum.y), __fmaf_rn(w, v.z, sum.z),
                        __fmaf_rn(w, v.w, sum.w));
    }
    out[static_cast<int64_t>(blockIdx.x) * row_quads + i] = sum;
  }
}
REGISTER_KERNEL(combine_experts)
