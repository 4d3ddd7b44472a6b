//! The two vector operations that everything rests on, for each instruction set: running dot products of 16 rows side by
//! side, of bf16 values with f32 accumulation and of 8-bit integers with exact accumulation. Lane `r` belongs to row `r`,
//! and no sum crosses lanes.
//!
//! # bf16
//! A 32-bit lane holds two neighbours of a row, a pair, and a step adds two products to each lane: first that of the odd
//! elements, then that of the even ones. A product of two bf16 values is exact in f32 (8 + 8 bits fit in 24), so a fused
//! multiply-add and a multiplication followed by an addition round alike, and all instruction sets follow the documented
//! steps of `vdpbf16ps`, but for subnormal numbers, which that instruction flushes to zero, and for weights and attention
//! on AMX, whose [`tiles`] have an order of their own.
//!
//! ```text
//! pairs     r0: w0 w1 | r1: w0 w1 | ... | r15: w0 w1             64 bytes; w0 << 16 is an f32, w1 & 0xffff0000 is
//! x         x0 x1                                                one token's pair, for all rows
//! sum[r]    += w1·x1, then += w0·x0                              f32
//! ```
//!
//! # Integers
//! Four columns (a quad) at a time:
//!
//! ```text
//! quads     r0: w w w w | r1: w w w w | ... | r15: w w w w       64 bytes, signed or as unsigned value + offset
//! x         x0 x1 x2 x3                                          one token's four values, for all rows
//! sum[r]    += w·x0 + w·x1 + w·x2 + w·x3                         i32, exact
//! ```
//!
//! Sums of integers are exact, and the few f32 operations on top ([`Simd::add_ints`], [`Simd::add_scaled`]) are fused
//! multiply-adds everywhere, so quantised products have the same bits on every instruction set.
//!
//! A value of an instruction set's type is the proof that the machine has it: safe code can make one only in
//! a function that enables its features. That is why the operations themselves are safe.

mod portable;
mod tiles;

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(crate) mod neon;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
use half::{bf16, f16};
pub(crate) use portable::Portable;
pub(crate) use tiles::{HalfPairs, NoTiles, PanelInts, PanelPairs, PanelQuads, TILE_TOKENS, TileUse, Tiles};

use crate::numbers;

/// Rows of weights whose sums advance together, one per lane.
pub(crate) const LANE_ROWS: usize = 16;
/// Bytes of a cache line.
pub(crate) const CACHE_LINE: usize = 64;
/// Columns of a pair.
pub(crate) const PAIR: usize = 2;
/// Columns of a quad.
pub(crate) const QUAD: usize = 4;

/// Two neighbours of a row.
pub(crate) type Pair = [bf16; PAIR];
/// A pair of each of [`LANE_ROWS`] rows.
pub(crate) type RowPairs = [Pair; LANE_ROWS];
/// [`QUAD`] stored weights of each of [`LANE_ROWS`] rows.
pub(crate) type QuadBytes = [u8; LANE_ROWS * QUAD];

/// Vector operations of one instruction set.
pub(crate) trait Simd: Copy {
    /// Calls `f` as a function of its own, compiled for this instruction set.
    ///
    /// A hot loop gets all registers to itself, and one copy of it serves every kernel.
    fn call(self, f: impl FnOnce());

    /// Asks for the cache line of something that will be loaded soon, into the L2 cache.
    #[inline(always)]
    fn prefetch<T>(self, _: &T) {}

    /// The tiles of the machine's matrix unit.
    type Tiles: Tiles;
    /// Whether there are any.
    const HAS_TILES: bool = false;

    /// Shapes the tiles of this thread for up to [`TILE_TOKENS`] tokens; `None` if there are none.
    #[inline(always)]
    fn tiles(self, _: TileUse, _num_tokens: usize) -> Option<Self::Tiles> {
        None
    }

    /// A pair of each row, ready to be multiplied.
    type Pairs: Copy;
    /// An f32 of each row.
    type Floats: Copy;
    /// Tokens of a tile of two times [`LANE_ROWS`] rows of pairs, as many as the registers hold sums for: up to 8.
    const PAIR_TOKENS: usize;

    /// The empty sum of every row.
    fn zero(self) -> Self::Floats;

    /// Reads pairs.
    fn pairs(self, stored: &RowPairs) -> Self::Pairs;

    /// Adds the product of every row's pair with `x`.
    fn dot_pairs(self, sum: Self::Floats, w: Self::Pairs, x: Pair) -> Self::Floats;

    /// A quad of each row, ready to be multiplied.
    type Quads: Copy;
    /// A running integer dot product of each row.
    type Ints: Copy;
    /// Tokens of a tile of [`QUAD_HALVES`](Self::QUAD_HALVES) times [`LANE_ROWS`] rows of quads, as many as the registers
    /// hold sums for: up to 8.
    const QUAD_TOKENS: usize;
    /// How many of the two halves of a panel a tile of quads has: with one, the other is walked after it, and more
    /// tokens share what is done for its weights.
    const QUAD_HALVES: usize = 2;
    /// Whether weights are multiplied as unsigned bytes, of q8 `value + 128` and of q4 `value + 8`, so that a sum must start
    /// at `-offset · Σ x`.
    const MULTIPLIES_UNSIGNED: bool;

    /// Reads quads of weights stored as signed bytes.
    fn bytes(self, stored: &QuadBytes) -> Self::Quads;

    /// Reads two quads of weights stored as `value + 8`, the first in the low halves of the bytes.
    fn nibbles(self, stored: &QuadBytes) -> [Self::Quads; 2];

    /// The same integer for every row.
    fn ints(self, x: i32) -> Self::Ints;

    /// Adds the product of every row's quad with `x`, four bytes of `-127..=127` in the order of memory.
    fn dot_quads(self, sum: Self::Ints, w: Self::Quads, x: i32) -> Self::Ints;

    /// Adds to `sums[t][half]` the products of two quads of every row of the half with those of token `t`, `x(t)`.
    ///
    /// Until [`Self::by_token`] the sums of neighbouring tokens may be mixed, so they begin equal in all lanes, and in
    /// all tokens unless [`Self::MULTIPLIES_UNSIGNED`].
    #[inline(always)]
    fn dot_two_quads<const T: usize, const HALVES: usize>(
        self,
        sums: &mut [[Self::Ints; HALVES]; T],
        w: [[Self::Quads; 2]; HALVES],
        x: impl Fn(usize) -> [i32; 2],
    ) {
        for (t, sums) in sums.iter_mut().enumerate() {
            let x = x(t);
            for (sum, w) in sums.iter_mut().zip(w) {
                *sum = self.dot_quads(*sum, w[0], x[0]);
                *sum = self.dot_quads(*sum, w[1], x[1]);
            }
        }
    }

    /// Puts the sums of [`Self::dot_two_quads`] where [`Self::dot_quads`] has them.
    #[inline(always)]
    fn by_token<const T: usize, const HALVES: usize>(self, _: &mut [[Self::Ints; HALVES]; T]) {}

    /// Reads integers.
    fn load_ints(self, ints: &[i32; LANE_ROWS]) -> Self::Ints;

    /// Widens a scale of each row.
    fn floats(self, halves: &[f16; LANE_ROWS]) -> Self::Floats;

    /// `sum + ints · scale`, rounded once, for integers that f32 can represent.
    fn add_ints(self, sum: Self::Floats, ints: Self::Ints, scale: Self::Floats) -> Self::Floats;

    /// `out += x · scale`, rounded once.
    fn add_scaled(self, out: &mut [f32; LANE_ROWS], x: Self::Floats, scale: f32);

    /// Sums numbers as a balanced tree: the upper half onto the lower until one is left.
    #[inline(always)]
    fn sum(self, numbers: &[f32; 2 * LANE_ROWS]) -> f32 {
        numbers::sum_lanes(&mut numbers.clone())
    }

    /// The largest of some numbers, or anything if one is NaN.
    #[inline(always)]
    fn largest(self, numbers: &[f32; 2 * LANE_ROWS]) -> f32 {
        numbers::fold_lanes(&mut numbers.clone(), |a, b| if b > a { b } else { a })
    }
}
