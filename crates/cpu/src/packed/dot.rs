//! The inner loop of quantised products: a panel of 32 rows × up to 8 tokens.
//!
//! Integers are summed exactly within a group of 32 columns, where the weights have one scale; f32 takes over from
//! there. A span of 128 columns, over which the tokens have one scale, is walked by all tokens before the next, so
//! its weights come from memory once and from the L1 cache after that.

use super::Panels;
use super::block::{Block, STEPS};
use crate::dot::{MAX_ROWS, Sums};
use crate::operand::{QuantisedRow, SPAN_GROUPS};
use crate::simd::{QUAD_ROWS, Simd};

impl<B: Block> Panels<B> {
    /// Computes `sums[t][r]`, the product of row `r` of the panel with token `t`:
    ///
    /// ```text
    /// sums[t][r] = Σ over spans  ( Σ over the span's groups  f32(Σ w·x) · scale_w ) · scale_x
    /// ```
    ///
    /// The inner sum is exact, both outer ones run in ascending order from zero in f32, and every operation rounds,
    /// so the bits are the same in every tile and on every instruction set.
    #[inline(always)]
    pub(super) fn dot<S: Simd>(&self, simd: S, panel: usize, x: &[QuantisedRow<'_>], sums: &mut Sums) {
        const { assert!(MAX_ROWS == 2 * QUAD_ROWS) }
        let blocks = self.panel(panel);
        assert!(x.iter().all(|x| x.groups.len() == blocks.len() && x.starts.len() == blocks.len()));
        let sums = &mut sums[..x.len()];
        sums.fill([0.0; MAX_ROWS]);
        simd.call(
            #[inline(always)]
            || {
                for (span, blocks) in blocks.chunks(SPAN_GROUPS).enumerate() {
                    let mut token = 0;
                    while token < x.len() {
                        let (x, sums) = (&x[token..], &mut sums[token..]);
                        token += match x.len().min(S::TILE_TOKENS) {
                            1 => walk::<S, B, 1>(simd, blocks, span, x, sums),
                            2 => walk::<S, B, 2>(simd, blocks, span, x, sums),
                            3 => walk::<S, B, 3>(simd, blocks, span, x, sums),
                            _ => walk::<S, B, 4>(simd, blocks, span, x, sums),
                        };
                    }
                }
            },
        );
    }
}

/// Walks the first `T` tokens along the blocks of a span; their number, `T`.
#[inline(always)]
fn walk<S: Simd, B: Block, const T: usize>(
    simd: S,
    blocks: &[B],
    span: usize,
    x: &[QuantisedRow<'_>],
    sums: &mut [[f32; MAX_ROWS]],
) -> usize {
    let groups = span * SPAN_GROUPS..span * SPAN_GROUPS + blocks.len();
    let values: [_; T] = std::array::from_fn(|t| &x[t].groups[groups.clone()]);
    let starts: [_; T] = std::array::from_fn(|t| &x[t].starts[groups.clone()]);
    let mut partial = [[simd.floats(&[half::f16::ZERO; QUAD_ROWS]); 2]; T];
    for (group, block) in blocks.iter().enumerate() {
        let mut ints: [[S::Ints; 2]; T] = std::array::from_fn(|t| {
            let start = if S::MULTIPLIES_STORED { starts[t][group] } else { 0 };
            [simd.ints(start); 2]
        });
        for step in 0..STEPS {
            let weights = [block.quads(simd, step, 0), block.quads(simd, step, 1)];
            for t in 0..T {
                let quads = [values[t][group][step], values[t][group][step + STEPS]];
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
            simd.add_scaled(out, partial[t][half], x[t].scales[span]);
        }
    }
    T
}
