// A row of numbers as e4m3 with one scale, written by a block.
#pragma once
#include "device.cuh"

#ifdef HAS_E4M3

constexpr int E4M3_THREADS = 256;
constexpr float E4M3_LARGEST = 448.0f;
constexpr int MAX_WARPS = 1024 / WARP;

// What an element must be divided by for the largest, of this magnitude, to become 448; NaN if that is not finite.
DEVICE float e4m3_scale(float largest) {
  if (!(largest < INFINITY)) return __int_as_float(0x7fffffff);
  // Not the largest's reciprocal, which a very small one does not have.
  return largest > 0.0f ? fmaxf(largest / E4M3_LARGEST, 1e-30f) : 1.0f;
}

// The magnitude of a number; of NaN an infinity, which a maximum does not forget.
DEVICE float e4m3_magnitude(float x) { return x == x ? fabsf(x) : INFINITY; }

// The largest magnitude that any thread of a block of whole warps has; an infinity if one has a NaN. Magnitudes without
// their sign are ordered as the integers that have their bits, and a NaN comes after the infinity.
DEVICE float block_largest(float magnitude) {
  __shared__ uint32_t of_warp[MAX_WARPS];
  uint32_t lane = threadIdx.x % WARP;
  uint32_t largest = __reduce_max_sync(ALL_LANES, __float_as_uint(magnitude));
  if (lane == 0) of_warp[threadIdx.x / WARP] = largest;
  __syncthreads();
  largest = __reduce_max_sync(ALL_LANES, lane < blockDim.x / WARP ? of_warp[lane] : 0u);
  return fminf(__uint_as_float(largest), INFINITY);
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
