//! bf16 weights: a pair of columns of 32 rows meets a pair of a token, and f32 takes the sums.

use super::super::PANEL_ROWS;
use super::super::block::Bf16Block;
use super::{Tokens, halves};
use crate::operand::{BF16_SPAN_BLOCKS, Bf16Rows};
use crate::simd::Simd;

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

    /// A span's product is `Σ over its columns  w · x`, from zero in f32: of each pair first the odd column, then the
    /// even one.
    #[inline(always)]
    fn walk<S: Simd, const T: usize>(
        self,
        simd: S,
        blocks: &[Bf16Block],
        span: usize,
        first: usize,
        mut meanwhile: impl FnMut(),
        sums: &mut [[f32; PANEL_ROWS]; T],
    ) {
        assert!(blocks.len() <= BF16_SPAN_BLOCKS);
        let x: &[_; T] = self.span(span)[first..].first_chunk().expect("T rows");
        let mut partial = [[simd.zero(); 2]; T];
        for (group, block) in blocks.iter().enumerate() {
            meanwhile();
            for (pair, stored) in block.pairs.iter().enumerate() {
                let weights = [simd.pairs(&stored[0]), simd.pairs(&stored[1])];
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
