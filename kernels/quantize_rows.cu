// Rows of bf16 to rows of e4m3, each with the scale that brings its largest element to 448.
//
//   out[i] = x[indices[i] / divisor] / scales[i]        x[i] if `indices` is null; one block per row
//
// Rows are padded with zeros to their strides, x to a multiple of 64 elements and out to one of 128. A row of zeros has
// scale 1; a NaN or an infinity makes what it is multiplied with NaN.
#include "e4m3_rows.cuh"

#ifdef HAS_E4M3

struct RowStrides {
  int x;
  int out;
};

KERNEL(E4M3_THREADS, quantize_rows)(const bf16* x, const uint32_t* indices, int divisor, e4m3* out, float* scales,
                                    RowStrides strides) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  int64_t from = indices ? indices[blockIdx.x] / divisor : blockIdx.x;
  const bf16* row = x + from * strides.x;
  auto element = [&](int i) { return i < strides.x ? to_f32(row[i]) : 0.0f; };
  float scale = write_e4m3_row(element, strides.out, out + static_cast<int64_t>(blockIdx.x) * strides.out);
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
}
REGISTER_KERNEL(quantize_rows)

#endif
