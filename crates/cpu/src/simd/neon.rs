//! NEON, which every AArch64 machine has: bf16 pairs are split into two vectors of f32, as with AVX2. Most machines
//! also have `sdot`, which multiplies 16 pairs of bytes and adds four products to each of four lanes.

use std::arch::aarch64::*;
use std::arch::asm;

use half::f16;

use super::{LANE_ROWS, Pair, QuadBytes, RowPairs, Simd};

/// The proof that the machine has NEON, part of the architecture's baseline, and `sdot` if `DOTPROD`.
#[derive(Clone, Copy)]
pub(crate) struct Neon<const DOTPROD: bool>(());

impl Neon<false> {
    pub(crate) fn new() -> Self {
        Self(())
    }
}

impl Neon<true> {
    #[target_feature(enable = "dotprod")]
    pub(crate) fn new() -> Self {
        Self(())
    }
}

impl<const DOTPROD: bool> Simd for Neon<DOTPROD> {
    #[inline(never)]
    fn call(self, f: impl FnOnce()) {
        f();
    }

    /// Even and odd elements of four rows each.
    type Pairs = [[float32x4_t; 2]; 4];
    type Floats = [float32x4_t; 4];
    const PAIR_TOKENS: usize = 2;

    #[inline(always)]
    fn zero(self) -> [float32x4_t; 4] {
        // SAFETY: NEON is part of the architecture's baseline.
        unsafe { [vdupq_n_f32(0.0); 4] }
    }

    #[inline(always)]
    fn pairs(self, stored: &RowPairs) -> [[float32x4_t; 2]; 4] {
        let mut pairs = [[self.zero()[0]; 2]; 4];
        for (part, pairs) in pairs.iter_mut().enumerate() {
            // SAFETY: as in `zero`, and each part of the array has the 16 bytes that are read.
            unsafe {
                let stored = vld1q_u32(stored.as_ptr().cast::<u32>().add(4 * part));
                let (even, odd) = (vshlq_n_u32::<16>(stored), vandq_u32(stored, vdupq_n_u32(0xffff_0000)));
                *pairs = [vreinterpretq_f32_u32(even), vreinterpretq_f32_u32(odd)];
            }
        }
        pairs
    }

    #[inline(always)]
    fn dot_pairs(self, mut sum: [float32x4_t; 4], w: [[float32x4_t; 2]; 4], x: Pair) -> [float32x4_t; 4] {
        for (sum, w) in sum.iter_mut().zip(w) {
            // SAFETY: as in `zero`.
            *sum = unsafe { vfmaq_n_f32(vfmaq_n_f32(*sum, w[1], x[1].to_f32()), w[0], x[0].to_f32()) };
        }
        sum
    }

    /// Four rows each.
    type Quads = [int8x16_t; 4];
    type Ints = [int32x4_t; 4];
    const QUAD_TOKENS: usize = 2;
    const MULTIPLIES_STORED: bool = false;

    #[inline(always)]
    fn bytes(self, stored: &QuadBytes) -> [int8x16_t; 4] {
        // SAFETY: as in `zero`, and each part of the array has the 16 bytes that are read. Flipping the highest bit
        // takes 128 off.
        std::array::from_fn(|part| unsafe {
            let stored = vld1q_u8(stored.as_ptr().add(16 * part));
            vreinterpretq_s8_u8(veorq_u8(stored, vdupq_n_u8(128)))
        })
    }

    #[inline(always)]
    fn nibbles(self, stored: &QuadBytes) -> [[int8x16_t; 4]; 2] {
        // SAFETY: as in `bytes`.
        unsafe {
            let both: [uint8x16_t; 4] = std::array::from_fn(|part| vld1q_u8(stored.as_ptr().add(16 * part)));
            let value = |nibble| vsubq_s8(vreinterpretq_s8_u8(nibble), vdupq_n_s8(8));
            [
                both.map(|both| value(vandq_u8(both, vdupq_n_u8(15)))),
                both.map(|both| value(vshrq_n_u8::<4>(both))),
            ]
        }
    }

    #[inline(always)]
    fn ints(self, x: i32) -> [int32x4_t; 4] {
        // SAFETY: as in `zero`.
        unsafe { [vdupq_n_s32(x); 4] }
    }

    #[inline(always)]
    fn dot_quads(self, sum: [int32x4_t; 4], w: [int8x16_t; 4], x: i32) -> [int32x4_t; 4] {
        // SAFETY: as in `zero`.
        let x = unsafe { vreinterpretq_s8_s32(vdupq_n_s32(x)) };
        std::array::from_fn(|part| match DOTPROD {
            // SAFETY: `self` proves `sdot`.
            true => unsafe { sdot(sum[part], w[part], x) },
            false => add_products(sum[part], w[part], x),
        })
    }

    #[inline(always)]
    fn floats(self, halves: &[f16; LANE_ROWS]) -> [float32x4_t; 4] {
        let floats = halves.map(f16::to_f32);
        // SAFETY: as in `zero`, and each part of the array has the 16 bytes that are read.
        std::array::from_fn(|part| unsafe { vld1q_f32(floats.as_ptr().add(4 * part)) })
    }

    #[inline(always)]
    fn scaled(self, sum: [int32x4_t; 4], scale: [float32x4_t; 4]) -> [float32x4_t; 4] {
        // SAFETY: as in `zero`.
        std::array::from_fn(|part| unsafe { vmulq_f32(vcvtq_f32_s32(sum[part]), scale[part]) })
    }

    #[inline(always)]
    fn add(self, a: [float32x4_t; 4], b: [float32x4_t; 4]) -> [float32x4_t; 4] {
        // SAFETY: as in `zero`.
        std::array::from_fn(|part| unsafe { vaddq_f32(a[part], b[part]) })
    }

    #[inline(always)]
    fn add_scaled(self, out: &mut [f32; LANE_ROWS], x: [float32x4_t; 4], scale: f32) {
        for (out, x) in out.as_chunks_mut::<4>().0.iter_mut().zip(x) {
            // SAFETY: as in `zero`, and the array has the 16 bytes that are read and written.
            unsafe {
                let sum = vaddq_f32(vld1q_f32(out.as_ptr()), vmulq_f32(x, vdupq_n_f32(scale)));
                vst1q_f32(out.as_mut_ptr(), sum);
            }
        }
    }
}

/// Adds four products of bytes to each lane.
///
/// # Safety
/// The machine must have `sdot`.
#[inline(always)]
unsafe fn sdot(mut sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: the caller promises the instruction, which reads and writes registers alone. Its intrinsic is not stable.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {sum:v}.4s, {w:v}.16b, {x:v}.16b",
            sum = inout(vreg) sum,
            w = in(vreg) w,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// The same without `sdot`: products of magnitudes below 128 are added in pairs in 16 bits, where two of them fit, then
/// in 32.
#[inline(always)]
fn add_products(sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: NEON is part of the architecture's baseline.
    unsafe {
        let low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
        let high = vmull_high_s8(w, x);
        vpadalq_s16(sum, vpaddq_s16(low, high))
    }
}
