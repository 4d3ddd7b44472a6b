//! Plain Rust with the lanes of `vdpbf16ps`: the path of machines without a faster one, of Miri, and the
//! software model on which the tiles of AVX-512 are tested everywhere.

use half::{bf16, f16};

use super::{LANE_ROWS, NoTiles, Pair, QUAD, QuadBytes, RowPairs, Simd};

/// The plain instruction set, which every machine has.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

impl Simd for Portable {
    #[inline(never)]
    fn call(self, f: impl FnOnce()) {
        f();
    }

    type Pairs = RowPairs;
    type Floats = [f32; LANE_ROWS];
    const PAIR_TOKENS: usize = 1;

    #[inline(always)]
    fn zero(self) -> [f32; LANE_ROWS] {
        [0.0; LANE_ROWS]
    }

    #[inline(always)]
    fn pairs(self, stored: &RowPairs) -> RowPairs {
        *stored
    }

    #[inline(always)]
    fn dot_pairs(self, mut sum: [f32; LANE_ROWS], w: RowPairs, x: Pair) -> [f32; LANE_ROWS] {
        let [even, odd] = [widened(x[0]), widened(x[1])];
        for (sum, w) in sum.iter_mut().zip(w) {
            *sum += widened(w[1]) * odd;
            *sum += widened(w[0]) * even;
        }
        sum
    }

    type Tiles = NoTiles;

    type Quads = [[i8; QUAD]; LANE_ROWS];
    type Ints = [i32; LANE_ROWS];
    const QUAD_TOKENS: usize = 1;
    const MULTIPLIES_UNSIGNED: bool = false;

    #[inline(always)]
    fn bytes(self, stored: &QuadBytes) -> [[i8; QUAD]; LANE_ROWS] {
        quads(|i| stored[i])
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
    fn load_ints(self, ints: &[i32; LANE_ROWS]) -> [i32; LANE_ROWS] {
        *ints
    }

    #[inline(always)]
    fn floats(self, halves: &[f16; LANE_ROWS]) -> [f32; LANE_ROWS] {
        halves.map(f16::to_f32)
    }

    #[inline(always)]
    fn add_ints(
        self,
        sum: [f32; LANE_ROWS],
        ints: [i32; LANE_ROWS],
        scale: [f32; LANE_ROWS],
    ) -> [f32; LANE_ROWS] {
        std::array::from_fn(|row| (ints[row] as f32).mul_add(scale[row], sum[row]))
    }

    #[inline(always)]
    fn add_scaled(self, out: &mut [f32; LANE_ROWS], x: [f32; LANE_ROWS], scale: f32) {
        out.iter_mut().zip(x).for_each(|(out, x)| *out = x.mul_add(scale, *out));
    }
}

/// Weights by their place among the stored bytes.
#[inline(always)]
fn quads(weight: impl Fn(usize) -> u8) -> [[i8; QUAD]; LANE_ROWS] {
    std::array::from_fn(|row| std::array::from_fn(|i| weight(row * QUAD + i).cast_signed()))
}

#[inline(always)]
fn widened(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}
