//! How a step's attention is cut into work: tiles of query tokens, over all that they see or over one chunk of keys.
//!
//! A tile that walks all its keys needs no second pass; one tile per chunk keeps the whole device busy when there are few
//! tiles. The kernels give the same bits either way (`kernels/attention.cu`), so this chooses by speed alone.
//!
//! The number of chunks grows with the context, and a recorded launch has a fixed number of blocks: split work is filled
//! up to a power of two with items that have nothing to do.

use std::ops::Range;

use backend::Batch;
use bytemuck::Zeroable;

use crate::kernels::{AttentionItem, FoldItem};

/// Query rows of a tile: tokens times query heads of one kv head.
pub(crate) const TILE_ROWS: usize = 64;
/// Keys of a chunk.
const CHUNK_KEYS: usize = 256;
const NO_PARTIAL: i32 = -1;

/// Dynamic shared memory of a block: two tiles of keys and of values, one of queries, and scores `[16, 72]` in f32 that
/// warps exchange.
pub(crate) const fn shared_bytes(head_stride: u32) -> u32 {
    5 * 64 * head_stride * 2 + 16 * 72 * 4
}

/// Rows of partial results there is room for; more would have enough tiles anyway.
pub(crate) const MAX_PARTIALS: usize = 1 << 16;

/// The sizes of a model's attention that its work is planned by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PlanShape {
    pub(crate) num_heads: usize,
    pub(crate) num_kv_heads: usize,
    /// Blocks that keep a device busy.
    pub(crate) enough_blocks: usize,
}

impl PlanShape {
    fn tokens_per_tile(&self) -> usize {
        TILE_ROWS / (self.num_heads / self.num_kv_heads)
    }
}

/// One step's work.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) items: Vec<AttentionItem>,
    /// Per token of a split tile; empty if none is split.
    pub(crate) folds: Vec<FoldItem>,
}

impl Plan {
    /// Plans a batch; keeps the allocations.
    pub(crate) fn make(&mut self, shape: &PlanShape, batch: &Batch) {
        self.items.clear();
        self.folds.clear();
        let tiles = || (0..batch.num_seqs()).flat_map(|seq| tiles_of(shape, batch, seq));
        let num_tiles = tiles().count();
        let partials: usize = tiles().map(|(_, tile)| tile.num_partials(shape)).sum();
        let split = num_tiles * shape.num_kv_heads < shape.enough_blocks && partials <= MAX_PARTIALS;
        let mut first_partial = 0;
        for (seq, tile) in tiles() {
            let item = AttentionItem {
                block_table_start: batch.block_table_start_loc[seq] as i32,
                first_token: tile.tokens.start as i32,
                num_tokens: tile.tokens.len() as i32,
                first_position: tile.first_position as i32,
                first_chunk: 0,
                end_chunk: tile.num_chunks() as i32,
                first_partial: NO_PARTIAL,
            };
            if split && tile.num_chunks() > 1 {
                self.push_split(shape, &tile, item, first_partial);
                first_partial += tile.num_partials(shape);
            } else {
                self.items.push(item);
            }
        }
        if !self.folds.is_empty() {
            self.items.resize(self.items.len().next_power_of_two(), AttentionItem::zeroed());
            self.folds.resize(self.folds.len().next_power_of_two(), FoldItem::zeroed());
        }
    }

    fn push_split(&mut self, shape: &PlanShape, tile: &QueryTile, item: AttentionItem, first_partial: usize) {
        let chunk_rows = tile.tokens.len() * shape.num_heads;
        self.folds.extend(tile.tokens.clone().enumerate().map(|(index, token)| FoldItem {
            token: token as i32,
            first_partial: (first_partial + index * shape.num_heads) as i32,
            chunk_rows: chunk_rows as i32,
            num_chunks: item.end_chunk,
        }));
        self.items.extend((0..item.end_chunk).map(|chunk| AttentionItem {
            first_chunk: chunk,
            end_chunk: chunk + 1,
            first_partial: first_partial as i32 + chunk * chunk_rows as i32,
            ..item
        }));
    }
}

/// Some query tokens of one sequence.
struct QueryTile {
    tokens: Range<usize>,
    first_position: usize,
}

impl QueryTile {
    fn num_chunks(&self) -> usize {
        (self.first_position + self.tokens.len()).div_ceil(CHUNK_KEYS)
    }

    fn num_partials(&self, shape: &PlanShape) -> usize {
        self.num_chunks() * self.tokens.len() * shape.num_heads
    }
}

fn tiles_of<'a>(
    shape: &PlanShape,
    batch: &'a Batch,
    seq: usize,
) -> impl Iterator<Item = (usize, QueryTile)> + use<'a> {
    let (query, step) = (batch.query_range(seq), shape.tokens_per_tile());
    query.clone().step_by(step).map(move |first| {
        let tokens = first..(first + step).min(query.end);
        (seq, QueryTile { tokens, first_position: batch.positions[first] as usize })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(sequences: &[(usize, u32)], enough_blocks: usize) -> Plan {
        let mut batch = Batch::new();
        for &(tokens, computed) in sequences {
            batch.push_sequence(&vec![0; tokens], computed, &[1; 200], 16);
        }
        let mut plan = Plan::default();
        plan.make(&PlanShape { num_heads: 8, num_kv_heads: 2, enough_blocks }, &batch);
        plan
    }

    #[test]
    fn every_token_is_in_one_item_where_there_are_enough() {
        let plan = plan(&[(40, 0), (1, 300)], 1);
        let tokens: Vec<_> = plan.items.iter().map(|item| (item.first_token, item.num_tokens)).collect();
        assert_eq!(tokens, [(0, 16), (16, 16), (32, 8), (40, 1)]);
        assert!(plan.folds.is_empty());
        assert_eq!((plan.items[3].block_table_start, plan.items[3].end_chunk), (200, 2));
    }

    #[test]
    fn few_tiles_are_split_and_their_partial_rows_follow_one_another() {
        let plan = plan(&[(1, 10), (2, 600)], 100);
        let partials: Vec<_> = plan.items.iter().map(|item| item.first_partial).collect();
        assert_eq!(partials, [NO_PARTIAL, 0, 16, 32]);
        let fold = |token, first_partial| FoldItem { token, first_partial, chunk_rows: 16, num_chunks: 3 };
        assert_eq!(plan.folds, [fold(1, 0), fold(2, 8)]);
    }

    #[test]
    fn split_work_is_filled_up_with_nothing_to_do() {
        let plan = plan(&[(1, 600), (1, 300), (1, 300)], 100);
        assert_eq!((plan.items.len(), plan.folds.len()), (8, 4));
        assert_eq!((plan.items[7], plan.folds[3]), (AttentionItem::zeroed(), FoldItem::zeroed()));
    }
}
