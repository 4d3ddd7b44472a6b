// Rows of bf16 to rows of e4m3, each with the scale that brings its largest element to 448.
//
//   out[i] = x[indices[i] / divisor] / scales[i]        x[i] if `indices` is null; one block per row
//
// Rows are padded with zeros to their strides, x to a multiple of 64 elements and out to one of 128. A row of zeros has
// scale 1; a NaN or an infinity makes what it is multiplied with NaN.
//
// A thread loads eight neighbours at a time, and a block has as many threads as make that one load for each, up to its
// most. From the largest to the rounding the row stays in registers; only what they do not hold is read again.
#include "e4m3_rows.cuh"

#ifdef HAS_E4M3

constexpr int MAX_QUANTIZE_THREADS = 1024;  // whole warps, and any number of them does the same
// Loads of a thread that stay in registers.
constexpr int KEPT = 2;

struct RowStrides {
  int x;
  int out;
};

// The larger magnitude of two bf16, or a NaN.
DEVICE float larger_magnitude(uint32_t pair) {
  return __uint_as_float(max(pair << 16 & 0x7fff0000u, pair & 0x7fff0000u));
}

// Of two magnitudes, one of which may be a NaN.
DEVICE float larger(float a, float b) { return __uint_as_float(max(__float_as_uint(a), __float_as_uint(b))); }

DEVICE float largest_magnitude(uint4 octet) {
  return larger(larger(larger_magnitude(octet.x), larger_magnitude(octet.y)),
                larger(larger_magnitude(octet.z), larger_magnitude(octet.w)));
}

// Two pairs of bf16 as four e4m3.
DEVICE uint32_t pack_quad(uint32_t low, uint32_t high, float inverse) {
  return pack_e4m3(low_to_f32(low) * inverse, high_to_f32(low) * inverse) |
         static_cast<uint32_t>(pack_e4m3(low_to_f32(high) * inverse, high_to_f32(high) * inverse)) << 16;
}

DEVICE uint2 pack_octet(uint4 octet, float inverse) {
  return make_uint2(pack_quad(octet.x, octet.y, inverse), pack_quad(octet.z, octet.w, inverse));
}

KERNEL(MAX_QUANTIZE_THREADS, quantize_rows)(const bf16* x, const uint32_t* indices, int divisor, e4m3* out,
                                            float* scales, RowStrides strides) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  int64_t from = indices ? indices[blockIdx.x] / divisor : blockIdx.x;
  const uint4* row = reinterpret_cast<const uint4*>(x + from * strides.x);
  uint2* out_row = reinterpret_cast<uint2*>(out + static_cast<int64_t>(blockIdx.x) * strides.out);
  int num_octets = strides.out / 8, threads = blockDim.x;
  auto octet = [&](int i) { return i < strides.x / 8 ? row[i] : make_uint4(0, 0, 0, 0); };

  uint4 kept[KEPT];
#pragma unroll
  for (int turn = 0; turn < KEPT; turn++) kept[turn] = octet(threadIdx.x + turn * threads);
  float largest = 0.0f;
#pragma unroll
  for (int turn = 0; turn < KEPT; turn++) largest = larger(largest, largest_magnitude(kept[turn]));
#pragma unroll 1
  for (int i = threadIdx.x + KEPT * threads; i < num_octets; i += threads) {
    largest = larger(largest, largest_magnitude(octet(i)));
  }

  float scale = e4m3_scale(block_largest(largest));
  float inverse = 1.0f / scale;
#pragma unroll
  for (int turn = 0; turn < KEPT; turn++) {
    int i = threadIdx.x + turn * threads;
    if (i < num_octets) out_row[i] = pack_octet(kept[turn], inverse);
  }
#pragma unroll 1
  for (int i = threadIdx.x + KEPT * threads; i < num_octets; i += threads) {
    out_row[i] = pack_octet(octet(i), inverse);
  }
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
}
REGISTER_KERNEL(quantize_rows)

#endif
