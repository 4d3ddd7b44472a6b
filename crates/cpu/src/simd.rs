//! The one vector operation that everything rests on: a running dot product of bf16 values with f32
//! accumulation, for each instruction set.
//!
//! An accumulator is a vector of f32 lanes. Step `k` adds the products of elements `k .. k + STEP` of two rows
//! to the lanes; which element goes to which lane, and in which order a lane adds, is fixed per instruction
//! set. A product of two bf16 values is exact in f32 (8 + 8 bits fit in 24), so a fused multiply-add and a
//! multiplication followed by an addition round alike, and the portable model follows the documented steps of
//! `vdpbf16ps`, but for subnormal numbers, which that instruction flushes to zero.
//!
//! ```text
//! row       e0 e1 e2 e3 e4 e5 ...           a 32-bit lane holds two neighbours: even low, odd high
//! lane 0    e0·f0 + e1·f1
//! lane 1    e2·f2 + e3·f3                   even half << 16 is its f32; odd half & 0xffff0000 is its f32
//! ```
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
use half::bf16;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(crate) use neon::Neon;
pub(crate) use portable::Portable;

/// Vector operations of one instruction set.
pub(crate) trait Simd: Copy {
    /// `STEP` elements of a row, ready to be multiplied.
    type Elements: Copy;
    /// A running dot product.
    type Accumulator: Copy;
    /// Elements that one [`Simd::dot`] takes from each row.
    const STEP: usize;
    /// Weight rows of a tile of four tokens, as many as the registers hold accumulators for: 2 or 4.
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

    /// Asks for the cache line of an element that will be loaded soon, into the L2 cache.
    #[inline(always)]
    fn prefetch(self, _: &bf16) {}

    /// Adds up the lanes.
    fn sum(self, sum: Self::Accumulator) -> f32;
}

/// Sums lanes as a balanced tree: the upper half is added to the lower until one is left.
#[inline(always)]
pub(crate) fn sum_lanes<const LANES: usize>(mut lanes: [f32; LANES]) -> f32 {
    const { assert!(LANES.is_power_of_two()) }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}
