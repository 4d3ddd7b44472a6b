// A row of numbers as e4m3 with one scale, written by a block.
#pragma once
#include "device.cuh"

#ifdef HAS_E4M3

constexpr int E4M3_THREADS = 256;
constexpr float E4M3_LARGEST = 448.0f;

// What an element must be divided by for the largest, of this magnitude, to become 448; NaN if that is not finite.
DEVICE float e4m3_scale(float largest) {
  if (!(largest < INFINITY)) return __int_as_float(0x7fffffff);
  // Not the largest's reciprocal, which a very small one does not have.
  return largest > 0.0f ? fmaxf(largest / E4M3_LARGEST, 1e-30f) : 1.0f;
}

// The magnitude of a number; of NaN an infinity, which a maximum does not forget.
DEVICE float e4m3_magnitude(float x) { return x == x ? fabsf(x) : INFINITY; }

// The largest magnitude that any thread of the block has.
DEVICE float block_largest(float x) {
  __shared__ float of_warp[E4M3_THREADS / WARP];
  for (int offset = WARP / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, offset));
  if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = x;
  __syncthreads();
  for (int warp = 0; warp < E4M3_THREADS / WARP; warp++) x = fmaxf(x, of_warp[warp]);
  return x;
}

// out[i] = element(i) / scale for i in 0..count, a multiple of 2; returns the scale. `element` is asked twice.
template <class Element>
DEVICE float write_e4m3_row(Element element, int count, e4m3* out) {
  float largest = 0.0f;
  for (int i = threadIdx.x; i < count; i += E4M3_THREADS) largest = fmaxf(largest, e4m3_magnitude(element(i)));
  float scale = e4m3_scale(block_largest(largest));
  float inverse = 1.0f / scale;
  uint16_t* pairs = reinterpret_cast<uint16_t*>(out);
  for (int i = threadIdx.x; i < count / 2; i += E4M3_THREADS) {
    pairs[i] = pack_e4m3(element(2 * i) * inverse, element(2 * i + 1) * inverse);
  }
  return scale;
}

#endif
