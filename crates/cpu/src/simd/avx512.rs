//! AVX-512 with VNNI: `vpdpbusd` multiplies 64 pairs of bytes, unsigned with signed, and adds four products to each of
//! 16 lanes. Newer machines also have BF16: `vdpbf16ps` multiplies 32 pairs of bf16 and adds two. On the others, such as
//! Ice Lake, bf16 pairs are split into two vectors of f32, as with AVX2. The newest of Intel's have [`Amx`] as well.

use std::arch::x86_64::*;

use half::f16;

use super::amx::Amx;
use super::{LANE_ROWS, Pair, QuadBytes, RowPairs, Simd, TileUse};

/// AVX-512 F, BW and VNNI.
pub(crate) const VNNI: u8 = 0;
/// And BF16.
pub(crate) const BF16: u8 = 1;
/// And AMX.
pub(crate) const AMX: u8 = 2;

/// The proof that the machine has the extensions of one of the constants above.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const EXTENSION: u8>(());

impl Avx512<VNNI> {
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(crate) fn new() -> Self {
        Self(())
    }
}

impl Avx512<BF16> {
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx512vnni")]
    pub(crate) fn new() -> Self {
        Self(())
    }
}

impl Avx512<AMX> {
    /// # Safety
    /// [`amx::is_available`](super::amx::is_available).
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx512vnni")]
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }
}

impl<const EXTENSION: u8> Simd for Avx512<EXTENSION> {
    #[inline(always)]
    fn call(self, f: impl FnOnce()) {
        #[inline(never)]
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vnni")]
        fn call(f: impl FnOnce()) {
            f();
        }
        #[inline(never)]
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512bf16,avx512vnni")]
        fn call_bf16(f: impl FnOnce()) {
            f();
        }
        // SAFETY: `self` proves these features, of which AVX-512 F implies the first three.
        unsafe { if EXTENSION >= BF16 { call_bf16(f) } else { call(f) } }
    }

    type Tiles = Amx;
    const HAS_TILES: bool = EXTENSION == AMX;

    #[inline(always)]
    fn tiles(self, purpose: TileUse, num_tokens: usize) -> Option<Amx> {
        // SAFETY: `self` proves AMX, and products do not run inside one another.
        Self::HAS_TILES.then(|| unsafe { Amx::new(purpose, num_tokens) })
    }

    #[inline(always)]
    fn prefetch<T>(self, element: &T) {
        // SAFETY: prefetching is part of SSE, the baseline of x86-64, and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(element).cast()) };
    }

    type Pairs = __m512i;
    type Floats = __m512;
    const PAIR_TOKENS: usize = 8;

    #[inline(always)]
    fn zero(self) -> __m512 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    fn pairs(self, stored: &RowPairs) -> __m512i {
        // SAFETY: `self` proves AVX-512 F, and the array has the 64 bytes that are read.
        unsafe { _mm512_loadu_si512(stored.as_ptr().cast()) }
    }

    #[inline(always)]
    fn dot_pairs(self, sum: __m512, w: __m512i, x: Pair) -> __m512 {
        let x = self.ints(bytemuck::cast(x));
        if EXTENSION >= BF16 {
            // SAFETY: `self` proves AVX-512 BF16; `__m512bh` is the same 64 bytes as `__m512i`.
            unsafe {
                let w = std::mem::transmute::<__m512i, __m512bh>(w);
                let x = std::mem::transmute::<__m512i, __m512bh>(x);
                _mm512_dpbf16_ps(sum, w, x)
            }
        } else {
            let ([w_even, w_odd], [x_even, x_odd]) = (self.split(w), self.split(x));
            // SAFETY: `self` proves AVX-512 F.
            unsafe { _mm512_fmadd_ps(w_even, x_even, _mm512_fmadd_ps(w_odd, x_odd, sum)) }
        }
    }

    type Quads = __m512i;
    type Ints = __m512i;
    const QUAD_TOKENS: usize = 4;
    const MULTIPLIES_UNSIGNED: bool = true;

    #[inline(always)]
    fn bytes(self, stored: &QuadBytes) -> __m512i {
        // SAFETY: `self` proves AVX-512 F, and the array has the 64 bytes that are read. Flipping the highest bit adds 128.
        unsafe { _mm512_xor_si512(_mm512_loadu_si512(stored.as_ptr().cast()), _mm512_set1_epi8(i8::MIN)) }
    }

    #[inline(always)]
    fn nibbles(self, stored: &QuadBytes) -> [__m512i; 2] {
        // SAFETY: `self` proves AVX-512 F, and the array has the 64 bytes that are read.
        unsafe {
            let both = _mm512_loadu_si512(stored.as_ptr().cast());
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
    fn load_ints(self, ints: &[i32; LANE_ROWS]) -> __m512i {
        // SAFETY: `self` proves AVX-512 F, and the array has the 64 bytes that are read.
        unsafe { _mm512_loadu_si512(ints.as_ptr().cast()) }
    }

    #[inline(always)]
    fn floats(self, halves: &[f16; LANE_ROWS]) -> __m512 {
        // SAFETY: `self` proves AVX-512 F, and the array has the 32 bytes that are read.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(halves.as_ptr().cast())) }
    }

    #[inline(always)]
    fn add_ints(self, sum: __m512, ints: __m512i, scale: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_fmadd_ps(_mm512_cvtepi32_ps(ints), scale, sum) }
    }

    #[inline(always)]
    fn add_scaled(self, out: &mut [f32; LANE_ROWS], x: __m512, scale: f32) {
        // SAFETY: `self` proves AVX-512 F, and the array has the 64 bytes that are read and written.
        unsafe {
            let sum = _mm512_fmadd_ps(x, _mm512_set1_ps(scale), _mm512_loadu_ps(out.as_ptr()));
            _mm512_storeu_ps(out.as_mut_ptr(), sum);
        }
    }

    #[inline(always)]
    fn sum(self, numbers: &[f32; 2 * LANE_ROWS]) -> f32 {
        // SAFETY: `self` proves AVX-512 F, and the array has the 128 bytes that are read. The reduction adds halves.
        unsafe {
            let (lower, upper) = (numbers.as_ptr(), numbers[LANE_ROWS..].as_ptr());
            _mm512_reduce_add_ps(_mm512_add_ps(_mm512_loadu_ps(lower), _mm512_loadu_ps(upper)))
        }
    }

    #[inline(always)]
    fn largest(self, numbers: &[f32; 2 * LANE_ROWS]) -> f32 {
        // SAFETY: as for `sum`.
        unsafe {
            let (lower, upper) = (numbers.as_ptr(), numbers[LANE_ROWS..].as_ptr());
            _mm512_reduce_max_ps(_mm512_max_ps(_mm512_loadu_ps(lower), _mm512_loadu_ps(upper)))
        }
    }
}

impl<const EXTENSION: u8> Avx512<EXTENSION> {
    /// The even and the odd elements of pairs, widened. The optimiser splits what several products share once.
    #[inline(always)]
    fn split(self, pairs: __m512i) -> [__m512; 2] {
        // SAFETY: `self` proves AVX-512 F.
        unsafe {
            let odd_mask = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
            let (even, odd) = (_mm512_slli_epi32::<16>(pairs), _mm512_and_si512(pairs, odd_mask));
            [_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd)]
        }
    }
}
