//! Attention on a matrix unit: a chunk's keys and values as panels of weights, which meet the queries of a tile, and
//! their weights, as tokens.
//!
//! ```text
//! keys      [16 positions][pair of features][position]     as they lie in the cache; rows of weights are positions
//! values    [16 features][pair of positions][feature]      put together here; rows of weights are features
//! ```
//!
//! Sums have the order of [`Tiles::add_pairs`]: of 32 features, or of a chunk's positions, at a time. A weight is the sum
//! of two numbers in bf16, as one alone misses the tolerance of the conformance tests; all first numbers of a chunk are
//! multiplied before the second.

use std::{iter, mem};

use half::bf16;

use super::scores::{GROUPS, KeyLanes};
use super::softmax::{FEATURES, Softmax, Values, Weights};
use super::{CHUNK, QUERIES, Query};
use crate::kv::MAX_HEAD_DIM;
use crate::numbers::Element;
use crate::simd::{HalfPairs, LANE_ROWS, PAIR, RowPairs, Simd, TILE_TOKENS, TileUse, Tiles};

const _: () = assert!(GROUPS == 2 && CHUNK == 2 * LANE_ROWS && FEATURES == CHUNK);

/// Room for a chunk.
pub(super) struct Panels {
    values: [[HalfPairs; 2]; MAX_HEAD_DIM / FEATURES],
    weights: [[[bf16; CHUNK]; PARTS]; QUERIES],
    products: [[[f32; FEATURES]; QUERIES]; 2],
}

/// Numbers in bf16 whose sum is a weight.
const PARTS: usize = 2;

/// The tiles for so many queries; `None` if the machine has none, or heads of so many features do not fill them.
#[inline(always)]
pub(super) fn tiles<S: Simd>(simd: S, head_dim: usize, num_queries: usize) -> Option<S::Tiles> {
    match head_dim.is_multiple_of(FEATURES) {
        true => simd.tiles(TileUse::Pairs, num_queries.min(TILE_TOKENS)),
        false => None,
    }
}

/// The first query of each tile of queries. The last tile has as many as the others, of which it shares some with the
/// one before; they are computed twice, alike.
#[inline(always)]
fn firsts<T: Tiles>(tiles: &T, num_queries: usize) -> impl Iterator<Item = usize> + use<T> {
    let num_tokens = tiles.num_tokens();
    (0..num_queries).step_by(num_tokens).map(move |first| first.min(num_queries - num_tokens))
}

impl Panels {
    pub(super) fn new() -> Self {
        Self {
            values: [[[RowPairs::default(); LANE_ROWS]; 2]; MAX_HEAD_DIM / FEATURES],
            weights: [[[bf16::ZERO; CHUNK]; PARTS]; QUERIES],
            products: [[[0.0; FEATURES]; QUERIES]; 2],
        }
    }

    /// As [`score`](super::scores::score). `meanwhile` is called now and then.
    #[inline(always)]
    pub(super) fn score<T: Tiles>(
        tiles: &T,
        keys: [KeyLanes<'_>; GROUPS],
        queries: &[Query],
        scores: &mut [[f32; CHUNK]],
        mut meanwhile: impl FnMut(),
    ) {
        let [lower, upper] = keys.map(|group| group.as_chunks::<LANE_ROWS>().0);
        for first in firsts(tiles, queries.len()) {
            let keys = lower.iter().zip(upper).map(|(lower, upper)| [lower, upper]);
            tiles.dot_pairs::<_, 1>(keys, &queries[first..], &mut meanwhile, &mut scores[first..]);
        }
    }

    /// As [`Softmax::add_values`]. `meanwhile` is called now and then.
    #[inline(always)]
    pub(super) fn add_values<T: Tiles>(
        &mut self,
        tiles: &T,
        weights: &Weights<'_>,
        first_lane: usize,
        values: &Values<'_>,
        softmax: &mut Softmax,
        mut meanwhile: impl FnMut(),
    ) {
        let head_dim = values[0].len();
        let parts = &mut self.weights[..weights.of_chunk.len()];
        split(weights.of_chunk, parts);
        let panels = &mut self.values[..head_dim / FEATURES];
        interleave(values, first_lane, panels, &mut meanwhile);
        // What the matrix unit stores can be loaded a while later: meanwhile it multiplies the next features.
        let [products, previous_products] = &mut self.products;
        let (mut products, mut previous_products) = (products, previous_products);
        let mut previous_sums = None;
        for ([lower, upper], sums) in panels.iter().zip(softmax.blocks(head_dim)) {
            for first in firsts(tiles, parts.len()) {
                let values = iter::once([lower, upper]);
                tiles.dot_pairs::<_, PARTS>(values, &parts[first..], &mut meanwhile, &mut products[first..]);
            }
            mem::swap(&mut products, &mut previous_products);
            if let Some(sums) = previous_sums.replace(sums) {
                add(sums, products, weights);
            }
        }
        if let Some(sums) = previous_sums {
            add(sums, previous_products, weights);
        }
    }
}

/// Splits weights into numbers in bf16.
#[inline(always)]
fn split(weights: &[[f32; CHUNK]], parts: &mut [[[bf16; CHUNK]; PARTS]]) {
    // Cut off, not rounded: the second number has what the first lacks.
    let upper_half = |x: f32| bf16::from_bits((x.to_bits() >> 16) as u16);
    for ([first, second], weights) in parts.iter_mut().zip(weights) {
        for ((first, second), &weight) in first.iter_mut().zip(second).zip(weights) {
            *first = upper_half(weight);
            *second = upper_half(weight - Element::to_f32(*first));
        }
    }
}

/// Pairs the values of neighbouring positions; the first value's is `first_lane`.
#[inline(always)]
fn interleave(
    values: &Values<'_>,
    first_lane: usize,
    panels: &mut [[HalfPairs; 2]],
    mut meanwhile: impl FnMut(),
) {
    // What lies in other lanes weighs nothing, but might not be finite.
    const NOTHING: &[bf16] = &[bf16::ZERO; MAX_HEAD_DIM];
    let value = |lane: usize| match lane.checked_sub(first_lane) {
        Some(index) if index < values.len() => values[index],
        _ => NOTHING,
    };
    for pair in 0..CHUNK / PAIR {
        meanwhile();
        let [even, odd] = [value(PAIR * pair), value(PAIR * pair + 1)];
        let features = even.as_chunks::<LANE_ROWS>().0.iter().zip(odd.as_chunks::<LANE_ROWS>().0);
        for (half, (even, odd)) in panels.as_flattened_mut().iter_mut().zip(features) {
            // As integers, for which compilers find the vector instructions.
            let mut pairs = [0; LANE_ROWS];
            for (pair, (even, odd)) in pairs.iter_mut().zip(even.iter().zip(odd)) {
                *pair = u32::from(odd.to_bits()) << 16 | u32::from(even.to_bits());
            }
            half[pair] = bytemuck::cast(pairs);
        }
    }
}

/// Scales the sums of what came before, and adds the products of a chunk.
#[inline(always)]
fn add(sums: &mut [[f32; FEATURES]; QUERIES], products: &[[f32; FEATURES]; QUERIES], weights: &Weights<'_>) {
    let products = &products[..weights.of_chunk.len()];
    for ((sums, products), scale) in sums.iter_mut().zip(products).zip(weights.of_before) {
        sums.iter_mut().zip(products).for_each(|(sum, product)| *sum = *sum * scale + product);
    }
}

#[cfg(test)]
mod tests {
    use backend::dummy_value;

    use super::*;
    use crate::isa::{Isa, Kernel};

    const HEAD_DIM: usize = 64;
    const FIRST_LANE: usize = 3;

    /// One chunk for some queries: its scores, and what it adds to a softmax with these weights.
    struct Chunk<'a> {
        keys: [KeyLanes<'a>; GROUPS],
        queries: &'a [Query],
        scores: &'a mut [[f32; CHUNK]],
        weights: Weights<'a>,
        values: &'a Values<'a>,
        softmax: &'a mut Softmax,
    }

    impl Kernel for Chunk<'_> {
        fn run<S: Simd>(self, simd: S) {
            let tiles = tiles(simd, HEAD_DIM, self.queries.len()).expect("an instruction set with tiles");
            Panels::score(&tiles, self.keys, self.queries, self.scores, || ());
            let mut panels = Panels::new();
            panels.add_values(&tiles, &self.weights, FIRST_LANE, self.values, self.softmax, || ());
        }
    }

    fn rows<const LEN: usize>(seed: u64, count: usize, len: usize) -> Vec<[bf16; LEN]> {
        let feature = |row, i| if i < len { dummy_value(seed + row, i as u64, 0.1, 1.0) } else { bf16::ZERO };
        (0..count as u64).map(|row| std::array::from_fn(|i| feature(row, i))).collect()
    }

    /// As a matrix unit sums 32 products: those of even places and those of odd ones apart.
    fn products(x: impl Iterator<Item = (f32, f32)>) -> f32 {
        let mut sums = [0.0; 2];
        x.enumerate().for_each(|(i, (a, b))| sums[i % 2] += a * b);
        sums[0] + sums[1]
    }

    #[test]
    fn scores_and_values_have_the_specified_bits() {
        let isa = Isa::Avx512Amx;
        if !isa.is_available() {
            println!("skipped: this machine does not have {}", isa.name());
            return;
        }
        let (keys, queries) = (rows::<HEAD_DIM>(1, CHUNK, HEAD_DIM), rows(100, QUERIES, HEAD_DIM));
        let values = rows::<MAX_HEAD_DIM>(200, CHUNK - FIRST_LANE, HEAD_DIM);
        let values = Values::new(values.iter().map(|value| &value[..HEAD_DIM]));
        let mut lanes = [[RowPairs::default(); HEAD_DIM / PAIR]; GROUPS];
        for (k, key) in keys.iter().enumerate() {
            for (pair, features) in key.as_chunks::<PAIR>().0.iter().enumerate() {
                lanes[k / LANE_ROWS][pair][k % LANE_ROWS] = *features;
            }
        }
        for num_queries in [1, 4, 15, 16, 17, 32] {
            let queries = &queries[..num_queries];
            let mut scores = vec![[f32::NAN; CHUNK]; num_queries];
            let weight = |query: usize, lane: usize| match lane {
                ..FIRST_LANE => 0.0,
                _ => 1.0 / (1 + query + 3 * lane) as f32,
            };
            let mut weights: Vec<[f32; CHUNK]> =
                (0..num_queries).map(|query| std::array::from_fn(|lane| weight(query, lane))).collect();
            let of_before = std::array::from_fn(|query| query as f32 / 8.0);
            let mut softmax = Softmax::new();
            for _ in 0..2 {
                let weights = Weights { of_chunk: &mut weights, of_before };
                let (scores, softmax) = (&mut scores[..], &mut softmax);
                let keys = [&lanes[0][..], &lanes[1][..]];
                isa.run(Chunk { keys, queries, scores, weights, values: &values, softmax });
            }
            for (q, query) in queries.iter().enumerate() {
                for (k, key) in keys.iter().enumerate() {
                    let pairs = query[..HEAD_DIM].iter().zip(key).map(|(q, k)| (q.to_f32(), k.to_f32()));
                    let pairs: Vec<(f32, f32)> = pairs.collect();
                    let expected: f32 = pairs.chunks(32).map(|pairs| products(pairs.iter().copied())).sum();
                    assert_eq!(
                        scores[q][k].to_bits(),
                        expected.to_bits(),
                        "query {q} of {num_queries}, key {k}"
                    );
                }
                let sums = softmax.blocks(HEAD_DIM).flat_map(|queries| queries[q]);
                for (feature, sum) in sums.enumerate() {
                    let mut parts = [[[bf16::ZERO; CHUNK]; PARTS]];
                    split(&weights[q..=q], &mut parts);
                    let [first, second] = parts[0].map(|part| {
                        let value = |lane: usize| match lane.checked_sub(FIRST_LANE) {
                            Some(index) => values[index][feature].to_f32(),
                            None => 0.0,
                        };
                        products(part.iter().enumerate().map(|(lane, weight)| (weight.to_f32(), value(lane))))
                    });
                    let once = first + second;
                    let expected = once * of_before[q] + once;
                    assert_eq!(
                        sum.to_bits(),
                        expected.to_bits(),
                        "query {q} of {num_queries}, feature {feature}"
                    );
                }
            }
        }
    }
}
