//! How a step's attention is cut into work: tiles of query tokens, over all that they see or over one chunk of keys.
//!
//! A tile that walks all its keys needs no second pass; one tile per chunk keeps the whole device busy. The kernels give
//! the same bits either way (`kernels/attention.cuh`), so this chooses by speed alone: what decodes is always split, for
//! each of its items is one warp; a prompt is split if it has few tiles.
//!
//! The number of chunks grows with the context, and a recorded launch has a fixed number of blocks: split work is filled
//! up to a rounded number with items that have nothing to do.

use std::cmp::Reverse;
use std::ops::Range;

use backend::Batch;
use bytemuck::Zeroable;

use crate::kernels::{AttentionItem, FoldItem};

/// Keys of a chunk.
const CHUNK_KEYS: usize = 256;
const NO_PARTIAL: i32 = -1;

/// Rows of partial results there is room for: a token and head of a chunk each, as of 256 sequences of 4096 tokens and
/// 32 heads. What does not fit is not split.
pub(crate) const MAX_PARTIALS: usize = 1 << 17;

/// The sizes of a model's attention that its work is planned by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PlanShape {
    pub(crate) num_heads: usize,
    pub(crate) num_kv_heads: usize,
    /// Most query rows, tokens times query heads of one kv head, of an item that decodes.
    pub(crate) decode_rows: usize,
    /// The same of a tile of a prompt.
    pub(crate) prefill_rows: usize,
    /// Blocks that keep a device busy with a prompt.
    pub(crate) enough_blocks: usize,
}

impl PlanShape {
    fn group(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }

    fn tokens_per_tile(&self) -> usize {
        self.prefill_rows / self.group()
    }

    fn decodes(&self, tile: &QueryTile) -> bool {
        tile.tokens.len() * self.group() <= self.decode_rows
    }
}

/// One step's work.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) decode_items: Vec<AttentionItem>,
    pub(crate) prefill_items: Vec<AttentionItem>,
    /// Per token of a split tile; empty if none is split.
    pub(crate) folds: Vec<FoldItem>,
}

impl Plan {
    /// Plans a batch; keeps the allocations.
    pub(crate) fn make(&mut self, shape: &PlanShape, batch: &Batch) {
        self.decode_items.clear();
        self.prefill_items.clear();
        self.folds.clear();
        let tiles = || (0..batch.num_seqs()).flat_map(|seq| tiles_of(shape, batch, seq));
        let num_wide = tiles().filter(|(_, tile)| !shape.decodes(tile)).count();
        let splits_wide = num_wide * shape.num_kv_heads < shape.enough_blocks;
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
            let decodes = shape.decodes(&tile);
            let items = if decodes { &mut self.decode_items } else { &mut self.prefill_items };
            let end_partial = first_partial + tile.num_partials(shape);
            if tile.num_chunks() > 1 && (decodes || splits_wide) && end_partial <= MAX_PARTIALS {
                push_split(items, &mut self.folds, shape, &tile, item, first_partial);
                first_partial = end_partial;
            } else {
                items.push(item);
            }
        }
        // The device takes items in their order: what takes longest must not come last.
        self.prefill_items.sort_by_key(|item| Reverse(item.end_chunk - item.first_chunk));
        if !self.folds.is_empty() {
            self.decode_items.resize(rounded_up(self.decode_items.len()), AttentionItem::zeroed());
            self.prefill_items.resize(rounded_up(self.prefill_items.len()), AttentionItem::zeroed());
            self.folds.resize(rounded_up(self.folds.len()), FoldItem::zeroed());
        }
    }
}

/// `count` rounded up to one of four numbers from one power of two to the next: few to record, and few blocks idle.
fn rounded_up(count: usize) -> usize {
    count.next_multiple_of((count.next_power_of_two() / 8).max(1))
}

fn push_split(
    items: &mut Vec<AttentionItem>,
    folds: &mut Vec<FoldItem>,
    shape: &PlanShape,
    tile: &QueryTile,
    item: AttentionItem,
    first_partial: usize,
) {
    let chunk_rows = tile.tokens.len() * shape.num_heads;
    folds.extend(tile.tokens.clone().enumerate().map(|(index, token)| FoldItem {
        token: token as i32,
        first_partial: (first_partial + index * shape.num_heads) as i32,
        chunk_rows: chunk_rows as i32,
        num_chunks: item.end_chunk,
    }));
    items.extend((0..item.end_chunk).map(|chunk| AttentionItem {
        first_chunk: chunk,
        end_chunk: chunk + 1,
        first_partial: first_partial as i32 + chunk * chunk_rows as i32,
        ..item
    }));
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
        let shape =
            PlanShape { num_heads: 8, num_kv_heads: 2, decode_rows: 16, prefill_rows: 64, enough_blocks };
        plan.make(&shape, &batch);
        plan
    }

    #[test]
    fn every_token_is_in_one_item_where_there_are_enough() {
        let plan = plan(&[(40, 0), (1, 200)], 1);
        let tokens = |items: &[AttentionItem]| {
            items.iter().map(|item| (item.first_token, item.num_tokens)).collect::<Vec<_>>()
        };
        assert_eq!(tokens(&plan.prefill_items), [(0, 16), (16, 16), (32, 8)]);
        assert_eq!(tokens(&plan.decode_items), [(40, 1)]);
        assert!(plan.folds.is_empty());
        assert_eq!((plan.decode_items[0].block_table_start, plan.decode_items[0].end_chunk), (200, 1));
    }

    #[test]
    fn tiles_of_prompts_are_ordered_by_their_keys() {
        let plan = plan(&[(16, 0), (40, 470), (16, 600)], 1);
        let chunks: Vec<_> =
            plan.prefill_items.iter().map(|item| (item.first_token, item.end_chunk)).collect();
        assert_eq!(chunks, [(56, 3), (16, 2), (32, 2), (48, 2), (0, 1)]);
    }

    #[test]
    fn what_decodes_is_split_and_partial_rows_follow_one_another() {
        let plan = plan(&[(1, 10), (2, 600)], 1);
        let partials: Vec<_> = plan.decode_items.iter().map(|item| item.first_partial).collect();
        assert_eq!(partials, [NO_PARTIAL, 0, 16, 32]);
        let fold = |token, first_partial| FoldItem { token, first_partial, chunk_rows: 16, num_chunks: 3 };
        assert_eq!(plan.folds, [fold(1, 0), fold(2, 8)]);
    }

    #[test]
    fn a_prompt_is_split_if_it_has_few_tiles() {
        let num_items = |enough_blocks| plan(&[(32, 480)], enough_blocks).prefill_items.len();
        assert_eq!((num_items(4), num_items(5)), (2, 4));
    }

    #[test]
    fn what_has_no_room_is_not_split() {
        let num_fitting = MAX_PARTIALS / (8 * 2);
        let plan = plan(&vec![(1, 300); num_fitting + 1], 1);
        assert_eq!(plan.decode_items[2 * num_fitting].end_chunk, 2);
        assert_eq!(plan.decode_items[2 * num_fitting].first_partial, NO_PARTIAL);
    }

    #[test]
    fn split_work_is_filled_up_with_nothing_to_do() {
        let plan = plan(&[(1, 1000), (1, 1000), (1, 300)], 1);
        assert_eq!((plan.decode_items.len(), plan.folds.len()), (10, 3));
        let plan = super::tests::plan(&[(1, 1000), (1, 1000), (1, 1000), (1, 300), (1, 300), (1, 300)], 1);
        assert_eq!((plan.decode_items.len(), plan.folds.len()), (20, 6));
        assert_eq!(plan.decode_items[18], AttentionItem::zeroed());
    }
}
