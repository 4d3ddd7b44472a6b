// Puts the rows of a weight where the matrix products want them: padded to the matrix's stride, and gate and up
// interleaved by eight rows, so that a thread of the product holds both halves of a SwiGLU. One block per row.
//
//   plain         row r            -> first_row + r
//   interleaved   row r            -> first_row + r / 8 · 16 + r % 8          (first_row 0 for gate, 8 for up)
//
// `place_rows` copies uploaded bf16; `place_dummy` makes seeded values on the device: those of
// backend::weights::dummy_value, bit for bit.
#include "device.cuh"

constexpr int INTERLEAVE = 8;

struct Placement {
  int cols;
  int stride;
  int first_row;
  int interleaved;
};

DEVICE bf16* placed_row(bf16* matrix, Placement place, int row) {
  int placed = place.interleaved ? row / INTERLEAVE * 2 * INTERLEAVE + row % INTERLEAVE : row;
  return matrix + static_cast<int64_t>(place.first_row + placed) * place.stride;
}

KERNEL(256, place_rows)(const bf16* rows, int first, bf16* matrix, Placement place) {
  const bf16* row = rows + static_cast<int64_t>(blockIdx.x) * place.cols;
  bf16* out = placed_row(matrix, place, first + blockIdx.x);
  for (int i = threadIdx.x; i < place.cols; i += blockDim.x) out[i] = row[i];
}
REGISTER_KERNEL(place_rows)

// As backend::sampling::mix64.
DEVICE uint64_t mix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  return x ^ x >> 31;
}

KERNEL(256, place_dummy)(uint64_t seed, float mean, float deviation, bf16* matrix, Placement place) {
  bf16* out = placed_row(matrix, place, blockIdx.x);
  for (int i = threadIdx.x; i < place.cols; i += blockDim.x) {
    uint64_t index = static_cast<uint64_t>(blockIdx.x) * place.cols + i;
    uint64_t bits = mix64(seed ^ index * 0x9e3779b97f4a7c15ull);
    float sum = static_cast<float>((bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48));
    float centred = __fmul_rn(__fsub_rn(sum, 131070.0f), 1.7320508f / 65536.0f);
    out[i] = to_bf16(__fadd_rn(mean, __fmul_rn(deviation, centred)));
  }
}
REGISTER_KERNEL(place_dummy)
