//! The softmax of a tile's queries over values that are seen a chunk at a time, and the weighted values by vectors.

use std::ops::{Deref, Range};

use half::bf16;

use super::{CHUNK, QUERIES};
use crate::kv::MAX_HEAD_DIM;
use crate::numbers::{Element, exp};
use crate::simd::Simd;

/// Features of a head that lie together.
pub(super) const FEATURES: usize = 32;
/// Features of the accumulators that are kept in registers while the values of a chunk stream past.
const LANES: usize = 16;
/// Queries whose accumulators are.
const KEPT_QUERIES: usize = 4;

/// The running softmax of up to [`QUERIES`] queries, and the values that it weighs.
pub(super) struct Softmax {
    /// Largest score so far.
    max: [f32; QUERIES],
    /// Sum of the weights `exp(score - max)`.
    sum: [f32; QUERIES],
    /// Weighted sum of the values, [`FEATURES`] of all queries after another.
    values: [[[f32; FEATURES]; QUERIES]; MAX_HEAD_DIM / FEATURES],
}

/// What a chunk adds to a softmax.
pub(super) struct Weights<'a> {
    /// `[query][position of the chunk]`
    pub(super) of_chunk: &'a mut [[f32; CHUNK]],
    /// By which each query's values so far are scaled.
    pub(super) of_before: [f32; QUERIES],
}

impl Softmax {
    pub(super) fn new() -> Self {
        let values = [[[0.0; FEATURES]; QUERIES]; MAX_HEAD_DIM / FEATURES];
        Self { max: [0.0; QUERIES], sum: [0.0; QUERIES], values }
    }

    /// Becomes the softmax of nothing, of so many queries.
    #[inline(always)]
    pub(super) fn begin(&mut self, num_queries: usize, head_dim: usize) {
        self.max[..num_queries].fill(f32::NEG_INFINITY);
        self.sum[..num_queries].fill(0.0);
        self.blocks(head_dim).for_each(|queries| queries[..num_queries].fill([0.0; FEATURES]));
    }

    /// The weighted sums of [`FEATURES`] features after another, as far as heads reach.
    #[inline(always)]
    pub(super) fn blocks(
        &mut self,
        head_dim: usize,
    ) -> impl Iterator<Item = &mut [[f32; FEATURES]; QUERIES]> {
        self.values[..head_dim.div_ceil(FEATURES)].iter_mut()
    }

    /// Numbers of a query in memory.
    pub(super) const fn width(head_dim: usize) -> usize {
        2 + head_dim
    }

    /// Reads what [`Softmax::store`] wrote of so many queries.
    #[inline(always)]
    pub(super) fn load(&mut self, numbers: &[f32], num_queries: usize, head_dim: usize) {
        for (query, numbers) in numbers.chunks_exact(Self::width(head_dim)).take(num_queries).enumerate() {
            [self.max[query], self.sum[query]] = [numbers[0], numbers[1]];
            for (queries, numbers) in self.values.iter_mut().zip(numbers[2..].chunks(FEATURES)) {
                queries[query][..numbers.len()].copy_from_slice(numbers);
            }
        }
    }

    /// Writes as many queries as there is room for.
    #[inline(always)]
    pub(super) fn store(&self, numbers: &mut [f32], head_dim: usize) {
        for (query, numbers) in numbers.chunks_exact_mut(Self::width(head_dim)).enumerate() {
            [numbers[0], numbers[1]] = [self.max[query], self.sum[query]];
            for (queries, numbers) in self.values.iter().zip(numbers[2..].chunks_mut(FEATURES)) {
                numbers.copy_from_slice(&queries[query][..numbers.len()]);
            }
        }
    }

    /// Takes in the split that follows.
    #[inline(always)]
    pub(super) fn merge(&mut self, next: &Self, num_queries: usize, head_dim: usize) {
        for query in 0..num_queries {
            let max = if next.max[query] > self.max[query] { next.max[query] } else { self.max[query] };
            let scales = [exp(self.max[query] - max), exp(next.max[query] - max)];
            self.max[query] = max;
            self.sum[query] = self.sum[query] * scales[0] + next.sum[query] * scales[1];
            for (queries, next) in self.blocks(head_dim).zip(&next.values) {
                let values = queries[query].iter_mut().zip(&next[query]);
                values.for_each(|(x, next)| *x = *x * scales[0] + next * scales[1]);
            }
        }
    }

    /// Writes the result of one query.
    #[inline(always)]
    pub(super) fn finish(&self, query: usize, out: &mut [bf16]) {
        let sum = self.sum[query];
        for (out, queries) in out.chunks_mut(FEATURES).zip(&self.values) {
            out.iter_mut().zip(&queries[query]).for_each(|(out, x)| *out = Element::from_f32(x / sum));
        }
    }

    /// Multiplies a chunk's scores by `factor` and turns them into weights, zeros in the lanes that a query does not
    /// see. `meanwhile` is called twice per query.
    #[inline(always)]
    pub(super) fn take_weights<'a, S: Simd>(
        &mut self,
        simd: S,
        scores: &'a mut [[f32; CHUNK]],
        factor: f32,
        lanes: impl Fn(usize) -> Range<usize>,
        mut meanwhile: impl FnMut(),
    ) -> Weights<'a> {
        let mut scales = [0.0; QUERIES];
        for (query, scores) in scores.iter_mut().enumerate() {
            meanwhile();
            map_lanes(scores, lanes(query), f32::NEG_INFINITY, |score| score * factor);
            let (before, max) = (self.max[query], simd.largest(scores));
            self.max[query] = if max > before { max } else { before };
            scales[query] = before - self.max[query];
        }
        scales.iter_mut().for_each(|scale| *scale = exp(*scale));
        for (query, weights) in scores.iter_mut().enumerate() {
            meanwhile();
            let max = self.max[query];
            map_lanes(weights, lanes(query), 0.0, |score| exp(score - max));
            self.sum[query] = self.sum[query] * scales[query] + simd.sum(weights);
        }
        Weights { of_chunk: scores, of_before: scales }
    }

    /// Scales what came before, and adds a chunk's values, weighted by those in the lanes from `first_lane` on.
    #[inline(always)]
    pub(super) fn add_values(
        &mut self,
        weights: &Weights<'_>,
        first_lane: usize,
        values: &[&[bf16]],
        head_dim: usize,
    ) {
        let (num_queries, mut query) = (weights.of_chunk.len(), 0);
        while num_queries - query >= KEPT_QUERIES {
            self.add_values_to::<KEPT_QUERIES>(query, weights, first_lane, values, head_dim);
            query += KEPT_QUERIES;
        }
        (query..num_queries)
            .for_each(|query| self.add_values_to::<1>(query, weights, first_lane, values, head_dim));
    }

    /// Adds a chunk's weighted values to `Q` queries, from `query` on.
    #[inline(always)]
    fn add_values_to<const Q: usize>(
        &mut self,
        query: usize,
        weights: &Weights<'_>,
        first_lane: usize,
        values: &[&[bf16]],
        head_dim: usize,
    ) {
        let scales = weights.of_before[query..].first_chunk::<Q>().expect("Q queries");
        let weights = weights.of_chunk[query..].first_chunk::<Q>().expect("Q queries");
        let whole = head_dim - head_dim % LANES;
        for first in (0..whole).step_by(LANES) {
            self.add_features::<Q, LANES>(query, scales, weights, first_lane, values, first);
        }
        for feature in whole..head_dim {
            self.add_features::<Q, 1>(query, scales, weights, first_lane, values, feature);
        }
    }

    /// Adds `N` features of a chunk's weighted values to `Q` queries, by ascending position.
    #[inline(always)]
    fn add_features<const Q: usize, const N: usize>(
        &mut self,
        query: usize,
        scales: &[f32; Q],
        weights: &[[f32; CHUNK]; Q],
        first_lane: usize,
        values: &[&[bf16]],
        first: usize,
    ) {
        let queries = &mut self.values[first / FEATURES][query..][..Q];
        let range = first % FEATURES..first % FEATURES + N;
        let mut sums = [[0.0; N]; Q];
        for q in 0..Q {
            for (sum, value) in sums[q].iter_mut().zip(&queries[q][range.clone()]) {
                *sum = value * scales[q];
            }
        }
        for (lane, value) in (first_lane..).zip(values) {
            let value: &[bf16] = &value[first..first + N];
            for q in 0..Q {
                let weight = weights[q][lane];
                for i in 0..N {
                    sums[q][i] += weight * Element::to_f32(value[i]);
                }
            }
        }
        queries.iter_mut().zip(&sums).for_each(|(values, sums)| values[range.clone()].copy_from_slice(sums));
    }
}

/// Maps the numbers in some lanes, and sets the others.
#[inline(always)]
fn map_lanes(numbers: &mut [f32; CHUNK], lanes: Range<usize>, other: f32, map: impl Fn(f32) -> f32) {
    let (start, end) = (lanes.start as u32, lanes.end as u32);
    for (lane, number) in (0..).zip(numbers) {
        // Without a branch, so that all lanes are computed, and stored whole.
        let mapped = map(*number);
        *number = if start <= lane && lane < end { mapped } else { other };
    }
}

/// The values of a chunk, borrowed from wherever they lie.
#[derive(Clone, Copy)]
pub(super) struct Values<'a> {
    rows: [&'a [bf16]; CHUNK],
    len: usize,
}

impl<'a> Values<'a> {
    /// Collects rows.
    ///
    /// # Panics
    /// If there are more than [`CHUNK`].
    #[inline(always)]
    pub(super) fn new(rows: impl IntoIterator<Item = &'a [bf16]>) -> Self {
        let mut values = Self { rows: [&[]; CHUNK], len: 0 };
        for row in rows {
            values.rows[values.len] = row;
            values.len += 1;
        }
        values
    }
}

impl<'a> Deref for Values<'a> {
    type Target = [&'a [bf16]];

    #[inline(always)]
    fn deref(&self) -> &Self::Target {
        &self.rows[..self.len]
    }
}
