//! AVX2 and FMA: bf16 pairs are split into two vectors of f32, even elements and odd ones, by a shift and a
//! mask. Both rows are split alike, so no permutation is needed.

use std::arch::x86_64::*;

use half::bf16;

use super::{Simd, sum_lanes};

/// The proof that the machine has AVX2 and FMA.
#[derive(Clone, Copy)]
pub(crate) struct Avx2 {
    /// Ones where a pair has its odd element.
    odd_mask: __m256i,
}

impl Avx2 {
    #[target_feature(enable = "avx2,fma")]
    pub(crate) fn new() -> Self {
        // Hidden from the optimiser, which would turn the masking into a blend: that one shares its execution
        // ports with the multiplications, an `and` does not.
        Self { odd_mask: std::hint::black_box(_mm256_set1_epi32(0xffff_0000_u32.cast_signed())) }
    }
}

impl Simd for Avx2 {
    /// Even and odd elements.
    type Elements = [__m256; 2];
    type Accumulator = __m256;
    const STEP: usize = 16;
    const TILE_ROWS: usize = 2;

    #[inline(always)]
    fn zero(self) -> __m256 {
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load(self, elements: *const bf16) -> [__m256; 2] {
        // SAFETY: `self` proves AVX2, and the caller promises 16 readable elements, 32 bytes.
        unsafe {
            let pairs = _mm256_loadu_si256(elements.cast());
            let even = _mm256_slli_epi32::<16>(pairs);
            let odd = _mm256_and_si256(pairs, self.odd_mask);
            [_mm256_castsi256_ps(even), _mm256_castsi256_ps(odd)]
        }
    }

    #[inline(always)]
    fn load_partial(self, elements: &[bf16]) -> [__m256; 2] {
        let mut padded = [bf16::ZERO; Self::STEP];
        padded[..elements.len()].copy_from_slice(elements);
        // SAFETY: `padded` has `STEP` elements.
        unsafe { self.load(padded.as_ptr()) }
    }

    #[inline(always)]
    fn dot(self, sum: __m256, w: [__m256; 2], x: [__m256; 2]) -> __m256 {
        // SAFETY: `self` proves FMA.
        unsafe { _mm256_fmadd_ps(w[0], x[0], _mm256_fmadd_ps(w[1], x[1], sum)) }
    }

    #[inline(always)]
    fn call(self, f: impl FnOnce()) {
        #[inline(never)]
        #[target_feature(enable = "avx2,fma")]
        fn call(f: impl FnOnce()) {
            f();
        }
        // SAFETY: `self` proves AVX2 and FMA.
        unsafe { call(f) }
    }

    #[inline(always)]
    fn prefetch(self, element: &bf16) {
        // SAFETY: prefetching is part of SSE, the baseline of x86-64, and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(element).cast()) };
    }

    #[inline(always)]
    fn sum(self, sum: __m256) -> f32 {
        let mut lanes = [0.0; 8];
        // SAFETY: `self` proves AVX, and `lanes` has the 32 bytes that are written.
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sum) };
        sum_lanes(lanes)
    }
}
