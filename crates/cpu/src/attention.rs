//! Causal attention over the paged cache, one query token and one kv head's group of query heads at a time.
//!
//! ```text
//! positions    0 .... 31 | 32 ... 63 | ... 511 ║ 512 ... | .... p      splits and chunks are anchored at position 0
//!              scores, weights, values: one chunk after another,
//!              with a running maximum and sum per head       ║ another split, begun anew, then merged
//! ```
//!
//! Keys and values are read once for all heads of the group; those of 8 bits become bf16 a chunk at a time, exactly,
//! and their scales go to the scores and to the weights. Splits and chunks depend on the query's position alone, within
//! a chunk a position has a lane of its own, and splits are merged in ascending order whether one task computes all of a
//! context or each has a split of its own, as in a step of few tokens. So neither the prompt's chunking, nor the
//! cache's blocks, nor the other queries of the step can be seen in the result. The running maximum follows Online
//! normalizer calculation for softmax (arXiv 1805.02867), the splits Flash-Decoding (Dao et al., 2023).

mod heads;
mod scores;
mod softmax;
mod splits;

use std::ops::Range;

use backend::Batch;
use half::bf16;

use crate::grid::Tile;
use crate::isa::Kernel;
use crate::kv::{KvCache, MAX_HEAD_DIM};
use crate::simd::{LANE_ROWS, PAIR, RowPairs, Simd};
use crate::tensor::Rows;
use heads::{CachedHead, KeyScratch, OverKvHead, over_kv_head};
use scores::{GROUPS, KeyLanes, Scores, score};
use softmax::{HEADS, Softmax};
pub(crate) use splits::Splits;
use splits::{part, split_range, visible};

/// Positions per chunk.
const CHUNK: usize = 32;

/// What attention reads.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub(crate) q: Rows<'a, bf16>,
    pub(crate) kv: &'a KvCache,
    pub(crate) batch: &'a Batch,
}

/// The attention of the query tokens and the kv head that one tile of `out` covers.
pub(crate) struct Attention<'a> {
    pub(crate) inputs: Inputs<'a>,
    pub(crate) out: Tile<'a, bf16>,
}

/// One split of a query token for one kv head, as [`Splits`] numbers them: the rows of `partial`.
pub(crate) struct AttentionSplit<'a> {
    pub(crate) inputs: Inputs<'a>,
    pub(crate) splits: &'a Splits,
    pub(crate) partial: Tile<'a, f32>,
}

/// The merged splits of the query token and the kv head that one tile of `out` covers.
pub(crate) struct MergeSplits<'a> {
    pub(crate) inputs: Inputs<'a>,
    pub(crate) splits: &'a Splits,
    pub(crate) partials: Rows<'a, f32>,
    pub(crate) out: Tile<'a, bf16>,
}

impl Kernel for Attention<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let kv_head = self.out.cols().start / self.inputs.group_features();
        over_kv_head(self.inputs.kv, kv_head, WholeContexts { simd, inputs: self.inputs, out: self.out });
    }
}

impl Kernel for AttentionSplit<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        for item in self.partial.rows() {
            let (row, kv_head, split) = self.splits.item(item);
            let partial = self.partial.row(item);
            over_kv_head(
                self.inputs.kv,
                kv_head,
                OneSplit { simd, inputs: self.inputs, row, split, partial },
            );
        }
    }
}

impl Kernel for MergeSplits<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        let head_dim = self.inputs.kv.shape.head_dim;
        let (features, width) = (HEADS * head_dim, HEADS * Softmax::width(head_dim));
        let kv_head = self.out.cols().start / self.inputs.group_features();
        let (mut merged, mut partial) = (Softmax::new(), Softmax::new());
        for row in self.out.rows() {
            for (index, out) in self.out.row(row).chunks_mut(features).enumerate() {
                let num_heads = out.len() / head_dim;
                for (split, item) in self.splits.items(row, kv_head).enumerate() {
                    let next = if split == 0 { &mut merged } else { &mut partial };
                    next.load(&self.partials.row(item)[index * width..], num_heads, head_dim);
                    if split > 0 {
                        merged.merge(&partial, num_heads, head_dim);
                    }
                }
                merged.finish(out, head_dim);
            }
        }
    }
}

impl<'a> Inputs<'a> {
    /// Features of the query heads that share a kv head.
    fn group_features(&self) -> usize {
        self.kv.group_len() * self.kv.shape.head_dim
    }

    /// The queries of a token that share a kv head.
    #[inline(always)]
    fn queries(&self, row: usize, kv_head: usize) -> &'a [bf16] {
        &self.q.row(row)[kv_head * self.group_features()..][..self.group_features()]
    }
}

struct WholeContexts<'a, S> {
    simd: S,
    inputs: Inputs<'a>,
    out: Tile<'a, bf16>,
}

impl<S: Simd> OverKvHead for WholeContexts<'_, S> {
    #[inline(always)]
    fn run<H: CachedHead>(mut self, kv_head: usize, head: H) {
        let features = HEADS * self.inputs.kv.shape.head_dim;
        let mut scratch = Scratch::<H>::new();
        let (mut merged, mut partial) = (Softmax::new(), Softmax::new());
        for row in self.out.rows() {
            let context = Context::new(&self.inputs, row, head);
            let queries = self.inputs.queries(row, kv_head).chunks(features);
            for (queries, out) in queries.zip(self.out.row(row).chunks_mut(features)) {
                attend(self.simd, &context, 0, queries, &mut scratch, &mut merged);
                for split in 1..split_range(&context.visible).len() {
                    attend(self.simd, &context, split, queries, &mut scratch, &mut partial);
                    merged.merge(&partial, queries.len() / context.head_dim, context.head_dim);
                }
                merged.finish(out, context.head_dim);
            }
        }
    }
}

struct OneSplit<'a, 'p, S> {
    simd: S,
    inputs: Inputs<'a>,
    row: usize,
    split: usize,
    partial: &'p mut [f32],
}

impl<S: Simd> OverKvHead for OneSplit<'_, '_, S> {
    #[inline(always)]
    fn run<H: CachedHead>(self, kv_head: usize, head: H) {
        let head_dim = self.inputs.kv.shape.head_dim;
        let context = Context::new(&self.inputs, self.row, head);
        let queries = self.inputs.queries(self.row, kv_head).chunks(HEADS * head_dim);
        let (mut scratch, mut softmax) = (Scratch::<H>::new(), Softmax::new());
        for (queries, partial) in queries.zip(self.partial.chunks_mut(HEADS * Softmax::width(head_dim))) {
            attend(self.simd, &context, self.split, queries, &mut scratch, &mut softmax);
            softmax.store(partial, head_dim);
        }
    }
}

/// What one query token sees of one kv head.
struct Context<'a, H> {
    head_dim: usize,
    block_size: usize,
    head: H,
    block_table: &'a [u32],
    visible: Range<usize>,
}

impl<'a, H: CachedHead> Context<'a, H> {
    #[inline(always)]
    fn new(inputs: &Inputs<'a>, row: usize, head: H) -> Self {
        let Inputs { kv, batch, .. } = *inputs;
        let seq_index = batch.query_start_loc.partition_point(|&start| start as usize <= row) - 1;
        Self {
            head_dim: kv.shape.head_dim,
            block_size: kv.block_size,
            head,
            block_table: batch.block_table(seq_index),
            visible: visible(kv, batch.positions[row]),
        }
    }

    /// The visible part of every chunk of a split, counted from the first visible one, that has one.
    #[inline(always)]
    fn chunks(&self, split: usize) -> impl Iterator<Item = Range<usize>> + use<H> {
        let visible = part(&self.visible, split);
        let chunks = visible.start / CHUNK..visible.end.div_ceil(CHUNK);
        chunks.map(move |chunk| visible.start.max(chunk * CHUNK)..visible.end.min((chunk + 1) * CHUNK))
    }

    /// The keys of a chunk's positions. A group without any has those of another, for want of its own.
    #[inline(always)]
    fn keys<'s>(
        &'s self,
        positions: &Range<usize>,
        scratch: &'s mut [KeyScratch; GROUPS],
    ) -> [KeyLanes<'s>; GROUPS] {
        // Then a position's lane is its slot's.
        let in_place = self.block_size.is_multiple_of(LANE_ROWS);
        let mut keys: [KeyLanes<'_>; GROUPS] = [&[]; GROUPS];
        for (group, (keys, scratch)) in keys.iter_mut().zip(scratch).enumerate() {
            let start = positions.start / CHUNK * CHUNK + group * LANE_ROWS;
            let positions = positions.start.max(start)..positions.end.min(start + LANE_ROWS);
            if positions.is_empty() {
                continue;
            }
            let (lane, mut slots) = (positions.start - start, self.slots(positions));
            *keys = match in_place {
                true => self.head.keys_beside(slots.next().expect("a slot"), self.head_dim, scratch),
                false => self.head.keys_of(slots, lane, self.head_dim, scratch),
            };
        }
        let any = if keys[0].is_empty() { keys[1] } else { keys[0] };
        keys.map(|group| if group.is_empty() { any } else { group })
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

/// Room for what a chunk needs.
struct Scratch<H: CachedHead> {
    keys: [KeyScratch; GROUPS],
    values: H::ValueScratch,
}

impl<H: CachedHead> Scratch<H> {
    fn new() -> Self {
        let keys = [[RowPairs::default(); MAX_HEAD_DIM / PAIR]; GROUPS];
        Self { keys, values: H::value_scratch() }
    }
}

/// Computes the softmax of one split for up to [`HEADS`] query heads, which lie one after another.
#[inline(always)]
fn attend<S: Simd, H: CachedHead>(
    simd: S,
    context: &Context<'_, H>,
    split: usize,
    queries: &[bf16],
    scratch: &mut Scratch<H>,
    softmax: &mut Softmax,
) {
    let (head, head_dim) = (&context.head, context.head_dim);
    let scale = 1.0 / (head_dim as f32).sqrt();
    let num_heads = queries.len() / head_dim;
    let mut scores: Scores = [[0.0; CHUNK]; HEADS];
    softmax.begin(num_heads, head_dim);
    for positions in context.chunks(split) {
        let slots = context.slots(positions.clone());
        let lanes = positions.start % CHUNK..positions.start % CHUNK + positions.len();
        score(simd, context.keys(&positions, &mut scratch.keys), queries, scale, &mut scores);
        let weights = &mut scores[..num_heads];
        weights.iter_mut().for_each(|scores| head.scale_by_keys(slots.clone(), &mut scores[lanes.clone()]));
        softmax.take_weights(weights, lanes.clone(), head_dim);
        weights
            .iter_mut()
            .for_each(|weights| head.scale_by_values(slots.clone(), &mut weights[lanes.clone()]));
        let values = head.values(slots, head_dim, &mut scratch.values);
        softmax.add_values(num_heads, &scores, lanes.start, &values, head_dim);
    }
}
