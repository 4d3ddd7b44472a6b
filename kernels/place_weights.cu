// Puts the rows of a weight where the matrix products want them: padded to the matrix's stride, and gate and up
// interleaved by eight rows, so that a thread of the product holds both halves of a SwiGLU. One block per row.
//
//   plain         row r            -> first_row + r
//   interleaved   row r            -> first_row + r / 8 · 16 + r % 8          (first_row 0 for gate, 8 for up)
//
// `place_rows` copies uploaded bf16; `place_dummy` makes seeded values on the device: those of
// backend::weights::dummy_value, bit for bit. Those that end with `e4m3` quantise, with a scale for each row.
#include "e4m3_rows.cuh"

constexpr int PLACE_THREADS = 256;
constexpr int INTERLEAVE = 8;

struct Placement {
  int cols;
  // Of the matrix, in its elements.
  int stride;
  int first_row;
  int interleaved;
};

DEVICE int64_t placed_row(Placement place, int row) {
  int placed = place.interleaved ? row / INTERLEAVE * 2 * INTERLEAVE + row % INTERLEAVE : row;
  return place.first_row + placed;
}

template <class Element>
DEVICE void place_bf16(Element element, int row, bf16* matrix, Placement place) {
  bf16* out = matrix + placed_row(place, row) * place.stride;
  for (int i = threadIdx.x; i < place.cols; i += PLACE_THREADS) out[i] = to_bf16(element(i));
}

// As backend::sampling::mix64.
DEVICE uint64_t mix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  return x ^ x >> 31;
}

// As backend::weights::dummy_value.
DEVICE float dummy_value(uint64_t seed, float mean, float deviation, uint64_t index) {
  uint64_t bits = mix64(seed ^ index * 0x9e3779b97f4a7c15ull);
  float sum = static_cast<float>((bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48));
  float centred = __fmul_rn(__fsub_rn(sum, 131070.0f), 1.7320508f / 65536.0f);
  return __fadd_rn(mean, __fmul_rn(deviation, centred));
}

// The elements of this block's row, uploaded or made up.
DEVICE auto uploaded(const bf16* rows, Placement place) {
  const bf16* row = rows + static_cast<int64_t>(blockIdx.x) * place.cols;
  return [=](int i) { return to_f32(row[i]); };
}
DEVICE auto dummy(uint64_t seed, float mean, float deviation, Placement place) {
  uint64_t first = static_cast<uint64_t>(blockIdx.x) * place.cols;
  return [=](int i) { return dummy_value(seed, mean, deviation, first + i); };
}

KERNEL(PLACE_THREADS, place_rows)(const bf16* rows, int first, bf16* matrix, Placement place) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  place_bf16(uploaded(rows, place), first + blockIdx.x, matrix, place);
}
REGISTER_KERNEL(place_rows)

KERNEL(PLACE_THREADS, place_dummy)(uint64_t seed, float mean, float deviation, bf16* matrix, Placement place) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  place_bf16(dummy(seed, mean, deviation, place), blockIdx.x, matrix, place);
}
REGISTER_KERNEL(place_dummy)

#ifdef HAS_E4M3

template <class Element>
DEVICE void place_e4m3(Element element, int row, e4m3* matrix, float* scales, Placement place) {
  int64_t placed = placed_row(place, row);
  auto padded = [&](int i) { return i < place.cols ? element(i) : 0.0f; };
  float scale = write_e4m3_row(padded, place.stride, matrix + placed * place.stride);
  if (threadIdx.x == 0) scales[placed] = scale;
}

KERNEL(PLACE_THREADS, place_rows_e4m3)(const bf16* rows, int first, e4m3* matrix, float* scales, Placement place) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  place_e4m3(uploaded(rows, place), first + blockIdx.x, matrix, scales, place);
}
REGISTER_KERNEL(place_rows_e4m3)

// What is quantised is rounded to bf16 first, as a stored weight would have been.
KERNEL(PLACE_THREADS, place_dummy_e4m3)(uint64_t seed, float mean, float deviation, e4m3* matrix, float* scales,
                                        Placement place) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  auto value = dummy(seed, mean, deviation, place);
  place_e4m3([&](int i) { return to_f32(to_bf16(value(i))); }, blockIdx.x, matrix, scales, place);
}
REGISTER_KERNEL(place_dummy_e4m3)

#endif
