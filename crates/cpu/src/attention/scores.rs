//! Attention's scores: dot products of a chunk's keys with a few query heads, both rows of one length.
//!
//! Tiles of keys × queries keep their accumulators in registers while they walk along the rows:
//!
//! ```text
//!            q0  q1        every pair of a key and a query has its own accumulator; tiles only say which pairs walk
//!        k0  a00 a01       together
//!        k1  a10 a11
//!        k2  a20 a21       Σ over lanes  Σ over steps   (element products)
//!        k3  a30 a31
//! ```
//!
//! So a score depends on its two rows and the instruction set alone, bit for bit: not on the tile that it fell in, nor
//! on the rows beside it.

use half::bf16;

use super::CHUNK;
use super::softmax::HEADS;
use crate::simd::Simd;

/// Most keys, and most queries, of a tile.
const MAX_TILE: usize = 4;

/// `[query][key]`
pub(super) type Scores = [[f32; CHUNK]; HEADS];
/// The keys, or the values, of a chunk.
pub(super) type CachedRows<'a> = RowList<'a, CHUNK>;
/// The queries that are computed together.
pub(super) type Queries<'a> = RowList<'a, HEADS>;

/// Computes `scores[q][k] = keys[k] · queries[q]` for all rows given.
///
/// # Panics
/// If the rows are not all of one length.
#[inline(always)]
pub(super) fn score<S: Simd>(simd: S, keys: &CachedRows<'_>, queries: &Queries<'_>, scores: &mut Scores) {
    let len = keys.first().map_or(0, |row| row.len());
    assert!(
        keys.iter().chain(queries.iter()).all(|row| row.len() == len),
        "keys and queries have one length"
    );
    for (queries, scores) in queries.chunks(MAX_TILE).zip(scores.chunks_mut(MAX_TILE)) {
        match (queries.len(), S::TILE_ROWS) {
            (1, _) => score_tiles::<S, 4, 1>(simd, keys, queries, scores),
            (2, _) => score_tiles::<S, 4, 2>(simd, keys, queries, scores),
            (3, 4) => score_tiles::<S, 4, 3>(simd, keys, queries, scores),
            (3, _) => score_tiles::<S, 2, 3>(simd, keys, queries, scores),
            (_, 4) => score_tiles::<S, 4, 4>(simd, keys, queries, scores),
            (_, _) => score_tiles::<S, 2, 4>(simd, keys, queries, scores),
        }
    }
}

/// Scores exactly `Q` queries, in tiles of `K` keys.
#[inline(always)]
fn score_tiles<S: Simd, const K: usize, const Q: usize>(
    simd: S,
    keys: &[&[bf16]],
    queries: &[&[bf16]],
    scores: &mut [[f32; CHUNK]],
) {
    let queries: &[_; Q] = queries.try_into().expect("Q queries");
    let (tiles, rest) = keys.as_chunks::<K>();
    for (tile, keys) in tiles.iter().enumerate() {
        score_tile(simd, keys, queries, K * tile, scores);
    }
    for (index, key) in rest.iter().enumerate() {
        score_tile(simd, &[*key], queries, K * tiles.len() + index, scores);
    }
}

/// Scores a tile whose keys are those from number `first` on.
#[inline(always)]
fn score_tile<S: Simd, const K: usize, const Q: usize>(
    simd: S,
    keys: &[&[bf16]; K],
    queries: &[&[bf16]; Q],
    first: usize,
    scores: &mut [[f32; CHUNK]],
) {
    simd.call(
        #[inline(always)]
        || {
            let tile = walk(simd, keys, queries);
            for (scores, tile) in scores.iter_mut().zip(&tile) {
                scores[first..].iter_mut().zip(tile).for_each(|(score, &pair)| *score = simd.sum(pair));
            }
        },
    );
}

/// Walks a tile along its rows; the accumulators, `[query][key]`.
#[inline(always)]
fn walk<S: Simd, const K: usize, const Q: usize>(
    simd: S,
    keys: &[&[bf16]; K],
    queries: &[&[bf16]; Q],
) -> [[S::Accumulator; K]; Q] {
    const { assert!(K <= MAX_TILE && Q <= MAX_TILE) }
    let len = keys[0].len();
    assert!(keys.iter().chain(queries).all(|row| row.len() == len));
    let num_steps = len / S::STEP;
    // SAFETY: every row has `len` elements, and each call below asks for one of its `num_steps` whole steps.
    let load = |row: &[bf16], step: usize| unsafe { simd.load(row.as_ptr().add(step * S::STEP)) };
    let mut tile = [[simd.zero(); K]; Q];
    // The shorter side of the tile waits in registers while the longer passes by.
    let mut held = [simd.load_partial(&[]); MAX_TILE];
    for step in 0..num_steps {
        if K <= Q {
            (0..K).for_each(|k| held[k] = load(keys[k], step));
            for q in 0..Q {
                let query = load(queries[q], step);
                (0..K).for_each(|k| tile[q][k] = simd.dot(tile[q][k], held[k], query));
            }
        } else {
            (0..Q).for_each(|q| held[q] = load(queries[q], step));
            for k in 0..K {
                let key = load(keys[k], step);
                (0..Q).for_each(|q| tile[q][k] = simd.dot(tile[q][k], key, held[q]));
            }
        }
    }
    let rest = num_steps * S::STEP;
    if rest < len {
        for k in 0..K {
            let key = simd.load_partial(&keys[k][rest..]);
            (0..Q)
                .for_each(|q| tile[q][k] = simd.dot(tile[q][k], key, simd.load_partial(&queries[q][rest..])));
        }
    }
    tile
}

/// Up to `N` rows, borrowed from wherever they lie.
#[derive(Clone, Copy)]
pub(super) struct RowList<'a, const N: usize> {
    rows: [&'a [bf16]; N],
    len: usize,
}

impl<'a, const N: usize> RowList<'a, N> {
    /// Collects rows.
    ///
    /// # Panics
    /// If there are more than `N`.
    #[inline(always)]
    pub(super) fn new(rows: impl IntoIterator<Item = &'a [bf16]>) -> Self {
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

    struct Score<'a> {
        keys: CachedRows<'a>,
        queries: Queries<'a>,
        scores: &'a mut Scores,
    }

    impl Kernel for Score<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            score(simd, &self.keys, &self.queries, self.scores);
        }
    }

    fn run(isa: Isa, keys: &[Vec<bf16>], queries: &[Vec<bf16>]) -> Scores {
        let mut scores = [[f32::NAN; CHUNK]; HEADS];
        let keys = CachedRows::new(keys.iter().map(Vec::as_slice));
        let queries = Queries::new(queries.iter().map(Vec::as_slice));
        isa.run(Score { keys, queries, scores: &mut scores });
        scores
    }

    fn rows(seed: usize, count: usize, len: usize) -> Vec<Vec<bf16>> {
        let row = |row| (0..len as u64).map(|i| dummy_value((seed + row) as u64, i, 0.1, 1.0)).collect();
        (0..count).map(row).collect()
    }

    fn exact(key: &[bf16], query: &[bf16]) -> f64 {
        key.iter().zip(query).map(|(k, q)| k.to_f64() * q.to_f64()).sum()
    }

    /// Rows of all lengths in tiles of all shapes: close to f64, and the bits of the pair alone.
    #[test]
    fn a_score_has_the_same_bits_in_every_tile() {
        for len in [1, 7, 8, 9, 16, 31, 32, 33, 64, 100, 128, 250] {
            let (keys, queries) = (rows(len, CHUNK, len), rows(len + 100, HEADS, len));
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
                let alone = |k: usize, q: usize| run(isa, &keys[k..=k], &queries[q..=q])[0][0];
                let expected: Vec<Vec<f32>> =
                    (0..HEADS).map(|q| (0..CHUNK).map(|k| alone(k, q)).collect()).collect();
                for num_keys in (1..=9).chain([17, CHUNK]) {
                    for num_queries in 1..=HEADS {
                        let scores = run(isa, &keys[..num_keys], &queries[..num_queries]);
                        for (q, (scores, expected)) in
                            scores.iter().zip(&expected).enumerate().take(num_queries)
                        {
                            let case = format!("{} {num_keys} x {num_queries}, length {len}", isa.name());
                            assert_eq!(scores[..num_keys], expected[..num_keys], "{case}, query {q}");
                        }
                    }
                }
                for (q, scores) in expected.iter().enumerate() {
                    for (k, score) in scores.iter().enumerate() {
                        let error = (f64::from(*score) - exact(&keys[k], &queries[q])).abs();
                        assert!(error < 1e-5 * len as f64, "{} length {len}: {error}", isa.name());
                    }
                }
            }
        }
    }
}
