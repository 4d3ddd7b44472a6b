// RMS norm, alone and after adding to the residual: out = x / sqrt(mean(x²) + eps) · weight, rounded to bf16.
//
// One block per row, which it reads once and keeps in shared memory. Rows are padded with zeros to a multiple of 64,
// as is the weight, so that every access is 16 bytes wide and the padding of `out` stays zero. The sum is taken in an
// order that depends on the width of the row alone. Both kernels run the same code on the same numbers, so fused and
// plain agree to the bit.
//
// Source: Root Mean Square Layer Normalization (arXiv 1910.07467).
#include "device.cuh"

constexpr int NORM_THREADS = 256;
// Loads of a thread that are on their way at a time.
constexpr int IN_FLIGHT = 4;

struct NormShape {
  int features;
  int stride;
  float eps;
};

// What a thread has of a row: every NORM_THREADS-th quad from `first` on; zeros behind the row.
struct Quads {
  float4 at[IN_FLIGHT];

  DEVICE void load(const float4* row, int first, int num_quads) {
#pragma unroll
    for (int turn = 0; turn < IN_FLIGHT; turn++) {
      int i = first + turn * NORM_THREADS;
      at[turn] = i < num_quads ? row[i] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  }
};

template <bool ADD>
DEVICE void rms_norm_row(float* x, const float* delta, const float* weight, bf16* out, NormShape shape) {
  __shared__ float partial_sums[NORM_THREADS / WARP];
  DYNAMIC_SHARED(float4, row);
  constexpr int SPAN = IN_FLIGHT * NORM_THREADS;
  float4* x_row = reinterpret_cast<float4*>(x + static_cast<int64_t>(blockIdx.x) * shape.stride);
  const float4* delta_row = reinterpret_cast<const float4*>(delta + static_cast<int64_t>(blockIdx.x) * shape.stride);
  const float4* weight_row = reinterpret_cast<const float4*>(weight);
  int begin = threadIdx.x, num_quads = shape.stride / 4;

  // No kernel writes weights, so the first of them can be on their way before anything else.
  Quads weights;
  weights.load(weight_row, begin, num_quads);
  wait_for_previous_kernel();
  let_next_kernel_start();

  float sum = 0.0f;
  for (int first = begin; first < num_quads; first += SPAN) {
    Quads values, added;
    values.load(x_row, first, num_quads);
    if (ADD) added.load(delta_row, first, num_quads);
#pragma unroll
    for (int turn = 0; turn < IN_FLIGHT; turn++) {
      int i = first + turn * NORM_THREADS;
      if (i >= num_quads) break;
      float4 v = values.at[turn];
      if (ADD) {
        float4 d = added.at[turn];
        v = make_float4(v.x + d.x, v.y + d.y, v.z + d.z, v.w + d.w);
        x_row[i] = v;
      }
      row[i] = v;
      sum = __fmaf_rn(v.x, v.x, __fmaf_rn(v.y, v.y, __fmaf_rn(v.z, v.z, __fmaf_rn(v.w, v.w, sum))));
    }
  }
  sum = warp_sum(sum);
  if (threadIdx.x % WARP == 0) partial_sums[threadIdx.x / WARP] = sum;
  __syncthreads();
  sum = 0.0f;
  for (int warp = 0; warp < NORM_THREADS / WARP; warp++) sum += partial_sums[warp];

  float scale = 1.0f / sqrtf(sum / static_cast<float>(shape.features) + shape.eps);
  uint2* out_row = reinterpret_cast<uint2*>(out + static_cast<int64_t>(blockIdx.x) * shape.stride);
  for (int first = begin; first < num_quads; first += SPAN) {
    if (first != begin) weights.load(weight_row, first, num_quads);
#pragma unroll
    for (int turn = 0; turn < IN_FLIGHT; turn++) {
      int i = first + turn * NORM_THREADS;
      if (i >= num_quads) break;
      float4 v = row[i], w = weights.at[turn];
      out_row[i] = make_uint2(pack_bf16(v.x * scale * w.x, v.y * scale * w.y),
                              pack_bf16(v.z * scale * w.z, v.w * scale * w.w));
    }
  }
}

KERNEL(NORM_THREADS, rms_norm)(float* x, const float* weight, bf16* out, NormShape shape) {
  rms_norm_row<false>(x, x, weight, out, shape);
}
REGISTER_KERNEL(rms_norm)

KERNEL(NORM_THREADS, add_rms_norm)(float* residual, const float* delta, const float* weight, bf16* out,
                                   NormShape shape) {
  rms_norm_row<true>(residual, delta, weight, out, shape);
}
REGISTER_KERNEL(add_rms_norm)
