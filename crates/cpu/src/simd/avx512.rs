//! AVX-512 with BF16: `vdpbf16ps` multiplies 32 pairs of bf16 and adds two products to each of 16 lanes.

use std::arch::x86_64::*;

use half::bf16;

use super::{Simd, sum_lanes};

/// The proof that the machine has AVX-512 F, BW and BF16.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Bf16(());

impl Avx512Bf16 {
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(crate) fn new() -> Self {
        Self(())
    }
}

impl Simd for Avx512Bf16 {
    type Elements = __m512i;
    type Accumulator = __m512;
    const STEP: usize = 32;
    const TILE_ROWS: usize = 4;

    #[inline(always)]
    fn zero(self) -> __m512 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load(self, elements: *const bf16) -> __m512i {
        // SAFETY: `self` proves AVX-512 F, and the caller promises 32 readable elements, 64 bytes.
        unsafe { _mm512_loadu_si512(elements.cast()) }
    }

    #[inline(always)]
    fn load_partial(self, elements: &[bf16]) -> __m512i {
        assert!(elements.len() < Self::STEP);
        let mask = (1u32 << elements.len()) - 1;
        // SAFETY: `self` proves AVX-512 BW; the mask's ones are the slice's elements, and a masked load does
        // not touch the others.
        unsafe { _mm512_maskz_loadu_epi16(mask, elements.as_ptr().cast()) }
    }

    #[inline(always)]
    fn dot(self, sum: __m512, w: __m512i, x: __m512i) -> __m512 {
        // SAFETY: `self` proves AVX-512 BF16; `__m512bh` is the same 64 bytes as `__m512i`.
        unsafe {
            let [w, x] = [w, x].map(|elements| std::mem::transmute::<__m512i, __m512bh>(elements));
            _mm512_dpbf16_ps(sum, w, x)
        }
    }

    #[inline(always)]
    fn call(self, f: impl FnOnce()) {
        #[inline(never)]
        #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
        fn call(f: impl FnOnce()) {
            f();
        }
        // SAFETY: `self` proves these features.
        unsafe { call(f) }
    }

    #[inline(always)]
    fn prefetch(self, element: &bf16) {
        // SAFETY: prefetching is part of SSE, the baseline of x86-64, and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(element).cast()) };
    }

    #[inline(always)]
    fn sum(self, sum: __m512) -> f32 {
        let mut lanes = [0.0; 16];
        // SAFETY: `self` proves AVX-512 F, and `lanes` has the 64 bytes that are written.
        unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), sum) };
        sum_lanes(lanes)
    }
}
