//! NEON, which every AArch64 machine has: bf16 pairs are split into two vectors of f32, as with AVX2.

use std::arch::aarch64::*;

use half::bf16;

use super::{Simd, sum_lanes};

/// The proof that the machine has NEON, part of the architecture's baseline.
#[derive(Clone, Copy)]
pub(crate) struct Neon(());

impl Neon {
    pub(crate) fn new() -> Self {
        Self(())
    }
}

impl Simd for Neon {
    /// Even and odd elements.
    type Elements = [float32x4_t; 2];
    type Accumulator = float32x4_t;
    const STEP: usize = 8;
    const TILE_ROWS: usize = 4;

    #[inline(always)]
    fn zero(self) -> float32x4_t {
        // SAFETY: NEON is part of the architecture's baseline.
        unsafe { vdupq_n_f32(0.0) }
    }

    #[inline(always)]
    unsafe fn load(self, elements: *const bf16) -> [float32x4_t; 2] {
        // SAFETY: as in `zero`, and the caller promises 8 readable elements, 16 bytes.
        unsafe {
            let pairs = vreinterpretq_u32_u16(vld1q_u16(elements.cast()));
            let even = vshlq_n_u32::<16>(pairs);
            let odd = vandq_u32(pairs, vdupq_n_u32(0xffff_0000));
            [vreinterpretq_f32_u32(even), vreinterpretq_f32_u32(odd)]
        }
    }

    #[inline(always)]
    fn load_partial(self, elements: &[bf16]) -> [float32x4_t; 2] {
        let mut padded = [bf16::ZERO; Self::STEP];
        padded[..elements.len()].copy_from_slice(elements);
        // SAFETY: `padded` has `STEP` elements.
        unsafe { self.load(padded.as_ptr()) }
    }

    #[inline(always)]
    fn dot(self, sum: float32x4_t, w: [float32x4_t; 2], x: [float32x4_t; 2]) -> float32x4_t {
        // SAFETY: as in `zero`.
        unsafe { vfmaq_f32(vfmaq_f32(sum, w[1], x[1]), w[0], x[0]) }
    }

    #[inline(never)]
    fn call(self, f: impl FnOnce()) {
        f();
    }

    #[inline(always)]
    fn sum(self, sum: float32x4_t) -> f32 {
        let mut lanes = [0.0; 4];
        // SAFETY: as in `zero`, and `lanes` has the 16 bytes that are written.
        unsafe { vst1q_f32(lanes.as_mut_ptr(), sum) };
        sum_lanes(lanes)
    }
}
