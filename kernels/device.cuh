// The one header that kernels include: number types, and a thin wrapper for each PTX instruction that CUDA C++ has no
// name for. It needs no NVIDIA header, so NVRTC compiles a kernel with no include path but this folder.
//
// `asm` appears here and in wgmma.cuh, nowhere else. When EMULATOR is defined the same names come from
// emulator/emulator.h, which runs the kernels on the CPU; tests/gpu compares every wrapper here with it, bit for bit.
//
// Source of every wrapper: PTX ISA, the instruction named in its comment.
#pragma once

#ifdef EMULATOR
#include "emulator/emulator.h"
#else

#ifdef __CUDACC_RTC__
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using int32_t = int;
using int64_t = long long;
#define INFINITY __int_as_float(0x7f800000)
#else
#include <stdint.h>
#endif

#define DEVICE __device__ __forceinline__
// A kernel that the host launches by its name; `threads` is its block size.
#define KERNEL(threads, name) extern "C" __global__ void __launch_bounds__(threads, 1) name
#define REGISTER_KERNEL(name)
// The dynamic shared memory of the block, aligned for the 128-byte swizzle.
#define DYNAMIC_SHARED(T, name)                                     \
  extern __shared__ __align__(1024) unsigned char dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(dynamic_shared)

// ---- one kernel after the other ------------------------------------------------------------------------------

// The host may launch a kernel so that it starts while the one before it still runs (programmatic dependent launch,
// from sm_90 on). That is sound because every kernel does the same three things in the same order:
//
//   1. wait_for_previous_kernel()     once, in every thread that reads or writes memory
//   2. let_next_kernel_start()        at once, without waiting for its own work
//   3. its work
//
// A kernel starts when every block of the one before has come past 1: so all kernels but that one are done. Before its
// own wait a kernel may therefore read launch parameters, weights, and the results of the last kernel but one and of
// those before it, these from the L2 (`__ldcg`), for nothing has made sure yet that the L1 has no older ones. It writes
// nothing but shared memory. After the wait it does as it likes.
//
// Where anything but a kernel of ours comes between two launches, or where weights were just written, the host launches
// in the ordinary way, and both calls do nothing. The emulator runs the first block of each launch as early as it may,
// so that what it reads too early is stale.

#if __CUDA_ARCH__ >= 900
// Returns when the previous kernel is done and its writes can be seen. griddepcontrol.wait
DEVICE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The next kernel may start once every block has called this. griddepcontrol.launch_dependents
DEVICE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#else
DEVICE void wait_for_previous_kernel() {}
DEVICE void let_next_kernel_start() {}
#endif

// ---- numbers ---------------------------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};

DEVICE float to_f32(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

// Two numbers rounded to bf16 (to nearest, ties to even), `low` in the low half. cvt.rn.bf16x2.f32
DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

DEVICE bf16 to_bf16(float x) { return bf16{static_cast<uint16_t>(pack_bf16(x, 0.0f))}; }

// Four exponent bits, three of mantissa, no infinity, 448 at most: what OCP calls E4M3.
struct e4m3 {
  uint8_t bits;
};

// Products of two pairs of bf16, rounded to nearest, ties to even; subnormal numbers count. fma.rn.bf16x2
DEVICE uint32_t multiply_bf16(uint32_t a, uint32_t b) {
  uint32_t products;
  // With -0 added a zero keeps its sign.
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(products) : "r"(a), "r"(b), "r"(0x80008000u));
  return products;
}

#if __CUDA_ARCH__ >= 890
#define HAS_E4M3 1

// Two numbers rounded to e4m3 (to nearest, ties to even; what is larger than 448 becomes 448), `low` in the low byte.
// cvt.rn.satfinite.e4m3x2.f32
DEVICE uint16_t pack_e4m3(float low, float high) {
  uint16_t packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
  return packed;
}
#endif

// 2^x to 2 units in the last place; 2^-inf = 0. ex2.approx.ftz.f32
DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- loads -----------------------------------------------------------------------------------------------------

DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8. ldmatrix
DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each matrix transposed. ldmatrix.trans
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Transposes an 8x8 matrix of 16-bit elements; lane l holds row l / 4, columns 2 (l % 4) and the next. movmatrix.trans
DEVICE uint32_t transpose_8x8(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// 16 bytes from global to shared memory behind the thread's back; zeros if not `valid`. cp.async.cg
DEVICE void cp_async_16(void* shared, const void* global, bool valid = true) {
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// The same of 4 bytes. cp.async.ca
DEVICE void cp_async_4(void* shared, const void* global, bool valid = true) {
  int bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's committed groups are in flight. cp.async.wait_group
template <int N>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- tensor cores of a warp ------------------------------------------------------------------------------------

// d[16, 8] += a[16, 16] · b[16, 8], fragments as the PTX ISA draws them for m16n8k16. mma.sync
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#ifdef HAS_E4M3
// d[16, 8] += a[16, 32] · b[32, 8] of e4m3; a register of a fragment holds four elements where m16n8k16 has two.
// mma.sync
DEVICE void mma_m16n8k32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// ---- Hopper: barriers in memory, bulk tensor copies ------------------------------------------------------------

// What cuTensorMapEncodeTiled writes.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

#if __CUDA_ARCH__ >= 900

DEVICE void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Shows initialised barriers to the copy engine. fence.mbarrier_init
DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, and makes the phase wait for `bytes` of copies as well. mbarrier.arrive.expect_tx
DEVICE void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Waits until the phase of this parity has completed. mbarrier.try_wait.parity
DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT%=:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra "
      "DONE%=;\nbra WAIT%=;\nDONE%=:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// A box of a rank-2 tensor map at element (x, y), x along the rows. cp.async.bulk.tensor.2d
DEVICE void tma_load_2d(void* shared, const TensorMap* map, uint64_t* barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}

// A box of a rank-3 tensor map. cp.async.bulk.tensor.3d
DEVICE void tma_load_3d(void* shared, const TensorMap* map, uint64_t* barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// Shows what this thread wrote to shared memory, by its copies that it waited for too, to wgmma and bulk copies.
// fence.proxy.async
DEVICE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// bar.sync of the `threads` threads that use barrier `id` (1..15; 0 is __syncthreads).
DEVICE void named_barrier_sync(int id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#endif  // __CUDA_ARCH__ >= 900

#include "wgmma.cuh"

#endif  // EMULATOR

// ---- built from the above --------------------------------------------------------------------------------------

constexpr uint32_t ALL_LANES = 0xffffffffu;
constexpr int WARP = 32;

// Sum over the warp, the same bits in every lane.
DEVICE float warp_sum(float x) {
  for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
  return x;
}

// Tells the compiler that `d` changed behind its back: what an asynchronous wgmma writes must not be read, nor moved,
// before the wait that precedes this.
template <int N>
DEVICE void registers_changed(float (&d)[N]) {
#ifndef EMULATOR
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

// The same of a left operand, which an asynchronous wgmma still reads.
DEVICE void registers_changed(uint32_t (&a)[4]) {
#ifndef EMULATOR
#pragma unroll
  for (int i = 0; i < 4; i++) asm volatile("" : "+r"(a[i])::"memory");
#endif
}

DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

DEVICE float low_to_f32(uint32_t pair) { return __uint_as_float(pair << 16); }
DEVICE float high_to_f32(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
