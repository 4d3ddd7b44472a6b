// What device.cuh includes in place of its own definitions when EMULATOR is defined: CUDA's keywords, builtins and
// vector types for the host compiler, then the PTX wrappers (instructions.h). A kernel that uses anything else does not
// compile here.
//
// Arithmetic is the host's; compile with -ffp-contract=off so that a product and a sum round as they are written. The
// approximate functions (__expf, exp2_approx, rsqrtf) are within their documented error, not equal bit for bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <tuple>
#include <type_traits>
#include <utility>

#include "fibers.h"
#include "instructions.h"
#include "sanitizers.h"
#include "warp_operations.h"

// ---- keywords --------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
// A plain static: one block runs at a time. AddressSanitizer surrounds it with red zones (-fsanitize-sections).
#define __shared__ static __attribute__((section("emulator_shared")))

#define DEVICE inline
#define KERNEL(threads, name)                            \
  static constexpr uint32_t name##_threads = (threads); \
  static void name
#define REGISTER_KERNEL(name)                                                                                          \
  static const emulator::Kernel name##_registration(#name, name##_threads, sizeof(emulator::Binder<&name>::Arguments), \
                                                    emulator::Binder<&name>::copy_arguments,                           \
                                                    emulator::Binder<&name>::call);
#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(emulator::here().block->dynamic_shared)

namespace emulator {

// Takes a kernel's arguments out of cuLaunchKernel's array of pointers, and calls the kernel with them.
template <auto kernel>
struct Binder;
template <class... Parameters, void (*kernel)(Parameters...)>
struct Binder<kernel> {
  using Arguments = std::tuple<std::remove_cv_t<Parameters>...>;
  static_assert(alignof(Arguments) <= 64);

  static void copy_arguments(void* const* from, void* to) {
    copy_each(from, to, std::index_sequence_for<Parameters...>{});
  }
  static void call(const void* arguments) { std::apply(kernel, *static_cast<const Arguments*>(arguments)); }

 private:
  template <size_t... I>
  static void copy_each([[maybe_unused]] void* const* from, void* to, std::index_sequence<I...>) {
    new (to) Arguments(*static_cast<const std::remove_cv_t<Parameters>*>(from[I])...);
  }
};

template <class T>
struct Identity {
  using type = T;
};
// Keeps a parameter out of template argument deduction, so that a literal converts as CUDA's overloads convert it.
template <class T>
using NonDeduced = typename Identity<T>::type;

}  // namespace emulator

// ---- builtin variables and types -------------------------------------------------------------------------------

#define threadIdx (emulator::here().index)
#define blockIdx (emulator::here().block->index)
#define blockDim (emulator::here().block->block_dim)
#define gridDim (emulator::here().block->grid_dim)
constexpr int warpSize = 32;

#define EMULATOR_VECTOR_TYPES(T, name)                                                         \
  struct alignas(2 * sizeof(T)) name##2 {                                                      \
    T x, y;                                                                                    \
  };                                                                                           \
  struct alignas(4 * sizeof(T)) name##4 {                                                      \
    T x, y, z, w;                                                                              \
  };                                                                                           \
  inline name##2 make_##name##2(T x, T y) { return name##2 { x, y }; }                         \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return name##4 { x, y, z, w }; }
EMULATOR_VECTOR_TYPES(float, float)
EMULATOR_VECTOR_TYPES(int, int)
EMULATOR_VECTOR_TYPES(unsigned int, uint)
EMULATOR_VECTOR_TYPES(short, short)
EMULATOR_VECTOR_TYPES(unsigned short, ushort)
EMULATOR_VECTOR_TYPES(signed char, char)
EMULATOR_VECTOR_TYPES(unsigned char, uchar)
#undef EMULATOR_VECTOR_TYPES

// ---- synchronisation -------------------------------------------------------------------------------------------

inline void __syncthreads() { emulator::barrier_sync(0, 0); }
inline void __syncwarp(uint32_t mask = ~0u) { emulator::sync_warp(mask); }
inline void __nanosleep(unsigned) { emulator::yield(); }
[[noreturn]] inline void __trap() { emulator::die("__trap"); }

#if defined(EMULATOR_TSAN)
// ThreadSanitizer knows no fences. It does not miss them either: blocks of a launch are ordered by the emulator.
inline void __threadfence() { asm volatile("" ::: "memory"); }
#else
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
#endif
inline void __threadfence_block() { __threadfence(); }

// ---- warp operations -------------------------------------------------------------------------------------------

namespace emulator {

template <class T>
inline T shuffle_value(uint32_t mask, Shuffle kind, T value, int by, int width) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = shuffle(mask, kind, bits, by, width);
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulator

template <class T>
inline T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
  return emulator::shuffle_value(mask, emulator::Shuffle::INDEX, value, source, width);
}
template <class T>
inline T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32) {
  return emulator::shuffle_value(mask, emulator::Shuffle::XOR, value, lane_mask, width);
}
template <class T>
inline T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  return emulator::shuffle_value(mask, emulator::Shuffle::UP, value, static_cast<int>(delta), width);
}
template <class T>
inline T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  return emulator::shuffle_value(mask, emulator::Shuffle::DOWN, value, static_cast<int>(delta), width);
}

// A wrapper of device.cuh; here because it is made of shuffles.
inline uint32_t transpose_8x8(uint32_t pair) {
  // This lane's new elements are [column][row] and [column + 1][row]; lane 4 r + c / 2 holds [r][c].
  const int row = threadIdx.x % 32 / 4, column = 2 * (threadIdx.x % 4);
  uint32_t low = __shfl_sync(~0u, pair, 4 * column + row / 2);
  uint32_t high = __shfl_sync(~0u, pair, 4 * (column + 1) + row / 2);
  int shift = row % 2 * 16;
  return (low >> shift & 0xffff) | high >> shift << 16;
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate) { return emulator::ballot(mask, predicate != 0); }
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

inline uint32_t __reduce_add_sync(uint32_t mask, uint32_t value) {
  return emulator::reduce(mask, emulator::Reduction::ADD, value);
}
inline int __reduce_add_sync(uint32_t mask, int value) {
  return static_cast<int>(__reduce_add_sync(mask, static_cast<uint32_t>(value)));
}
inline uint32_t __reduce_min_sync(uint32_t mask, uint32_t value) {
  return emulator::reduce(mask, emulator::Reduction::MIN, value);
}
inline int __reduce_min_sync(uint32_t mask, int value) {
  return static_cast<int>(emulator::reduce(mask, emulator::Reduction::MIN_SIGNED, static_cast<uint32_t>(value)));
}
inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t value) {
  return emulator::reduce(mask, emulator::Reduction::MAX, value);
}
inline int __reduce_max_sync(uint32_t mask, int value) {
  return static_cast<int>(emulator::reduce(mask, emulator::Reduction::MAX_SIGNED, static_cast<uint32_t>(value)));
}
inline uint32_t __reduce_and_sync(uint32_t mask, uint32_t value) {
  return emulator::reduce(mask, emulator::Reduction::AND, value);
}
inline uint32_t __reduce_or_sync(uint32_t mask, uint32_t value) {
  return emulator::reduce(mask, emulator::Reduction::OR, value);
}
inline uint32_t __reduce_xor_sync(uint32_t mask, uint32_t value) {
  return emulator::reduce(mask, emulator::Reduction::XOR, value);
}

// ---- atomics: relaxed, as CUDA's --------------------------------------------------------------------------------

namespace emulator {

// Replaces *address by next(*address), and returns what it was.
template <class T, class Next>
inline T atomic_update(T* address, Next next) {
  T old;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  T wanted = next(old);
  while (!__atomic_compare_exchange(address, &old, &wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    wanted = next(old);
  }
  return old;
}

}  // namespace emulator

template <class T>
inline T atomicAdd(T* address, emulator::NonDeduced<T> value) {
  return emulator::atomic_update(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
inline T atomicSub(T* address, emulator::NonDeduced<T> value) {
  return emulator::atomic_update(address, [=](T old) { return static_cast<T>(old - value); });
}
template <class T>
inline T atomicMax(T* address, emulator::NonDeduced<T> value) {
  return emulator::atomic_update(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
inline T atomicMin(T* address, emulator::NonDeduced<T> value) {
  return emulator::atomic_update(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
inline T atomicOr(T* address, emulator::NonDeduced<T> value) {
  return emulator::atomic_update(address, [=](T old) { return static_cast<T>(old | value); });
}
template <class T>
inline T atomicAnd(T* address, emulator::NonDeduced<T> value) {
  return emulator::atomic_update(address, [=](T old) { return static_cast<T>(old & value); });
}
template <class T>
inline T atomicExch(T* address, emulator::NonDeduced<T> value) {
  return emulator::atomic_update(address, [=](T) { return value; });
}
template <class T>
inline T atomicCAS(T* address, emulator::NonDeduced<T> compare, emulator::NonDeduced<T> value) {
  __atomic_compare_exchange(address, &compare, &value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return compare;
}
// Wraps to 0 past `limit`.
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return emulator::atomic_update(address, [=](unsigned old) { return old >= limit ? 0 : old + 1; });
}

// ---- loads and stores with a hint ------------------------------------------------------------------------------

#define EMULATOR_LOAD(name)        \
  template <class T>               \
  inline T name(const T* address) { \
    return *address;               \
  }
EMULATOR_LOAD(__ldg)
EMULATOR_LOAD(__ldca)
EMULATOR_LOAD(__ldcg)
EMULATOR_LOAD(__ldcs)
#undef EMULATOR_LOAD

#define EMULATOR_STORE(name)                                      \
  template <class T>                                              \
  inline void name(T* address, emulator::NonDeduced<T> value) {   \
    *address = value;                                             \
  }
EMULATOR_STORE(__stcg)
EMULATOR_STORE(__stcs)
#undef EMULATOR_STORE

// ---- arithmetic ------------------------------------------------------------------------------------------------

inline float __uint_as_float(uint32_t bits) { return emulator::bits_to_float(bits); }
inline uint32_t __float_as_uint(float value) { return emulator::float_to_bits(value); }
inline float __int_as_float(int bits) { return emulator::bits_to_float(static_cast<uint32_t>(bits)); }
inline int __float_as_int(float value) { return static_cast<int>(emulator::float_to_bits(value)); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frsqrt_rn(float a) { return static_cast<float>(1.0 / sqrt(static_cast<double>(a))); }

inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return expf(a); }
inline float __exp10f(float a) { return powf(10.0f, a); }
inline float __logf(float a) { return logf(a); }
inline float __log2f(float a) { return log2f(a); }
inline float __powf(float a, float b) { return powf(a, b); }
inline float __sinf(float a) { return sinf(a); }
inline float __cosf(float a) { return cosf(a); }
inline float __saturatef(float a) { return fminf(fmaxf(a, 0.0f), 1.0f); }

// Conversions saturate, and NaN becomes 0.
inline int __float2int_rz(float a) {
  if (std::isnan(a)) return 0;
  if (a >= 2147483648.0f) return INT32_MAX;
  if (a < -2147483648.0f) return INT32_MIN;
  return static_cast<int>(a);
}
inline int __float2int_rn(float a) { return __float2int_rz(nearbyintf(a)); }
inline int __float2int_rd(float a) { return __float2int_rz(floorf(a)); }
inline int __float2int_ru(float a) { return __float2int_rz(ceilf(a)); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline float __uint2float_rn(uint32_t a) { return static_cast<float>(a); }

inline int __popc(uint32_t a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline int __clz(int a) { return a == 0 ? 32 : __builtin_clz(static_cast<uint32_t>(a)); }
inline int __clzll(long long a) { return a == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(a)); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __ffsll(long long a) { return __builtin_ffsll(a); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) << (shift & 31) >> 32);
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    uint32_t nibble = selector >> 4 * i;
    uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (nibble & 7)) & 0xff;
    if ((nibble & 8) != 0) byte = (byte & 0x80) != 0 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}

// As C++ converts their operands; of a number and NaN, the number.
template <class A, class B>
inline std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return std::fmin(static_cast<T>(a), static_cast<T>(b));
  } else {
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
  }
}
template <class A, class B>
inline std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return std::fmax(static_cast<T>(a), static_cast<T>(b));
  } else {
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
  }
}
