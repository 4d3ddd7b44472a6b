//! Matrix products of activations: a task owns a band of output columns, which is a tile of weight rows, and
//! multiplies it with all tokens, so every weight row is read from memory once per step.

use crate::grid::Tile;
use crate::isa::Kernel;
use crate::matrix::{CALL_TOKENS, Matrix, PanelSums};
use crate::numbers::Element;
use crate::operand::Operand;
use crate::simd::Simd;

/// `out[t, o] = Σ_i x[t, i] · weight[o, i]` for the columns of one tile.
pub(crate) struct Linear<'a, E> {
    pub(crate) x: Operand<'a>,
    pub(crate) weight: &'a Matrix,
    pub(crate) out: Tile<'a, E>,
}

impl<E: Element> Kernel for Linear<'_, E> {
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let mut sums = PanelSums::default();
        let (tokens, cols) = (self.out.rows(), self.out.cols());
        let then = self.weight.beginning(cols.end);
        for first in tokens.clone().step_by(CALL_TOKENS) {
            let group = first..tokens.end.min(first + CALL_TOKENS);
            self.weight.dot(simd, cols.clone(), self.x, group, then, &mut sums);
            for (token, col, sums) in sums.iter() {
                let out = self.out.row(first + token)[col..].iter_mut().zip(sums);
                out.for_each(|(out, &sum)| *out = E::from_f32(sum));
            }
        }
    }
}
