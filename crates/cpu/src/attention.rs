//! Causal attention over the paged cache, a tile of queries and one kv head at a time.
//!
//! ```text
//! positions    0 .... 31 | 32 ... 63 | ... 511 ║ 512 ... | .... p      splits and chunks are anchored at position 0
//!              scores, weights, values: one chunk after another,
//!              with a running maximum and sum per query      ║ another split, begun anew, then merged
//! ```
//!
//! A tile has the queries of neighbouring tokens of a sequence that share the kv head and see the same chunks, so keys
//! and values are read once for all of them; those of 8 bits become bf16 a chunk at a time, exactly, and their scales go
//! to the scores and to the weights. Splits and chunks depend on a query's position alone, within a chunk a position has
//! a lane of its own, what a query does not see weighs zero, and splits are merged in ascending order whether one task
//! computes all of a context or each has a split of its own, as in a step of few tokens. So neither the prompt's
//! chunking, nor the cache's blocks, nor the other queries of the step can be seen in the result. The running maximum
//! follows Online normalizer calculation for softmax (arXiv 1805.02867), the splits Flash-Decoding (Dao et al., 2023).
//! (Zero times what is not finite is not zero: a value that is none spoils its chunk for earlier tokens of its own
//! sequence too, which is lost anyway, and never for another.)
//!
//! Scores and weighted values are computed by vectors ([`scores`], [`softmax`]), or on a matrix unit ([`panels`]) if
//! there is one and a head is some of its tiles long.

mod heads;
mod panels;
mod scores;
mod softmax;
mod splits;

use std::cell::Cell;
use std::ops::{Deref, DerefMut, Range};

use backend::Batch;
use half::bf16;

use crate::grid::Tile;
use crate::isa::Kernel;
use crate::kv::{KvCache, MAX_HEAD_DIM};
use crate::simd::{LANE_ROWS, PAIR, RowPairs, Simd, TILE_TOKENS};
use crate::tensor::Rows;
use heads::{CachedHead, KeyScratch, OverKvHead, WideValues, over_kv_head, scale};
use panels::Panels;
use scores::{GROUPS, KeyLanes, Scores, score};
use softmax::Softmax;
pub(crate) use splits::Splits;
use splits::{part, split_range, visible};

/// Positions per chunk.
const CHUNK: usize = 32;
/// Most queries per tile: two of a matrix unit's, so that twice as many share what is done for a chunk.
const QUERIES: usize = 2 * TILE_TOKENS;

/// A query, or what there is of one.
type Query = [bf16; MAX_HEAD_DIM];

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
        let (features, width) = (QUERIES * head_dim, QUERIES * Softmax::width(head_dim));
        let kv_head = self.out.cols().start / self.inputs.group_features();
        let mut scratch = Scratch::take();
        let Room { merged, partial, .. } = &mut *scratch;
        for row in self.out.rows() {
            for (index, out) in self.out.row(row).chunks_mut(features).enumerate() {
                let num_queries = out.len() / head_dim;
                for (split, item) in self.splits.items(row, kv_head).enumerate() {
                    let next = if split == 0 { &mut *merged } else { &mut *partial };
                    next.load(&self.partials.row(item)[index * width..], num_queries, head_dim);
                    if split > 0 {
                        merged.merge(partial, num_queries, head_dim);
                    }
                }
                for (query, out) in out.chunks_mut(head_dim).enumerate() {
                    merged.finish(query, out);
                }
            }
        }
    }
}

impl<'a> Inputs<'a> {
    /// Features of the query heads that share a kv head.
    fn group_features(&self) -> usize {
        self.kv.group_len() * self.kv.shape.head_dim
    }

    /// A token's queries of some heads.
    #[inline(always)]
    fn queries(&self, row: usize, heads: &Heads) -> &'a [bf16] {
        let head_dim = self.kv.shape.head_dim;
        &self.q.row(row)[heads.first * head_dim..][..heads.count * head_dim]
    }

    /// The query heads of a kv head, as many at a time as a tile has queries.
    fn heads(&self, kv_head: usize) -> impl Iterator<Item = Heads> + use<> {
        let group = kv_head * self.kv.group_len()..(kv_head + 1) * self.kv.group_len();
        group
            .clone()
            .step_by(QUERIES)
            .map(move |first| Heads { first, count: QUERIES.min(group.end - first) })
    }
}

/// Some neighbouring query heads.
struct Heads {
    first: usize,
    count: usize,
}

struct WholeContexts<'a, S> {
    simd: S,
    inputs: Inputs<'a>,
    out: Tile<'a, bf16>,
}

impl<S: Simd> OverKvHead for WholeContexts<'_, S> {
    #[inline(always)]
    fn run<H: CachedHead>(mut self, kv_head: usize, head: H) {
        let head_dim = self.inputs.kv.shape.head_dim;
        let mut scratch = Scratch::take();
        let Room { work, merged, partial } = &mut *scratch;
        for heads in self.inputs.heads(kv_head) {
            let first_col = (heads.first - kv_head * self.inputs.kv.group_len()) * head_dim;
            let mut rows = self.out.rows();
            while !rows.is_empty() {
                let context = Context::new(&self.inputs, rows.clone(), &heads, head);
                attend(self.simd, &context, 0, work, merged);
                for split in 1..split_range(&context.visible[0]).len() {
                    attend(self.simd, &context, split, work, partial);
                    merged.merge(partial, context.num_queries, head_dim);
                }
                for (index, row) in context.rows.clone().enumerate() {
                    let out = &mut self.out.row(row)[first_col..][..heads.count * head_dim];
                    for (query, out) in (index * heads.count..).zip(out.chunks_mut(head_dim)) {
                        merged.finish(query, out);
                    }
                }
                rows.start = context.rows.end;
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
        let mut scratch = Scratch::take();
        let Room { work, merged, .. } = &mut *scratch;
        let partials = self.partial.chunks_mut(QUERIES * Softmax::width(head_dim));
        for (heads, partial) in self.inputs.heads(kv_head).zip(partials) {
            let context = Context::new(&self.inputs, self.row..self.row + 1, &heads, head);
            attend(self.simd, &context, self.split, work, merged);
            merged.store(partial, head_dim);
        }
    }
}

/// What the queries of a tile see of one kv head.
struct Context<'a, H> {
    inputs: Inputs<'a>,
    head_dim: usize,
    head: H,
    block_table: &'a [u32],
    heads: &'a Heads,
    /// The tokens.
    rows: Range<usize>,
    num_queries: usize,
    /// What each query sees.
    visible: [Range<usize>; QUERIES],
}

impl<'a, H: CachedHead> Context<'a, H> {
    /// Of as many tokens from the first of `rows` on as can share a tile.
    #[inline(always)]
    fn new(inputs: &Inputs<'a>, rows: Range<usize>, heads: &'a Heads, head: H) -> Self {
        let Inputs { kv, batch, .. } = *inputs;
        let first = rows.start;
        let seq_index = batch.query_start_loc.partition_point(|&start| start as usize <= first) - 1;
        let end_of_seq = batch.query_start_loc[seq_index + 1] as usize;
        let end = rows.end.min(end_of_seq).min(first + QUERIES / heads.count);

        let mut rows = first..first;
        let mut num_queries = 0;
        let mut seen: [Range<usize>; QUERIES] = [const { 0..0 }; QUERIES];
        for row in first..end {
            let token = visible(kv, batch.positions[row]);
            if row > first && chunks_of(&token) != chunks_of(&seen[0]) {
                break;
            }
            seen[num_queries..][..heads.count].fill(token);
            num_queries += heads.count;
            rows.end += 1;
        }
        let (head_dim, block_table) = (kv.shape.head_dim, batch.block_table(seq_index));
        Self { inputs: *inputs, head_dim, head, block_table, heads, rows, num_queries, visible: seen }
    }

    /// What a query sees of a chunk, as lanes of it; a part of every chunk of the tile's.
    #[inline(always)]
    fn lanes(&self, query: usize, chunk: usize) -> Range<usize> {
        let (seen, start) = (&self.visible[query], chunk * CHUNK);
        seen.start.max(start) - start..seen.end.min(start + CHUNK) - start
    }

    /// What any query sees of a chunk.
    #[inline(always)]
    fn positions(&self, chunk: usize) -> Range<usize> {
        let (start, end) = (self.visible[0].start, self.visible[self.num_queries - 1].end);
        start.max(chunk * CHUNK)..end.min((chunk + 1) * CHUNK)
    }

    /// The keys of a chunk's positions. A group without any has those of another, for want of its own.
    #[inline(always)]
    fn keys<'s>(
        &'s self,
        positions: &Range<usize>,
        scratch: &'s mut [KeyScratch; GROUPS],
    ) -> [KeyLanes<'s>; GROUPS] {
        // Then a position's lane is its slot's.
        let in_place = self.inputs.kv.block_size.is_multiple_of(LANE_ROWS);
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
        let (block_table, block_size) = (self.block_table, self.inputs.kv.block_size);
        // Divided once, not for every position.
        let (mut block, mut offset) = (positions.start / block_size, positions.start % block_size);
        positions.map(move |_| {
            let slot = block_table[block] as usize * block_size + offset;
            offset += 1;
            if offset == block_size {
                (block, offset) = (block + 1, 0);
            }
            slot
        })
    }
}

/// The chunks with a visible position.
fn chunks_of(visible: &Range<usize>) -> Range<usize> {
    visible.start / CHUNK..visible.end.div_ceil(CHUNK)
}

/// What a thread needs room for.
struct Room {
    work: Work,
    merged: Softmax,
    partial: Softmax,
}

/// What [`attend`] needs room for.
struct Work {
    queries: [Query; QUERIES],
    keys: [KeyScratch; GROUPS],
    values: WideValues,
    panels: Panels,
    scores: Scores,
}

impl Room {
    fn new() -> Self {
        let work = Work {
            queries: [[bf16::ZERO; MAX_HEAD_DIM]; QUERIES],
            keys: [[RowPairs::default(); MAX_HEAD_DIM / PAIR]; GROUPS],
            values: [[bf16::ZERO; MAX_HEAD_DIM]; CHUNK],
            panels: Panels::new(),
            scores: [[0.0; CHUNK]; QUERIES],
        };
        Self { work, merged: Softmax::new(), partial: Softmax::new() }
    }
}

/// The room of a thread, which goes from task to task: to clear it took longer than a short context.
struct Scratch(Option<Box<Room>>);

thread_local! {
    static SPARE_ROOM: Cell<Option<Box<Room>>> = const { Cell::new(None) };
}

impl Scratch {
    fn take() -> Self {
        Self(Some(SPARE_ROOM.take().unwrap_or_else(|| Box::new(Room::new()))))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        SPARE_ROOM.set(self.0.take());
    }
}

impl Deref for Scratch {
    type Target = Room;

    fn deref(&self) -> &Room {
        self.0.as_ref().expect("until it is dropped")
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut Room {
        self.0.as_mut().expect("until it is dropped")
    }
}

/// Computes the softmax of one split for the queries of a tile.
#[inline(always)]
fn attend<S: Simd, H: CachedHead>(
    simd: S,
    context: &Context<'_, H>,
    split: usize,
    work: &mut Work,
    softmax: &mut Softmax,
) {
    let (head, head_dim, num_queries) = (&context.head, context.head_dim, context.num_queries);
    let Work { queries, keys, values, panels, scores } = work;
    let (queries, scores) = (&mut queries[..num_queries], &mut scores[..num_queries]);
    for (row, queries) in context.rows.clone().zip(queries.chunks_mut(context.heads.count)) {
        let heads = context.inputs.queries(row, context.heads).chunks(head_dim);
        queries.iter_mut().zip(heads).for_each(|(query, head)| query[..head_dim].copy_from_slice(head));
    }

    let factor = 1.0 / (head_dim as f32).sqrt();
    let tiles = panels::tiles(simd, head_dim, num_queries);
    softmax.begin(num_queries, head_dim);
    for chunk in chunks_of(&part(&context.visible[0], split)) {
        let positions = context.positions(chunk);
        // The processor by itself stops at the end of every page, 16 positions, and does not see past a chunk's arithmetic.
        // Asked for all at once, the next chunk would keep this one's loads waiting.
        let mut next_slots = context.slots(context.positions(chunk + 1));
        let mut meanwhile = || {
            if let Some(slot) = next_slots.next() {
                head.prefetch(simd, slot, head_dim);
            }
        };
        let (slots, first_lane) = (context.slots(positions.clone()), positions.start % CHUNK);
        let key_lanes = context.keys(&positions, keys);
        match &tiles {
            Some(tiles) => Panels::score(tiles, key_lanes, queries, scores, &mut meanwhile),
            None => score(simd, key_lanes, head_dim, queries, scores),
        }
        scale(scores, head.key_scales(), slots.clone(), first_lane);
        let lanes = |query| context.lanes(query, chunk);
        let weights = softmax.take_weights(simd, scores, factor, lanes, &mut meanwhile);
        scale(weights.of_chunk, head.value_scales(), slots.clone(), first_lane);
        let values = head.values(slots, head_dim, values);
        match &tiles {
            Some(tiles) => panels.add_values(tiles, &weights, first_lane, &values, softmax, &mut meanwhile),
            None => softmax.add_values(&weights, first_lane, &values, head_dim),
        }
    }
}
