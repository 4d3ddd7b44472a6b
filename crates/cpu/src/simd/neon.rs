//! NEON, which every AArch64 machine has: bf16 pairs are split into two vectors of f32, as with AVX2. Most machines
//! also have `sdot`, which multiplies 16 pairs of bytes and adds four products to each of four lanes, and many have
//! `smmla`, which multiplies twice as many: 2 × 8 bytes with 8 × 2, for two rows and two tokens.

use std::arch::aarch64::*;
use std::arch::asm;

use half::f16;

use super::{LANE_ROWS, NoTiles, Pair, QuadBytes, RowPairs, Simd};

/// The architecture's baseline alone.
pub(crate) const BASELINE: u8 = 0;
/// And `sdot`.
pub(crate) const DOTPROD: u8 = 1;
/// And `smmla`.
pub(crate) const I8MM: u8 = 2;

/// The proof that the machine has NEON, with one of the constants above.
#[derive(Clone, Copy)]
pub(crate) struct Neon<const EXTENSION: u8>(());

impl Neon<BASELINE> {
    pub(crate) fn new() -> Self {
        Self(())
    }
}

impl Neon<DOTPROD> {
    #[target_feature(enable = "dotprod")]
    pub(crate) fn new() -> Self {
        Self(())
    }
}

impl Neon<I8MM> {
    #[target_feature(enable = "dotprod,i8mm")]
    pub(crate) fn new() -> Self {
        Self(())
    }
}

impl<const EXTENSION: u8> Simd for Neon<EXTENSION> {
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
    type Tiles = NoTiles;

    type Quads = [int8x16_t; 4];
    type Ints = [int32x4_t; 4];
    /// Of 32 registers 16 or 24 are sums. `smmla` has to interleave weights first, which more tokens share.
    const QUAD_TOKENS: usize = if EXTENSION == I8MM { 6 } else { 4 };
    const QUAD_HALVES: usize = 1;
    const MULTIPLIES_UNSIGNED: bool = false;

    #[inline(always)]
    fn bytes(self, stored: &QuadBytes) -> [int8x16_t; 4] {
        // SAFETY: as in `zero`, and each part of the array has the 16 bytes that are read.
        std::array::from_fn(|part| unsafe { vreinterpretq_s8_u8(vld1q_u8(stored.as_ptr().add(16 * part))) })
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
        std::array::from_fn(|part| match EXTENSION {
            BASELINE => add_products(sum[part], w[part], x),
            // SAFETY: `self` proves `sdot`.
            _ => unsafe { sdot(sum[part], w[part], x) },
        })
    }

    /// With `smmla`, two tokens' sums are eight vectors, each of two rows: `t0·r0 t0·r1 t1·r0 t1·r1`.
    #[inline(always)]
    fn dot_two_quads<const T: usize, const HALVES: usize>(
        self,
        sums: &mut [[[int32x4_t; 4]; HALVES]; T],
        w: [[[int8x16_t; 4]; 2]; HALVES],
        x: impl Fn(usize) -> [i32; 2],
    ) {
        let num_paired = if EXTENSION == I8MM { T / 2 * 2 } else { 0 };
        for half in 0..HALVES {
            let [first, second] = w[half];
            for part in 0..4 {
                let rows = interleaved(first[part], second[part]);
                for t in (0..num_paired).step_by(2) {
                    let x = two_tokens(x(t), x(t + 1));
                    for (index, rows) in rows.into_iter().enumerate() {
                        let vector = 2 * part + index;
                        let sum = &mut sums[t + vector / 4][half][vector % 4];
                        // SAFETY: `self` proves `smmla`.
                        *sum = unsafe { smmla(*sum, x, rows) };
                    }
                }
            }
            for t in num_paired..T {
                for (w, x) in w[half].into_iter().zip(x(t)) {
                    sums[t][half] = self.dot_quads(sums[t][half], w, x);
                }
            }
        }
    }

    #[inline(always)]
    fn by_token<const T: usize, const HALVES: usize>(self, sums: &mut [[[int32x4_t; 4]; HALVES]; T]) {
        if EXTENSION != I8MM {
            return;
        }
        for tokens in sums.as_chunks_mut::<2>().0 {
            for half in 0..HALVES {
                let mixed = [tokens[0][half], tokens[1][half]];
                for part in 0..4 {
                    let [a, b] = [2 * part, 2 * part + 1].map(|vector| mixed[vector / 4][vector % 4]);
                    [tokens[0][half][part], tokens[1][half][part]] = by_halves(a, b);
                }
            }
        }
    }

    #[inline(always)]
    fn load_ints(self, ints: &[i32; LANE_ROWS]) -> [int32x4_t; 4] {
        // SAFETY: as in `zero`, and each part has the 16 bytes that are read.
        std::array::from_fn(|part| unsafe { vld1q_s32(ints[4 * part..].as_ptr()) })
    }

    #[inline(always)]
    fn floats(self, halves: &[f16; LANE_ROWS]) -> [float32x4_t; 4] {
        let floats = halves.map(f16::to_f32);
        // SAFETY: as in `zero`, and each part of the array has the 16 bytes that are read.
        std::array::from_fn(|part| unsafe { vld1q_f32(floats.as_ptr().add(4 * part)) })
    }

    #[inline(always)]
    fn add_ints(
        self,
        sum: [float32x4_t; 4],
        ints: [int32x4_t; 4],
        scale: [float32x4_t; 4],
    ) -> [float32x4_t; 4] {
        // SAFETY: as in `zero`.
        std::array::from_fn(|part| unsafe { vfmaq_f32(sum[part], vcvtq_f32_s32(ints[part]), scale[part]) })
    }

    #[inline(always)]
    fn add_scaled(self, out: &mut [f32; LANE_ROWS], x: [float32x4_t; 4], scale: f32) {
        for (out, x) in out.as_chunks_mut::<4>().0.iter_mut().zip(x) {
            // SAFETY: as in `zero`, and the array has the 16 bytes that are read and written.
            unsafe {
                let sum = vfmaq_n_f32(vld1q_f32(out.as_ptr()), x, scale);
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

/// Adds to lane `2·t + r` the eight products of bytes of half `t` of `x` with half `r` of `w`.
///
/// # Safety
/// The machine must have `smmla`.
#[inline(always)]
unsafe fn smmla(mut sum: int32x4_t, x: int8x16_t, w: int8x16_t) -> int32x4_t {
    // SAFETY: as for `sdot`.
    unsafe {
        asm!(
            ".arch_extension i8mm",
            "smmla {sum:v}.4s, {x:v}.16b, {w:v}.16b",
            sum = inout(vreg) sum,
            x = in(vreg) x,
            w = in(vreg) w,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// Two quads of four rows as both quads of rows 0 and 1, and of rows 2 and 3.
#[inline(always)]
fn interleaved(first: int8x16_t, second: int8x16_t) -> [int8x16_t; 2] {
    // SAFETY: NEON is part of the architecture's baseline.
    unsafe {
        let (first, second) = (vreinterpretq_s32_s8(first), vreinterpretq_s32_s8(second));
        [vzip1q_s32(first, second), vzip2q_s32(first, second)].map(|rows| vreinterpretq_s8_s32(rows))
    }
}

/// Two quads of each of two tokens.
#[inline(always)]
fn two_tokens(first: [i32; 2], second: [i32; 2]) -> int8x16_t {
    let quads = [first[0], first[1], second[0], second[1]];
    // SAFETY: NEON is part of the architecture's baseline, and the array has the 16 bytes that are read.
    unsafe { vreinterpretq_s8_s32(vld1q_s32(quads.as_ptr())) }
}

/// The first halves of two vectors, and the second ones.
#[inline(always)]
fn by_halves(a: int32x4_t, b: int32x4_t) -> [int32x4_t; 2] {
    // SAFETY: NEON is part of the architecture's baseline.
    unsafe {
        let (a, b) = (vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b));
        [vzip1q_s64(a, b), vzip2q_s64(a, b)].map(|sums| vreinterpretq_s32_s64(sums))
    }
}

/// As [`sdot`] without it: products of magnitudes below 128 are added in pairs in 16 bits, where two of them fit, then
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
