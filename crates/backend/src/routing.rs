//! Which expert got which token, at what weight: the one structure that a mixture of experts adds to a
//! transformer.

use std::ops::Range;

/// The router's choice for a step's tokens, and the tokens grouped by expert.
///
/// An *assignment* is one (token, rank) pair, `assignment = token * top_k + rank`. `permutation` lists all
/// assignments sorted by expert and, within an expert, by token, so that each expert's rows are contiguous:
///
/// ```text
/// topk_ids        [[2, 0], [0, 1], [2, 0]]          three tokens, top-2 of three experts
/// permutation     1 2 5 | 3 | 0 4                   expert 0 | expert 1 | expert 2
/// expert_offsets  0       3   4     6               [num_experts + 1]
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Routing {
    /// Experts per token.
    pub top_k: usize,
    /// `[num_tokens, top_k]` expert ids, heaviest first.
    pub topk_ids: Vec<u32>,
    /// `[num_tokens, top_k]` gate weights; each token's sum to one.
    pub topk_weights: Vec<f32>,
    /// `[num_experts + 1]` offset of each expert's first row in `permutation`.
    pub expert_offsets: Vec<u32>,
    /// `[num_tokens * top_k]` assignments grouped by expert.
    pub permutation: Vec<u32>,
}

impl Routing {
    /// Makes an empty routing with room for `max_tokens` tokens.
    pub fn with_capacity(max_tokens: usize, num_experts: usize, top_k: usize) -> Self {
        Self {
            top_k,
            topk_ids: Vec::with_capacity(max_tokens * top_k),
            topk_weights: Vec::with_capacity(max_tokens * top_k),
            expert_offsets: vec![0; num_experts + 1],
            permutation: Vec::with_capacity(max_tokens * top_k),
        }
    }

    /// Number of experts that tokens can be routed to.
    pub fn num_experts(&self) -> usize {
        self.expert_offsets.len() - 1
    }

    /// Number of tokens routed.
    pub fn num_tokens(&self) -> usize {
        self.topk_ids.len() / self.top_k
    }

    /// Number of assignments, the rows of what experts compute.
    pub fn num_rows(&self) -> usize {
        self.permutation.len()
    }

    /// Rows per expert, rounded down.
    pub fn mean_rows(&self) -> usize {
        self.num_rows() / self.num_experts()
    }

    /// Rows of `expert` in `permutation`.
    pub fn expert_range(&self, expert: usize) -> Range<usize> {
        self.expert_offsets[expert] as usize..self.expert_offsets[expert + 1] as usize
    }

    /// Forgets all tokens.
    pub fn clear(&mut self) {
        self.topk_ids.clear();
        self.topk_weights.clear();
        self.permutation.clear();
        self.expert_offsets.fill(0);
    }

    /// Appends one token's choice from its router logits `[num_experts]`: softmax over all experts, the
    /// `top_k` largest (the lower id on a tie), renormalised to sum to one.
    ///
    /// Source: `MixtralSparseMoeBlock` in `transformers`; Mixtral of Experts (arXiv 2401.04088), section 2.1.
    ///
    /// # Panics
    /// If `logits` is not `[num_experts]`.
    pub fn push_token(&mut self, logits: &[f32]) {
        assert_eq!(logits.len(), self.num_experts());
        let start = self.topk_ids.len();
        for _ in 0..self.top_k {
            let chosen = &self.topk_ids[start..];
            let best = (0..logits.len() as u32)
                .filter(|expert| !chosen.contains(expert))
                .reduce(|best, e| if logits[e as usize] > logits[best as usize] { e } else { best });
            self.topk_ids.push(best.expect("top_k is at most the number of experts"));
        }
        // The softmax's denominator cancels in the renormalisation, so only the chosen are exponentiated.
        let max = logits[self.topk_ids[start] as usize];
        let chosen = self.topk_ids[start..].iter();
        self.topk_weights.extend(chosen.map(|&expert| (logits[expert as usize] - max).exp()));
        let sum: f32 = self.topk_weights[start..].iter().sum();
        self.topk_weights[start..].iter_mut().for_each(|weight| *weight /= sum);
    }

    /// Groups all pushed tokens by expert with a counting sort: fills `expert_offsets` and `permutation`.
    pub fn group_by_expert(&mut self) {
        self.expert_offsets.fill(0);
        for &expert in &self.topk_ids {
            self.expert_offsets[expert as usize + 1] += 1;
        }
        for expert in 0..self.num_experts() {
            self.expert_offsets[expert + 1] += self.expert_offsets[expert];
        }
        self.permutation.clear();
        self.permutation.resize(self.topk_ids.len(), 0);
        for (assignment, &expert) in self.topk_ids.iter().enumerate() {
            let next_row = &mut self.expert_offsets[expert as usize];
            self.permutation[*next_row as usize] = assignment as u32;
            *next_row += 1;
        }
        // Filling advanced every offset to its expert's end, which is the next expert's start.
        self.expert_offsets.rotate_right(1);
        self.expert_offsets[0] = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_grouped_by_expert_in_token_order() {
        let mut routing = Routing::with_capacity(3, 3, 2);
        routing.push_token(&[1.0, 0.0, 2.0]);
        routing.push_token(&[3.0, 2.0, 0.0]);
        routing.push_token(&[4.0, 0.0, 5.0]);
        routing.group_by_expert();
        assert_eq!(routing.topk_ids, [2, 0, 0, 1, 2, 0]);
        assert_eq!(routing.permutation, [1, 2, 5, 3, 0, 4]);
        assert_eq!(routing.expert_offsets, [0, 3, 4, 6]);
        assert_eq!(routing.expert_range(1), 3..4);
    }

    #[test]
    fn gate_weights_are_the_renormalised_softmax_and_ties_go_to_the_lower_id() {
        let mut routing = Routing::with_capacity(1, 4, 2);
        routing.push_token(&[0.5, 1.5, 1.5, 0.5]);
        assert_eq!(routing.topk_ids, [1, 2]);
        assert_eq!(routing.topk_weights, [0.5, 0.5]);
    }
}
