// Where the paged cache keeps a token's keys and values.
//
//   rows     [block][key | value][kv head][offset in block][head_stride]   bf16 or e4m3
//   scales   [block][key | value][kv head][offset in block]                f32, what a row of e4m3 is multiplied with
//   slot     block · block_size + offset
//
// A head's rows are padded with zeros to `head_stride`, the width that the attention kernel is compiled for. A row of
// e4m3 that cannot be said so, for there was an infinity or NaN in it, has scale NaN, whatever its elements are.
#pragma once
#include "device.cuh"

template <class Element>
struct KvCache {
  Element* rows;
  // Null for bf16.
  float* scales;
};

template <class Element>
constexpr bool IS_E4M3 = sizeof(Element) == sizeof(e4m3);

struct KvShape {
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int head_stride;
  int block_size;
};

// A row of the cache, of which no memory holds 2^31; `part` is 0 for keys and 1 for values.
DEVICE int kv_row(const KvShape& shape, int block, int part, int kv_head, int offset) {
  return ((block * 2 + part) * shape.num_kv_heads + kv_head) * shape.block_size + offset;
}
