// Token embedding: out[t] = table[token_ids[t]], widened to f32. One block per token.
#include "device.cuh"

KERNEL(256, embed)(const uint32_t* token_ids, const bf16* table, float* out, int features, int table_stride,
                   int out_stride) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const bf16* row = table + static_cast<int64_t>(token_ids[blockIdx.x]) * table_stride;
  float* out_row = out + static_cast<int64_t>(blockIdx.x) * out_stride;
  for (int i = threadIdx.x; i < features; i += blockDim.x) out_row[i] = to_f32(row[i]);
}
REGISTER_KERNEL(embed)
