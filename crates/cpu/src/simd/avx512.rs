//! AVX-512 with BF16 and VNNI: `vdpbf16ps` multiplies 32 pairs of bf16 and adds two products to each of 16 lanes,
//! `vpdpbusd` 64 pairs of bytes, unsigned with signed, and adds four.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Pair, QUAD_ROWS, QuadBytes, RowPairs, STRIP_ROWS, Simd};

/// The proof that the machine has AVX-512 F, BW, BF16 and VNNI.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Bf16(());

impl Avx512Bf16 {
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx512vnni")]
    pub(crate) fn new() -> Self {
        Self(())
    }
}

impl Simd for Avx512Bf16 {
    type Elements = __m512i;
    type Accumulator = __m512;
    const STEP: usize = 32;
    const TILE_ROWS: usize = 4;
    const STRIP_TILE: [usize; 2] = [8, 3];

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
        #[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx512vnni")]
        fn call(f: impl FnOnce()) {
            f();
        }
        // SAFETY: `self` proves these features.
        unsafe { call(f) }
    }

    #[inline(always)]
    fn prefetch<T>(self, element: &T) {
        // SAFETY: prefetching is part of SSE, the baseline of x86-64, and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(element).cast()) };
    }

    #[inline(always)]
    fn store(self, sum: __m512, lanes: &mut [f32]) {
        assert_eq!(lanes.len(), 16);
        // SAFETY: `self` proves AVX-512 F, and `lanes` has the 64 bytes that are written.
        unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), sum) };
    }

    #[inline(always)]
    fn add_sums(self, a: __m512, b: __m512) -> __m512 {
        self.add(a, b)
    }

    #[inline(always)]
    fn pairs(self, pair: Pair) -> __m512i {
        self.ints(bytemuck::cast(pair))
    }

    #[inline(always)]
    fn turn(self, rows: &[&[bf16]; STRIP_ROWS], start: usize, out: &mut [RowPairs], stride: usize) {
        // Loops, as `map` of an array is a function of its own, without the instruction set.
        let mut steps = [self.ints(0); STRIP_ROWS];
        for (step, row) in steps.iter_mut().zip(rows) {
            // SAFETY: the row is cut to the 64 bytes that are read.
            *step = unsafe { self.load(row[start..][..Self::STEP].as_ptr()) };
        }
        for (pair, rows) in transposed(steps).iter().enumerate() {
            // SAFETY: `self` proves AVX-512 F, and the array has the 64 bytes that are written.
            unsafe { _mm512_storeu_si512(out[pair * stride].as_mut_ptr().cast(), *rows) };
        }
    }

    type Quads = __m512i;
    type Ints = __m512i;
    type Floats = __m512;
    const TILE_TOKENS: usize = 4;
    const MULTIPLIES_STORED: bool = true;

    #[inline(always)]
    fn bytes(self, stored: &QuadBytes) -> __m512i {
        // SAFETY: `self` proves AVX-512 F, and the array has the 64 bytes that are read.
        unsafe { _mm512_loadu_si512(stored.as_ptr().cast()) }
    }

    #[inline(always)]
    fn nibbles(self, stored: &QuadBytes) -> [__m512i; 2] {
        let both = self.bytes(stored);
        // SAFETY: `self` proves AVX-512 F.
        unsafe {
            let low = _mm512_set1_epi8(15);
            [_mm512_and_si512(both, low), _mm512_and_si512(_mm512_srli_epi16::<4>(both), low)]
        }
    }

    #[inline(always)]
    fn ints(self, x: i32) -> __m512i {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_set1_epi32(x) }
    }

    #[inline(always)]
    fn dot_quads(self, sum: __m512i, w: __m512i, x: i32) -> __m512i {
        // SAFETY: `self` proves AVX-512 VNNI.
        unsafe { _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(x)) }
    }

    #[inline(always)]
    fn floats(self, halves: &[f16; QUAD_ROWS]) -> __m512 {
        // SAFETY: `self` proves AVX-512 F, and the array has the 32 bytes that are read.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(halves.as_ptr().cast())) }
    }

    #[inline(always)]
    fn scaled(self, sum: __m512i, scale: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn add_scaled(self, out: &mut [f32; QUAD_ROWS], x: __m512, scale: f32) {
        // SAFETY: `self` proves AVX-512 F, and the array has the 64 bytes that are read and written.
        unsafe {
            let sum = _mm512_add_ps(_mm512_loadu_ps(out.as_ptr()), _mm512_mul_ps(x, _mm512_set1_ps(scale)));
            _mm512_storeu_ps(out.as_mut_ptr(), sum);
        }
    }
}

/// The transpose of a 16 × 16 matrix of 32-bit elements: neighbouring rows, then pairs of them, then fours swap their
/// halves.
#[inline(always)]
fn transposed(rows: [__m512i; 16]) -> [__m512i; 16] {
    let mut out = rows;
    // SAFETY: only values of this instruction set are rearranged, so the machine has AVX-512 F.
    unsafe {
        // `fours[4 i + j]` has in its 128-bit quarter `q` column `4 q + j` of rows `4 i ..`.
        let mut fours = rows;
        for i in (0..16).step_by(4) {
            let (a, b) = ((rows[i], rows[i + 1]), (rows[i + 2], rows[i + 3]));
            let (low_a, low_b) = (_mm512_unpacklo_epi32(a.0, a.1), _mm512_unpacklo_epi32(b.0, b.1));
            let (high_a, high_b) = (_mm512_unpackhi_epi32(a.0, a.1), _mm512_unpackhi_epi32(b.0, b.1));
            fours[i] = _mm512_unpacklo_epi64(low_a, low_b);
            fours[i + 1] = _mm512_unpackhi_epi64(low_a, low_b);
            fours[i + 2] = _mm512_unpacklo_epi64(high_a, high_b);
            fours[i + 3] = _mm512_unpackhi_epi64(high_a, high_b);
        }
        for j in 0..4 {
            let [a, b] = [(fours[j], fours[j + 4]), (fours[j + 8], fours[j + 12])];
            let low = [_mm512_shuffle_i32x4::<0x44>(a.0, a.1), _mm512_shuffle_i32x4::<0x44>(b.0, b.1)];
            let high = [_mm512_shuffle_i32x4::<0xee>(a.0, a.1), _mm512_shuffle_i32x4::<0xee>(b.0, b.1)];
            out[j] = _mm512_shuffle_i32x4::<0x88>(low[0], low[1]);
            out[j + 4] = _mm512_shuffle_i32x4::<0xdd>(low[0], low[1]);
            out[j + 8] = _mm512_shuffle_i32x4::<0x88>(high[0], high[1]);
            out[j + 12] = _mm512_shuffle_i32x4::<0xdd>(high[0], high[1]);
        }
    }
    out
}
