//! Dot products of up to 32 weight rows with up to 8 activation rows: the one inner loop of all matrix
//! products and of attention's scores.
//!
//! Tiles of weight rows × tokens keep their accumulators in registers while they walk along K:
//!
//! ```text
//!            x0  x1        every (weight row, token) pair has exactly one accumulator, which walks K from
//!        w0  a00 a01       the start to the end; tiles only say which pairs walk together
//!        w1  a10 a11
//!        w2  a20 a21       K in blocks ──► a block of all activation rows stays in the L1 cache while the
//!        w3  a30 a31       weight rows stream past; accumulators wait in between, unrounded
//! ```
//!
//! So a pair's result depends on the two rows and the instruction set alone, bit for bit: not on the tile that
//! it fell in, nor on the rows beside it. This file does not know where rows come from or where sums go.

use half::bf16;

use crate::simd::Simd;

/// Most weight rows of one call.
pub(crate) const MAX_ROWS: usize = 32;
/// Most activation rows of one call.
pub(crate) const MAX_TOKENS: usize = 8;
/// Weight rows of a full tile.
pub(crate) const TILE_ROWS: usize = 4;
/// Elements of K after which a product with many tokens turns to its next tile; a multiple of every `STEP`.
const K_BLOCK: usize = 512;

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
    // With few tokens the weights come from memory, and each row is better read in one go.
    let k_block = if x.len() <= S::TILE_TOKENS { len } else { K_BLOCK };
    let mut accumulators = [[simd.zero(); MAX_ROWS]; MAX_TOKENS];
    let mut start = 0;
    while start < len {
        let k = start..len.min(start + k_block);
        match S::TILE_TOKENS {
            4 => tiles::<S, 4>(simd, w, x, k.clone(), &mut accumulators),
            _ => tiles::<S, 2>(simd, w, x, k.clone(), &mut accumulators),
        }
        start = k.end;
    }
    for (sums, accumulators) in sums.iter_mut().zip(&accumulators[..x.len()]) {
        for (sum, &accumulator) in sums.iter_mut().zip(&accumulators[..w.len()]) {
            *sum = simd.sum(accumulator);
        }
    }
}

/// The pairs of one call, `[token][weight row]`.
type Accumulators<S> = [[<S as Simd>::Accumulator; MAX_ROWS]; MAX_TOKENS];

/// Walks all pairs along elements `k`, in tiles of [`TILE_ROWS`] × `T` and single rows and tokens at the edges.
#[inline(always)]
fn tiles<S: Simd, const T: usize>(
    simd: S,
    w: &[&[bf16]],
    x: &[&[bf16]],
    k: std::ops::Range<usize>,
    accumulators: &mut Accumulators<S>,
) {
    let mut row = 0;
    while row < w.len() {
        let full = w.len() - row >= TILE_ROWS;
        let mut token = 0;
        while token < x.len() {
            let (w, x) = (&w[row..], &x[token..]);
            let wide = x.len() >= T;
            let corner = &mut accumulators[token..];
            match (full, wide) {
                (true, true) => tile::<S, TILE_ROWS, T>(simd, w, x, k.clone(), corner, row),
                (true, false) => tile::<S, TILE_ROWS, 1>(simd, w, x, k.clone(), corner, row),
                (false, true) => tile::<S, 1, T>(simd, w, x, k.clone(), corner, row),
                (false, false) => tile::<S, 1, 1>(simd, w, x, k.clone(), corner, row),
            }
            token += if wide { T } else { 1 };
        }
        row += if full { TILE_ROWS } else { 1 };
    }
}

/// Walks the pairs of the first `R` rows of `w` and the first `T` of `x` along elements `k`.
#[inline(always)]
fn tile<S: Simd, const R: usize, const T: usize>(
    simd: S,
    w: &[&[bf16]],
    x: &[&[bf16]],
    k: std::ops::Range<usize>,
    accumulators: &mut [[S::Accumulator; MAX_ROWS]],
    first_row: usize,
) {
    let w: [&[bf16]; R] = std::array::from_fn(|r| &w[r][k.clone()]);
    let x: [&[bf16]; T] = std::array::from_fn(|t| &x[t][k.clone()]);
    let mut sums: [[S::Accumulator; R]; T] =
        std::array::from_fn(|t| std::array::from_fn(|r| accumulators[t][first_row + r]));

    let whole = k.len() - k.len() % S::STEP;
    let mut i = 0;
    while i < whole {
        // SAFETY: all rows were cut to `k.len()` elements above, and `i + STEP <= whole <= k.len()`.
        let load = |row: &[bf16]| unsafe { simd.load(row.as_ptr().add(i)) };
        let x = x.map(load);
        for r in 0..R {
            let w = load(w[r]);
            for t in 0..T {
                sums[t][r] = simd.dot(sums[t][r], w, x[t]);
            }
        }
        i += S::STEP;
    }
    if whole < k.len() {
        let x = x.map(|x| simd.load_partial(&x[whole..]));
        for r in 0..R {
            let w = simd.load_partial(&w[r][whole..]);
            for t in 0..T {
                sums[t][r] = simd.dot(sums[t][r], w, x[t]);
            }
        }
    }

    for t in 0..T {
        accumulators[t][first_row..][..R].copy_from_slice(&sums[t]);
    }
}
