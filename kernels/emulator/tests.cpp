// Tests of the emulator: every wrapper against plain arithmetic, and planted bugs that must not go unnoticed.
//
// Each runs over several schedules, with asynchronous work late and early. A right kernel must give the right result
// under all of them; a planted bug must give a wrong result, an abort or a sanitizer's report under at least one.
// Matrices hold small integers, so that every sum is exact and results are compared bit for bit.
//
// usage: tests                       all of it, one line each
//        tests NAME SCHEDULE ASYNC   one kernel, for a closer look: exit status 0 if its result is right
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "asynchronous.h"
#include "fibers.h"
#include "instructions.h"
#include "sanitizers.h"

using emulator::Asynchrony;
using emulator::Options;
using emulator::Order;

#if defined(EMULATOR_TSAN)
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_options() {
  return "halt_on_error=1:atexit_sleep_ms=0";
}
#elif defined(EMULATOR_ASAN)
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() { return "detect_leaks=0"; }
#endif

// ---- memory and launches ---------------------------------------------------------------------------------------

// Global memory, with a canary behind it where there is no AddressSanitizer.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count) : count_(count) {
    void* memory;
    if (posix_memalign(&memory, 512, count * sizeof(T) + CANARY_BYTES) != 0) abort();
    data_ = static_cast<T*>(memory);
    memset(memory, 0xff, count * sizeof(T));
    memset(data_ + count, CANARY, CANARY_BYTES);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free(data_); }

  T& operator[](size_t i) { return data_[i]; }
  T* data() { return data_; }
  size_t size() const { return count_; }
  bool is_intact() const {
    const unsigned char* behind = reinterpret_cast<const unsigned char*>(data_ + count_);
    for (size_t i = 0; i < CANARY_BYTES; i++) {
      if (behind[i] != CANARY) return false;
    }
    return true;
  }

 private:
  static constexpr size_t CANARY_BYTES = emulator::HAS_RED_ZONES ? 0 : 64;
  static constexpr unsigned char CANARY = 0xa5;
  size_t count_;
  T* data_;
};

struct Shape {
  dim3 grid, block;
  size_t shared_bytes = 0;
};

// A kernel with its arguments.
struct Prepared {
  alignas(64) char storage[1024];
  emulator::Launch launch;

  template <class... Arguments>
  Prepared(const char* name, const Shape& shape, Arguments... arguments) {
    const emulator::Kernel* kernel = emulator::find_kernel(name);
    if (kernel == nullptr) emulator::die("there is no kernel %s", name);
    void* pointers[] = {&arguments...};
    if (kernel->arguments_bytes > sizeof storage) abort();
    kernel->copy_arguments(pointers, storage);
    launch = emulator::Launch{kernel, storage, shape.grid, shape.block, shape.shared_bytes};
  }
  Prepared(const Prepared&) = delete;
  Prepared& operator=(const Prepared&) = delete;
};

template <class... Arguments>
static void launch(const char* name, const Options& options, const Shape& shape, Arguments... arguments) {
  emulator::launch(Prepared(name, shape, arguments...).launch, options);
}

static uint32_t next_random() {
  static uint64_t state = 42;
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<uint32_t>(state >> 33);
}

static void fill_small(Buffer<bf16>& matrix) {
  for (size_t i = 0; i < matrix.size(); i++) {
    matrix[i] = to_bf16(static_cast<float>(static_cast<int>(next_random() % 17) - 8));
  }
}

// ---- warps, barriers, numbers ----------------------------------------------------------------------------------

static bool test_warp_operations(const Options& options) {
  Buffer<int> in(32), out(13 * 32);
  for (int i = 0; i < 32; i++) in[i] = static_cast<int>(next_random() % 1000) - 500;
  launch("warp_operations", options, Shape{1, 32}, in.data(), out.data());
  int votes = 0, sum = 0, least = in[0], largest = in[0];
  for (int i = 0; i < 32; i++) {
    votes |= (in[i] % 3 == 0) << i;
    sum += in[i];
    least = std::min(least, in[i]);
    largest = std::max(largest, in[i]);
  }
  bool right = true;
  for (int lane = 0; lane < 32; lane++) {
    int segment = lane / 8 * 8;
    int wanted[] = {
        in[lane * 7 % 32],
        in[lane ^ 5],
        in[lane >= 3 ? lane - 3 : lane],
        in[lane + 3 < 32 ? lane + 3 : lane],
        in[segment + 2],
        in[lane - 3 >= segment ? lane - 3 : lane],
        in[lane + 3 < segment + 8 ? lane + 3 : lane],
        votes,
        1,
        0,
        sum,
        least,
        largest,
    };
    for (int i = 0; i < 13; i++) right = right && out[i * 32 + lane] == wanted[i];
  }
  return right;
}

static bool test_half_warps(const Options& options) {
  Buffer<int> in(64), out(64);
  for (int i = 0; i < 64; i++) in[i] = i * i;
  launch("half_warps", options, Shape{1, 64}, in.data(), out.data());
  bool right = true;
  for (int i = 0; i < 64; i++) {
    int sum = 0;
    for (int j = i / 16 * 16; j < i / 16 * 16 + 16; j++) sum += in[j];
    right = right && out[i] == sum;
  }
  return right;
}

static bool test_atomics(const Options& options) {
  constexpr int COUNT = 1000;
  Buffer<int> in(COUNT), sum(1), least(1);
  Buffer<unsigned> largest(1);
  Buffer<float> float_sum(1);
  Buffer<unsigned long long> long_sum(1);
  int wanted = 0;
  for (int i = 0; i < COUNT; i++) wanted += in[i] = static_cast<int>(next_random() % 1000);
  in[17] += 5000 - in[17];
  wanted = 0;
  for (int i = 0; i < COUNT; i++) wanted += in[i];
  sum[0] = 0, least[0] = 1 << 30, largest[0] = 0, float_sum[0] = 0.0f, long_sum[0] = 1ull << 40;
  launch("atomics", options, Shape{4, 256}, in.data(), COUNT, sum.data(), largest.data(), least.data(),
         float_sum.data(), long_sum.data());
  int smallest = in[0];
  for (int i = 0; i < COUNT; i++) smallest = std::min(smallest, in[i]);
  return sum[0] == wanted && largest[0] == 5000 && least[0] == smallest &&
         float_sum[0] == static_cast<float>(wanted) && long_sum[0] == (1ull << 40) + static_cast<unsigned>(wanted);
}

static bool test_reverse_after_exit(const Options& options) {
  constexpr int COUNT = 77, BLOCKS = 5;
  Buffer<int> in(COUNT * BLOCKS), out(COUNT * BLOCKS);
  for (int i = 0; i < COUNT * BLOCKS; i++) in[i] = i * 3;
  launch("reverse_after_exit", options, Shape{BLOCKS, 256}, in.data(), COUNT, out.data());
  bool right = true;
  for (int i = 0; i < COUNT * BLOCKS; i++) right = right && out[i] == in[i / COUNT * COUNT + COUNT - 1 - i % COUNT];
  return right;
}

static bool test_named_barriers(const Options& options) {
  constexpr int ROUNDS = 9;
  Buffer<int> out(128);
  launch("named_barriers", options, Shape{1, 128}, out.data(), ROUNDS);
  bool right = true;
  for (int i = 0; i < 128; i++) right = right && out[i] == (i + ROUNDS * (i / 64 + 1)) % 64;
  return right;
}

static bool test_unwritten_shared(const Options& options) {
  constexpr int BLOCKS = 3;
  Buffer<unsigned> out(BLOCKS * 2 * 32);
  launch("unwritten_shared", options, Shape{BLOCKS, 32, 128}, out.data());
  bool right = true;
  for (size_t i = 0; i < out.size(); i++) right = right && out[i] == ~0u;
  return right;
}

static bool test_coordinates(const Options& options) {
  struct alignas(16) Place {
    unsigned thread, block, block_y, grid_z;
  };
  Buffer<Place> out(24 * 24);
  launch("coordinates", options, Shape{dim3(2, 3, 4), dim3(4, 3, 2)}, out.data());
  bool right = true;
  for (unsigned i = 0; i < 24 * 24; i++) {
    unsigned t = i % 24, b = i / 24;
    right = right && out[i].thread == t % 4 + t / 4 % 3 * 10 + t / 12 * 100;
    right = right && out[i].block == b % 2 + b / 2 % 3 * 10 + b / 6 * 100;
    right = right && out[i].block_y == 3 && out[i].grid_z == 4;
  }
  return right;
}

// Rounds to the eight significant bits of bf16 through the rounding of double to integers.
static float rounded_to_bf16(float x) {
  if (x == 0.0f || std::isnan(x) || std::isinf(x)) return x;
  int exponent = std::max(std::ilogb(x), -126);
  double unit = std::ldexp(1.0, exponent - 7);
  return static_cast<float>(std::nearbyint(x / unit) * unit);
}

// The number of e4m3 that is nearest, the even one of two; found among all of them.
static uint8_t nearest_e4m3(float x) {
  auto value = [](int code) {
    int exponent = code >> 3, mantissa = code & 7;
    return exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  };
  double magnitude = std::min(std::fabs(static_cast<double>(x)), 448.0);
  int nearest = 0;
  for (int code = 1; code <= 0x7e; code++) {
    double gain = std::fabs(value(nearest) - magnitude) - std::fabs(value(code) - magnitude);
    if (gain > 0.0 || (gain == 0.0 && code % 2 == 0)) nearest = code;
  }
  return static_cast<uint8_t>(nearest | (std::signbit(x) ? 0x80 : 0));
}

static bool test_numbers(const Options& options) {
  constexpr int COUNT = 4096;
  Buffer<float> in(COUNT), rounded(COUNT), powers(COUNT);
  Buffer<uint32_t> packed(COUNT);
  Buffer<uint16_t> eighths(COUNT);
  for (int i = 0; i < COUNT; i++) {
    uint32_t bits = next_random() << 1 ^ next_random();
    // Every second one lies half way between two bf16.
    if (i % 2 == 0) bits = (bits & 0xffff0000u) | 0x8000u;
    in[i] = emulator::bits_to_float(bits);
    if (std::isnan(in[i])) in[i] = 1.0f;
    // Every fourth one is of the size of e4m3's numbers, and some of those lie half way between two.
    if (i % 4 == 1) in[i] = std::ldexp(static_cast<float>(i / 4 % 64), i % 15 - 9);
  }
  in[0] = -INFINITY, in[1] = INFINITY, in[2] = 3.4e38f, in[3] = -127.0f, in[4] = 0.0f, in[5] = 0.5f, in[6] = -126.0f;
  launch("numbers", options, Shape{COUNT / 256, 256}, in.data(), COUNT, packed.data(), eighths.data(), rounded.data(),
         powers.data());
  bool right = powers[0] == 0.0f && powers[3] == 0.0f && powers[4] == 1.0f && powers[6] > 0.0f;
  for (int i = 0; i < COUNT; i++) {
    float wanted = rounded_to_bf16(in[i]);
    right = right && rounded[i] == wanted;
    right = right && packed[i] == (to_bf16(in[i]).bits | static_cast<uint32_t>(to_bf16(-in[i]).bits) << 16);
    uint16_t wanted_eighths = static_cast<uint16_t>(nearest_e4m3(in[i] / 8.0f) | nearest_e4m3(-in[i]) << 8);
    right = right && eighths[i] == wanted_eighths;
    double power = std::exp2(static_cast<double>(in[i]));
    if (power > 1.2e-38 && power < 3e38) right = right && std::fabs(powers[i] - power) <= 2.4e-7 * power;
  }
  return right;
}

static bool test_bf16_products(const Options& options) {
  constexpr uint32_t COUNT = 4096;
  Buffer<uint32_t> a(COUNT), b(COUNT), products(COUNT);
  for (size_t i = 0; i < COUNT; i++) {
    // No infinities; every fourth one is small, subnormal numbers among them, and multiplied with a power of two.
    a[i] = next_random() & (i % 4 == 0 ? 0x87ff87ffu : 0xbfffbfffu);
    b[i] = i % 4 == 0 ? 0x7b80fb80u : (next_random() & 0x83ff83ffu) | 0x3c003c00u;
  }
  launch("bf16_products", options, Shape{COUNT / 256, 256}, a.data(), b.data(), COUNT, products.data());
  bool right = true;
  for (size_t i = 0; i < COUNT; i++) {
    for (int shift : {0, 16}) {
      auto half = [&](uint32_t pair) { return emulator::bits_to_float(pair >> shift << 16); };
      uint32_t wanted = emulator::float_to_bits(rounded_to_bf16(half(a[i]) * half(b[i])));
      right = right && emulator::float_to_bits(half(products[i])) == wanted;
    }
  }
  return right;
}

static bool test_matrices(const Options& options) {
  Buffer<uint16_t> rows(32 * 8);
  Buffer<uint32_t> out(32 * 8);
  for (size_t i = 0; i < rows.size(); i++) rows[i] = static_cast<uint16_t>(next_random());
  launch("matrices", options, Shape{1, 32}, rows.data(), out.data());
  bool right = true;
  for (size_t lane = 0; lane < 32; lane++) {
    for (size_t matrix = 0; matrix < 4; matrix++) {
      auto at = [&](size_t row, size_t column) { return uint32_t{rows[(matrix * 8 + row) * 8 + column]}; };
      size_t i = lane / 4, j = lane % 4 * 2;
      right = right && out[lane * 8 + matrix] == (at(i, j) | at(i, j + 1) << 16);
      right = right && out[lane * 8 + 4 + matrix] == (at(j, i) | at(j + 1, i) << 16);
    }
  }
  return right;
}

static bool test_async_copies(const Options& options) {
  constexpr uint32_t COPIES = 4 * 64;
  Buffer<uint32_t> in(4 * COPIES), out(4 * COPIES);
  for (uint32_t i = 0; i < 4 * COPIES; i++) in[i] = next_random();
  launch("async_copies", options, Shape{1, 32}, in.data(), out.data());
  bool right = true;
  for (uint32_t i = 0; i < 4 * COPIES; i++) right = right && out[i] == (i / 4 % 3 != 0 ? in[i] : 0);
  return right;
}

static bool test_word_copies(const Options& options) {
  Buffer<uint32_t> in(64), out(64);
  for (uint32_t i = 0; i < 64; i++) in[i] = next_random();
  launch("word_copies", options, Shape{1, 32}, in.data(), out.data());
  bool right = true;
  for (uint32_t i = 0; i < 64; i++) right = right && out[i] == (i % 3 != 0 ? in[i] : 0);
  return right;
}

static bool test_mbarrier_phases(const Options& options) {
  constexpr int ROUNDS = 9;
  Buffer<int> out(64);
  launch("mbarrier_phases", options, Shape{1, 64}, out.data(), ROUNDS);
  bool right = true;
  for (int i = 0; i < 64; i++) right = right && out[static_cast<size_t>(i)] == (i + ROUNDS) % 64;
  return right;
}

static bool test_register_budget(const Options& options) {
  Buffer<int> in(384), out(384);
  for (int i = 0; i < 384; i++) in[static_cast<size_t>(i)] = 3 * i;
  launch("register_budget", options, Shape{1, 384}, in.data(), out.data());
  bool right = true;
  for (int i = 0; i < 384; i++) right = right && out[static_cast<size_t>(i)] == 3 * i + (i < 128 ? 1 : 2);
  return right;
}

// ---- bulk tensor copies ----------------------------------------------------------------------------------------

struct BoxCase {
  unsigned rank;
  bool swizzle;
  uint32_t box[3];
  int start[3];
};

static TensorMap encode(const void* address, const BoxCase& box, const uint64_t (&dims)[3]) {
  emulator::TensorMapFields fields{};
  fields.address = static_cast<const char*>(address);
  fields.rank = box.rank;
  fields.element_bytes = 2;
  fields.swizzle_128 = box.swizzle;
  fields.magic = emulator::TensorMapFields::MAGIC;
  uint64_t stride = 2;
  for (int i = 0; i < 3; i++) {
    fields.dims[i] = dims[i];
    fields.strides[i] = stride;
    fields.box[i] = box.box[i];
    stride *= dims[i];
  }
  TensorMap map{};
  memcpy(&map, &fields, sizeof fields);
  return map;
}

// Every element of the box where the swizzle puts it: in row r of 128 bytes, chunk c lies at c ^ (r mod 8).
static bool check_box(const Options& options, const BoxCase& box) {
  const uint64_t dims[3] = {72, 10, 3};
  Buffer<uint16_t> tensor(72 * 10 * 3);
  for (size_t i = 0; i < tensor.size(); i++) tensor[i] = static_cast<uint16_t>(i + 1);
  uint32_t rows = box.box[1] * (box.rank == 3 ? box.box[2] : 1), columns = box.box[0];
  Buffer<uint16_t> out(rows * columns);
  Shape shape{1, 64, (rows * columns * 2 + 1023) / 1024 * 1024};
  launch("copy_box", options, shape, encode(tensor.data(), box, dims), static_cast<int>(box.rank), box.start[0],
         box.start[1], box.start[2], static_cast<int>(rows * columns * 2), out.data());
  bool right = true;
  for (uint32_t row = 0; row < rows; row++) {
    for (uint32_t column = 0; column < columns; column++) {
      int64_t x = box.start[0] + static_cast<int64_t>(column);
      int64_t y = box.start[1] + static_cast<int64_t>(row % box.box[1]);
      int64_t z = box.start[2] + static_cast<int64_t>(row / box.box[1]);
      bool inside = x >= 0 && x < 72 && y >= 0 && y < 10 && z >= 0 && z < 3;
      uint16_t wanted = inside ? tensor[static_cast<size_t>((z * 10 + y) * 72 + x)] : uint16_t{0};
      uint32_t chunk = box.swizzle ? column / 8 ^ row % 8 : column / 8;
      right = right && out[row * columns + chunk * 8 + column % 8] == wanted;
    }
  }
  return right;
}

static bool test_copy_box(const Options& options) {
  const BoxCase cases[] = {
      {2, true, {64, 8, 1}, {0, 0, 0}},    {2, true, {64, 16, 1}, {40, 5, 0}},  {2, false, {64, 8, 1}, {-8, -3, 0}},
      {3, true, {64, 10, 1}, {8, 0, 2}},   {3, true, {64, 4, 1}, {64, 9, 1}},   {3, false, {16, 3, 2}, {3, 8, 2}},
      {3, true, {64, 8, 1}, {0, -8, 1}},   {2, false, {256, 2, 1}, {0, 9, 0}},  {3, true, {64, 8, 1}, {0, 0, -1}},
  };
  bool right = true;
  for (const BoxCase& box : cases) right = check_box(options, box) && right;
  return right;
}

// ---- matrix products -------------------------------------------------------------------------------------------

struct GemmSize {
  int rows, columns, k;
};

static bool is_product(Buffer<bf16>& a, Buffer<bf16>& b, Buffer<float>& c, const GemmSize& size) {
  for (int row = 0; row < size.rows; row++) {
    for (int column = 0; column < size.columns; column++) {
      float sum = 0.0f;
      for (int k = 0; k < size.k; k++) {
        sum += to_f32(a[static_cast<size_t>(row * size.k + k)]) * to_f32(b[static_cast<size_t>(column * size.k + k)]);
      }
      if (c[static_cast<size_t>(row * size.columns + column)] != sum) return false;
    }
  }
  return true;
}

static bool run_mma_gemm(const char* name, const Options& options, const GemmSize& size) {
  Buffer<bf16> a(static_cast<size_t>(size.rows * size.k)), b(static_cast<size_t>(size.columns * size.k));
  Buffer<float> c(static_cast<size_t>(size.rows * size.columns));
  fill_small(a);
  fill_small(b);
  dim3 grid(static_cast<unsigned>(size.columns + 31) / 32, static_cast<unsigned>(size.rows + 63) / 64);
  launch(name, options, Shape{grid, 128, 2 * 96 * 64}, a.data(), b.data(), c.data(), size.rows, size.columns, size.k);
  return is_product(a, b, c, size) && c.is_intact();
}

static bool run_wgmma_gemm(const char* name, const Options& options, int n, const GemmSize& size) {
  Buffer<bf16> a(static_cast<size_t>(size.rows * size.k)), b(static_cast<size_t>(size.columns * size.k));
  Buffer<float> c(static_cast<size_t>(size.rows * size.columns));
  fill_small(a);
  fill_small(b);
  uint64_t k = static_cast<uint64_t>(size.k);
  TensorMap map_a = encode(a.data(), {3, true, {64, 64, 1}, {}}, {k, static_cast<uint64_t>(size.rows), 1});
  TensorMap map_b =
      encode(b.data(), {2, true, {64, static_cast<uint32_t>(n), 1}, {}}, {k, static_cast<uint64_t>(size.columns), 1});
  dim3 grid(static_cast<unsigned>(size.columns / n), static_cast<unsigned>(size.rows / 64));
  size_t stage_bytes = 64 * 128 + (static_cast<size_t>(n) * 128 + 1023) / 1024 * 1024;
  launch(name, options, Shape{grid, 160, 2 * stage_bytes}, map_a, map_b, c.data(), size.columns, size.k);
  return is_product(a, b, c, size) && c.is_intact();
}

// b is [k][columns].
static bool run_wgmma_transposed(const char* name, const Options& options, int n, const GemmSize& size) {
  Buffer<bf16> a(static_cast<size_t>(size.rows * size.k)), b(static_cast<size_t>(size.columns * size.k));
  Buffer<bf16> b_transposed(b.size());
  Buffer<float> c(static_cast<size_t>(size.rows * size.columns));
  fill_small(a);
  fill_small(b);
  for (size_t i = 0; i < b.size(); i++) {
    size_t column = i / static_cast<size_t>(size.k), k = i % static_cast<size_t>(size.k);
    b_transposed[k * static_cast<size_t>(size.columns) + column] = b[i];
  }
  dim3 grid(static_cast<unsigned>(size.columns / n), static_cast<unsigned>(size.rows / 64));
  launch(name, options, Shape{grid, 128, static_cast<size_t>(n) * 128}, a.data(), b_transposed.data(), c.data(),
         size.columns, size.k);
  return is_product(a, b, c, size) && c.is_intact();
}

// ---- the tests, by name ----------------------------------------------------------------------------------------

// A kernel (int* in, int count, int* out) that should reverse 256 numbers.
static bool run_reverse(const char* name, const Options& options) {
  constexpr int COUNT = 256;
  Buffer<int> in(COUNT), out(COUNT);
  for (int i = 0; i < COUNT; i++) in[i] = i;
  launch(name, options, Shape{1, COUNT, COUNT * sizeof(int)}, in.data(), COUNT, out.data());
  for (int i = 0; i < COUNT; i++) {
    if (out[i] != COUNT - 1 - i) return false;
  }
  return out.is_intact();
}

// The same kernel between two others, each of which may start while the one before it runs: from one buffer to another
// and back, so that it shows if a kernel reads or writes too early.
static bool run_chained(const char* name, const Options& options) {
  constexpr int COUNT = 256, BLOCKS = 3;
  Buffer<int> a(BLOCKS * COUNT), b(BLOCKS * COUNT);
  for (int i = 0; i < BLOCKS * COUNT; i++) a[i] = b[i] = i;
  Shape shape{BLOCKS, COUNT};
  Prepared first("reverse_after_exit", shape, a.data(), COUNT, b.data());
  Prepared second(name, shape, b.data(), COUNT, a.data());
  Prepared third("chained_right_too", shape, a.data(), COUNT, b.data());
  second.launch.is_dependent = third.launch.is_dependent = true;
  emulator::begin(second.launch, *first.launch.kernel, options);
  emulator::launch(first.launch, options);
  emulator::begin(third.launch, *second.launch.kernel, options);
  emulator::launch(second.launch, options);
  emulator::launch(third.launch, options);
  for (int i = 0; i < BLOCKS * COUNT; i++) {
    if (b[i] != i / COUNT * COUNT + COUNT - 1 - i % COUNT) return false;
  }
  return a.is_intact() && b.is_intact();
}

struct Test {
  std::string name;
  bool is_bug;
  std::function<bool(const Options&)> run;
};

static std::vector<Test> wrapper_tests() {
  return {
      {"warp_operations", false, test_warp_operations},
      {"half_warps", false, test_half_warps},
      {"atomics", false, test_atomics},
      {"reverse_after_exit", false, test_reverse_after_exit},
      {"named_barriers", false, test_named_barriers},
      {"unwritten_shared", false, test_unwritten_shared},
      {"coordinates", false, test_coordinates},
      {"numbers", false, test_numbers},
      {"bf16_products", false, test_bf16_products},
      {"matrices", false, test_matrices},
      {"async_copies", false, test_async_copies},
      {"word_copies", false, test_word_copies},
      {"mbarrier_phases", false, test_mbarrier_phases},
      {"register_budget", false, test_register_budget},
      {"copy_box", false, test_copy_box},
      {"chained_right", false, [](auto& o) { return run_chained("chained_right", o); }},
      {"mma_gemm_right", false, [](auto& o) { return run_mma_gemm("mma_gemm_right", o, {100, 56, 160}); }},
      {"wgmma_gemm_8", false, [](auto& o) { return run_wgmma_gemm("wgmma_gemm_8", o, 8, {128, 24, 320}); }},
      {"wgmma_gemm_24", false, [](auto& o) { return run_wgmma_gemm("wgmma_gemm_24", o, 24, {64, 48, 192}); }},
      {"wgmma_gemm_64", false, [](auto& o) { return run_wgmma_gemm("wgmma_gemm_64", o, 64, {128, 128, 320}); }},
      {"wgmma_gemm_128", false, [](auto& o) { return run_wgmma_gemm("wgmma_gemm_128", o, 128, {64, 128, 64}); }},
      {"wgmma_transposed_64", false,
       [](auto& o) { return run_wgmma_transposed("wgmma_transposed_64", o, 64, {128, 128, 192}); }},
      {"wgmma_transposed_128", false,
       [](auto& o) { return run_wgmma_transposed("wgmma_transposed_128", o, 128, {64, 256, 128}); }},
      {"wgmma_gemm_256", false, [](auto& o) { return run_wgmma_gemm("wgmma_gemm_256", o, 256, {64, 256, 128}); }},
  };
}

static std::vector<Test> planted_bugs() {
  std::vector<Test> tests;
  for (const char* name : {"mma_gemm_no_copy_wait", "mma_gemm_no_sync_after_copy", "mma_gemm_no_sync_before_copy"}) {
    tests.push_back({name, true, [=](auto& o) { return run_mma_gemm(name, o, {64, 32, 160}); }});
  }
  for (const char* name :
       {"wgmma_gemm_no_full_wait", "wgmma_gemm_no_empty_wait", "wgmma_gemm_releases_early",
        "wgmma_gemm_too_many_arrivals_expected", "wgmma_gemm_too_few_arrivals_expected",
        "wgmma_gemm_too_few_bytes_expected", "wgmma_gemm_warps_differ", "wgmma_gemm_no_final_wait",
        "wgmma_gemm_no_init_sync"}) {
    tests.push_back({name, true, [=](auto& o) { return run_wgmma_gemm(name, o, 64, {64, 64, 320}); }});
  }
  tests.push_back({"wgmma_transposed_weights_change", true, [](auto& o) {
                     return run_wgmma_transposed("wgmma_transposed_weights_change", o, 64, {64, 64, 64});
                   }});
  for (const char* name :
       {"chained_no_wait", "chained_reads_early", "chained_writes_early", "chained_lets_next_first"}) {
    tests.push_back({name, true, [=](auto& o) { return run_chained(name, o); }});
  }
  for (const char* name :
       {"reverse_without_sync", "write_past_global", "write_past_dynamic_shared", "shuffle_with_absent_lanes",
        "shuffle_with_foreign_mask", "crossed_barriers", "read_unwritten_shared"}) {
    tests.push_back({name, true, [=](auto& o) { return run_reverse(name, o); }});
  }
  return tests;
}

// ---- running them ----------------------------------------------------------------------------------------------

static const char* const SCHEDULES[] = {"forward", "backward", "1", "2"};
static const char* const ASYNCS[] = {"late", "early"};

static Options options_of(const std::string& schedule, const std::string& async) {
  Options options;
  if (schedule == "backward") options.order = Order::BACKWARD;
  if (schedule != "backward" && schedule != "forward") {
    options.order = Order::SEEDED;
    options.seed = strtoull(schedule.c_str(), nullptr, 10);
  }
  options.asynchrony = async == "early" ? Asynchrony::EARLY : Asynchrony::LATE;
  return options;
}

// Runs one test in a process of its own, silently; whether its result was right and nothing was reported.
static bool passes_alone(const std::string& name, const char* schedule, const char* async) {
  fflush(stdout);
  pid_t child = fork();
  if (child == 0) {
    if (freopen("/dev/null", "w", stderr) == nullptr) _exit(2);
    execl("/proc/self/exe", "tests", name.c_str(), schedule, async, static_cast<char*>(nullptr));
    _exit(2);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// Says under which schedules a test failed. Right kernels run here, so that what they report is seen.
static bool check(const Test& test) {
  auto start = std::chrono::steady_clock::now();
  std::string failures;
  for (const char* schedule : SCHEDULES) {
    for (const char* async : ASYNCS) {
      bool passes =
          test.is_bug ? passes_alone(test.name, schedule, async) : test.run(options_of(schedule, async));
      if (!passes) failures += std::string(" ") + schedule + "/" + async;
    }
  }
  double ms =
      std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  bool ok = failures.empty() != test.is_bug;
  const char* verb = test.is_bug ? "caught under" : "wrong under";
  printf("%-6s %-40s %7.1f ms  %s%s\n", ok ? "ok" : "FAILED", test.name.c_str(), ms, failures.empty() ? "" : verb,
         failures.c_str());
  return ok;
}

static int run_one(const std::string& name, const char* schedule, const char* async) {
  for (const auto& tests : {wrapper_tests(), planted_bugs()}) {
    for (const Test& test : tests) {
      if (test.name == name) return test.run(options_of(schedule, async)) ? 0 : 1;
    }
  }
  fprintf(stderr, "tests: there is no test %s\n", name.c_str());
  return 2;
}

int main(int argc, char** argv) {
  if (argc == 4) return run_one(argv[1], argv[2], argv[3]);
  int num_failed = 0;
  for (const Test& test : wrapper_tests()) num_failed += !check(test);
  for (const Test& test : planted_bugs()) num_failed += !check(test);
  if (num_failed != 0) printf("%d tests failed\n", num_failed);
  return num_failed != 0;
}
