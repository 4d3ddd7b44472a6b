//! Attention's scores: a chunk's keys lie 16 side by side, one in each lane, and meet one query after another, as the
//! rows of packed weights meet tokens. So a score depends on its two rows alone, bit for bit.

use half::bf16;

use super::CHUNK;
use super::softmax::HEADS;
use crate::simd::{LANE_ROWS, PAIR, RowPairs, Simd};

/// Lanes of a chunk's keys are in so many groups.
pub(super) const GROUPS: usize = CHUNK / LANE_ROWS;
/// Most queries of a tile.
const MAX_TILE: usize = 4;

/// `[query][position of the chunk]`
pub(super) type Scores = [[f32; CHUNK]; HEADS];
/// 16 keys side by side, pair by pair.
pub(super) type KeyLanes<'a> = &'a [RowPairs];

/// Computes `scores[q][k] = keys[k] · queries[q] · scale` for the heads that lie one after another in `queries`, and all
/// lanes of the chunk.
///
/// # Panics
/// If there are more than [`HEADS`] queries, or they and the keys have different lengths.
#[inline(always)]
pub(super) fn score<S: Simd>(
    simd: S,
    keys: [KeyLanes<'_>; GROUPS],
    queries: &[bf16],
    scale: f32,
    scores: &mut Scores,
) {
    let head_dim = PAIR * keys[0].len();
    assert!(keys.iter().all(|group| group.len() == keys[0].len()));
    assert!(queries.len().is_multiple_of(head_dim) && queries.len() <= HEADS * head_dim);
    let tile_len = S::PAIR_TOKENS.min(MAX_TILE);
    for (queries, scores) in queries.chunks(tile_len * head_dim).zip(scores.chunks_mut(tile_len)) {
        match queries.len() / head_dim {
            1 => score_tile::<S, 1>(simd, keys, queries, scale, scores),
            2 => score_tile::<S, 2>(simd, keys, queries, scale, scores),
            3 => score_tile::<S, 3>(simd, keys, queries, scale, scores),
            _ => score_tile::<S, MAX_TILE>(simd, keys, queries, scale, scores),
        }
    }
}

/// The scores of `Q` queries.
#[inline(always)]
fn score_tile<S: Simd, const Q: usize>(
    simd: S,
    keys: [KeyLanes<'_>; GROUPS],
    queries: &[bf16],
    scale: f32,
    scores: &mut [[f32; CHUNK]],
) {
    simd.call(
        #[inline(always)]
        || {
            let num_pairs = keys[0].len();
            let queries = &queries.as_chunks::<PAIR>().0[..Q * num_pairs];
            let keys = [&keys[0][..num_pairs], &keys[1][..num_pairs]];
            let mut sums = [[simd.zero(); GROUPS]; Q];
            for pair in 0..num_pairs {
                let lanes = [simd.pairs(&keys[0][pair]), simd.pairs(&keys[1][pair])];
                for q in 0..Q {
                    for group in 0..GROUPS {
                        let query = queries[q * num_pairs + pair];
                        sums[q][group] = simd.dot_pairs(sums[q][group], lanes[group], query);
                    }
                }
            }
            for (scores, sums) in scores.iter_mut().zip(sums) {
                *scores = [0.0; CHUNK];
                for (scores, sum) in scores.as_chunks_mut::<LANE_ROWS>().0.iter_mut().zip(sums) {
                    simd.add_scaled(scores, sum, scale);
                }
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use backend::dummy_value;

    use super::*;
    use crate::isa::{Isa, Kernel};

    struct Score<'a> {
        keys: [KeyLanes<'a>; GROUPS],
        queries: &'a [bf16],
        scores: &'a mut Scores,
    }

    impl Kernel for Score<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            score(simd, self.keys, self.queries, 0.5, self.scores);
        }
    }

    fn rows(seed: u64, count: usize, len: usize) -> Vec<Vec<bf16>> {
        let row = |row| (0..len as u64).map(|i| dummy_value(seed + row, i, 0.1, 1.0)).collect();
        (0..count as u64).map(row).collect()
    }

    /// As the kernel specifies it: pair by pair, first the odd feature.
    fn expected(key: &[bf16], query: &[bf16]) -> f32 {
        let pairs = key.chunks(PAIR).zip(query.chunks(PAIR));
        let products = pairs.flat_map(|(key, query)| key.iter().zip(query).rev());
        0.5 * products.fold(0.0, |sum, (k, q)| sum + k.to_f32() * q.to_f32())
    }

    #[test]
    fn scores_have_the_specified_bits_on_every_instruction_set() {
        for head_dim in [2, 6, 32, 64, 80, 128, 256] {
            let (keys, queries) = (rows(1, CHUNK, head_dim), rows(100, HEADS, head_dim));
            let mut lanes = vec![RowPairs::default(); GROUPS * head_dim / PAIR];
            for (k, key) in keys.iter().enumerate() {
                for (pair, features) in key.as_chunks::<PAIR>().0.iter().enumerate() {
                    lanes[k / LANE_ROWS * (head_dim / PAIR) + pair][k % LANE_ROWS] = *features;
                }
            }
            let (first, second) = lanes.split_at(head_dim / PAIR);
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
                for num_queries in 1..=HEADS {
                    let mut scores = [[f32::NAN; CHUNK]; HEADS];
                    let flat = queries[..num_queries].concat();
                    isa.run(Score { keys: [first, second], queries: &flat, scores: &mut scores });
                    for (q, (query, scores)) in queries.iter().zip(&scores).enumerate().take(num_queries) {
                        for (k, (key, score)) in keys.iter().zip(scores).enumerate() {
                            let case = format!("{} {head_dim} features, key {k}, query {q}", isa.name());
                            assert_eq!(score.to_bits(), expected(key, query).to_bits(), "{case}");
                        }
                    }
                }
            }
        }
    }
}
