//! Plain Rust with the lanes of `vdpbf16ps`: the path of machines without a faster one, of Miri, and the
//! software model on which the tiles of AVX-512 are tested everywhere.

use half::{bf16, f16};

use super::{LANE_ROWS, Pair, QUAD, QuadBytes, RowPairs, Simd};

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
    fn store(self, sum: [f32; LANES], lanes: &mut [f32]) {
        lanes.copy_from_slice(&sum);
    }

    type Pairs = [u32; LANES];
    type Floats = [f32; LANES];
    const PAIR_TOKENS: usize = 1;

    #[inline(always)]
    fn pairs(self, stored: &RowPairs) -> [u32; LANES] {
        pair_up(bytemuck::cast(*stored))
    }

    #[inline(always)]
    fn dot_pairs(self, sum: [f32; LANES], w: [u32; LANES], x: Pair) -> [f32; LANES] {
        self.dot(sum, w, pair_up(bytemuck::cast([x; LANES])))
    }

    type Quads = [[i8; QUAD]; LANE_ROWS];
    type Ints = [i32; LANE_ROWS];
    const QUAD_TOKENS: usize = 1;
    const MULTIPLIES_STORED: bool = false;

    #[inline(always)]
    fn bytes(self, stored: &QuadBytes) -> [[i8; QUAD]; LANE_ROWS] {
        quads(|i| stored[i].wrapping_sub(128))
    }

    #[inline(always)]
    fn nibbles(self, stored: &QuadBytes) -> [[[i8; QUAD]; LANE_ROWS]; 2] {
        [quads(|i| (stored[i] & 15).wrapping_sub(8)), quads(|i| (stored[i] >> 4).wrapping_sub(8))]
    }

    #[inline(always)]
    fn ints(self, x: i32) -> [i32; LANE_ROWS] {
        [x; LANE_ROWS]
    }

    #[inline(always)]
    fn dot_quads(self, mut sum: [i32; LANE_ROWS], w: [[i8; QUAD]; LANE_ROWS], x: i32) -> [i32; LANE_ROWS] {
        let x = x.to_ne_bytes().map(u8::cast_signed);
        for (sum, w) in sum.iter_mut().zip(w) {
            *sum += w.iter().zip(x).map(|(&w, x)| i32::from(w) * i32::from(x)).sum::<i32>();
        }
        sum
    }

    #[inline(always)]
    fn floats(self, halves: &[f16; LANE_ROWS]) -> [f32; LANES] {
        halves.map(f16::to_f32)
    }

    #[inline(always)]
    fn scaled(self, sum: [i32; LANE_ROWS], scale: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|row| sum[row] as f32 * scale[row])
    }

    #[inline(always)]
    fn add(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|row| a[row] + b[row])
    }

    #[inline(always)]
    fn add_scaled(self, out: &mut [f32; LANES], x: [f32; LANES], scale: f32) {
        out.iter_mut().zip(x).for_each(|(out, x)| *out += x * scale);
    }
}

/// Weights by their place among the stored bytes.
#[inline(always)]
fn quads(weight: impl Fn(usize) -> u8) -> [[i8; QUAD]; LANE_ROWS] {
    std::array::from_fn(|row| std::array::from_fn(|i| weight(row * QUAD + i).cast_signed()))
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
