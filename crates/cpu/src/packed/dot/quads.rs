//! Quantised weights: a quad of columns of 32 rows meets a quad of a token, integers are summed exactly within a group
//! of 32 columns, where the weights have one scale, and f32 takes over from there.

use super::super::PANEL_ROWS;
use super::super::block::{QuantisedBlock, STEPS};
use super::{Tokens, halves};
use crate::operand::{QuantisedRows, SPAN_GROUPS, SpanRows};
use crate::simd::Simd;

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

    /// A span's product is `(Σ over its groups  f32(Σ w·x) · scale_w) · scale_x`. The inner sum is exact, the outer one
    /// runs from zero in f32, and every operation rounds, so the bits are the same on every instruction set.
    #[inline(always)]
    fn walk<S: Simd, const T: usize>(
        self,
        simd: S,
        blocks: &[B],
        span: usize,
        first: usize,
        mut meanwhile: impl FnMut(),
        sums: &mut [[f32; PANEL_ROWS]; T],
    ) {
        assert!(blocks.len() <= SPAN_GROUPS);
        let SpanRows { quads, starts, scales } = self.span(span, first..first + T);
        let quads: &[_; T] = quads.first_chunk().expect("T rows");
        let starts: &[_; T] = starts.first_chunk().expect("T rows");
        let mut partial = [[simd.zero(); 2]; T];
        for (group, block) in blocks.iter().enumerate() {
            meanwhile();
            let mut ints = [[simd.ints(0); 2]; T];
            if S::MULTIPLIES_STORED {
                for t in 0..T {
                    ints[t] = [simd.ints(starts[t][group]); 2];
                }
            }
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
            let block_scales = block.scales();
            for half in 0..2 {
                let scale = simd.floats(&block_scales[half]);
                for t in 0..T {
                    partial[t][half] = simd.add(partial[t][half], simd.scaled(ints[t][half], scale));
                }
            }
        }
        for t in 0..T {
            for (half, out) in halves(&mut sums[t]).into_iter().enumerate() {
                simd.add_scaled(out, partial[t][half], scales[t]);
            }
        }
    }
}
