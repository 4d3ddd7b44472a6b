//! Many tokens: 16 rows side by side, a *strip*, fill the lanes of registers, and no sum ever crosses lanes.
//!
//! ```text
//! rows as they lie   r0: p0 p1 p2 ... | p0 p1 ...       a step of a row: pair p belongs to lane p of an accumulator
//!                    r1: p0 p1 p2 ... | p0 p1 ...
//! strip              p0: r0 r1 ... r15 of step 0, r0 r1 ... r15 of step 1, ...       a register is 16 rows
//!                    p1: r0 r1 ... r15 of step 0, r0 r1 ... r15 of step 1, ...
//! ```
//!
//! Walking pair 0 through all steps, then pair 1, and so on computes for 16 tokens at once what [`streamed`] computes
//! in the lanes of one accumulator, by the same operations in the same order. These sums are then added up as the tree
//! that [`Simd::sum`] is, so the bits are the same. What is gained: one accumulator serves 16 tokens instead of one,
//! and everything is read in the order in which it lies. Tokens become strips before a product, once for all of its
//! tasks; weights stay rows in memory, and a task turns 16 of them at a time, which pays for many tokens only.
//!
//! [`streamed`]: super::streamed

#![expect(clippy::needless_range_loop, reason = "tiles are arrays of known size, indexed by row and token")]

use std::ops::Range;

use half::bf16;

use super::{MAX_ROWS, SPAN, spans};
use crate::simd::{MAX_STEP, PAIR, RowPairs, STRIP_ROWS, Simd};

/// Most levels of the tree that adds up the lanes.
const MAX_LEVELS: usize = (MAX_STEP / PAIR).ilog2() as usize + 1;
/// Elements of a cache line.
const LINE: usize = 32;

/// Consecutive strips of rows of one length.
#[derive(Clone, Copy)]
pub(crate) struct Strips<'a> {
    pairs: &'a [RowPairs],
    row_len: usize,
}

impl<'a> Strips<'a> {
    /// Wraps strips of rows with `row_len` elements.
    pub(crate) fn new(pairs: &'a [RowPairs], row_len: usize) -> Self {
        Self { pairs, row_len }
    }

    /// The strips from number `first` on.
    pub(crate) fn skip(self, first: usize) -> Self {
        Self { pairs: &self.pairs[first * strip_len(self.row_len)..], ..self }
    }

    /// One strip from element `start` of its rows on, where a span begins.
    #[inline(always)]
    fn strip(&self, index: usize, start: usize) -> &'a [RowPairs] {
        &self.pairs[index * strip_len(self.row_len)..][start / PAIR..]
    }
}

/// Length of a strip of rows with `row_len` elements.
pub(crate) const fn strip_len(row_len: usize) -> usize {
    row_len.next_multiple_of(MAX_STEP) / PAIR
}

/// Lays up to [`STRIP_ROWS`] rows of one length side by side. Lanes without a row repeat the last one.
///
/// # Panics
/// If there is no row, or `strip` is not [`strip_len`] long.
#[inline(always)]
pub(crate) fn make_strip<S: Simd>(simd: S, rows: &[&[bf16]], strip: &mut [RowPairs]) {
    let len = rows[0].len();
    assert!(rows.iter().all(|row| row.len() == len) && strip.len() == strip_len(len));
    for k in spans(len) {
        let start = k.start / PAIR;
        let num_steps = k.len().div_ceil(S::STEP);
        turn(simd, rows, k, &mut strip[start..], num_steps);
    }
}

/// Lays elements `k` of rows side by side, `[pair of a step][step][row]`, the last step padded with zeros. From pair to
/// pair there are `stride` steps.
#[inline(always)]
fn turn<S: Simd>(simd: S, rows: &[&[bf16]], k: Range<usize>, out: &mut [RowPairs], stride: usize) {
    let rows: [&[bf16]; STRIP_ROWS] = std::array::from_fn(|row| &rows[row.min(rows.len() - 1)][k.clone()]);
    let (num_whole, num_steps) = (k.len() / S::STEP, k.len().div_ceil(S::STEP));
    for step in 0..num_whole {
        simd.turn(&rows, step * S::STEP, &mut out[step..], stride);
    }
    if num_whole < num_steps {
        let mut padded = [[bf16::ZERO; MAX_STEP]; STRIP_ROWS];
        for (padded, row) in padded.iter_mut().zip(rows) {
            let rest = &row[num_whole * S::STEP..];
            padded[..rest.len()].copy_from_slice(rest);
        }
        let padded = padded.each_ref().map(|row| &row[..]);
        simd.turn(&padded, 0, &mut out[num_whole..], stride);
    }
}

/// Adds to `sums[t][r]` the product of weight row `r` with row `t` of the strips. `scratch` is kept for the next call.
#[inline(always)]
pub(crate) fn dot_strips<S: Simd>(
    simd: S,
    w: &[&[bf16]],
    x: Strips<'_>,
    scratch: &mut Vec<RowPairs>,
    sums: &mut [[f32; MAX_ROWS]],
) {
    assert!(w.iter().all(|row| row.len() == x.row_len));
    scratch.resize(strip_len(SPAN) + MAX_STEP / PAIR, RowPairs::default());
    let parts =
        |k: Range<usize>| w.chunks(STRIP_ROWS).enumerate().map(move |(part, rows)| (k.clone(), part, rows));
    let mut parts = spans(x.row_len).flat_map(parts).peekable();
    while let Some((k, part, rows)) = parts.next() {
        let num_steps = k.len().div_ceil(S::STEP);
        // One step more than there are: otherwise all pairs of a step would be 4 KiB apart and fight over eight ways.
        let stride = num_steps + 1;
        turn(simd, rows, k.clone(), scratch, stride);
        let next = parts.peek().map(|(k, _, rows)| rows.iter().map(|row| &row[k.clone()]));
        let mut product = Product {
            simd,
            weights: scratch,
            num_rows: rows.len(),
            stride,
            num_steps,
            x,
            start: k.start,
            next_lines: next.into_iter().flatten().flat_map(|row| row.iter().step_by(LINE)),
            lines_per_pair: lines_per_pair::<S>(rows.len(), sums.len()),
        };
        product.add_to(sums, part * STRIP_ROWS);
    }
}

/// Cache lines of a span of [`STRIP_ROWS`] rows per pair that is walked, over all tiles of a product.
fn lines_per_pair<S: Simd>(num_rows: usize, num_tokens: usize) -> usize {
    let (lanes, [tile_rows, tile_vectors]) = (S::STEP / PAIR, S::STRIP_TILE);
    let num_tiles = num_rows.div_ceil(tile_rows) * num_tokens.div_ceil(tile_vectors * lanes);
    (STRIP_ROWS * SPAN / LINE).div_ceil(num_tiles * lanes)
}

/// The product of a span of up to [`STRIP_ROWS`] weight rows with all tokens.
struct Product<'a, S, L> {
    simd: S,
    /// `[pair of a step][stride]`, of which the first `num_steps` are set.
    weights: &'a [RowPairs],
    num_rows: usize,
    stride: usize,
    num_steps: usize,
    x: Strips<'a>,
    /// The span's first element.
    start: usize,
    /// Cache lines of the weights that come next, to be asked for meanwhile: so many with every pair of a tile.
    next_lines: L,
    lines_per_pair: usize,
}

impl<'a, S: Simd, L: Iterator<Item = &'a bf16>> Product<'a, S, L> {
    /// Lanes of a register.
    const LANES: usize = S::STEP / PAIR;

    /// Adds the products to the columns of `sums` from `first_row` on.
    #[inline(always)]
    fn add_to(&mut self, sums: &mut [[f32; MAX_ROWS]], first_row: usize) {
        let [tile_rows, tile_vectors] = S::STRIP_TILE;
        for row in (0..self.num_rows).step_by(tile_rows) {
            let mut token = 0;
            while token < sums.len() {
                let sums = &mut sums[token..];
                token += Self::LANES
                    * match (tile_rows, sums.len().div_ceil(Self::LANES).min(tile_vectors)) {
                        (8, 1) => self.add_tile::<8, 1>(row, token, sums, first_row),
                        (8, 2) => self.add_tile::<8, 2>(row, token, sums, first_row),
                        (8, _) => self.add_tile::<8, 3>(row, token, sums, first_row),
                        (_, 1) => self.add_tile::<4, 1>(row, token, sums, first_row),
                        (_, 2) => self.add_tile::<4, 2>(row, token, sums, first_row),
                        (_, 3) => self.add_tile::<4, 3>(row, token, sums, first_row),
                        (_, _) => self.add_tile::<4, 4>(row, token, sums, first_row),
                    }
            }
        }
    }

    /// Adds the products of `R` weight rows, from `row` on, with `T` registers of tokens, from `token` on; `T`.
    #[inline(always)]
    fn add_tile<const R: usize, const T: usize>(
        &mut self,
        row: usize,
        token: usize,
        sums: &mut [[f32; MAX_ROWS]],
        first_row: usize,
    ) -> usize {
        let simd = self.simd;
        simd.call(
            #[inline(always)]
            || {
                let tile = self.walk_tile::<R, T>(row, token);
                let mut lanes = [0.0; STRIP_ROWS];
                let lanes = &mut lanes[..Self::LANES];
                for (sums, tile) in sums.chunks_mut(Self::LANES).zip(tile) {
                    for (col, sum) in (row..self.num_rows).zip(tile) {
                        simd.store(sum, lanes);
                        sums.iter_mut().zip(&*lanes).for_each(|(sums, lane)| sums[first_row + col] += lane);
                    }
                }
            },
        );
        T
    }

    /// The sums of a tile. Those of single pairs are added up in the order of a binary counter with its bits reversed,
    /// which makes neighbours of those that [`Simd::sum`] adds first.
    #[inline(always)]
    fn walk_tile<const R: usize, const T: usize>(
        &mut self,
        row: usize,
        token: usize,
    ) -> [[S::Accumulator; R]; T] {
        let simd = self.simd;
        let levels = Self::LANES.ilog2();
        let strips: [_; T] = std::array::from_fn(|t| {
            let token = token + t * Self::LANES;
            (self.x.strip(token / STRIP_ROWS, self.start), token % STRIP_ROWS)
        });
        let mut tree = [[[simd.zero(); R]; T]; MAX_LEVELS];
        for count in 0..Self::LANES {
            let pair = count.reverse_bits() >> (usize::BITS - levels);
            self.next_lines.by_ref().take(self.lines_per_pair).for_each(|line| simd.prefetch(line));
            let steps = pair * self.num_steps..(pair + 1) * self.num_steps;
            let tokens = strips.map(|(strip, first)| (&strip[steps.clone()], first));
            let weights = &self.weights[pair * self.stride..][..self.num_steps];
            let mut tile = walk(simd, weights, row, tokens);
            let level = count.trailing_ones() as usize;
            for lower in &tree[..level] {
                for t in 0..T {
                    for r in 0..R {
                        tile[t][r] = simd.add_sums(lower[t][r], tile[t][r]);
                    }
                }
            }
            tree[level] = tile;
        }
        tree[levels as usize]
    }
}

/// Walks one pair of `R` weight rows, from `row` on, and of `T` registers of tokens through all steps.
#[inline(always)]
fn walk<S: Simd, const R: usize, const T: usize>(
    simd: S,
    weights: &[RowPairs],
    row: usize,
    tokens: [(&[RowPairs], usize); T],
) -> [[S::Accumulator; R]; T] {
    let lanes = S::STEP / PAIR;
    assert!(row + R <= STRIP_ROWS && tokens.iter().all(|(_, first)| first + lanes <= STRIP_ROWS));
    assert!(tokens.iter().all(|(steps, _)| steps.len() == weights.len()));
    // Loops all over: `map` and `from_fn` of arrays are functions of their own, without the instruction set.
    let mut tile = [[simd.zero(); R]; T];
    let mut held = [simd.load_partial(&[]); T];
    for step in 0..weights.len() {
        for t in 0..T {
            let (steps, first) = tokens[t];
            // SAFETY: all have `weights.len()` steps, of which each has a register of rows from `first` on.
            held[t] = unsafe { simd.load(steps.get_unchecked(step).as_ptr().add(first).cast()) };
        }
        for r in 0..R {
            // SAFETY: as above, and a step has `R` rows from `row` on.
            let weight = simd.pairs(unsafe { *weights.get_unchecked(step).get_unchecked(row + r) });
            for t in 0..T {
                tile[t][r] = simd.dot(tile[t][r], weight, held[t]);
            }
        }
    }
    tile
}
