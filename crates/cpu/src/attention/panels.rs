//! Attention on a matrix unit: a chunk's keys and values as panels of weights, which meet the queries of a tile, and
//! their weights, as tokens.
//!
//! ```text
//! keys      [32 features][pair of features][position of the chunk]      rows of weights are positions
//! values    [32 features][pair of positions][feature]                   rows of weights are features
//! ```
//!
//! Sums have the order of [`Tiles::add_pairs`]: of 32 features, or of a chunk's positions, at a time. A weight is the sum
//! of two numbers in bf16, as one alone would cost more precision than everything else in attention; all first numbers
//! of a chunk are multiplied before the second.

use half::bf16;

use super::scores::{GROUPS, KeyLanes};
use super::softmax::{FEATURES, Softmax, Values};
use super::{CHUNK, QUERIES, Query};
use crate::kv::MAX_HEAD_DIM;
use crate::numbers::Element;
use crate::simd::{LANE_ROWS, PAIR, PanelPairs, RowPairs, Simd, TILE_TOKENS, TileUse, Tiles};

const _: () = assert!(GROUPS == 2 && CHUNK == 2 * LANE_ROWS && FEATURES == CHUNK);

/// Room for a chunk.
pub(super) struct Panels {
    keys: [PanelPairs; MAX_HEAD_DIM / FEATURES],
    values: [PanelPairs; MAX_HEAD_DIM / FEATURES],
    weights: [[[bf16; CHUNK]; PARTS]; TILE_TOKENS],
}

/// Numbers in bf16 whose sum is a weight.
const PARTS: usize = 2;

/// The tiles for so many queries; `None` if the machine has none.
#[inline(always)]
pub(super) fn tiles<S: Simd>(simd: S, num_queries: usize) -> Option<S::Tiles> {
    simd.tiles(TileUse::Pairs, num_queries)
}

impl Panels {
    pub(super) fn new() -> Self {
        let panels = || [[[RowPairs::default(); 2]; LANE_ROWS]; MAX_HEAD_DIM / FEATURES];
        Self { keys: panels(), values: panels(), weights: [[[bf16::ZERO; CHUNK]; PARTS]; TILE_TOKENS] }
    }

    /// Whether heads of so many features are computed here on an instruction set.
    pub(super) const fn fit<S: Simd>(head_dim: usize) -> bool {
        S::HAS_TILES && head_dim.is_multiple_of(FEATURES)
    }

    /// As [`score`](super::scores::score), for as many queries as the tiles have tokens.
    #[inline(always)]
    pub(super) fn score<T: Tiles>(
        &mut self,
        tiles: &T,
        keys: [KeyLanes<'_>; GROUPS],
        queries: &[Query],
        scores: &mut [[f32; CHUNK]],
    ) {
        let [lower, upper] = keys.map(|group| group.as_chunks::<LANE_ROWS>().0);
        let panels = &mut self.keys[..lower.len()];
        for (panel, halves) in panels.iter_mut().zip(lower.iter().zip(upper)) {
            for (pairs, (&lower, &upper)) in panel.iter_mut().zip(halves.0.iter().zip(halves.1)) {
                *pairs = [lower, upper];
            }
        }
        tiles.dot_pairs(panels.iter(), queries, scores);
    }

    /// As [`Softmax::add_values`].
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    pub(super) fn add_values<T: Tiles>(
        &mut self,
        tiles: &T,
        scales: [f32; QUERIES],
        weights: &[[f32; CHUNK]],
        first_lane: usize,
        values: &Values<'_>,
        head_dim: usize,
        softmax: &mut Softmax,
    ) {
        // Cut off, not rounded: the second number has what the first lacks.
        let upper_half = |x: f32| bf16::from_bits((x.to_bits() >> 16) as u16);
        let parts = &mut self.weights[..weights.len()];
        for ([first, second], weights) in parts.iter_mut().zip(weights) {
            for ((first, second), &weight) in first.iter_mut().zip(second).zip(weights) {
                *first = upper_half(weight);
                *second = upper_half(weight - Element::to_f32(*first));
            }
        }
        // What lies in other lanes weighs nothing, but might not be finite.
        const NOTHING: &[bf16] = &[bf16::ZERO; MAX_HEAD_DIM];
        let value = |lane: usize| match lane.checked_sub(first_lane) {
            Some(index) if index < values.len() => values[index],
            _ => NOTHING,
        };
        let panels = &mut self.values[..head_dim / FEATURES];
        for pair in 0..CHUNK / PAIR {
            let [even, odd] = [value(PAIR * pair), value(PAIR * pair + 1)];
            let features = even.as_chunks::<FEATURES>().0.iter().zip(odd.as_chunks::<FEATURES>().0);
            for (panel, (even, odd)) in panels.iter_mut().zip(features) {
                // As integers, for which compilers find the vector instructions.
                let mut pairs = [0; FEATURES];
                for (pair, (even, odd)) in pairs.iter_mut().zip(even.iter().zip(odd)) {
                    *pair = u32::from(odd.to_bits()) << 16 | u32::from(even.to_bits());
                }
                panel[pair] = bytemuck::cast(pairs);
            }
        }
        for (panel, sums) in panels.iter().zip(softmax.blocks(head_dim)) {
            let mut products = [[0.0; FEATURES]; TILE_TOKENS];
            tiles.dot_pairs([panel; PARTS].into_iter(), parts, &mut products);
            for ((sums, products), scale) in sums.iter_mut().zip(&products[..weights.len()]).zip(scales) {
                sums.iter_mut().zip(products).for_each(|(sum, product)| *sum = *sum * scale + product);
            }
        }
    }
}
