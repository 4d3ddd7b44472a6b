// The second pass of attention: what items of one chunk each left is folded into the tokens' results.
#include "attention.cuh"

// Partial results of one token: those of chunk c start at row `first_partial` + c · `chunk_rows`. Without chunks there
// is no token.
struct FoldItem {
  int token;
  int first_partial;
  int chunk_rows;
  int num_chunks;
};

// Folds the chunks of a token's head, one block per token and head, one thread per feature.
KERNEL(128, attention_fold)(const FoldItem* items, const Softmax* partial_softmax, const float* partial_output,
                            AttentionShape shape, bf16* out) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const FoldItem item = items[blockIdx.x];
  int head = blockIdx.y, feature = threadIdx.x;
  if (item.num_chunks == 0 || feature >= shape.kv.head_dim) return;
  Softmax total = {-INFINITY, 0.0f};
  float output = 0.0f;
  // Unrolled, several chunks are read before the first is folded.
#pragma unroll 8
  for (int chunk = 0; chunk < item.num_chunks; chunk++) {
    int64_t row = item.first_partial + static_cast<int64_t>(chunk) * item.chunk_rows + head;
    Fold factors = fold_softmax(total, partial_softmax[row], shape.scale);
    output = fold_output(output, partial_output[row * shape.kv.head_stride + feature], factors);
  }
  bf16* row = out + static_cast<int64_t>(item.token) * shape.out_stride + head * shape.kv.head_dim;
  row[feature] = to_bf16(__fmul_rn(output, __frcp_rn(total.sum)));
}
REGISTER_KERNEL(attention_fold)
