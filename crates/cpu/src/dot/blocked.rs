//! Several tokens: a span of K is cut into blocks, and a block of the tokens is unpacked into the L1 cache once, where
//! all weight rows stream past it. Between blocks accumulators wait in memory, unrounded.
//!
//! ```text
//!            k: block 0   block 1   ...
//! tokens        ░░░░░░░                    unpacked, 16 KiB, half of an L1 cache
//! w0 w1         ───────►                   then w2 w3, and so on; then block 1
//! ```
//!
//! Unpacked tokens are contiguous. Rows of activations, like rows of weights, are usually a multiple of 4 KiB
//! apart, and a dozen of them would fight over the same eight ways of the cache.

use std::ops::Range;

use half::bf16;

use super::tile::{cut, walk};
use super::{MAX_ROWS, MAX_TILE, MAX_TOKENS};
use crate::simd::Simd;

/// Steps of K in a block; a step of a token takes up to 64 bytes.
const BLOCK_STEPS: usize = 32;
/// Elements of a cache line.
const LINE: usize = 32;

/// Adds the products of a span, in tiles of `R` weight rows.
#[inline(always)]
pub(super) fn dot_rows<S: Simd, const R: usize>(
    simd: S,
    w: &[&[bf16]],
    x: &[&[bf16]],
    sums: &mut [[f32; MAX_ROWS]],
) {
    let len = x[0].len();
    let mut product = Product {
        simd,
        unpacked: [[simd.load_partial(&[]); MAX_TOKENS]; BLOCK_STEPS],
        accumulators: [[simd.zero(); MAX_ROWS]; MAX_TOKENS],
        num_tokens: x.len(),
    };
    let mut start = 0;
    while start < len {
        let k = start..len.min(start + BLOCK_STEPS * S::STEP);
        let next_k = k.end..len.min(k.end + BLOCK_STEPS * S::STEP);
        product.unpack(x, k.clone());
        let mut row = 0;
        while row < w.len() {
            // What comes next is asked for while this is multiplied: weights, and a token's next block.
            w.iter().skip(row + R).take(R).for_each(|next| prefetch(simd, &next[k.clone()]));
            x.iter().skip(row / R).take(1).for_each(|next| prefetch(simd, &next[next_k.clone()]));
            if row + R <= w.len() {
                product.walk_rows::<R>(w, row, k.clone());
                row += R;
            } else {
                product.walk_rows::<1>(w, row, k.clone());
                row += 1;
            }
        }
        start = k.end;
    }
    for (sums, accumulators) in sums.iter_mut().zip(&product.accumulators[..x.len()]) {
        sums.iter_mut().zip(&accumulators[..w.len()]).for_each(|(sum, &pair)| *sum += simd.sum(pair));
    }
}

/// A product on its way along K.
struct Product<S: Simd> {
    simd: S,
    /// The current block of the tokens, `[step][token]`, the last step padded with zeros.
    unpacked: [[S::Elements; MAX_TOKENS]; BLOCK_STEPS],
    /// All pairs, `[token][weight row]`.
    accumulators: [[S::Accumulator; MAX_ROWS]; MAX_TOKENS],
    num_tokens: usize,
}

impl<S: Simd> Product<S> {
    /// Unpacks elements `k` of the tokens.
    #[inline(always)]
    fn unpack(&mut self, x: &[&[bf16]], k: Range<usize>) {
        for (token, row) in x.iter().enumerate() {
            let mut rest = &row[k.clone()];
            for step in &mut self.unpacked {
                if rest.len() < S::STEP {
                    step[token] = self.simd.load_partial(rest);
                    break;
                }
                // SAFETY: `rest` has at least `STEP` elements.
                step[token] = unsafe { self.simd.load(rest.as_ptr()) };
                rest = &rest[S::STEP..];
            }
        }
    }

    /// Walks `R` weight rows, from `row` on, and all tokens along the block of elements `k`.
    #[inline(always)]
    fn walk_rows<const R: usize>(&mut self, w: &[&[bf16]], row: usize, k: Range<usize>) {
        let w = cut::<R>(&w[row..], k);
        let mut token = 0;
        while token < self.num_tokens {
            token += match self.num_tokens - token {
                1 => self.walk_tile::<R, 1>(w, row, token),
                2 | 3 => self.walk_tile::<R, 2>(w, row, token),
                _ => self.walk_tile::<R, MAX_TILE>(w, row, token),
            };
        }
    }

    /// Walks `T` tokens, from `token` on, along a block of weights; their number, `T`.
    #[inline(always)]
    fn walk_tile<const R: usize, const T: usize>(
        &mut self,
        w: [&[bf16]; R],
        row: usize,
        token: usize,
    ) -> usize {
        let Self { simd, ref unpacked, ref mut accumulators, .. } = *self;
        simd.call(
            #[inline(always)]
            || {
                let rest_step = w[0].len() / S::STEP;
                assert!(rest_step <= BLOCK_STEPS);
                let pairs = &mut accumulators[token..token + T];
                let mut tile = [[simd.zero(); R]; T];
                for (tile, pairs) in tile.iter_mut().zip(pairs.iter()) {
                    tile.copy_from_slice(&pairs[row..row + R]);
                }
                let tile = walk(
                    simd,
                    w,
                    tile,
                    #[inline(always)]
                    |step, t| unpacked[step][token + t],
                    #[inline(always)]
                    |t| unpacked[rest_step][token + t],
                );
                for (pairs, tile) in pairs.iter_mut().zip(&tile) {
                    pairs[row..row + R].copy_from_slice(tile);
                }
            },
        );
        T
    }
}

#[inline(always)]
fn prefetch<S: Simd>(simd: S, row: &[bf16]) {
    row.iter().step_by(LINE).for_each(|element| simd.prefetch(element));
}
