//! Attention's scores by vectors: a chunk's keys lie 16 side by side, one in each lane, and meet one query after another,
//! as the rows of packed weights meet tokens. So a score depends on its two rows alone, bit for bit.

use super::{CHUNK, QUERIES, Query};
use crate::simd::{LANE_ROWS, PAIR, RowPairs, Simd};

/// Lanes of a chunk's keys are in so many groups.
pub(super) const GROUPS: usize = CHUNK / LANE_ROWS;
/// Most queries whose scores are computed together.
const MAX_TILE: usize = 4;

/// `[query][position of the chunk]`
pub(super) type Scores = [[f32; CHUNK]; QUERIES];
/// 16 keys side by side, pair by pair.
pub(super) type KeyLanes<'a> = &'a [RowPairs];

/// Computes `scores[q][k] = keys[k] · queries[q]` for heads of `head_dim` features and all lanes of the chunk.
///
/// # Panics
/// If there are not as many scores as queries, or the keys have another length.
#[inline(always)]
pub(super) fn score<S: Simd>(
    simd: S,
    keys: [KeyLanes<'_>; GROUPS],
    head_dim: usize,
    queries: &[Query],
    scores: &mut [[f32; CHUNK]],
) {
    assert!(keys.iter().all(|group| group.len() == head_dim / PAIR) && queries.len() == scores.len());
    let tile_len = S::PAIR_TOKENS.min(MAX_TILE);
    for (queries, scores) in queries.chunks(tile_len).zip(scores.chunks_mut(tile_len)) {
        match queries.len() {
            1 => score_tile::<S, 1>(simd, keys, queries, scores),
            2 => score_tile::<S, 2>(simd, keys, queries, scores),
            3 => score_tile::<S, 3>(simd, keys, queries, scores),
            _ => score_tile::<S, MAX_TILE>(simd, keys, queries, scores),
        }
    }
}

/// The scores of `Q` queries.
#[inline(always)]
fn score_tile<S: Simd, const Q: usize>(
    simd: S,
    keys: [KeyLanes<'_>; GROUPS],
    queries: &[Query],
    scores: &mut [[f32; CHUNK]],
) {
    simd.call(
        #[inline(always)]
        || {
            let queries = queries.first_chunk::<Q>().expect("Q queries");
            let mut sums = [[simd.zero(); GROUPS]; Q];
            for (pair, (lower, upper)) in keys[0].iter().zip(keys[1]).enumerate() {
                let lanes = [simd.pairs(lower), simd.pairs(upper)];
                for q in 0..Q {
                    for group in 0..GROUPS {
                        let query = queries[q].as_chunks::<PAIR>().0[pair];
                        sums[q][group] = simd.dot_pairs(sums[q][group], lanes[group], query);
                    }
                }
            }
            for (scores, sums) in scores.iter_mut().zip(sums) {
                *scores = [0.0; CHUNK];
                for (scores, sum) in scores.as_chunks_mut::<LANE_ROWS>().0.iter_mut().zip(sums) {
                    simd.add_scaled(scores, sum, 1.0);
                }
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use backend::dummy_value;
    use half::bf16;

    use super::*;
    use crate::isa::{Isa, Kernel};
    use crate::kv::MAX_HEAD_DIM;

    struct Score<'a> {
        keys: [KeyLanes<'a>; GROUPS],
        head_dim: usize,
        queries: &'a [Query],
        scores: &'a mut [[f32; CHUNK]],
    }

    impl Kernel for Score<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            score(simd, self.keys, self.head_dim, self.queries, self.scores);
        }
    }

    fn rows(seed: u64, count: usize, len: usize) -> Vec<Query> {
        let features = |row| (0..len as u64).map(move |i| dummy_value(seed + row, i, 0.1, 1.0));
        let mut rows = vec![[bf16::ZERO; MAX_HEAD_DIM]; count];
        for (row, query) in (0..).zip(&mut rows) {
            query.iter_mut().zip(features(row)).for_each(|(x, feature)| *x = feature);
        }
        rows
    }

    /// As the kernel specifies it: pair by pair, first the odd feature.
    fn expected(key: &[bf16], query: &[bf16]) -> f32 {
        let pairs = key.chunks(PAIR).zip(query.chunks(PAIR));
        let products = pairs.flat_map(|(key, query)| key.iter().zip(query).rev());
        products.fold(0.0, |sum, (k, q)| sum + k.to_f32() * q.to_f32())
    }

    #[test]
    fn scores_have_the_specified_bits_on_every_instruction_set() {
        for head_dim in [2, 6, 32, 64, 80, 128, 256] {
            let (keys, queries) = (rows(1, CHUNK, head_dim), rows(100, QUERIES, head_dim));
            let mut lanes = vec![RowPairs::default(); GROUPS * head_dim / PAIR];
            for (k, key) in keys.iter().enumerate() {
                for (pair, features) in key[..head_dim].as_chunks::<PAIR>().0.iter().enumerate() {
                    lanes[k / LANE_ROWS * (head_dim / PAIR) + pair][k % LANE_ROWS] = *features;
                }
            }
            let (first, second) = lanes.split_at(head_dim / PAIR);
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
                for num_queries in 1..=QUERIES {
                    let mut scores = [[f32::NAN; CHUNK]; QUERIES];
                    let (queries, scores) = (&queries[..num_queries], &mut scores[..num_queries]);
                    isa.run(Score { keys: [first, second], head_dim, queries, scores });
                    for (q, (query, scores)) in queries.iter().zip(scores).enumerate() {
                        for (k, (key, score)) in keys.iter().zip(scores).enumerate() {
                            let case = format!("{} {head_dim} features, key {k}, query {q}", isa.name());
                            let expected = expected(&key[..head_dim], &query[..head_dim]);
                            assert_eq!(score.to_bits(), expected.to_bits(), "{case}");
                        }
                    }
                }
            }
        }
    }
}
