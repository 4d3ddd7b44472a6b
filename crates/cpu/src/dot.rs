//! Dot products of up to 32 weight rows with activation rows: the one inner loop of all bf16 matrix products and of
//! attention's scores.
//!
//! Tiles of weight rows × tokens keep their accumulators in registers while they walk along K:
//!
//! ```text
//!            x0  x1        every (weight row, token) pair has its own accumulator, which walks a span of K from
//!        w0  a00 a01       the start to the end; tiles only say which pairs walk together
//!        w1  a10 a11
//!        w2  a20 a21       Σ over spans of 2048 elements  Σ over lanes  Σ over steps   (element products)
//!        w3  a30 a31
//! ```
//!
//! So a pair's result depends on the two rows and the instruction set alone, bit for bit: not on the tile that
//! it fell in, nor on the rows beside it. With few tokens memory is the limit and weights are [`streamed`]; with
//! several the product is [`blocked`] for the caches; with many arithmetic is the limit, and tokens lie in [`strips`].
//! This file does not know where rows come from or where sums go.

mod blocked;
mod streamed;
mod strips;
mod tile;

use std::ops::Range;

use half::bf16;

use crate::simd::Simd;
pub(crate) use strips::{Strips, dot_strips, make_strip, strip_len};

/// Most weight rows of one call.
pub(crate) const MAX_ROWS: usize = 32;
/// Most activation rows of one call of [`dot_rows`].
pub(crate) const MAX_TOKENS: usize = 8;
/// Most weight rows, and most tokens, of a tile.
pub(crate) const MAX_TILE: usize = 4;
/// Elements after which the lanes of an accumulator are added up.
const SPAN: usize = 2048;

/// The sums of one call, `[token][weight row]`.
pub(crate) type Sums = [[f32; MAX_ROWS]; MAX_TOKENS];

/// Weight rows of one call.
pub(crate) type WeightRows<'a> = RowList<'a, MAX_ROWS>;
/// Activation rows of one call.
pub(crate) type TokenRows<'a> = RowList<'a, MAX_TOKENS>;

/// The spans of rows with `len` elements.
#[inline(always)]
fn spans(len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(SPAN).map(move |start| start..len.min(start + SPAN))
}

/// Computes `sums[t][r] = w[r] · x[t]` for all rows given.
///
/// # Panics
/// If the rows are not all of one length.
#[inline(always)]
pub(crate) fn dot_rows<S: Simd>(
    simd: S,
    w: &WeightRows<'_>,
    x: &TokenRows<'_>,
    sums: &mut [[f32; MAX_ROWS]],
) {
    let len = w.first().map_or(0, |row| row.len());
    assert!(w.iter().chain(x.iter()).all(|row| row.len() == len), "rows of a product have one length");
    sums[..x.len()].iter_mut().for_each(|sums| sums[..w.len()].fill(0.0));
    match (x.len(), S::TILE_ROWS) {
        (0, _) => {}
        (1, _) => streamed::dot_rows::<S, 4, 1>(simd, w, x, sums),
        (2, _) => streamed::dot_rows::<S, 4, 2>(simd, w, x, sums),
        (3, 4) => streamed::dot_rows::<S, 4, 3>(simd, w, x, sums),
        (3, _) => streamed::dot_rows::<S, 2, 3>(simd, w, x, sums),
        (4, 4) => streamed::dot_rows::<S, 4, 4>(simd, w, x, sums),
        (4, _) => streamed::dot_rows::<S, 2, 4>(simd, w, x, sums),
        (_, rows) => {
            for k in spans(len) {
                let w = WeightRows::new(w.iter().map(|row| &row[k.clone()]));
                let x = TokenRows::new(x.iter().map(|row| &row[k.clone()]));
                match rows {
                    4 => blocked::dot_rows::<S, 4>(simd, &w, &x, sums),
                    _ => blocked::dot_rows::<S, 2>(simd, &w, &x, sums),
                }
            }
        }
    }
}

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

#[cfg(test)]
mod tests {
    use backend::dummy_value;

    use super::*;
    use crate::isa::{Isa, Kernel};
    use crate::simd::{RowPairs, STRIP_ROWS};

    struct DotRows<'a> {
        w: WeightRows<'a>,
        x: TokenRows<'a>,
        sums: &'a mut Sums,
    }

    impl Kernel for DotRows<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            dot_rows(simd, &self.w, &self.x, self.sums);
        }
    }

    fn run(isa: Isa, w: &[Vec<bf16>], x: &[Vec<bf16>]) -> Sums {
        let mut sums = [[f32::NAN; MAX_ROWS]; MAX_TOKENS];
        let w = WeightRows::new(w.iter().map(Vec::as_slice));
        let x = TokenRows::new(x.iter().map(Vec::as_slice));
        isa.run(DotRows { w, x, sums: &mut sums });
        sums
    }

    struct DotStrips<'a> {
        w: WeightRows<'a>,
        x: &'a [Vec<bf16>],
        sums: &'a mut [[f32; MAX_ROWS]],
    }

    impl Kernel for DotStrips<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            let len = self.x[0].len();
            let mut strips = vec![RowPairs::default(); strip_len(len) * self.x.len().div_ceil(STRIP_ROWS)];
            for (x, strip) in self.x.chunks(STRIP_ROWS).zip(strips.chunks_mut(strip_len(len))) {
                make_strip(simd, &RowList::<STRIP_ROWS>::new(x.iter().map(Vec::as_slice)), strip);
            }
            dot_strips(simd, &self.w, Strips::new(&strips, len), &mut Vec::new(), self.sums);
        }
    }

    fn run_strips(isa: Isa, w: &[Vec<bf16>], x: &[Vec<bf16>]) -> Vec<[f32; MAX_ROWS]> {
        let mut sums = vec![[0.0; MAX_ROWS]; x.len()];
        isa.run(DotStrips { w: WeightRows::new(w.iter().map(Vec::as_slice)), x, sums: &mut sums });
        sums
    }

    fn rows(seed: usize, count: usize, len: usize) -> Vec<Vec<bf16>> {
        let row = |row| (0..len as u64).map(|i| dummy_value((seed + row) as u64, i, 0.1, 1.0)).collect();
        (0..count).map(row).collect()
    }

    fn exact(w: &[bf16], x: &[bf16]) -> f64 {
        w.iter().zip(x).map(|(w, x)| w.to_f64() * x.to_f64()).sum()
    }

    fn available() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// Rows of all lengths in tiles of all shapes, as they lie and in strips: close to f64, and the bits of the pair
    /// alone.
    #[test]
    fn a_pair_has_the_same_bits_in_every_tile() {
        const NUM_TOKENS: usize = 70;
        for len in [1, 7, 8, 9, 16, 31, 32, 33, 100, 511, 512, 513, 1024, 1337, 2048, 2050, 4111] {
            let (w, x) = (rows(len, MAX_ROWS, len), rows(len + 100, NUM_TOKENS, len));
            for isa in available() {
                let alone = |r: usize, t: usize| run(isa, &w[r..=r], &x[t..=t])[0][0];
                let expected: Vec<Vec<f32>> =
                    (0..NUM_TOKENS).map(|t| (0..MAX_ROWS).map(|r| alone(r, t)).collect()).collect();
                let check = |sums: &[[f32; MAX_ROWS]], num_rows: usize, num_tokens: usize| {
                    for (t, (sums, expected)) in sums.iter().zip(&expected).enumerate().take(num_tokens) {
                        let case = format!("{} {num_rows} x {num_tokens}, length {len}", isa.name());
                        assert_eq!(sums[..num_rows], expected[..num_rows], "{case}, token {t}");
                    }
                };
                for num_rows in (1..=9).chain([17, MAX_ROWS]) {
                    for num_tokens in 1..=MAX_TOKENS {
                        check(&run(isa, &w[..num_rows], &x[..num_tokens]), num_rows, num_tokens);
                    }
                    for num_tokens in [1, 3, 5, 8, 9, 16, 17, 31, 33, 48, 49, NUM_TOKENS] {
                        let sums = run_strips(isa, &w[..num_rows], &x[..num_tokens]);
                        check(&sums, num_rows, num_tokens);
                    }
                }
                for (t, sums) in expected.iter().enumerate() {
                    for (r, sum) in sums.iter().enumerate() {
                        let error = (f64::from(*sum) - exact(&w[r], &x[t])).abs();
                        assert!(error < 1e-5 * len as f64, "{} length {len}: {error}", isa.name());
                    }
                }
            }
        }
    }

    /// The model's order of additions is the documented one of `vdpbf16ps`, so the bits should agree; the
    /// promise is only that the values do.
    #[test]
    fn avx512_agrees_with_its_software_model() {
        if !Isa::Avx512Bf16.is_available() {
            println!("skipped: this machine has no {}", Isa::Avx512Bf16.name());
            return;
        }
        let (w, x) = (rows(1, MAX_ROWS, 1000), rows(2, MAX_TOKENS, 1000));
        let [model, real] = [Isa::Portable, Isa::Avx512Bf16].map(|isa| run(isa, &w, &x));
        let pairs = || model.iter().flatten().zip(real.iter().flatten());
        assert!(pairs().all(|(model, real)| (model - real).abs() < 1e-3), "{model:?} is not {real:?}");
        println!("{} of {} sums agree to the bit", pairs().filter(|(a, b)| a == b).count(), pairs().count());
    }
}
