//! Quantised weights: a quad of columns of 32 rows meets a quad of a token, integers are summed exactly within a group
//! of 32 columns, where the weights have one scale, and f32 takes over from there.

use super::super::PANEL_ROWS;
use super::super::block::{QuantisedBlock, STEPS};
use super::{Tokens, Way, halves, quad_tiles};
use crate::operand::{QuantisedRows, SPAN_GROUPS, SpanRows};
use crate::simd::{Simd, TILE_TOKENS, TileUse};

impl<B: QuantisedBlock> Tokens<B> for QuantisedRows<'_> {
    const SPAN_BLOCKS: usize = SPAN_GROUPS;

    #[inline(always)]
    fn num_spans(&self) -> usize {
        self.num_spans()
    }

    #[inline(always)]
    fn tile_tokens<S: Simd>() -> usize {
        S::QUAD_TOKENS
    }

    const TILE_USE: TileUse = TileUse::Quads;
    /// Fewer are computed by vectors to the same bits.
    const FEWEST_TILED: usize = B::FEWEST_TILED;
    const WALKED_TOKENS: usize = TILE_TOKENS;

    /// The product is the same as that of [`Self::walk`].
    #[inline(always)]
    fn walk_tiles<S: Simd>(
        self,
        simd: S,
        tiles: &S::Tiles,
        Way { blocks, span, first, .. }: Way<'_, B>,
        meanwhile: impl FnMut(),
        sums: &mut [[f32; PANEL_ROWS]],
    ) {
        let rows = self.span(span, first..first + sums.len());
        match *blocks {
            [_, _, _, _] => quad_tiles::walk::<S, B, 4>(simd, tiles, blocks, rows, meanwhile, sums),
            [_, _, _] => quad_tiles::walk::<S, B, 3>(simd, tiles, blocks, rows, meanwhile, sums),
            [_, _] => quad_tiles::walk::<S, B, 2>(simd, tiles, blocks, rows, meanwhile, sums),
            [_] => quad_tiles::walk::<S, B, 1>(simd, tiles, blocks, rows, meanwhile, sums),
            _ => panic!("a span has 1 to {SPAN_GROUPS} groups"),
        }
    }

    /// A span's product is `(Σ over its groups  f32(Σ w·x) · scale_w) · scale_x`. The inner sum is exact, the outer one
    /// runs from zero in f32, as does that of spans, both by fused multiply-adds, so the bits are the same on every
    /// instruction set.
    #[inline(always)]
    fn walk<S: Simd, const T: usize>(
        self,
        simd: S,
        Way { blocks, span, first, .. }: Way<'_, B>,
        mut meanwhile: impl FnMut(),
        sums: &mut [[f32; PANEL_ROWS]; T],
    ) {
        assert!(blocks.len() <= SPAN_GROUPS);
        let rows = self.span(span, first..first + T);
        match S::QUAD_HALVES {
            1 => {
                for half in 0..2 {
                    walk_halves::<S, B, T, 1>(simd, blocks, rows, half, &mut meanwhile, sums);
                }
            }
            _ => walk_halves::<S, B, T, 2>(simd, blocks, rows, 0, meanwhile, sums),
        }
    }
}

/// Walks `HALVES` halves of a panel from one on.
#[inline(always)]
fn walk_halves<S: Simd, B: QuantisedBlock, const T: usize, const HALVES: usize>(
    simd: S,
    blocks: &[B],
    SpanRows { quads, starts, scales }: SpanRows<'_>,
    first_half: usize,
    mut meanwhile: impl FnMut(),
    sums: &mut [[f32; PANEL_ROWS]; T],
) {
    let quads: &[_; T] = quads.first_chunk().expect("T rows");
    let starts: &[_; T] = starts.first_chunk().expect("T rows");
    let mut partial = [[simd.zero(); HALVES]; T];
    for (group, block) in blocks.iter().enumerate() {
        meanwhile();
        let mut ints = [[simd.ints(0); HALVES]; T];
        if S::MULTIPLIES_UNSIGNED {
            for t in 0..T {
                ints[t] = [simd.ints(starts[t][group]); HALVES];
            }
        }
        for step in 0..STEPS {
            let mut weights = [block.quads(simd, step, first_half); HALVES];
            for (half, weights) in weights.iter_mut().enumerate().skip(1) {
                *weights = block.quads(simd, step, first_half + half);
            }
            simd.dot_two_quads(
                &mut ints,
                weights,
                #[inline(always)]
                |t| [quads[t][group][step], quads[t][group][step + STEPS]],
            );
        }
        simd.by_token(&mut ints);
        let block_scales = block.scales();
        for half in 0..HALVES {
            let scale = simd.floats(&block_scales[first_half + half]);
            for t in 0..T {
                partial[t][half] = simd.add_ints(partial[t][half], ints[t][half], scale);
            }
        }
    }
    for t in 0..T {
        let halves = halves(&mut sums[t]).into_iter().skip(first_half);
        for (out, partial) in halves.zip(partial[t]) {
            simd.add_scaled(out, partial, scales[t]);
        }
    }
}
