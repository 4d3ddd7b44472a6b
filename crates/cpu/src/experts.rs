//! The expert products: tokens grouped by expert, each expert's weights read once per step.
//!
//! A task owns a band of output columns and walks it through all experts in ascending order, each with the
//! tokens routed to it. All tasks cost the same, however unevenly the router chose, a layer is two runs of
//! the team, and the sum over a token's experts has a fixed order because one task does all of it:
//!
//! ```text
//!               columns 0..32       32..64        ...        tasks of experts_gate_up
//! expert 0      rows 0 1 2          rows 0 1 2               gate and up rows of expert 0 × its 3 tokens
//! expert 1      (no token: its weights are not touched)
//! expert 2      rows 3 4            rows 3 4                 gate and up rows of expert 2 × its 2 tokens
//! ```

use std::ops::Range;

use backend::Routing;
use half::bf16;

use crate::grid::Tile;
use crate::isa::Kernel;
use crate::matrix::{CALL_TOKENS, Experts, Matrix, PanelSums};
use crate::numbers::{Element, silu};
use crate::operand::Operand;
use crate::simd::Simd;

/// Rows that the tiles of an expert's products have room for, if it has `num_rows`.
pub(crate) fn tile_rows(num_rows: usize, tile_tokens: usize) -> usize {
    let in_tiles = |num_rows: usize| num_rows.next_multiple_of(tile_tokens);
    num_rows / CALL_TOKENS * in_tiles(CALL_TOKENS) + in_tiles(num_rows % CALL_TOKENS)
}

/// `act[r] = silu(gate_e · x[r]) * (up_e · x[r])`, rows ordered by expert, for the columns of one tile.
pub(crate) struct GateUp<'a> {
    pub(crate) x: Operand<'a>,
    pub(crate) experts: &'a Experts,
    pub(crate) routing: &'a Routing,
    pub(crate) act: Tile<'a, bf16>,
}

impl Kernel for GateUp<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let (mut gate, mut up) = (PanelSums::default(), PanelSums::default());
        let cols = self.act.cols();
        for expert in 0..self.routing.num_experts() {
            let rows = self.routing.expert_range(expert);
            for first in rows.clone().step_by(CALL_TOKENS) {
                let group = first..rows.end.min(first + CALL_TOKENS);
                let [gates, ups] = [&self.experts.gate, &self.experts.up];
                let then = ups[expert].beginning(cols.start);
                gates[expert].dot(simd, cols.clone(), self.x, group.clone(), then, &mut gate);
                let then = beginning_behind(gates, expert, &cols, self.routing);
                ups[expert].dot(simd, cols.clone(), self.x, group, then, &mut up);
                for ((token, col, gate), (.., up)) in gate.iter().zip(up.iter()) {
                    let act = self.act.row(first + token)[col..].iter_mut().zip(gate.iter().zip(up));
                    act.for_each(|(act, (&gate, &up))| *act = Element::from_f32(silu(gate) * up));
                }
            }
        }
    }
}

/// `out[t] = Σ_e weight(t, e) · (down_e · act[row(t, e)])` for the columns of one tile.
pub(crate) struct Down<'a> {
    pub(crate) act: Operand<'a>,
    pub(crate) experts: &'a Experts,
    pub(crate) routing: &'a Routing,
    pub(crate) out: Tile<'a, f32>,
}

impl Kernel for Down<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let mut sums = PanelSums::default();
        let cols = self.out.cols();
        self.out.rows().for_each(|token| self.out.row(token).fill(0.0));
        for expert in 0..self.routing.num_experts() {
            let rows = self.routing.expert_range(expert);
            for first in rows.clone().step_by(CALL_TOKENS) {
                let group = first..rows.end.min(first + CALL_TOKENS);
                let then = beginning_behind(&self.experts.down, expert, &cols, self.routing);
                self.experts.down[expert].dot(simd, cols.clone(), self.act, group, then, &mut sums);
                for (token, col, sums) in sums.iter() {
                    let assignment = self.routing.permutation[first + token] as usize;
                    let weight = self.routing.topk_weights[assignment];
                    let out = self.out.row(assignment / self.routing.width)[col..].iter_mut().zip(sums);
                    out.for_each(|(out, &sum)| *out += weight * sum);
                }
            }
        }
    }
}

/// What a task reads first of the expert after this one; after the last, the next task of the first one.
#[inline(always)]
fn beginning_behind<'a>(
    matrices: &'a [Matrix],
    expert: usize,
    cols: &Range<usize>,
    routing: &Routing,
) -> &'a [u8] {
    let is_used = |expert: &usize| !routing.expert_range(*expert).is_empty();
    match (expert + 1..matrices.len()).find(is_used) {
        Some(next) => matrices[next].beginning(cols.start),
        None => (0..=expert).find(is_used).map_or(&[], |first| matrices[first].beginning(cols.end)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_experts_tiles_begin_again_with_each_call() {
        let check = |num_rows: usize, tile_tokens: usize, expected: usize| {
            assert_eq!(
                tile_rows(num_rows, tile_tokens),
                expected,
                "{num_rows} rows in tiles of {tile_tokens}"
            );
        };
        check(0, 8, 0);
        check(1, 1, 1);
        check(1, 8, 8);
        check(8, 8, 8);
        check(9, 8, 16);
        check(9, 6, 12);
        // Calls of 512 rows fill 86 tiles of 6, of which the last has 2.
        check(512, 6, 516);
        check(513, 6, 522);
        check(1030, 6, 1038);
        check(1030, 8, 1032);
    }
}
