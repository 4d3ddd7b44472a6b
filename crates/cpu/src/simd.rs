//! The three vector operations that everything rests on, for each instruction set: running dot products of bf16 values
//! with f32 accumulation, of one row's neighbours or of 16 rows side by side, and one of 8-bit integers with exact
//! accumulation.
//!
//! # bf16
//! A 32-bit lane holds two neighbours of a row, a pair. An accumulator is a vector of f32 lanes, and a step adds two
//! products to each: first that of the odd elements, then that of the even ones. A product of two bf16 values is exact
//! in f32 (8 + 8 bits fit in 24), so a fused multiply-add and a multiplication followed by an addition round alike, and
//! the portable model follows the documented steps of `vdpbf16ps`, but for subnormal numbers, which that instruction
//! flushes to zero.
//!
//! ```text
//! pair       e0 | e1        even half << 16 is its f32; odd half & 0xffff0000 is its f32
//!
//! dot        w: e0 e1 | e2 e3 | ...              neighbours of one row, and of another: the lanes are added up at the
//!            x: f0 f1 | f2 f3 | ...              end, and how many there are depends on the instruction set
//!
//! dot_pairs  w: r0: w0 w1 | r1: w0 w1 | ...      a pair of each of 16 rows
//!            x: x0 x1                            one token's pair, for all rows
//! ```
//!
//! # Integers
//! 16 rows of weights advance together, four columns (a quad) at a time; lane `r` belongs to row `r`:
//!
//! ```text
//! quads     r0: w w w w | r1: w w w w | ... | r15: w w w w       64 bytes, stored as unsigned value + offset
//! x         x0 x1 x2 x3                                          one token's four values, for all rows
//! sum[r]    += w·x0 + w·x1 + w·x2 + w·x3                         i32, exact
//! ```
//!
//! Sums of integers are exact, and the few f32 operations on top ([`Simd::scaled`], [`Simd::add_scaled`]) round
//! after every step, so quantised products have the same bits on every instruction set.
//!
//! A value of an instruction set's type is the proof that the machine has it: safe code can make one only in
//! a function that enables its features. That is why the operations themselves are safe.

mod portable;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
mod neon;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512Bf16;
use half::{bf16, f16};
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(crate) use neon::Neon;
pub(crate) use portable::Portable;

/// Most elements of a [`Simd::dot`].
pub(crate) const MAX_STEP: usize = 32;

/// Rows of weights whose sums advance together, one per lane.
pub(crate) const LANE_ROWS: usize = 16;
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
    /// `STEP` elements of a row, ready to be multiplied.
    type Elements: Copy;
    /// A running dot product.
    type Accumulator: Copy;
    /// Elements that one [`Simd::dot`] takes from each row.
    const STEP: usize;
    /// Rows of a tile of four others, as many as the registers hold accumulators for: 2 or 4.
    const TILE_ROWS: usize;

    /// The empty sum.
    fn zero(self) -> Self::Accumulator;

    /// Loads `STEP` elements.
    ///
    /// # Safety
    /// `elements` must be readable for `STEP` elements; it need not be aligned.
    unsafe fn load(self, elements: *const bf16) -> Self::Elements;

    /// Loads fewer than `STEP` elements and zeros for the rest.
    fn load_partial(self, elements: &[bf16]) -> Self::Elements;

    /// Adds the products of `w` and `x` to `sum`.
    fn dot(self, sum: Self::Accumulator, w: Self::Elements, x: Self::Elements) -> Self::Accumulator;

    /// Calls `f` as a function of its own, compiled for this instruction set.
    ///
    /// A hot loop gets all registers to itself, and one copy of it serves every kernel.
    fn call(self, f: impl FnOnce());

    /// Asks for the cache line of something that will be loaded soon, into the L2 cache.
    #[inline(always)]
    fn prefetch<T>(self, _: &T) {}

    /// Adds up the lanes.
    #[inline(always)]
    fn sum(self, sum: Self::Accumulator) -> f32 {
        let mut lanes = [0.0; MAX_STEP / PAIR];
        let lanes = &mut lanes[..Self::STEP / PAIR];
        self.store(sum, lanes);
        sum_lanes(lanes)
    }

    /// Writes the lanes.
    ///
    /// # Panics
    /// If `lanes` is not as long.
    fn store(self, sum: Self::Accumulator, lanes: &mut [f32]);

    /// A pair of each row, ready to be multiplied.
    type Pairs: Copy;
    /// An f32 of each row.
    type Floats: Copy;
    /// Tokens of a tile of two times [`LANE_ROWS`] rows of pairs, as many as the registers hold sums for: up to 8.
    const PAIR_TOKENS: usize;

    /// Reads pairs.
    fn pairs(self, stored: &RowPairs) -> Self::Pairs;

    /// Adds the product of every row's pair with `x`.
    fn dot_pairs(self, sum: Self::Floats, w: Self::Pairs, x: Pair) -> Self::Floats;

    /// A quad of each row, ready to be multiplied.
    type Quads: Copy;
    /// A running integer dot product of each row.
    type Ints: Copy;
    /// Tokens of a tile of two times [`LANE_ROWS`] rows of quads, as many as the registers hold sums for: up to 8.
    const QUAD_TOKENS: usize;
    /// Whether weights are multiplied as stored, so that a sum must start at `-offset · Σ x`; otherwise the offset
    /// is taken off the weights.
    const MULTIPLIES_STORED: bool;

    /// Reads quads of weights stored as `value + 128`.
    fn bytes(self, stored: &QuadBytes) -> Self::Quads;

    /// Reads two quads of weights stored as `value + 8`, the first in the low halves of the bytes.
    fn nibbles(self, stored: &QuadBytes) -> [Self::Quads; 2];

    /// The same integer for every row.
    fn ints(self, x: i32) -> Self::Ints;

    /// Adds the product of every row's quad with `x`, four bytes of `-127..=127` in the order of memory.
    fn dot_quads(self, sum: Self::Ints, w: Self::Quads, x: i32) -> Self::Ints;

    /// Widens a scale of each row.
    fn floats(self, halves: &[f16; LANE_ROWS]) -> Self::Floats;

    /// `sum · scale`, for sums that f32 can represent.
    fn scaled(self, sum: Self::Ints, scale: Self::Floats) -> Self::Floats;

    /// `a + b`.
    fn add(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;

    /// `out += x · scale`, rounded after the product and after the sum.
    fn add_scaled(self, out: &mut [f32; LANE_ROWS], x: Self::Floats, scale: f32);
}

/// Sums lanes as a balanced tree: the upper half is added to the lower until one is left.
#[inline(always)]
pub(crate) fn sum_lanes(lanes: &mut [f32]) -> f32 {
    assert!(lanes.len().is_power_of_two());
    let mut width = lanes.len() / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}
