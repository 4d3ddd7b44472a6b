//! The inner loop of quantised products: panels of 32 rows × up to 128 tokens.
//!
//! Integers are summed exactly within a group of 32 columns, where the weights have one scale; f32 takes over from
//! there. A span of 128 columns, over which the tokens have one scale, is walked by all tokens before the next, so
//! its weights come from memory once and from the L1 cache after that. With many tokens all panels walk a span before
//! the next, so that the tokens' part of it stays there too; few tokens take one panel after another, each a single
//! stream from memory.

use std::ops::Range;

use super::Panels;
use super::block::{Block, STEPS};
use crate::dot::MAX_ROWS;
use crate::operand::{QuantisedRows, SPAN_GROUPS, SpanRows};
use crate::simd::{QUAD_ROWS, Simd};

/// Most tokens that are worth no order but that of the weights in memory.
const STREAMED_TOKENS: usize = 4;
/// Bytes of a cache line.
const LINE: usize = 64;

impl<B: Block> Panels<B> {
    /// Adds to `sums[panel][t][r]` the product of row `r` of the panel with token `t`:
    ///
    /// ```text
    /// Σ over spans  ( Σ over the span's groups  f32(Σ w·x) · scale_w ) · scale_x
    /// ```
    ///
    /// The inner sum is exact, both outer ones run in ascending order from zero in f32, and every operation rounds,
    /// so the bits are the same in every tile and on every instruction set.
    #[inline(always)]
    pub(super) fn dot<S: Simd>(
        &self,
        simd: S,
        panels: Range<usize>,
        x: QuantisedRows<'_>,
        rows: Range<usize>,
        sums: &mut [[f32; MAX_ROWS]],
    ) {
        const { assert!(MAX_ROWS == 2 * QUAD_ROWS) }
        let (num_spans, num_tokens) = (x.num_spans(), rows.len());
        assert!(
            num_spans == self.num_groups.div_ceil(SPAN_GROUPS) && sums.len() == panels.len() * num_tokens
        );
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
                            false => self.span(panel, span + 1),
                        };
                        walk_all(simd, self.span(panel, span), x.span(span, rows.clone()), next, sums);
                    }
                }
            },
        );
    }

    /// The blocks of one span of a panel; none beyond the last.
    #[inline(always)]
    fn span(&self, panel: usize, span: usize) -> &[B] {
        self.panel(panel).chunks(SPAN_GROUPS).nth(span).unwrap_or_default()
    }
}

/// Walks all tokens along the blocks of a span, and asks for the next span's meanwhile.
#[inline(always)]
fn walk_all<S: Simd, B: Block>(
    simd: S,
    blocks: &[B],
    x: SpanRows<'_>,
    next: &[B],
    sums: &mut [[f32; MAX_ROWS]],
) {
    let mut next_lines = bytemuck::cast_slice::<B, u8>(next).chunks(LINE);
    let lines_per_walk = next_lines.len().div_ceil(sums.len().div_ceil(S::TILE_TOKENS));
    let mut token = 0;
    while token < sums.len() {
        next_lines.by_ref().take(lines_per_walk).for_each(|line| simd.prefetch(&line[0]));
        let (x, sums) = (x.skip(token), &mut sums[token..]);
        token += match sums.len().min(S::TILE_TOKENS) {
            1 => walk::<S, B, 1>(simd, blocks, x, sums),
            2 => walk::<S, B, 2>(simd, blocks, x, sums),
            3 => walk::<S, B, 3>(simd, blocks, x, sums),
            _ => walk::<S, B, 4>(simd, blocks, x, sums),
        };
    }
}

/// Walks the first `T` tokens along the blocks of a span; their number, `T`.
#[inline(always)]
fn walk<S: Simd, B: Block, const T: usize>(
    simd: S,
    blocks: &[B],
    x: SpanRows<'_>,
    sums: &mut [[f32; MAX_ROWS]],
) -> usize {
    assert!(blocks.len() <= SPAN_GROUPS);
    let quads: &[_; T] = x.quads.first_chunk().expect("T rows");
    let starts: &[_; T] = x.starts.first_chunk().expect("T rows");
    let mut partial = [[simd.floats(&[half::f16::ZERO; QUAD_ROWS]); 2]; T];
    for (group, block) in blocks.iter().enumerate() {
        let mut ints: [[S::Ints; 2]; T] = std::array::from_fn(|t| {
            let start = if S::MULTIPLIES_STORED { starts[t][group] } else { 0 };
            [simd.ints(start); 2]
        });
        for step in 0..STEPS {
            let weights = [block.quads(simd, step, 0), block.quads(simd, step, 1)];
            for t in 0..T {
                let quads = [quads[t][group][step], quads[t][group][step + STEPS]];
                for half in 0..2 {
                    ints[t][half] = simd.dot_quads(ints[t][half], weights[half][0], quads[0]);
                    ints[t][half] = simd.dot_quads(ints[t][half], weights[half][1], quads[1]);
                }
            }
        }
        let scales = block.scales();
        for half in 0..2 {
            let scale = simd.floats(&scales[half]);
            for t in 0..T {
                partial[t][half] = simd.add(partial[t][half], simd.scaled(ints[t][half], scale));
            }
        }
    }
    for t in 0..T {
        let (lower, upper) = sums[t].split_at_mut(QUAD_ROWS);
        for (half, out) in [lower, upper].into_iter().enumerate() {
            let out = out.first_chunk_mut().expect("16 sums");
            simd.add_scaled(out, partial[t][half], x.scales[t]);
        }
    }
    T
}
