//! The way through a product: which panel, which span of columns and which tokens come next. The inner loops are
//! [`pairs`] for bf16 and [`quads`] for quantised weights.
//!
//! ```text
//! panel      ├─ span 0 ─┤├─ span 1 ─┤ ...        32 rows; a span is 128 or 256 columns
//! tokens      t0..5  t5..10 ...                  a tile: their sums with all 32 rows stay in registers along a span
//! ```
//!
//! A span is walked by all tokens before the next, so its weights come from memory once and from the L1 cache after
//! that. With many tokens all panels walk a span before the next, so that the tokens' part of it stays in a cache too;
//! few tokens take one panel after another, each a single stream from memory.

mod pairs;
mod quads;

use std::ops::Range;

use super::block::Block;
use super::{PANEL_ROWS, Panels};
use crate::simd::Simd;

/// Most tokens that are worth no order but that of the weights in memory.
const STREAMED_TOKENS: usize = 4;
/// Most tokens of a tile on any instruction set.
const MAX_TILE_TOKENS: usize = 8;
/// Bytes of a cache line.
const LINE: usize = 64;

/// Rows of activations in the form that blocks of type `B` multiply.
pub(super) trait Tokens<B>: Copy {
    /// Blocks of a span.
    const SPAN_BLOCKS: usize;

    /// Spans of a row.
    fn num_spans(&self) -> usize;

    /// Most tokens of a tile, as many as the registers hold sums for: up to [`MAX_TILE_TOKENS`].
    fn tile_tokens<S: Simd>() -> usize;

    /// Walks `T` rows, from `first` on, along the blocks of a span, and adds their products to `sums`. Before every
    /// block it calls `meanwhile`.
    fn walk<S: Simd, const T: usize>(
        self,
        simd: S,
        blocks: &[B],
        span: usize,
        first: usize,
        meanwhile: impl FnMut(),
        sums: &mut [[f32; PANEL_ROWS]; T],
    );
}

impl<B: Block> Panels<B> {
    /// Adds to `sums[panel][t][r]` the product of row `r` of the panel with token `t`: the sum over its spans, in
    /// ascending order, of what [`Tokens::walk`] specifies. Every operation rounds in one order, so the bits are the
    /// same in every tile.
    #[inline(always)]
    pub(super) fn dot<S: Simd, X: Tokens<B>>(
        &self,
        simd: S,
        panels: Range<usize>,
        x: X,
        rows: Range<usize>,
        sums: &mut [[f32; PANEL_ROWS]],
    ) {
        let (num_spans, num_tokens) = (x.num_spans(), rows.len());
        assert_eq!(num_spans, self.num_groups.div_ceil(X::SPAN_BLOCKS));
        assert_eq!(sums.len(), panels.len() * num_tokens);
        let streamed = num_tokens <= STREAMED_TOKENS;
        let (outer, inner) = if streamed { (panels.len(), num_spans) } else { (num_spans, panels.len()) };
        simd.call(
            #[inline(always)]
            || {
                for outer in 0..outer {
                    for inner in 0..inner {
                        let (index, span) = if streamed { (outer, inner) } else { (inner, outer) };
                        let panel = panels.start + index;
                        let sums = &mut sums[index * num_tokens..][..num_tokens];
                        let next = match streamed {
                            true => &[][..],
                            false => self.span::<X>(panel, span + 1),
                        };
                        walk_all(simd, self.span::<X>(panel, span), x, span, rows.start, next, sums);
                    }
                }
            },
        );
    }

    /// The blocks of one span of a panel; none beyond the last.
    #[inline(always)]
    fn span<X: Tokens<B>>(&self, panel: usize, span: usize) -> &[B] {
        self.panel(panel).chunks(X::SPAN_BLOCKS).nth(span).unwrap_or_default()
    }
}

/// Walks all tokens, from row `first` on, along the blocks of a span, and asks for the next span's meanwhile.
#[inline(always)]
fn walk_all<S: Simd, B: Block, X: Tokens<B>>(
    simd: S,
    blocks: &[B],
    x: X,
    span: usize,
    first: usize,
    next: &[B],
    sums: &mut [[f32; PANEL_ROWS]],
) {
    let most = X::tile_tokens::<S>();
    assert!(most <= MAX_TILE_TOKENS);
    let mut next_lines = bytemuck::cast_slice::<B, u8>(next).chunks(LINE);
    let num_walked = blocks.len() * sums.len().div_ceil(most);
    let lines_per_block = next_lines.len().div_ceil(num_walked.max(1));
    // A few at a time: memory takes no more, and what is needed now would have to wait.
    let mut prefetch = || next_lines.by_ref().take(lines_per_block).for_each(|line| simd.prefetch(&line[0]));
    let mut token = 0;
    while token < sums.len() {
        let tile = Tile { blocks, x, span, first: first + token, meanwhile: &mut prefetch };
        let sums = &mut sums[token..];
        // Tiles of about the same size: the few sums of a small one would wait for each other.
        token += match sums.len().div_ceil(sums.len().div_ceil(most)) {
            1 => tile.walk::<S, 1>(simd, sums),
            2 => tile.walk::<S, 2>(simd, sums),
            3 => tile.walk::<S, 3>(simd, sums),
            4 => tile.walk::<S, 4>(simd, sums),
            5 if most > 4 => tile.walk::<S, 5>(simd, sums),
            6 if most > 4 => tile.walk::<S, 6>(simd, sums),
            7 if most > 4 => tile.walk::<S, 7>(simd, sums),
            8 if most > 4 => tile.walk::<S, 8>(simd, sums),
            size => unreachable!("a tile of {size} tokens where {most} are the most"),
        };
    }
}

/// The blocks of a span and the tokens from one on.
struct Tile<'a, B, X, M> {
    blocks: &'a [B],
    x: X,
    span: usize,
    first: usize,
    meanwhile: M,
}

impl<B: Block, X: Tokens<B>, M: FnMut()> Tile<'_, B, X, M> {
    /// Walks the first `T` tokens; their number, `T`.
    #[inline(always)]
    fn walk<S: Simd, const T: usize>(self, simd: S, sums: &mut [[f32; PANEL_ROWS]]) -> usize {
        let sums = sums.first_chunk_mut().expect("T tokens");
        self.x.walk::<S, T>(simd, self.blocks, self.span, self.first, self.meanwhile, sums);
        T
    }
}

/// The sums of rows 0..16 and 16..32.
#[inline(always)]
fn halves(sums: &mut [f32; PANEL_ROWS]) -> [&mut [f32; PANEL_ROWS / 2]; 2] {
    let (lower, upper) = sums.split_at_mut(PANEL_ROWS / 2);
    [lower, upper].map(|half| half.first_chunk_mut().expect("half a panel"))
}
