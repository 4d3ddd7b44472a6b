// Hopper's tensor cores of a warpgroup (four warps, the first of a multiple of four): wgmma, on sm_90a alone.
//
// Operands lie in shared memory as rows of 128 bytes (64 bf16 or 128 e4m3) under the 128-byte swizzle, as a bulk tensor
// copy with that swizzle writes them: eight rows are 1,024 bytes, on which a tile is aligned. K is contiguous in them,
// but for a transposed right operand, whose rows are K; and a left one of bf16 may come from registers.
#pragma once

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HAS_WGMMA 1

// Describes a tile of such rows: start address, leading offset, 1,024 bytes from one group of eight rows to the next,
// 128-byte swizzle. A step along K, of 16 bf16 or 32 e4m3, adds 32 bytes to the address. In a transposed tile a step is
// two groups, and the leading offset is from one panel of 64 columns to the next; in others it has no meaning. PTX ISA,
// "matrix descriptor" and "strides".
DEVICE uint64_t wgmma_descriptor(const void* tile, uint32_t leading_bytes = 16) {
  uint64_t address = shared_address(tile);
  return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(1024 >> 4) << 32 | 1ull << 62;
}

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most N committed groups are in flight.
template <int N>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Gives registers of this warpgroup back, or takes them. setmaxnreg
template <int REGISTERS>
DEVICE void registers_release() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
DEVICE void registers_acquire() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// d[64, N] = a[64, 16] · b[N, 16]ᵀ, plus d if `accumulate`. Thread t of the warpgroup holds in d[4 j + 2 h + i] row
// 16 (t / 32) + (t % 32) / 4 + 8 h, column 8 j + 2 (t % 4) + i. wgmma.mma_async
template <int N>
DEVICE void wgmma_m64k16(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate);
// The same for a[64, 32] and b[N, 32] of e4m3.
template <int N>
DEVICE void wgmma_m64k32(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate);
// d[64, N] = a[64, 16] · b[16, N], plus d if `accumulate`: b transposed, a from registers, where each warp has 16 rows
// as the left fragment of m16n8k16. They must not change before the wait.
template <int N>
DEVICE void wgmma_m64k16_transposed(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate);

// The registers of d, as the text of the instruction numbers them and as operands: each list is the one of half its
// length and as many again. asm takes neither from a template.
#define REGISTERS_4 "%0, %1, %2, %3"
#define REGISTERS_8 \
  REGISTERS_4 \
  ", %4, %5, %6, %7"
#define REGISTERS_16 \
  REGISTERS_8 \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define REGISTERS_32 \
  REGISTERS_16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_64 \
  REGISTERS_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51" \
  ", %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_128 \
  REGISTERS_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83" \
  ", %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103" \
  ", %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120" \
  ", %121, %122, %123, %124, %125, %126, %127"
#define OPERANDS_4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define OPERANDS_8(i) OPERANDS_4(i), OPERANDS_4((i) + 4)
#define OPERANDS_16(i) OPERANDS_8(i), OPERANDS_8((i) + 8)
#define OPERANDS_32(i) OPERANDS_16(i), OPERANDS_16((i) + 16)
#define OPERANDS_64(i) OPERANDS_32(i), OPERANDS_32((i) + 32)
#define OPERANDS_128(i) OPERANDS_64(i), OPERANDS_64((i) + 64)

// A, B and ACCUMULATE are the numbers of the operands that follow those of d; SHAPE_TAIL is what follows "m64n" N, and
// FLAGS are those behind the scales of a and b: which bf16 operands are transposed.
#define WGMMA_OF(FUNCTION, SHAPE_TAIL, FLAGS, N, NUM_REGISTERS, A, B, ACCUMULATE)                    \
  template <>                                                                                        \
  DEVICE void FUNCTION<N>(float (&d)[NUM_REGISTERS], uint64_t a, uint64_t b, int accumulate) {       \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ACCUMULATE ", 0;\n"                           \
                 "wgmma.mma_async.sync.aligned.m64n" #N SHAPE_TAIL " {" REGISTERS_##NUM_REGISTERS    \
                 "}, %" #A ", %" #B ", p, 1, 1" FLAGS ";\n}"                                         \
                 : OPERANDS_##NUM_REGISTERS(0)                                                       \
                 : "l"(a), "l"(b), "r"(accumulate));                                                 \
  }
#define WGMMA(N, NUM_REGISTERS, A, B, ACCUMULATE)                                                            \
  WGMMA_OF(wgmma_m64k16, "k16.f32.bf16.bf16", ", 0, 0", N, NUM_REGISTERS, A, B, ACCUMULATE)                   \
  WGMMA_OF(wgmma_m64k32, "k32.f32.e4m3.e4m3", "", N, NUM_REGISTERS, A, B, ACCUMULATE)
WGMMA(8, 4, 4, 5, 6)
WGMMA(16, 8, 8, 9, 10)
WGMMA(32, 16, 16, 17, 18)
WGMMA(64, 32, 32, 33, 34)
WGMMA(128, 64, 64, 65, 66)
WGMMA(256, 128, 128, 129, 130)

#define WGMMA_TRANSPOSED(N, NUM_REGISTERS, A0, A1, A2, A3, B, ACCUMULATE)                                      \
  template <>                                                                                                   \
  DEVICE void wgmma_m64k16_transposed<N>(float (&d)[NUM_REGISTERS], const uint32_t (&a)[4], uint64_t b,          \
                                         int accumulate) {                                                      \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ACCUMULATE ", 0;\n"                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTERS_##NUM_REGISTERS          \
                 "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, 1;\n}"                          \
                 : OPERANDS_##NUM_REGISTERS(0)                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                         \
  }
WGMMA_TRANSPOSED(64, 32, 32, 33, 34, 35, 36, 37)
WGMMA_TRANSPOSED(128, 64, 64, 65, 66, 67, 68, 69)

#endif  // __CUDA_ARCH_FEAT_SM90_ALL
