//! Causal attention over the paged cache, one query token and one kv head's group of query heads at a time.
//!
//! ```text
//! positions    0 ........ 31 | 32 ....... 63 | 64 .... p      chunks are anchored at position 0
//!              scores, weights, values: one chunk after another, with a running maximum and sum per head
//! ```
//!
//! Keys and values are read once for all heads of the group; those of 8 bits become bf16 a chunk at a time, exactly,
//! and their scales go to the scores and to the weights. Chunks depend on the query's position alone, and
//! within a chunk sums run by ascending position, so neither the prompt's chunking, nor the cache's blocks, nor
//! the other queries of the step can be seen in the result. The running maximum follows Online normalizer
//! calculation for softmax (arXiv 1805.02867).

use std::ops::Range;

use backend::Batch;
use half::bf16;

use crate::dot::{MAX_ROWS, MAX_TOKENS, Sums, TokenRows, WeightRows, dot_rows};
use crate::grid::Tile;
use crate::isa::Kernel;
use crate::kv::{KvCache, KvStorage, MAX_HEAD_DIM, Q8Heads};
use crate::numbers::{Element, exp};
use crate::simd::Simd;
use crate::tensor::Rows;

/// Positions per chunk.
const CHUNK: usize = MAX_ROWS;
/// Query heads that are computed together.
const HEADS: usize = MAX_TOKENS;
/// Features of the accumulators that are kept in registers while the values of a chunk stream past.
const LANES: usize = 16;

/// The attention of the query tokens and the kv head that one tile of `out` covers.
pub(crate) struct Attention<'a> {
    pub(crate) q: Rows<'a, bf16>,
    pub(crate) kv: &'a KvCache,
    pub(crate) batch: &'a Batch,
    pub(crate) out: Tile<'a, bf16>,
}

impl Kernel for Attention<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let KvCache { shape, storage, .. } = self.kv;
        let kv_head = self.out.cols().start / (self.kv.group_len() * shape.head_dim);
        let plane = kv_head * self.kv.plane_len()..(kv_head + 1) * self.kv.plane_len();
        let slots = kv_head * self.kv.num_slots()..(kv_head + 1) * self.kv.num_slots();
        match storage {
            KvStorage::Bf16 { keys, values } => self.run_over(simd, [&keys[plane.clone()], &values[plane]]),
            KvStorage::Q8 { keys, values } => {
                let heads = [keys, values];
                self.run_over(simd, heads.map(|heads| Q8Head::new(heads, plane.clone(), slots.clone())));
            }
        }
    }
}

impl Attention<'_> {
    /// Runs over the keys and the values of the kv head.
    #[inline(always)]
    fn run_over<S: Simd, H: CachedHead>(mut self, simd: S, [keys, values]: [H; 2]) {
        let head_dim = self.kv.shape.head_dim;
        let cols = self.out.cols();
        let mut scratch = H::scratch();
        for row in self.out.rows() {
            let context = Context::new(self.kv, self.batch, row, keys, values);
            let queries = &self.q.row(row)[cols.clone()];
            let heads = queries.chunks(HEADS * head_dim);
            for (queries, out) in heads.zip(self.out.row(row).chunks_mut(HEADS * head_dim)) {
                attend(simd, &context, queries, &mut scratch, out);
            }
        }
    }
}

/// The plane of one kv head, to be read: all its keys, or all its values.
trait CachedHead: Copy {
    /// Where a chunk is widened to bf16, if it must be.
    type Scratch;

    fn scratch() -> Self::Scratch;

    /// The features of some slots; of 8-bit heads before their scales.
    fn rows<'a>(
        &'a self,
        slots: impl Iterator<Item = usize>,
        head_dim: usize,
        scratch: &'a mut Self::Scratch,
    ) -> WeightRows<'a>;

    /// Multiplies each number by the scale of its slot.
    fn scale(&self, slots: impl Iterator<Item = usize>, numbers: &mut [f32]);
}

impl CachedHead for &[bf16] {
    type Scratch = ();

    fn scratch() {}

    #[inline(always)]
    fn rows<'a>(
        &'a self,
        slots: impl Iterator<Item = usize>,
        head_dim: usize,
        (): &'a mut (),
    ) -> WeightRows<'a> {
        WeightRows::new(slots.map(|slot| &self[slot * head_dim..][..head_dim]))
    }

    #[inline(always)]
    fn scale(&self, _: impl Iterator<Item = usize>, _: &mut [f32]) {}
}

/// An 8-bit plane.
#[derive(Clone, Copy)]
struct Q8Head<'k> {
    features: &'k [i8],
    scales: &'k [f32],
}

impl<'k> Q8Head<'k> {
    #[inline(always)]
    fn new(heads: &'k Q8Heads, features: Range<usize>, scales: Range<usize>) -> Self {
        Self { features: &heads.features[features], scales: &heads.scales[scales] }
    }
}

impl CachedHead for Q8Head<'_> {
    type Scratch = [[bf16; MAX_HEAD_DIM]; CHUNK];

    fn scratch() -> Self::Scratch {
        [[bf16::ZERO; MAX_HEAD_DIM]; CHUNK]
    }

    #[inline(always)]
    fn rows<'a>(
        &'a self,
        slots: impl Iterator<Item = usize>,
        head_dim: usize,
        scratch: &'a mut Self::Scratch,
    ) -> WeightRows<'a> {
        WeightRows::new(scratch.iter_mut().zip(slots).map(|(wide, slot)| {
            let wide = &mut wide[..head_dim];
            let features = &self.features[slot * head_dim..][..head_dim];
            wide.iter_mut().zip(features).for_each(|(wide, &x)| *wide = widened(x));
            &*wide
        }))
    }

    #[inline(always)]
    fn scale(&self, slots: impl Iterator<Item = usize>, numbers: &mut [f32]) {
        numbers.iter_mut().zip(slots).for_each(|(number, slot)| *number *= self.scales[slot]);
    }
}

/// An integer that 8 bits hold needs no rounding in bf16.
#[inline(always)]
fn widened(x: i8) -> bf16 {
    bf16::from_bits((f32::from(x).to_bits() >> 16) as u16)
}

/// What one query token sees of one kv head.
struct Context<'a, H> {
    head_dim: usize,
    block_size: usize,
    keys: H,
    values: H,
    block_table: &'a [u32],
    visible: Range<usize>,
}

impl<'a, H: CachedHead> Context<'a, H> {
    #[inline(always)]
    fn new(kv: &KvCache, batch: &'a Batch, row: usize, keys: H, values: H) -> Self {
        let seq_index = batch.query_start_loc.partition_point(|&start| start as usize <= row) - 1;
        let end = batch.positions[row] as usize + 1;
        let window = kv.shape.sliding_window.map_or(usize::MAX, |window| window as usize);
        Self {
            head_dim: kv.shape.head_dim,
            block_size: kv.block_size,
            keys,
            values,
            block_table: batch.block_table(seq_index),
            visible: end.saturating_sub(window)..end,
        }
    }

    /// The visible part of every chunk that has one.
    #[inline(always)]
    fn chunks(&self) -> impl Iterator<Item = Range<usize>> + use<H> {
        let visible = self.visible.clone();
        let chunks = visible.start / CHUNK..visible.end.div_ceil(CHUNK);
        chunks.map(move |chunk| visible.start.max(chunk * CHUNK)..visible.end.min((chunk + 1) * CHUNK))
    }

    /// Where some positions are cached.
    #[inline(always)]
    fn slots(&self, positions: Range<usize>) -> impl Iterator<Item = usize> + Clone {
        let (block_table, block_size) = (self.block_table, self.block_size);
        positions.map(move |position| {
            block_table[position / block_size] as usize * block_size + position % block_size
        })
    }
}

/// The running softmax of up to [`HEADS`] query heads.
struct Running {
    /// Largest score so far.
    max: [f32; HEADS],
    /// Sum of the weights `exp(score - max)`.
    sum: [f32; HEADS],
    /// Weighted sum of the values.
    values: [[f32; MAX_HEAD_DIM]; HEADS],
}

/// Computes `out = softmax(q·Kᵀ / sqrt(head_dim)) · V` for the heads side by side in `queries`.
#[inline(always)]
fn attend<S: Simd, H: CachedHead>(
    simd: S,
    context: &Context<'_, H>,
    queries: &[bf16],
    scratch: &mut H::Scratch,
    out: &mut [bf16],
) {
    let head_dim = context.head_dim;
    let scale = 1.0 / (head_dim as f32).sqrt();
    let queries = TokenRows::new(queries.chunks_exact(head_dim));
    let num_heads = queries.len();
    let mut scores: Sums = [[0.0; MAX_ROWS]; MAX_TOKENS];
    let mut running =
        Running { max: [f32::NEG_INFINITY; HEADS], sum: [0.0; HEADS], values: [[0.0; MAX_HEAD_DIM]; HEADS] };

    for positions in context.chunks() {
        let slots = context.slots(positions.clone());
        let keys = context.keys.rows(slots.clone(), head_dim, scratch);
        dot_rows(simd, &keys, &queries, &mut scores);
        for (head, weights) in scores[..num_heads].iter_mut().enumerate() {
            let weights = &mut weights[..positions.len()];
            context.keys.scale(slots.clone(), weights);
            weights.iter_mut().for_each(|score| *score *= scale);
            running.take_weights(head, weights, head_dim);
            context.values.scale(slots.clone(), weights);
        }
        let values = context.values.rows(slots, head_dim, scratch);
        let mut head = 0;
        while head < num_heads {
            let four = num_heads - head >= 4;
            match four {
                true => running.add_values::<4>(head, &scores, &values, head_dim),
                false => running.add_values::<1>(head, &scores, &values, head_dim),
            }
            head += if four { 4 } else { 1 };
        }
    }

    for (head, out) in out.chunks_exact_mut(head_dim).enumerate() {
        let values = running.values[head].iter();
        out.iter_mut().zip(values).for_each(|(out, x)| *out = Element::from_f32(x / running.sum[head]));
    }
}

impl Running {
    /// Turns a chunk's scores into weights and scales what came before to the new maximum.
    #[inline(always)]
    fn take_weights(&mut self, head: usize, scores: &mut [f32], head_dim: usize) {
        let max = scores.iter().fold(self.max[head], |max, &score| if score > max { score } else { max });
        let scale = exp(self.max[head] - max);
        scores.iter_mut().for_each(|score| *score = exp(*score - max));
        self.max[head] = max;
        self.sum[head] = self.sum[head] * scale + scores.iter().sum::<f32>();
        self.values[head][..head_dim].iter_mut().for_each(|x| *x *= scale);
    }

    /// Adds a chunk's weighted values to `H` heads.
    #[inline(always)]
    fn add_values<const H: usize>(
        &mut self,
        head: usize,
        weights: &Sums,
        values: &[&[bf16]],
        head_dim: usize,
    ) {
        let whole = head_dim - head_dim % LANES;
        for first in (0..whole).step_by(LANES) {
            self.add_features::<H, LANES>(head, weights, values, first);
        }
        for feature in whole..head_dim {
            self.add_features::<H, 1>(head, weights, values, feature);
        }
    }

    /// Adds `N` features of a chunk's weighted values to `H` heads, by ascending position.
    #[inline(always)]
    fn add_features<const H: usize, const N: usize>(
        &mut self,
        head: usize,
        weights: &Sums,
        values: &[&[bf16]],
        first: usize,
    ) {
        let mut sums = [[0.0; N]; H];
        for (sums, values) in sums.iter_mut().zip(&self.values[head..]) {
            sums.copy_from_slice(&values[first..first + N]);
        }
        for (position, value) in values.iter().enumerate() {
            let value: &[bf16] = &value[first..first + N];
            for h in 0..H {
                let weight = weights[head + h][position];
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
