//! Quantised weights on a matrix unit, which sums the integers of a group; vectors scale the sums.
//!
//! ```text
//! matrix unit    tile 0: groups 0 1 2 3 │ tile 1: groups 0 1 2 3 │ ...      16 tokens × 32 weight rows
//! vectors                               │ tile 0: its tokens, a  │ ...
//!                                       │ quarter with each group│
//! ```

use std::mem::MaybeUninit;
use std::ops::Range;

use super::super::block::QuantisedBlock;
use super::super::{GROUP, PANEL_ROWS};
use super::halves;
use crate::operand::SpanRows;
use crate::simd::{LANE_ROWS, PanelInts, QUAD, Simd, TILE_TOKENS, Tiles};

/// Integer sums of a tile's tokens, of each group of a span.
type TileInts<const GROUPS: usize> = [[MaybeUninit<PanelInts>; TILE_TOKENS]; GROUPS];

/// Walks all tokens along the `GROUPS` blocks of a span on a matrix unit.
///
/// While the matrix unit multiplies a tile, the vector units scale the integers of the one before, a share with each
/// group: left to itself, the processor would do one after the other, since neither fits into what it looks ahead.
#[inline(always)]
pub(super) fn walk<S: Simd, B: QuantisedBlock, const GROUPS: usize>(
    simd: S,
    tiles: &S::Tiles,
    blocks: &[B],
    rows: SpanRows<'_>,
    mut meanwhile: impl FnMut(),
    sums: &mut [[f32; PANEL_ROWS]],
) {
    let mut room = [const { MaybeUninit::uninit() }; GROUPS];
    let mut scales = [[simd.zero(); 2]; GROUPS];
    let mut weights = [&[[[0; LANE_ROWS * QUAD]; 2]; GROUP / QUAD]; GROUPS];
    for (group, (block, room)) in blocks.iter().zip(&mut room).enumerate() {
        weights[group] = block.signed_quads(room);
        scales[group] = [simd.floats(&block.scales()[0]), simd.floats(&block.scales()[1])];
    }
    let mut ints: [TileInts<GROUPS>; 2] = [const { [[MaybeUninit::uninit(); TILE_TOKENS]; GROUPS] }; 2];
    let [mut ints, mut previous_ints] = ints.each_mut();
    let mut previous = Previous { first: 0, tokens: 0..0 };
    while previous.tokens.end < sums.len() {
        let num_tokens = tiles.num_tokens();
        let first = previous.tokens.end.min(sums.len() - num_tokens);
        let x = &rows.quads[first..][..num_tokens];
        for (group, weights) in weights.into_iter().enumerate() {
            meanwhile();
            if group.is_multiple_of(2) {
                tiles.dot_quads::<_, 0>(weights, x, group);
            } else {
                tiles.dot_quads::<_, 1>(weights, x, group);
            }
            if group > 0 {
                store(tiles, group - 1, ints);
            }
            let share = previous.share(group, GROUPS);
            fold(simd, previous_ints, previous.first, share, &scales, rows.scales, sums);
        }
        store(tiles, GROUPS - 1, ints);
        previous = Previous { first, tokens: previous.tokens.end..first + num_tokens };
        std::mem::swap(&mut ints, &mut previous_ints);
    }
    fold(simd, previous_ints, previous.first, previous.tokens.clone(), &scales, rows.scales, sums);
}

/// The tile before, whose integers are stored but not yet scaled.
struct Previous {
    /// Its first token.
    first: usize,
    /// Those that no tile before it had.
    tokens: Range<usize>,
}

impl Previous {
    /// One of `num_shares` equal shares of the tokens, or nearly so.
    #[inline(always)]
    fn share(&self, index: usize, num_shares: usize) -> Range<usize> {
        let end_of =
            |num_shares_before| self.tokens.start + self.tokens.len() * num_shares_before / num_shares;
        end_of(index)..end_of(index + 1)
    }
}

/// Stores the integers of a group, which are in the set of its parity.
#[inline(always)]
fn store<T: Tiles, const GROUPS: usize>(tiles: &T, group: usize, ints: &mut TileInts<GROUPS>) {
    if group.is_multiple_of(2) {
        tiles.store_ints::<0>(&mut ints[group]);
    } else {
        tiles.store_ints::<1>(&mut ints[group]);
    }
}

/// Scales integers of some tokens of a tile, which begins with `first`, and adds them to the tokens' sums.
#[inline(always)]
fn fold<S: Simd, const GROUPS: usize>(
    simd: S,
    ints: &TileInts<GROUPS>,
    first: usize,
    tokens: Range<usize>,
    weight_scales: &[[S::Floats; 2]; GROUPS],
    token_scales: &[f32],
    sums: &mut [[f32; PANEL_ROWS]],
) {
    for token in tokens {
        for (half, out) in halves(&mut sums[token]).into_iter().enumerate() {
            let mut partial = simd.zero();
            for group in 0..GROUPS {
                // SAFETY: the tile's tokens were stored, in every group, before it became the previous one.
                let ints = unsafe { ints[group][token - first].assume_init_ref() };
                partial = simd.add_ints(partial, simd.load_ints(&ints.0[half]), weight_scales[group][half]);
            }
            simd.add_scaled(out, partial, token_scales[token]);
        }
    }
}
