//! Few tokens, one tile wide: every weight row is read from memory in one go, and the tokens, which are read
//! again for every tile of weights, stay in the caches.

use half::bf16;

use super::tile::{cut, walk};
use super::{MAX_ROWS, spans};
use crate::simd::Simd;

/// Adds the products of exactly `T` tokens, in tiles of `R` weight rows.
#[inline(always)]
pub(super) fn dot_rows<S: Simd, const R: usize, const T: usize>(
    simd: S,
    w: &[&[bf16]],
    x: &[&[bf16]],
    sums: &mut [[f32; MAX_ROWS]],
) {
    assert_eq!(x.len(), T);
    let mut row = 0;
    while row + R <= w.len() {
        dot_tile::<S, R, T>(simd, w, row, x, sums);
        row += R;
    }
    while row < w.len() {
        dot_tile::<S, 1, T>(simd, w, row, x, sums);
        row += 1;
    }
}

/// Adds the products of `T` tokens with `R` weight rows, from `row` on.
#[inline(always)]
fn dot_tile<S: Simd, const R: usize, const T: usize>(
    simd: S,
    w: &[&[bf16]],
    row: usize,
    x: &[&[bf16]],
    sums: &mut [[f32; MAX_ROWS]],
) {
    simd.call(
        #[inline(always)]
        || {
            for k in spans(w[row].len()) {
                let rest = k.len() - k.len() % S::STEP;
                let w = cut::<R>(&w[row..], k.clone());
                let x = cut::<T>(x, k);
                let tile = walk(
                    simd,
                    w,
                    [[simd.zero(); R]; T],
                    #[inline(always)]
                    // SAFETY: `walk` asks for whole steps of a span, and all rows of `x` are cut to it.
                    |step, t| unsafe { simd.load(x[t].as_ptr().add(step * S::STEP)) },
                    #[inline(always)]
                    |t| simd.load_partial(&x[t][rest..]),
                );
                for (sums, tile) in sums.iter_mut().zip(&tile) {
                    sums[row..].iter_mut().zip(tile).for_each(|(sum, &pair)| *sum += simd.sum(pair));
                }
            }
        },
    );
}
