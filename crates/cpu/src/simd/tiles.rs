//! Matrix units: registers that hold tiles of up to 16 rows of 64 bytes, and instructions that multiply whole tiles.
//!
//! ```text
//!                        16 weight rows
//!                      ┌────────────────┐
//!                      │ pair or quad 0 │  64 bytes, as they lie in a panel
//!                      │ pair or quad 1 │
//!                      │ ...            │
//!   up to 16 tokens    └────────────────┘
//!  ┌────────────────┐  ┌────────────────┐
//!  │ t0: 32 columns │  │ t0: sums       │  f32 or i32
//!  │ t1: 32 columns │  │ t1: sums       │
//!  │ ...            │  │ ...            │
//!  └────────────────┘  └────────────────┘
//! ```
//!
//! A product of tiles costs the same, or nearly so, however many tokens there are: with 16 it is several times as fast
//! as the vector instructions, with one still faster than memory is.

use std::mem::MaybeUninit;

use super::{LANE_ROWS, QuadBytes, RowPairs};

/// Most tokens of a tile.
pub(crate) const TILE_TOKENS: usize = 16;
/// Quads of [`QUADS`] columns of both halves of a panel.
pub(crate) type PanelQuads = [[QuadBytes; 2]; QUADS];
/// Pairs of 32 columns of both halves of a panel.
pub(crate) type PanelPairs = [HalfPairs; 2];
/// Pairs of 32 columns of half a panel.
pub(crate) type HalfPairs = [RowPairs; PAIRS];
/// A token's integer sums with both halves of a panel, each a cache line.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(crate) struct PanelInts(pub(crate) [[i32; LANE_ROWS]; 2]);

/// Quads of a tile of weights.
const QUADS: usize = 8;
/// Pairs of a tile of weights.
const PAIRS: usize = 16;

/// What tiles are shaped for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum TileUse {
    /// [`Tiles::add_pairs`].
    Pairs,
    /// [`Tiles::dot_quads`].
    Quads,
}

/// The tiles of one thread's matrix unit, shaped for a number of tokens; free again when dropped.
pub(crate) trait Tiles {
    /// Takes `sums[t]` of [`Tiles::num_tokens`] tokens from each of `firsts` on, for [`Tiles::add_pairs`].
    ///
    /// # Panics
    /// If `sums` end before the tokens do.
    fn take_sums<const TILES: usize>(&self, sums: &[[f32; 2 * LANE_ROWS]], firsts: [usize; TILES]);

    /// Adds to the sums that were taken the tokens' products with both halves of a panel along some blocks of 32
    /// columns. Places of tokens that both tiles have are computed twice, alike.
    ///
    /// Of each block the products of even columns and those of odd ones are summed from zero in ascending order, and
    /// then the sum of both is added; every operation rounds once, and subnormal numbers are zero.
    ///
    /// `x[t]` holds the token's columns, 64 bytes of each block. Before every block `meanwhile` is called.
    ///
    /// # Panics
    /// If the tiles have another use, or `x` ends before the tokens do.
    fn add_pairs<'a, X, const TILES: usize>(
        &self,
        weights: impl Iterator<Item = &'a PanelPairs>,
        x: &[X],
        firsts: [usize; TILES],
        meanwhile: impl FnMut(),
    );

    /// Puts the sums that were taken back.
    ///
    /// # Panics
    /// As [`Tiles::take_sums`].
    fn put_sums<const TILES: usize>(&self, sums: &mut [[f32; 2 * LANE_ROWS]], firsts: [usize; TILES]);

    /// Writes to `out[t]` what [`Tiles::add_pairs`] would add to zeros, of weights whose halves lie apart and each meet
    /// the next `PARTS` blocks of `x[t]`, one after another. Before every block of weights `meanwhile` is called.
    ///
    /// # Panics
    /// As [`Tiles::add_pairs`].
    fn dot_pairs<'a, X, const PARTS: usize>(
        &self,
        weights: impl Iterator<Item = [&'a HalfPairs; 2]>,
        x: &[X],
        meanwhile: impl FnMut(),
        out: &mut [[f32; 2 * LANE_ROWS]],
    );

    /// Computes the products of [`Tiles::num_tokens`] tokens with weights, signed bytes, of both halves of a panel along
    /// the 32 columns that are group `group` of `x`, and leaves them in set `SET` of the tiles, 0 or 1.
    ///
    /// # Panics
    /// If the tiles have another use, or `x` ends before the tokens or the group do.
    fn dot_quads<X, const SET: usize>(&self, weights: &PanelQuads, x: &[X], group: usize);

    /// Writes what [`Tiles::dot_quads`] left in set `SET`.
    ///
    /// # Panics
    /// If `out` ends before the tokens do.
    fn store_ints<const SET: usize>(&self, out: &mut [MaybeUninit<PanelInts>]);

    /// Multiplies tiles as they are, without loading or storing any; operations, of which a multiplication and its
    /// addition are two. No product takes less time for as many.
    fn multiply(&self) -> usize;

    /// Rows of a tile of tokens.
    fn num_tokens(&self) -> usize;
}

/// The tiles of a machine that has none.
pub(crate) enum NoTiles {}

impl Tiles for NoTiles {
    fn take_sums<const TILES: usize>(&self, _: &[[f32; 2 * LANE_ROWS]], _: [usize; TILES]) {
        match *self {}
    }

    fn add_pairs<'a, X, const TILES: usize>(
        &self,
        _: impl Iterator<Item = &'a PanelPairs>,
        _: &[X],
        _: [usize; TILES],
        _: impl FnMut(),
    ) {
        match *self {}
    }

    fn put_sums<const TILES: usize>(&self, _: &mut [[f32; 2 * LANE_ROWS]], _: [usize; TILES]) {
        match *self {}
    }

    fn dot_pairs<'a, X, const PARTS: usize>(
        &self,
        _: impl Iterator<Item = [&'a HalfPairs; 2]>,
        _: &[X],
        _: impl FnMut(),
        _: &mut [[f32; 2 * LANE_ROWS]],
    ) {
        match *self {}
    }

    fn dot_quads<X, const SET: usize>(&self, _: &PanelQuads, _: &[X], _: usize) {
        match *self {}
    }

    fn store_ints<const SET: usize>(&self, _: &mut [MaybeUninit<PanelInts>]) {
        match *self {}
    }

    fn multiply(&self) -> usize {
        match *self {}
    }

    fn num_tokens(&self) -> usize {
        match *self {}
    }
}
