//! Dot products of up to 32 weight rows with up to 8 activation rows: the one inner loop of all matrix
//! products and of attention's scores.
//!
//! Tiles of weight rows × tokens keep their accumulators in registers while they walk along K:
//!
//! ```text
//!            x0  x1        every (weight row, token) pair has exactly one accumulator, which walks K from
//!        w0  a00 a01       the start to the end; tiles only say which pairs walk together
//!        w1  a10 a11
//!        w2  a20 a21
//!        w3  a30 a31
//! ```
//!
//! So a pair's result depends on the two rows and the instruction set alone, bit for bit: not on the tile that
//! it fell in, nor on the rows beside it.
//!
//! A few tokens are one tile wide: memory is the limit, and every weight row is read in one go. With more of
//! them arithmetic is, and K is cut into blocks: a block of the activations is unpacked into the L1 cache
//! once, and the weight rows stream past it while accumulators wait in between, unrounded. Unpacked rows are
//! contiguous; rows of activations, like rows of weights, are usually a multiple of 4 KiB apart, and a dozen of
//! them would fight over the same eight ways of the cache.
//!
//! This file does not know where rows come from or where sums go.
#![expect(clippy::needless_range_loop, reason = "tiles are arrays of known size, indexed by row and token")]

use std::ops::Range;

use half::bf16;

use crate::simd::Simd;

/// Most weight rows of one call.
pub(crate) const MAX_ROWS: usize = 32;
/// Most activation rows of one call.
pub(crate) const MAX_TOKENS: usize = 8;
/// Most weight rows of a tile.
pub(crate) const TILE_ROWS: usize = 4;
/// Tokens of a full tile when there are many.
const TILE_TOKENS: usize = 4;
/// Steps of K in a block: 16 KiB of activations at 64 bytes per step and token, half of an L1 cache.
const BLOCK_STEPS: usize = 16;
/// Elements of a cache line.
const LINE: usize = 32;

const _: () = assert!(MAX_ROWS.is_multiple_of(TILE_ROWS));

/// The sums of one call, `[token][weight row]`.
pub(crate) type Sums = [[f32; MAX_ROWS]; MAX_TOKENS];

/// Up to `N` rows, borrowed from wherever they lie.
#[derive(Clone, Copy)]
pub(crate) struct RowList<'a, const N: usize> {
    rows: [&'a [bf16]; N],
    len: usize,
}

impl<'a, const N: usize> RowList<'a, N> {
    /// Collects rows.
    ///
    /// # Panics
    /// If there are more than `N`.
    #[inline(always)]
    pub(crate) fn new(rows: impl IntoIterator<Item = &'a [bf16]>) -> Self {
        let mut list = Self { rows: [&[]; N], len: 0 };
        for row in rows {
            list.rows[list.len] = row;
            list.len += 1;
        }
        list
    }
}

impl<'a, const N: usize> std::ops::Deref for RowList<'a, N> {
    type Target = [&'a [bf16]];

    #[inline(always)]
    fn deref(&self) -> &Self::Target {
        &self.rows[..self.len]
    }
}

/// Weight rows of one call.
pub(crate) type WeightRows<'a> = RowList<'a, MAX_ROWS>;
/// Activation rows of one call.
pub(crate) type TokenRows<'a> = RowList<'a, MAX_TOKENS>;

/// Computes `sums[t][r] = w[r] · x[t]` for all rows given.
///
/// # Panics
/// If the rows are not all of one length.
#[inline(always)]
pub(crate) fn dot_rows<S: Simd>(simd: S, w: &WeightRows<'_>, x: &TokenRows<'_>, sums: &mut Sums) {
    let len = w.first().map_or(0, |row| row.len());
    assert!(w.iter().chain(x.iter()).all(|row| row.len() == len), "rows of a product have one length");
    match (x.len(), S::TILE_ROWS) {
        (0, _) => {}
        (1, _) => few_tokens::<S, 4, 1>(simd, w, x, sums),
        (2, _) => few_tokens::<S, 4, 2>(simd, w, x, sums),
        (3, 4..) => few_tokens::<S, 4, 3>(simd, w, x, sums),
        (3, _) => few_tokens::<S, 2, 3>(simd, w, x, sums),
        (4, 4..) => few_tokens::<S, 4, 4>(simd, w, x, sums),
        (4, _) => few_tokens::<S, 2, 4>(simd, w, x, sums),
        (_, 4..) => many_tokens::<S, 4>(simd, w, x, sums),
        (_, _) => many_tokens::<S, 2>(simd, w, x, sums),
    }
}

/// The accumulators of a tile of `R` weight rows and `T` tokens.
type TileSums<S, const R: usize, const T: usize> = [[<S as Simd>::Accumulator; R]; T];

/// Multiplies exactly `T` tokens in tiles of `R` weight rows, every row in one go.
#[inline(always)]
fn few_tokens<S: Simd, const R: usize, const T: usize>(
    simd: S,
    w: &[&[bf16]],
    x: &[&[bf16]],
    sums: &mut Sums,
) {
    let mut row = 0;
    while row < w.len() {
        row += match row + R <= w.len() {
            true => few_tokens_tile::<S, R, T>(simd, w, row, x, sums),
            false => few_tokens_tile::<S, 1, T>(simd, w, row, x, sums),
        };
    }
}

/// Multiplies `R` weight rows, from `row` on, and `T` tokens; `R`.
#[inline(always)]
fn few_tokens_tile<S: Simd, const R: usize, const T: usize>(
    simd: S,
    w: &[&[bf16]],
    row: usize,
    x: &[&[bf16]],
    sums: &mut Sums,
) -> usize {
    simd.call(
        #[inline(always)]
        || {
            let len = w[row].len();
            let w = cut::<R>(&w[row..], 0..len);
            let x = cut::<T>(x, 0..len);
            let tile = walk(
                simd,
                w,
                [[simd.zero(); R]; T],
                #[inline(always)]
                // SAFETY: `walk` asks for whole steps of `len` elements, and all rows of `x` have as many.
                |step, t| unsafe { simd.load(x[t].as_ptr().add(step * S::STEP)) },
                #[inline(always)]
                |t| simd.load_partial(&x[t][len - len % S::STEP..]),
            );
            for t in 0..T {
                for r in 0..R {
                    sums[t][row + r] = simd.sum(tile[t][r]);
                }
            }
        },
    );
    R
}

/// A block of the activations, `[step][token]`.
type Unpacked<S> = [[<S as Simd>::Elements; MAX_TOKENS]; BLOCK_STEPS];
/// The accumulators of all pairs, `[token][weight row]`.
type Accumulators<S> = [[<S as Simd>::Accumulator; MAX_ROWS]; MAX_TOKENS];

/// Multiplies many tokens in blocks of K, in tiles of `R` weight rows.
#[inline(always)]
fn many_tokens<S: Simd, const R: usize>(simd: S, w: &[&[bf16]], x: &[&[bf16]], sums: &mut Sums) {
    let len = x[0].len();
    let mut unpacked: Unpacked<S> = [[simd.load_partial(&[]); MAX_TOKENS]; BLOCK_STEPS];
    let mut accumulators: Accumulators<S> = [[simd.zero(); MAX_ROWS]; MAX_TOKENS];
    let mut start = 0;
    while start < len {
        let k = start..len.min(start + BLOCK_STEPS * S::STEP);
        let next_k = k.end..len.min(k.end + BLOCK_STEPS * S::STEP);
        unpack(simd, x, k.clone(), &mut unpacked);
        let mut row = 0;
        while row < w.len() {
            // What comes next is asked for while this is multiplied: weights, and a token's next block.
            w[row..].iter().skip(R).take(R).for_each(|next| prefetch(simd, &next[k.clone()]));
            x.get(row / R).into_iter().for_each(|next| prefetch(simd, &next[next_k.clone()]));
            row += match row + R <= w.len() {
                true => {
                    many_tokens_rows::<S, R>(simd, w, row, k.clone(), &unpacked, x.len(), &mut accumulators)
                }
                false => {
                    many_tokens_rows::<S, 1>(simd, w, row, k.clone(), &unpacked, x.len(), &mut accumulators)
                }
            };
        }
        start = k.end;
    }
    for t in 0..x.len() {
        for r in 0..w.len() {
            sums[t][r] = simd.sum(accumulators[t][r]);
        }
    }
}

/// Loads the steps of elements `k` of all tokens, the last padded with zeros.
#[inline(always)]
fn unpack<S: Simd>(simd: S, x: &[&[bf16]], k: Range<usize>, unpacked: &mut Unpacked<S>) {
    for (token, row) in x.iter().enumerate() {
        let mut rest = &row[k.clone()];
        for step in unpacked.iter_mut() {
            if rest.len() < S::STEP {
                step[token] = simd.load_partial(rest);
                break;
            }
            // SAFETY: `rest` has at least `STEP` elements.
            step[token] = unsafe { simd.load(rest.as_ptr()) };
            rest = &rest[S::STEP..];
        }
    }
}

/// Walks `R` weight rows, from `row` on, and all tokens along the block of elements `k`; `R`.
#[inline(always)]
fn many_tokens_rows<S: Simd, const R: usize>(
    simd: S,
    w: &[&[bf16]],
    row: usize,
    k: Range<usize>,
    unpacked: &Unpacked<S>,
    num_tokens: usize,
    accumulators: &mut Accumulators<S>,
) -> usize {
    let w = cut::<R>(&w[row..], k);
    let mut token = 0;
    while token < num_tokens {
        token += match num_tokens - token {
            1 => many_tokens_tile::<S, R, 1>(simd, w, row, unpacked, token, accumulators),
            2 | 3 => many_tokens_tile::<S, R, 2>(simd, w, row, unpacked, token, accumulators),
            _ => many_tokens_tile::<S, R, TILE_TOKENS>(simd, w, row, unpacked, token, accumulators),
        };
    }
    R
}

/// Walks `R` weight rows and `T` tokens, from `token` on, along a block; `T`.
#[inline(always)]
fn many_tokens_tile<S: Simd, const R: usize, const T: usize>(
    simd: S,
    w: [&[bf16]; R],
    row: usize,
    unpacked: &Unpacked<S>,
    token: usize,
    accumulators: &mut Accumulators<S>,
) -> usize {
    simd.call(
        #[inline(always)]
        || {
            let rest_step = w[0].len() / S::STEP;
            assert!(rest_step <= BLOCK_STEPS);
            let mut tile = [[simd.zero(); R]; T];
            for t in 0..T {
                tile[t].copy_from_slice(&accumulators[token + t][row..row + R]);
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
            for t in 0..T {
                accumulators[token + t][row..row + R].copy_from_slice(&tile[t]);
            }
        },
    );
    T
}

/// Walks the pairs of a tile along all of `w`, whose rows are of one length.
///
/// `x(step, t)` is a whole step of token `t`, `x_rest(t)` what is left of it after the last whole step.
#[inline(always)]
fn walk<S: Simd, const R: usize, const T: usize>(
    simd: S,
    w: [&[bf16]; R],
    mut sums: TileSums<S, R, T>,
    x: impl Fn(usize, usize) -> S::Elements,
    x_rest: impl Fn(usize) -> S::Elements,
) -> TileSums<S, R, T> {
    let len = w[0].len();
    assert!(w.iter().all(|row| row.len() == len));
    let num_steps = len / S::STEP;
    // SAFETY: every row has `len` elements, and each caller below asks for one of its whole steps.
    let weights = |step: usize, r: usize| unsafe { simd.load(w[r].as_ptr().add(step * S::STEP)) };
    // The shorter side of the tile waits in registers while the longer passes by.
    let mut held = [simd.load_partial(&[]); TILE_ROWS];
    for step in 0..num_steps {
        if R <= T {
            (0..R).for_each(|r| held[r] = weights(step, r));
            for t in 0..T {
                let token = x(step, t);
                (0..R).for_each(|r| sums[t][r] = simd.dot(sums[t][r], held[r], token));
            }
        } else {
            (0..T).for_each(|t| held[t] = x(step, t));
            for r in 0..R {
                let weights = weights(step, r);
                (0..T).for_each(|t| sums[t][r] = simd.dot(sums[t][r], weights, held[t]));
            }
        }
    }
    if num_steps * S::STEP < len {
        for r in 0..R {
            let weights = simd.load_partial(&w[r][num_steps * S::STEP..]);
            for t in 0..T {
                sums[t][r] = simd.dot(sums[t][r], weights, x_rest(t));
            }
        }
    }
    sums
}

/// Elements `k` of the first `N` rows.
#[inline(always)]
fn cut<'a, const N: usize>(rows: &[&'a [bf16]], k: Range<usize>) -> [&'a [bf16]; N] {
    let mut cut: [&[bf16]; N] = [&[]; N];
    for i in 0..N {
        cut[i] = &rows[i][k.clone()];
    }
    cut
}

#[inline(always)]
fn prefetch<S: Simd>(simd: S, row: &[bf16]) {
    row.iter().step_by(LINE).for_each(|element| simd.prefetch(element));
}
