//! A tile: `R` weight rows × `T` tokens whose accumulators walk along K together.
#![expect(clippy::needless_range_loop, reason = "tiles are arrays of known size, indexed by row and token")]

use std::ops::Range;

use half::bf16;

use super::MAX_TILE;
use crate::simd::Simd;

/// The accumulators of a tile.
pub(super) type Tile<S, const R: usize, const T: usize> = [[<S as Simd>::Accumulator; R]; T];

/// Elements `k` of the first `N` rows.
#[inline(always)]
pub(super) fn cut<'a, const N: usize>(rows: &[&'a [bf16]], k: Range<usize>) -> [&'a [bf16]; N] {
    let mut cut: [&[bf16]; N] = [&[]; N];
    for i in 0..N {
        cut[i] = &rows[i][k.clone()];
    }
    cut
}

/// Walks the pairs of a tile along all of `w`, whose rows are of one length.
///
/// `x(step, t)` is a whole step of token `t`, `x_rest(t)` what is left of it after the last whole step.
#[inline(always)]
pub(super) fn walk<S: Simd, const R: usize, const T: usize>(
    simd: S,
    w: [&[bf16]; R],
    mut tile: Tile<S, R, T>,
    x: impl Fn(usize, usize) -> S::Elements,
    x_rest: impl Fn(usize) -> S::Elements,
) -> Tile<S, R, T> {
    const { assert!(R <= MAX_TILE && T <= MAX_TILE) }
    let len = w[0].len();
    assert!(w.iter().all(|row| row.len() == len));
    let num_steps = len / S::STEP;
    // SAFETY: every row has `len` elements, and each call below asks for one of its `num_steps` whole steps.
    let weights = |step: usize, r: usize| unsafe { simd.load(w[r].as_ptr().add(step * S::STEP)) };
    // The shorter side of the tile waits in registers while the longer passes by.
    let mut held = [simd.load_partial(&[]); MAX_TILE];
    for step in 0..num_steps {
        if R <= T {
            (0..R).for_each(|r| held[r] = weights(step, r));
            for t in 0..T {
                let token = x(step, t);
                (0..R).for_each(|r| tile[t][r] = simd.dot(tile[t][r], held[r], token));
            }
        } else {
            (0..T).for_each(|t| held[t] = x(step, t));
            for r in 0..R {
                let weights = weights(step, r);
                (0..T).for_each(|t| tile[t][r] = simd.dot(tile[t][r], weights, held[t]));
            }
        }
    }
    if num_steps * S::STEP < len {
        for r in 0..R {
            let weights = simd.load_partial(&w[r][num_steps * S::STEP..]);
            (0..T).for_each(|t| tile[t][r] = simd.dot(tile[t][r], weights, x_rest(t)));
        }
    }
    tile
}
