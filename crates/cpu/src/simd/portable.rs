//! Plain Rust with the lanes of `vdpbf16ps`: the path of machines without a faster one, of Miri, and the
//! software model on which the tiles of AVX-512 are tested everywhere.

use half::bf16;

use super::{Simd, sum_lanes};

/// 16 lanes of two elements each, as in a 512-bit register.
const LANES: usize = 16;

/// The plain instruction set, which every machine has.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

impl Simd for Portable {
    type Elements = [u32; LANES];
    type Accumulator = [f32; LANES];
    const STEP: usize = 2 * LANES;
    const TILE_ROWS: usize = 4;

    #[inline(always)]
    fn zero(self) -> [f32; LANES] {
        [0.0; LANES]
    }

    #[inline(always)]
    unsafe fn load(self, elements: *const bf16) -> [u32; LANES] {
        // SAFETY: the caller promises `STEP` readable elements, which are exactly this array's bytes.
        let elements = unsafe { elements.cast::<[bf16; 2 * LANES]>().read_unaligned() };
        pair_up(elements)
    }

    #[inline(always)]
    fn load_partial(self, elements: &[bf16]) -> [u32; LANES] {
        let mut padded = [bf16::ZERO; 2 * LANES];
        padded[..elements.len()].copy_from_slice(elements);
        pair_up(padded)
    }

    #[inline(always)]
    fn dot(self, mut sum: [f32; LANES], w: [u32; LANES], x: [u32; LANES]) -> [f32; LANES] {
        for lane in 0..LANES {
            sum[lane] += odd(w[lane]) * odd(x[lane]);
            sum[lane] += even(w[lane]) * even(x[lane]);
        }
        sum
    }

    #[inline(never)]
    fn call(self, f: impl FnOnce()) {
        f();
    }

    #[inline(always)]
    fn sum(self, sum: [f32; LANES]) -> f32 {
        sum_lanes(sum)
    }
}

#[inline(always)]
fn pair_up(elements: [bf16; 2 * LANES]) -> [u32; LANES] {
    let bits = |i: usize| u32::from(elements[i].to_bits());
    std::array::from_fn(|lane| bits(2 * lane) | bits(2 * lane + 1) << 16)
}

#[inline(always)]
fn even(pair: u32) -> f32 {
    f32::from_bits(pair << 16)
}

#[inline(always)]
fn odd(pair: u32) -> f32 {
    f32::from_bits(pair & 0xffff_0000)
}
