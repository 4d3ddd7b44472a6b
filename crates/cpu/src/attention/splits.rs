//! Contexts cut at fixed positions, so that a step of few tokens has work for every thread.
//!
//! A partial result is what one split is to one query token and one kv head: of each query head of the group a maximum,
//! a sum and a vector of values, see [`Softmax`]. They are numbered `[split of the step][kv_head]`, the splits of a
//! token one after another.

use std::ops::Range;

use backend::Batch;

use super::CHUNK;
use super::softmax::Softmax;
use crate::kv::KvCache;

/// Positions per split.
const SPLIT: usize = 512;

const _: () = assert!(SPLIT.is_multiple_of(CHUNK));

/// How the contexts of a step are split: work for more tasks than there are query tokens and kv heads.
#[derive(Default)]
pub(crate) struct Splits {
    /// `[tokens + 1]` splits before each token.
    starts: Vec<usize>,
    num_kv_heads: usize,
    /// Numbers of a partial result: of each query head a maximum, a sum and a vector of values.
    width: usize,
}

impl Splits {
    /// Counts the splits of a step.
    pub(crate) fn count(&mut self, batch: &Batch, kv: &KvCache) {
        self.num_kv_heads = kv.shape.num_kv_heads;
        self.width = kv.group_len() * Softmax::width(kv.shape.head_dim);
        let mut end = 0;
        let counts = batch.positions.iter().map(|&position| split_range(&visible(kv, position)).len());
        let ends = counts.map(|count| {
            end += count;
            end
        });
        self.starts.clear();
        self.starts.push(0);
        self.starts.extend(ends);
    }

    /// Whether some token has more than one.
    pub(crate) fn are_many(&self) -> bool {
        self.num_splits() >= self.starts.len()
    }

    /// Numbers of a partial result.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// Partial results of the step.
    pub(crate) fn num_items(&self) -> usize {
        self.num_splits() * self.num_kv_heads
    }

    fn num_splits(&self) -> usize {
        self.starts.last().copied().unwrap_or(0)
    }

    /// The query token, the kv head and, counted from the token's first, the split of a partial result.
    pub(super) fn item(&self, item: usize) -> (usize, usize, usize) {
        let (split, kv_head) = (item / self.num_kv_heads, item % self.num_kv_heads);
        let row = self.starts.partition_point(|&start| start <= split) - 1;
        (row, kv_head, split - self.starts[row])
    }

    /// The partial results of a query token for a kv head.
    pub(super) fn items(&self, row: usize, kv_head: usize) -> impl Iterator<Item = usize> {
        (self.starts[row]..self.starts[row + 1]).map(move |split| split * self.num_kv_heads + kv_head)
    }
}

/// The positions that a query token sees.
pub(super) fn visible(kv: &KvCache, position: u32) -> Range<usize> {
    let end = position as usize + 1;
    end.saturating_sub(kv.shape.sliding_window.map_or(usize::MAX, |window| window as usize))..end
}

/// The splits that have a visible position.
pub(super) fn split_range(visible: &Range<usize>) -> Range<usize> {
    visible.start / SPLIT..visible.end.div_ceil(SPLIT)
}

/// The visible part of a split, counted from the first visible one.
pub(super) fn part(visible: &Range<usize>, split: usize) -> Range<usize> {
    let start = (split_range(visible).start + split) * SPLIT;
    visible.start.max(start)..visible.end.min(start + SPLIT)
}
