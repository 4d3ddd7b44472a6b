//! AVX2 and FMA: bf16 pairs are split into two vectors of f32, even elements and odd ones, by a shift and a
//! mask. Both rows are split alike, so no permutation is needed.
//!
//! Bytes are multiplied by `vpmaddubsw`, unsigned with signed: the weight gives its magnitude and lends its sign to
//! the token's value. Sums of two products of magnitudes below 128 fit in its 16 bits.

use std::arch::x86_64::*;

use half::f16;

use super::{LANE_ROWS, NoTiles, Pair, QuadBytes, RowPairs, Simd};

/// The proof that the machine has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2 {
    /// Ones where a pair has its odd element.
    odd_mask: __m256i,
}

impl Avx2 {
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn new() -> Self {
        // Hidden from the optimiser, which would turn the masking into a blend: that one shares its execution
        // ports with the multiplications, an `and` does not.
        Self { odd_mask: std::hint::black_box(_mm256_set1_epi32(0xffff_0000_u32.cast_signed())) }
    }

    /// The even and the odd elements of pairs, widened.
    #[inline(always)]
    fn split(self, pairs: __m256i) -> [__m256; 2] {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let (even, odd) = (_mm256_slli_epi32::<16>(pairs), _mm256_and_si256(pairs, self.odd_mask));
            [_mm256_castsi256_ps(even), _mm256_castsi256_ps(odd)]
        }
    }
}

impl Simd for Avx2 {
    #[inline(always)]
    fn call(self, f: impl FnOnce()) {
        #[inline(never)]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn call(f: impl FnOnce()) {
            f();
        }
        // SAFETY: `self` proves AVX2 and FMA.
        unsafe { call(f) }
    }

    #[inline(always)]
    fn prefetch<T>(self, element: &T) {
        // SAFETY: prefetching is part of SSE, the baseline of x86-64, and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(element).cast()) };
    }

    /// Even and odd elements of eight rows each.
    type Pairs = [[__m256; 2]; 2];
    type Floats = [__m256; 2];
    const PAIR_TOKENS: usize = 2;

    #[inline(always)]
    fn zero(self) -> [__m256; 2] {
        // SAFETY: `self` proves AVX2.
        unsafe { [_mm256_setzero_ps(); 2] }
    }

    #[inline(always)]
    fn pairs(self, stored: &RowPairs) -> [[__m256; 2]; 2] {
        let stored: *const __m256i = stored.as_ptr().cast();
        // SAFETY: `self` proves AVX2, and the array has the 64 bytes that are read.
        unsafe { [self.split(_mm256_loadu_si256(stored)), self.split(_mm256_loadu_si256(stored.add(1)))] }
    }

    #[inline(always)]
    fn dot_pairs(self, sum: [__m256; 2], w: [[__m256; 2]; 2], x: Pair) -> [__m256; 2] {
        // SAFETY: `self` proves AVX2 and FMA.
        unsafe {
            let [even, odd] = self.split(_mm256_set1_epi32(bytemuck::cast(x)));
            [
                _mm256_fmadd_ps(w[0][0], even, _mm256_fmadd_ps(w[0][1], odd, sum[0])),
                _mm256_fmadd_ps(w[1][0], even, _mm256_fmadd_ps(w[1][1], odd, sum[1])),
            ]
        }
    }

    type Tiles = NoTiles;

    type Quads = [SignedBytes; 2];
    type Ints = [__m256i; 2];
    const QUAD_TOKENS: usize = 1;
    const MULTIPLIES_UNSIGNED: bool = false;

    #[inline(always)]
    fn bytes(self, stored: &QuadBytes) -> [SignedBytes; 2] {
        // SAFETY: `self` proves AVX2.
        self.halves(stored).map(|half| unsafe { SignedBytes::new(half) })
    }

    #[inline(always)]
    fn nibbles(self, stored: &QuadBytes) -> [[SignedBytes; 2]; 2] {
        let both = self.halves(stored);
        // SAFETY: `self` proves AVX2.
        unsafe {
            let (low, offset) = (_mm256_set1_epi8(15), _mm256_set1_epi8(8));
            let value = |nibble| SignedBytes::new(_mm256_sub_epi8(_mm256_and_si256(nibble, low), offset));
            [both.map(value), both.map(|half| value(_mm256_srli_epi16::<4>(half)))]
        }
    }

    #[inline(always)]
    fn ints(self, x: i32) -> [__m256i; 2] {
        // SAFETY: `self` proves AVX2.
        unsafe { [_mm256_set1_epi32(x); 2] }
    }

    #[inline(always)]
    fn dot_quads(self, sum: [__m256i; 2], w: [SignedBytes; 2], x: i32) -> [__m256i; 2] {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let (x, ones) = (_mm256_set1_epi32(x), _mm256_set1_epi16(1));
            std::array::from_fn(|half| {
                let pairs = _mm256_maddubs_epi16(w[half].magnitude, _mm256_sign_epi8(x, w[half].value));
                _mm256_add_epi32(sum[half], _mm256_madd_epi16(pairs, ones))
            })
        }
    }

    #[inline(always)]
    fn load_ints(self, ints: &[i32; LANE_ROWS]) -> [__m256i; 2] {
        let ints: *const __m256i = ints.as_ptr().cast();
        // SAFETY: `self` proves AVX2, and the array has the 64 bytes that are read.
        unsafe { [_mm256_loadu_si256(ints), _mm256_loadu_si256(ints.add(1))] }
    }

    #[inline(always)]
    fn floats(self, halves: &[f16; LANE_ROWS]) -> [__m256; 2] {
        // SAFETY: `self` proves F16C, and the array has the 32 bytes that are read.
        unsafe {
            let halves: *const __m128i = halves.as_ptr().cast();
            [_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves.add(1)))]
        }
    }

    #[inline(always)]
    fn add_ints(self, sum: [__m256; 2], ints: [__m256i; 2], scale: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: `self` proves AVX2 and FMA.
        std::array::from_fn(|half| unsafe {
            _mm256_fmadd_ps(_mm256_cvtepi32_ps(ints[half]), scale[half], sum[half])
        })
    }

    #[inline(always)]
    fn add_scaled(self, out: &mut [f32; LANE_ROWS], x: [__m256; 2], scale: f32) {
        for (out, x) in out.as_chunks_mut::<8>().0.iter_mut().zip(x) {
            // SAFETY: `self` proves AVX2 and FMA, and the array has the 32 bytes that are read and written.
            unsafe {
                let sum = _mm256_fmadd_ps(x, _mm256_set1_ps(scale), _mm256_loadu_ps(out.as_ptr()));
                _mm256_storeu_ps(out.as_mut_ptr(), sum);
            }
        }
    }
}

/// Quads of eight rows, and their magnitudes.
#[derive(Clone, Copy)]
pub(crate) struct SignedBytes {
    value: __m256i,
    magnitude: __m256i,
}

impl SignedBytes {
    #[target_feature(enable = "avx2")]
    fn new(value: __m256i) -> Self {
        Self { value, magnitude: _mm256_abs_epi8(value) }
    }
}

impl Avx2 {
    /// Eight rows each.
    #[inline(always)]
    fn halves(self, stored: &QuadBytes) -> [__m256i; 2] {
        // SAFETY: `self` proves AVX2, and the array has the 64 bytes that are read.
        unsafe {
            let stored: *const __m256i = stored.as_ptr().cast();
            [_mm256_loadu_si256(stored), _mm256_loadu_si256(stored.add(1))]
        }
    }
}
