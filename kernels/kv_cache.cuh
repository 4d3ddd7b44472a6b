// Where the paged cache keeps a token's keys and values.
//
//   cache    [block][key | value][kv head][offset in block][head_stride]   bf16
//   slot     block · block_size + offset
//
// A head's rows are padded with zeros to `head_stride`, the width that the attention kernel is compiled for.
#pragma once
#include "device.cuh"

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
