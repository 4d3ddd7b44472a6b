// Turns queries and keys by their positions' angles, in f32; writes queries to a tensor and keys and values to the
// paged cache, all rounded to bf16. One block per token, one pair of features per thread and turn.
//
// Source: RoFormer (arXiv 2104.09864), feature i paired with i + head_dim / 2 as in Hugging Face's rotate_half.
#include "device.cuh"
#include "kv_cache.cuh"

KERNEL(256, rope_store_kv)(const float* qkv, int qkv_stride, const float* cos_table, const float* sin_table,
                           const uint32_t* positions, const uint32_t* slots, bf16* queries, int queries_stride,
                           bf16* cache, KvShape shape) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  int half = shape.head_dim / 2;
  const float* row = qkv + static_cast<int64_t>(blockIdx.x) * qkv_stride;
  bf16* query_row = queries + static_cast<int64_t>(blockIdx.x) * queries_stride;
  const float* cosines = cos_table + static_cast<int64_t>(positions[blockIdx.x]) * half;
  const float* sines = sin_table + static_cast<int64_t>(positions[blockIdx.x]) * half;
  int block = slots[blockIdx.x] / shape.block_size, offset = slots[blockIdx.x] % shape.block_size;

  int num_heads = shape.num_heads + 2 * shape.num_kv_heads;
  for (int i = threadIdx.x; i < num_heads * half; i += blockDim.x) {
    int head = i / half, pair = i % half;
    float first = row[head * shape.head_dim + pair], second = row[head * shape.head_dim + pair + half];
    int kv_head = head - shape.num_heads;
    bf16* out = query_row + head * shape.head_dim;
    if (kv_head >= 0) {
      int part = kv_head / shape.num_kv_heads;
      int cache_row = kv_row(shape, block, part, kv_head % shape.num_kv_heads, offset);
      out = cache + static_cast<int64_t>(cache_row) * shape.head_stride;
      if (part == 1) {
        out[pair] = to_bf16(first);
        out[pair + half] = to_bf16(second);
        continue;
      }
    }
    out[pair] = to_bf16(first * cosines[pair] - second * sines[pair]);
    out[pair + half] = to_bf16(second * cosines[pair] + first * sines[pair]);
  }
}
REGISTER_KERNEL(rope_store_kv)
