//! bf16 weights: a pair of columns of 32 rows meets a pair of a token, and f32 takes the sums.

use super::super::PANEL_ROWS;
use super::super::block::Bf16Block;
use super::{Tokens, Way, halves};
use crate::operand::{BF16_SPAN_BLOCKS, Bf16Rows};
use crate::simd::{Simd, TILE_TOKENS, TileUse, Tiles};

impl Tokens<Bf16Block> for Bf16Rows<'_> {
    const SPAN_BLOCKS: usize = BF16_SPAN_BLOCKS;

    #[inline(always)]
    fn num_spans(&self) -> usize {
        self.num_spans()
    }

    #[inline(always)]
    fn tile_tokens<S: Simd>() -> usize {
        S::PAIR_TOKENS
    }

    const TILE_USE: TileUse = TileUse::Pairs;
    /// Any, since its sums have another order than those of [`Self::walk`].
    const FEWEST_TILED: usize = 1;
    const WALKED_TOKENS: usize = 2 * TILE_TOKENS;

    /// A product is that of [`Tiles::add_pairs`].
    #[inline(always)]
    fn walk_tiles<S: Simd>(
        self,
        _: S,
        tiles: &S::Tiles,
        way: Way<'_, Bf16Block>,
        mut meanwhile: impl FnMut(),
        sums: &mut [[f32; PANEL_ROWS]],
    ) {
        assert!(way.blocks.len() <= BF16_SPAN_BLOCKS);
        let num_tokens = sums.len();
        let x = &self.span(way.span)[way.first..][..num_tokens];
        // Two tiles of tokens share what is loaded of the weights. Parts of about the same size: only a part of all
        // tokens can be too small for two tiles, which may overlap.
        let num_parts = num_tokens.div_ceil(Self::WALKED_TOKENS);
        for part in 0..num_parts {
            let [start, end] = [part, part + 1].map(|part| part * num_tokens / num_parts);
            if end - start <= tiles.num_tokens() {
                walk_part(tiles, way, x, [start], &mut meanwhile, sums);
            } else {
                walk_part(tiles, way, x, [start, end - tiles.num_tokens()], &mut meanwhile, sums);
            }
        }
    }

    /// A span's product is `Σ over its columns  w · x`, from zero in f32: of each pair first the odd column, then the
    /// even one.
    #[inline(always)]
    fn walk<S: Simd, const T: usize>(
        self,
        simd: S,
        Way { blocks, span, first, .. }: Way<'_, Bf16Block>,
        mut meanwhile: impl FnMut(),
        sums: &mut [[f32; PANEL_ROWS]; T],
    ) {
        assert!(blocks.len() <= BF16_SPAN_BLOCKS);
        let x: &[_; T] = self.span(span)[first..].first_chunk().expect("T rows");
        let mut partial = [[simd.zero(); 2]; T];
        for (group, block) in blocks.iter().enumerate() {
            meanwhile();
            let [lower, upper] = &block.halves;
            for (pair, (lower, upper)) in lower.iter().zip(upper).enumerate() {
                let weights = [simd.pairs(lower), simd.pairs(upper)];
                for t in 0..T {
                    for half in 0..2 {
                        partial[t][half] = simd.dot_pairs(partial[t][half], weights[half], x[t][group][pair]);
                    }
                }
            }
        }
        for t in 0..T {
            for (half, out) in halves(&mut sums[t]).into_iter().enumerate() {
                simd.add_scaled(out, partial[t][half], 1.0);
            }
        }
    }
}

/// Walks the tokens of one tile or two.
#[inline(always)]
fn walk_part<T: Tiles, X, const TILES: usize>(
    tiles: &T,
    way: Way<'_, Bf16Block>,
    x: &[X],
    firsts: [usize; TILES],
    meanwhile: impl FnMut(),
    sums: &mut [[f32; PANEL_ROWS]],
) {
    if way.is_start {
        tiles.take_sums(sums, firsts);
    }
    tiles.add_pairs(way.blocks.iter().map(|block| &block.halves), x, firsts, meanwhile);
    if way.is_end {
        tiles.put_sums(sums, firsts);
    }
}
