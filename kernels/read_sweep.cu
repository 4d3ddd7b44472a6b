// How fast this GPU reads its memory: every block sums its share of a buffer, 16 bytes per thread and access.
#include "device.cuh"

KERNEL(256, read_sweep)(const uint4* buffer, int64_t quads, uint32_t* sums) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  uint32_t sum = 0;
  int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
#pragma unroll 8
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < quads; i += stride) {
    uint4 v = buffer[i];
    sum += v.x ^ v.y ^ v.z ^ v.w;
  }
  // The sum must be used, or the reads would be dropped.
  if (sum == 0x12345678u) sums[blockIdx.x] = sum;
}
REGISTER_KERNEL(read_sweep)
