// The PTX wrappers of device.cuh and wgmma.cuh, under the same names, on the emulator.
//
// The work is done in warp_operations.cpp, asynchronous.cpp and tensor_core.cpp, which are not compiled with the
// sanitizers; only names and template parameters are here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "fibers.h"

namespace emulator {

void wait_for_previous_kernel();
void let_next_kernel_start();

void load_matrices(uint32_t* registers, const void* row, uint32_t num_matrices, bool transposed);
enum class Format : uint8_t { BF16, E4M3 };
// m16n8k16 of bf16, m16n8k32 of e4m3.
void multiply_m16n8(Format format, float* d, const uint32_t* a, uint32_t b0, uint32_t b1);

void issue_async_copy(void* shared, const void* global, uint32_t num_bytes, bool valid);
void commit_async_copies();
void wait_async_copies(uint32_t max_in_flight);

void initialise_mbarrier(uint64_t* barrier, uint32_t arrivals);
void arrive_at_mbarrier(uint64_t* barrier, uint32_t bytes);
void wait_at_mbarrier(const uint64_t* barrier, uint32_t parity);

uint32_t shared_offset(const void* address);
void issue_bulk_copy(void* shared, const void* tensor_map, uint64_t* barrier, const int* start, uint32_t rank);

uint64_t describe_wgmma_tile(const void* tile, uint32_t leading_bytes);
void issue_wgmma(Format format, float* d, uint64_t a, uint64_t b, uint32_t columns, bool accumulate);
// Of bf16, with a[64, 16] from registers and b[16, columns].
void issue_transposed_wgmma(float* d, const uint32_t* a, uint64_t b, uint32_t columns, bool accumulate);
void commit_wgmma();
void wait_wgmma(uint32_t max_in_flight);

inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

}  // namespace emulator

#define HAS_WGMMA 1
#define HAS_E4M3 1

// ---- one kernel after the other --------------------------------------------------------------------------------

inline void wait_for_previous_kernel() { emulator::wait_for_previous_kernel(); }
inline void let_next_kernel_start() { emulator::let_next_kernel_start(); }

// ---- numbers ---------------------------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};

inline float to_f32(bf16 x) { return emulator::bits_to_float(static_cast<uint32_t>(x.bits) << 16); }

inline bf16 to_bf16(float x) {
  uint32_t bits = emulator::float_to_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return bf16{0x7fff};  // the one NaN that cvt gives
  return bf16{static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline uint32_t pack_bf16(float low, float high) {
  return to_bf16(low).bits | static_cast<uint32_t>(to_bf16(high).bits) << 16;
}

// A product of two bf16 is exact in double, and rounded once where f32 is not left for its subnormal numbers.
inline uint32_t multiply_bf16(uint32_t a, uint32_t b) {
  auto number = [](uint32_t pair, int shift) {
    return static_cast<double>(emulator::bits_to_float(pair >> shift << 16));
  };
  auto product = [&](int shift) { return static_cast<float>(number(a, shift) * number(b, shift)); };
  return pack_bf16(product(0), product(16));
}

struct e4m3 {
  uint8_t bits;
};

// To nearest, ties to even; what is larger than 448 becomes 448, a NaN the one there is.
inline uint8_t to_e4m3(float x) {
  uint32_t sign = emulator::float_to_bits(x) >> 24 & 0x80;
  float magnitude = fabsf(x);
  if (!(magnitude == magnitude)) return 0x7f;
  if (magnitude >= 448.0f) return static_cast<uint8_t>(sign | 0x7e);
  // Below 2^-6 the steps are those of the least exponent.
  int exponent = magnitude < 0x1p-6f ? -6 : ilogbf(magnitude);
  uint32_t steps = static_cast<uint32_t>(nearbyintf(ldexpf(magnitude, 3 - exponent)));
  return static_cast<uint8_t>(sign | (static_cast<uint32_t>(exponent + 6) * 8 + steps));
}

inline uint16_t pack_e4m3(float low, float high) {
  return static_cast<uint16_t>(to_e4m3(low) | to_e4m3(high) << 8);
}

// Within the error of ex2.approx.ftz, not with its bits: those are not published.
inline float exp2_approx(float x) {
  constexpr float MIN_NORMAL = 1.17549435e-38f;
  float y = exp2f(x);
  return y < MIN_NORMAL ? 0.0f : y;
}

// ---- loads -----------------------------------------------------------------------------------------------------

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { emulator::load_matrices(r, row, 4, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { emulator::load_matrices(r, row, 4, true); }

inline void cp_async_16(void* shared, const void* global, bool valid = true) {
  emulator::issue_async_copy(shared, global, 16, valid);
}
inline void cp_async_4(void* shared, const void* global, bool valid = true) {
  emulator::issue_async_copy(shared, global, 4, valid);
}
inline void cp_async_commit() { emulator::commit_async_copies(); }
template <int N>
inline void cp_async_wait() {
  emulator::wait_async_copies(N);
}

// ---- tensor cores of a warp ------------------------------------------------------------------------------------

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::multiply_m16n8(emulator::Format::BF16, d, a, b0, b1);
}
inline void mma_m16n8k32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::multiply_m16n8(emulator::Format::E4M3, d, a, b0, b1);
}

// ---- barriers in memory, bulk tensor copies --------------------------------------------------------------------

struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) { emulator::initialise_mbarrier(barrier, arrivals); }
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) { emulator::arrive_at_mbarrier(barrier, bytes); }
inline void mbarrier_arrive(uint64_t* barrier) { emulator::arrive_at_mbarrier(barrier, 0); }
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) { emulator::wait_at_mbarrier(barrier, parity); }

inline void tma_load_2d(void* shared, const TensorMap* map, uint64_t* barrier, int x, int y) {
  const int start[2] = {x, y};
  emulator::issue_bulk_copy(shared, map, barrier, start, 2);
}
inline void tma_load_3d(void* shared, const TensorMap* map, uint64_t* barrier, int x, int y, int z) {
  const int start[3] = {x, y, z};
  emulator::issue_bulk_copy(shared, map, barrier, start, 3);
}

inline void async_proxy_fence() {}

inline void named_barrier_sync(int id, uint32_t threads) {
  if (threads == 0) emulator::die("barrier %d joins no threads", id);
  emulator::barrier_sync(static_cast<uint32_t>(id), threads);
}

// ---- tensor cores of a warpgroup -------------------------------------------------------------------------------

inline uint64_t wgmma_descriptor(const void* tile, uint32_t leading_bytes = 16) {
  return emulator::describe_wgmma_tile(tile, leading_bytes);
}
inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::commit_wgmma(); }
template <int N>
inline void wgmma_wait() {
  emulator::wait_wgmma(N);
}
template <int N>
inline void wgmma_m64k16(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  emulator::issue_wgmma(emulator::Format::BF16, d, a, b, N, accumulate != 0);
}
template <int N>
inline void wgmma_m64k32(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  emulator::issue_wgmma(emulator::Format::E4M3, d, a, b, N, accumulate != 0);
}
template <int N>
inline void wgmma_m64k16_transposed(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  static_assert(N % 64 == 0 && N <= 256);
  emulator::issue_transposed_wgmma(d, a, b, N, accumulate != 0);
}

template <int REGISTERS>
inline void registers_release() {
  static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256);
}
template <int REGISTERS>
inline void registers_acquire() {
  static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256);
}
