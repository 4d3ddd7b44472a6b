// Token embedding: out[t] = table[token_ids[t]], widened to f32. A token has a block, or several along y if there
// are few. Rows are padded with zeros to a multiple of 64, so a thread widens eight neighbours per turn.
#include "device.cuh"

KERNEL(256, embed)(const uint32_t* token_ids, const bf16* table, float* out, int features, int table_stride,
                   int out_stride) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const uint4* row = reinterpret_cast<const uint4*>(table + static_cast<int64_t>(token_ids[blockIdx.x]) * table_stride);
  float4* out_row = reinterpret_cast<float4*>(out + static_cast<int64_t>(blockIdx.x) * out_stride);
  for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < ceil_div(features, 8); i += gridDim.y * blockDim.x) {
    uint4 v = row[i];
    out_row[2 * i] = make_float4(low_to_f32(v.x), high_to_f32(v.x), low_to_f32(v.y), high_to_f32(v.y));
    out_row[2 * i + 1] = make_float4(low_to_f32(v.z), high_to_f32(v.z), low_to_f32(v.w), high_to_f32(v.w));
  }
}
REGISTER_KERNEL(embed)
