//! The softmax of a few query heads over values that are seen a chunk at a time.

use std::mem;
use std::ops::{Deref, Range};

use half::bf16;

use super::CHUNK;
use super::scores::Scores;
use crate::kv::MAX_HEAD_DIM;
use crate::numbers::{Element, exp, fold_lanes, sum_lanes};

/// Query heads that are computed together.
pub(super) const HEADS: usize = 8;
/// Features of the accumulators that are kept in registers while the values of a chunk stream past.
const LANES: usize = 16;

/// The running softmax of up to [`HEADS`] query heads, and the values that it weighs.
pub(super) struct Softmax {
    /// Largest score so far.
    max: [f32; HEADS],
    /// Sum of the weights `exp(score - max)`.
    sum: [f32; HEADS],
    /// Weighted sum of the values.
    values: [[f32; MAX_HEAD_DIM]; HEADS],
}

impl Softmax {
    /// Room for a softmax.
    #[inline(always)]
    pub(super) fn new() -> Self {
        Self { max: [0.0; HEADS], sum: [0.0; HEADS], values: [[0.0; MAX_HEAD_DIM]; HEADS] }
    }

    /// Becomes the softmax of nothing, of so many heads.
    #[inline(always)]
    pub(super) fn begin(&mut self, num_heads: usize, head_dim: usize) {
        (self.max, self.sum) = ([f32::NEG_INFINITY; HEADS], [0.0; HEADS]);
        self.values[..num_heads].iter_mut().for_each(|values| values[..head_dim].fill(0.0));
    }

    /// Numbers of a head in memory.
    pub(super) const fn width(head_dim: usize) -> usize {
        2 + head_dim
    }

    /// Reads what [`Softmax::store`] wrote of so many heads.
    #[inline(always)]
    pub(super) fn load(&mut self, numbers: &[f32], num_heads: usize, head_dim: usize) {
        for (head, numbers) in numbers.chunks_exact(Self::width(head_dim)).take(num_heads).enumerate() {
            [self.max[head], self.sum[head]] = [numbers[0], numbers[1]];
            self.values[head][..head_dim].copy_from_slice(&numbers[2..]);
        }
    }

    /// Writes as many heads as there is room for.
    #[inline(always)]
    pub(super) fn store(&self, numbers: &mut [f32], head_dim: usize) {
        for (head, numbers) in numbers.chunks_exact_mut(Self::width(head_dim)).enumerate() {
            [numbers[0], numbers[1]] = [self.max[head], self.sum[head]];
            numbers[2..].copy_from_slice(&self.values[head][..head_dim]);
        }
    }

    /// Takes in the split that follows.
    #[inline(always)]
    pub(super) fn merge(&mut self, next: &Self, num_heads: usize, head_dim: usize) {
        for head in 0..num_heads {
            let max = if next.max[head] > self.max[head] { next.max[head] } else { self.max[head] };
            let scales = [exp(self.max[head] - max), exp(next.max[head] - max)];
            self.max[head] = max;
            self.sum[head] = self.sum[head] * scales[0] + next.sum[head] * scales[1];
            let values = self.values[head][..head_dim].iter_mut().zip(&next.values[head]);
            values.for_each(|(x, next)| *x = *x * scales[0] + next * scales[1]);
        }
    }

    /// Writes the result of as many heads as there is room for.
    #[inline(always)]
    pub(super) fn finish(&self, out: &mut [bf16], head_dim: usize) {
        for (head, out) in out.chunks_exact_mut(head_dim).enumerate() {
            let values = self.values[head].iter();
            out.iter_mut().zip(values).for_each(|(out, x)| *out = Element::from_f32(x / self.sum[head]));
        }
    }

    /// Turns the scores of the first heads in some lanes of a chunk into weights, zeros in the others, and scales what
    /// came before to the new maxima.
    #[inline(always)]
    pub(super) fn take_weights(&mut self, scores: &mut [[f32; CHUNK]], lanes: Range<usize>, head_dim: usize) {
        let larger = |a: f32, b: f32| if b > a { b } else { a };
        let mut scales = [0.0; HEADS];
        for ((scores, max), scale) in scores.iter_mut().zip(&mut self.max).zip(&mut scales) {
            keep(scores, &lanes, f32::NEG_INFINITY);
            let before = mem::replace(max, larger(*max, fold_lanes(&mut scores.clone(), larger)));
            *scale = before - *max;
        }
        scales.iter_mut().for_each(|scale| *scale = exp(*scale));
        for (head, (weights, scale)) in scores.iter_mut().zip(scales).enumerate() {
            weights.iter_mut().for_each(|score| *score = exp(*score - self.max[head]));
            keep(weights, &lanes, 0.0);
            self.sum[head] = self.sum[head] * scale + sum_lanes(&mut weights.clone());
            self.values[head][..head_dim].iter_mut().for_each(|x| *x *= scale);
        }
    }

    /// Adds a chunk's values, weighted by those in the lanes from `first_lane` on, to the first heads.
    #[inline(always)]
    pub(super) fn add_values(
        &mut self,
        num_heads: usize,
        weights: &Scores,
        first_lane: usize,
        values: &[&[bf16]],
        head_dim: usize,
    ) {
        let mut head = 0;
        while num_heads - head >= 4 {
            self.add_values_of::<4>(head, weights, first_lane, values, head_dim);
            head += 4;
        }
        (head..num_heads)
            .for_each(|head| self.add_values_of::<1>(head, weights, first_lane, values, head_dim));
    }

    /// Adds a chunk's weighted values to `H` heads, from `head` on.
    #[inline(always)]
    fn add_values_of<const H: usize>(
        &mut self,
        head: usize,
        weights: &Scores,
        first_lane: usize,
        values: &[&[bf16]],
        head_dim: usize,
    ) {
        let whole = head_dim - head_dim % LANES;
        for first in (0..whole).step_by(LANES) {
            self.add_features::<H, LANES>(head, weights, first_lane, values, first);
        }
        for feature in whole..head_dim {
            self.add_features::<H, 1>(head, weights, first_lane, values, feature);
        }
    }

    /// Adds `N` features of a chunk's weighted values to `H` heads, by ascending position.
    #[inline(always)]
    fn add_features<const H: usize, const N: usize>(
        &mut self,
        head: usize,
        weights: &Scores,
        first_lane: usize,
        values: &[&[bf16]],
        first: usize,
    ) {
        let mut sums = [[0.0; N]; H];
        for (sums, values) in sums.iter_mut().zip(&self.values[head..]) {
            sums.copy_from_slice(&values[first..first + N]);
        }
        for (lane, value) in (first_lane..).zip(values) {
            let value: &[bf16] = &value[first..first + N];
            for h in 0..H {
                let weight = weights[head + h][lane];
                for i in 0..N {
                    sums[h][i] += weight * Element::to_f32(value[i]);
                }
            }
        }
        for (sums, values) in sums.iter().zip(&mut self.values[head..]) {
            values[first..first + N].copy_from_slice(sums);
        }
    }
}

/// Replaces the numbers outside of some lanes.
#[inline(always)]
fn keep(numbers: &mut [f32; CHUNK], lanes: &Range<usize>, other: f32) {
    let (start, end) = (lanes.start as u32, lanes.end as u32);
    for (lane, number) in (0..).zip(numbers) {
        *number = if start <= lane && lane < end { *number } else { other };
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
