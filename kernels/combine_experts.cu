// The weighted sum of a token's experts: out[t] = Σ weight(t, e) · y[row(t, e)], by ascending expert, in f32.
//
// A scatter with atomics would sum in the order in which blocks happen to finish; this reads each row once more and
// sums in one order. Rows are grouped by expert, so ascending rows are ascending experts. A token may have fewer experts
// than entries: an empty entry's row is the largest number. One block per token.
#include "device.cuh"

constexpr int MAX_WIDTH = 64;

KERNEL(256, combine_experts)(const float4* y, const uint32_t* rows, const float* weights, int width, float4* out,
                             int row_quads) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  __shared__ uint32_t sorted_rows[MAX_WIDTH];
  __shared__ float sorted_weights[MAX_WIDTH];
  const uint32_t* token_rows = rows + static_cast<int64_t>(blockIdx.x) * width;
  int num_rows = 0;
  for (int k = 0; k < width; k++) num_rows += token_rows[k] != 0xffffffffu;
  int mine = threadIdx.x;
  if (mine < width && token_rows[mine] != 0xffffffffu) {
    int place = 0;
    for (int other = 0; other < width; other++) place += token_rows[other] < token_rows[mine];
    sorted_rows[place] = token_rows[mine];
    sorted_weights[place] = weights[static_cast<int64_t>(blockIdx.x) * width + mine];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < row_quads; i += blockDim.x) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
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
