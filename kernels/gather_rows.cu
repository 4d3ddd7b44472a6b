// Copies rows: those whose logits are wanted, and each token's activations to the rows of its experts.
//
//   out[i] = x[indices[i] / divisor]        rows of `row_quads` times 16 bytes; a row has a block, or
//                                         several along y if there are few
//
// With a routing's permutation and divisor top_k, `out` has every expert's rows side by side, as a bulk tensor copy
// wants them.
#include "device.cuh"

KERNEL(128, gather_rows)(const uint4* x, const uint32_t* indices, int divisor, uint4* out, int row_quads) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const uint4* row = x + static_cast<int64_t>(indices[blockIdx.x] / divisor) * row_quads;
  uint4* out_row = out + static_cast<int64_t>(blockIdx.x) * row_quads;
  for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < row_quads; i += gridDim.y * blockDim.x) {
    out_row[i] = row[i];
  }
}
REGISTER_KERNEL(gather_rows)
