//! The way through a product: which panel, which span of columns and which tokens come next. The inner loops are
//! [`pairs`] for bf16 and [`quads`] for quantised weights, and [`quad_tiles`] for those on a matrix unit.
//!
//! ```text
//! panel      ├─ span 0 ─┤├─ span 1 ─┤ ...        32 rows; a span is 128 or 256 columns
//! tokens      t0..5  t5..10 ...                  a tile: their sums with all 32 rows stay in registers along a span
//! ```
//!
//! A span is walked by all tokens before the next, so its weights come from memory once and from the L1 cache after
//! that. With many tokens all panels walk a span before the next, so that the tokens' part of it stays in a cache too;
//! few tokens take one panel after another, a single stream from memory, and their sums stay on the matrix unit, if
//! there is one, along the whole panel. Either way the spans that come next are asked for meanwhile, as the processor
//! by itself stops at the end of every page, and before a stream's end what its thread will read then.

mod pairs;
mod quad_tiles;
mod quads;

use std::ops::Range;

use bytemuck::Zeroable;

use super::PANEL_ROWS;
use super::block::Block;
use crate::simd::{CACHE_LINE, Simd, TILE_TOKENS, TileUse};

/// Bytes by which memory is asked ahead for few tokens.
const STREAMED_AHEAD: usize = 8 << 10;
/// Most tokens of a tile on any instruction set.
const MAX_TILE_TOKENS: usize = 8;

/// Where rows of activations go: along the blocks of a span of a panel, from row `first` on.
#[derive(Clone, Copy)]
pub(super) struct Way<'a, B> {
    blocks: &'a [B],
    span: usize,
    first: usize,
    /// Whether a matrix unit takes the sums up with this span, as it still has those of the span before if not.
    is_start: bool,
    /// Whether it puts them back after it.
    is_end: bool,
}

/// Rows of activations in the form that blocks of type `B` multiply.
pub(super) trait Tokens<B>: Copy {
    /// Blocks of a span.
    const SPAN_BLOCKS: usize;

    /// Spans of a row.
    fn num_spans(&self) -> usize;

    /// Most tokens of a tile, as many as the registers hold sums for: up to [`MAX_TILE_TOKENS`].
    fn tile_tokens<S: Simd>() -> usize;

    /// Walks `T` rows, and adds their products to `sums`. Before every block it calls `meanwhile`.
    fn walk<S: Simd, const T: usize>(
        self,
        simd: S,
        way: Way<'_, B>,
        meanwhile: impl FnMut(),
        sums: &mut [[f32; PANEL_ROWS]; T],
    );

    /// What tiles of a matrix unit are shaped for.
    const TILE_USE: TileUse;
    /// Fewest tokens for which a matrix unit is used where there is one.
    const FEWEST_TILED: usize;
    /// Tokens that [`Self::walk_tiles`] walks at a time, and the most that are worth no order but that of the weights in
    /// memory.
    const WALKED_TOKENS: usize;

    /// As [`Self::walk`], with any number of rows, on a matrix unit whose tiles have as many tokens as there are, or
    /// all that they can.
    fn walk_tiles<S: Simd>(
        self,
        simd: S,
        tiles: &S::Tiles,
        way: Way<'_, B>,
        meanwhile: impl FnMut(),
        sums: &mut [[f32; PANEL_ROWS]],
    );
}

/// A matrix in panels of blocks.
pub(super) trait Blocks {
    /// What is multiplied.
    type Block: Block;
    /// Where the blocks of a span are made if they are not stored as they are multiplied.
    type Room: Zeroable;
    /// Whether they are.
    const ARE_MADE: bool;

    /// Panels.
    fn num_panels(&self) -> usize;

    /// Blocks of a panel.
    fn num_groups(&self) -> usize;

    /// What some blocks of a panel are stored as.
    fn stored(&self, panel: usize, groups: Range<usize>) -> &[u8];

    /// What is read first of a panel; nothing if it is beyond the last.
    #[inline(always)]
    fn beginning(&self, panel: usize) -> &[u8] {
        match panel < self.num_panels() {
            true => {
                let num_groups = STREAMED_AHEAD.div_ceil(size_of::<Self::Block>());
                self.stored(panel, 0..self.num_groups().min(num_groups))
            }
            false => &[],
        }
    }

    /// Blocks of a panel, at most as many as `room` is for. Before every block that is made it calls `meanwhile`.
    fn blocks<'a>(
        &'a self,
        panel: usize,
        groups: Range<usize>,
        room: &'a mut Self::Room,
        meanwhile: impl FnMut(),
    ) -> &'a [Self::Block];

    /// Adds to `sums[panel][t][r]` the product of row `r` of the panel with token `t`: the sum over its spans, in
    /// ascending order, of what [`Tokens::walk`] specifies. Every operation rounds in one order, so the bits are the
    /// same in every tile. `then` is what the thread will most likely read next.
    #[inline(always)]
    fn dot<S: Simd, X: Tokens<Self::Block>>(
        &self,
        simd: S,
        panels: Range<usize>,
        x: X,
        rows: Range<usize>,
        then: &[u8],
        sums: &mut [[f32; PANEL_ROWS]],
    ) {
        let (num_spans, num_tokens) = (x.num_spans(), rows.len());
        assert_eq!(num_spans, self.num_groups().div_ceil(X::SPAN_BLOCKS));
        assert_eq!(sums.len(), panels.len() * num_tokens);
        let streamed = num_tokens <= X::WALKED_TOKENS;
        // A streamed span is walked in less time than memory takes to answer.
        let span_bytes = X::SPAN_BLOCKS * size_of::<Self::Block>();
        let spans_ahead = if streamed { STREAMED_AHEAD.div_ceil(span_bytes) } else { 1 };
        let (outer, inner) = if streamed { (panels.len(), num_spans) } else { (num_spans, panels.len()) };
        let end_of = |num_spans: usize| self.num_groups().min(num_spans * X::SPAN_BLOCKS);
        let groups = |span: usize| end_of(span)..end_of(span + 1);
        simd.call(
            #[inline(always)]
            || {
                let is_tiled = S::HAS_TILES && num_tokens >= X::FEWEST_TILED;
                let tiles = is_tiled.then(|| simd.tiles(X::TILE_USE, num_tokens.min(TILE_TOKENS))).flatten();
                let walked_tokens = if tiles.is_some() { X::WALKED_TOKENS } else { X::tile_tokens::<S>() };
                let num_passes = usize::from(Self::ARE_MADE) + num_tokens.div_ceil(walked_tokens);
                let mut room = Self::Room::zeroed();
                for outer in 0..outer {
                    for inner in 0..inner {
                        let (index, span) = if streamed { (outer, inner) } else { (inner, outer) };
                        let panel = panels.start + index;
                        let sums = &mut sums[index * num_tokens..][..num_tokens];
                        let next = match span + spans_ahead {
                            ahead if ahead < num_spans || !streamed => self.stored(panel, groups(ahead)),
                            ahead if panel + 1 < panels.end => {
                                part(self.beginning(panel + 1), ahead - num_spans, spans_ahead)
                            }
                            ahead => part(then, ahead - num_spans, spans_ahead),
                        };
                        let mut prefetch = prefetch(simd, next, X::SPAN_BLOCKS * num_passes);
                        let blocks = self.blocks(panel, groups(span), &mut room, &mut prefetch);
                        let is_start = !streamed || span == 0;
                        let is_end = !streamed || span + 1 == num_spans;
                        let way = Way { blocks, span, first: rows.start, is_start, is_end };
                        walk_all(simd, tiles.as_ref(), x, way, prefetch, sums);
                    }
                }
            },
        );
    }
}

/// Walks all tokens, on a matrix unit if there are tiles for it.
#[inline(always)]
fn walk_all<S: Simd, B: Block, X: Tokens<B>>(
    simd: S,
    tiles: Option<&S::Tiles>,
    x: X,
    way: Way<'_, B>,
    mut meanwhile: impl FnMut(),
    sums: &mut [[f32; PANEL_ROWS]],
) {
    if let Some(tiles) = tiles {
        x.walk_tiles(simd, tiles, way, meanwhile, sums);
        return;
    }
    let most = X::tile_tokens::<S>();
    assert!(most <= MAX_TILE_TOKENS);
    let mut token = 0;
    while token < sums.len() {
        let way = Way { first: way.first + token, ..way };
        let tile = Tile { x, way, meanwhile: &mut meanwhile };
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

/// One of some equal parts of memory.
#[inline(always)]
fn part(bytes: &[u8], index: usize, num_parts: usize) -> &[u8] {
    bytes.chunks(bytes.len().div_ceil(num_parts).max(1)).nth(index).unwrap_or_default()
}

/// Asks for memory bit by bit, all of it in `num_calls` calls: memory takes only a few lines at a time, and what is
/// needed now would have to wait.
#[inline(always)]
fn prefetch<S: Simd>(simd: S, bytes: &[u8], num_calls: usize) -> impl FnMut() {
    let mut lines = bytes.chunks(CACHE_LINE);
    let lines_per_call = lines.len().div_ceil(num_calls.max(1));
    move || lines.by_ref().take(lines_per_call).for_each(|line| simd.prefetch(&line[0]))
}

/// Some tokens on their way.
struct Tile<'a, B, X, M> {
    x: X,
    way: Way<'a, B>,
    meanwhile: M,
}

impl<B: Block, X: Tokens<B>, M: FnMut()> Tile<'_, B, X, M> {
    /// Walks the first `T` tokens; their number, `T`.
    #[inline(always)]
    fn walk<S: Simd, const T: usize>(self, simd: S, sums: &mut [[f32; PANEL_ROWS]]) -> usize {
        let sums = sums.first_chunk_mut().expect("T tokens");
        self.x.walk::<S, T>(simd, self.way, self.meanwhile, sums);
        T
    }
}

/// The sums of rows 0..16 and 16..32.
#[inline(always)]
fn halves(sums: &mut [f32; PANEL_ROWS]) -> [&mut [f32; PANEL_ROWS / 2]; 2] {
    let (lower, upper) = sums.split_at_mut(PANEL_ROWS / 2);
    [lower, upper].map(|half| half.first_chunk_mut().expect("half a panel"))
}
