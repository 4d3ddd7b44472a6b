//! Which expert got which token, at what weight: the one structure that a mixture of experts adds to a
//! transformer.

use std::ops::{AddAssign, Range};

use crate::steering::{NONE, RouteRule, StepSteering, filled_entries};

/// The router's choice for a step's tokens, and the tokens grouped by expert.
///
/// An *assignment* is one (token, rank) pair, `assignment = token * width + rank`. `permutation` lists all
/// assignments sorted by expert and, within an expert, by token, so that each expert's rows are contiguous:
///
/// ```text
/// topk_ids        [[2, 0], [0, 1], [2, 0]]          three tokens, top-2 of three experts
/// permutation     1 2 5 | 3 | 0 4                   expert 0 | expert 1 | expert 2
/// expert_offsets  0       3   4     6               [num_experts + 1]
/// ```
///
/// The width is `top_k`, unless the step has steered tokens: then it is the most experts that a token of the step may
/// visit, and whoever visits fewer leaves entries empty.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Routing {
    /// Experts of a token that is not steered.
    pub top_k: usize,
    /// Entries per token.
    pub width: usize,
    /// `[num_tokens, width]` expert ids, heaviest first; [`NONE`] in an empty entry.
    pub topk_ids: Vec<u32>,
    /// `[num_tokens, width]` gate weights; each token's sum to one. 0 in an empty entry.
    pub topk_weights: Vec<f32>,
    /// `[num_experts + 1]` offset of each expert's first row in `permutation`.
    pub expert_offsets: Vec<u32>,
    /// `[num_rows]` assignments grouped by expert.
    pub permutation: Vec<u32>,
}

/// What one layer's router chose in a step, without what experts compute from it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LayerChoices {
    /// Entries per token.
    pub width: usize,
    /// `[num_tokens, width]`, as [`Routing::topk_ids`].
    pub ids: Vec<u32>,
    /// `[num_tokens, width]`, as [`Routing::topk_weights`].
    pub weights: Vec<f32>,
}

impl LayerChoices {
    /// The experts and weights of one token, without empty entries.
    pub fn of(&self, token: usize) -> (&[u32], &[f32]) {
        filled_entries(&self.ids, &self.weights, token, self.width)
    }
}

/// What an expert had to do in a step.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ExpertLoad {
    /// Tokens that went to it.
    pub num_tokens: u64,
    /// Sum of their gate weights, which decides how much of the layer's output is its own.
    pub gate_weight: f64,
    /// Tokens that the tiles of its products have room for. A tile reads weights once, and costs the same or nearly
    /// so however full it is.
    pub tile_rows: u64,
}

impl AddAssign for ExpertLoad {
    fn add_assign(&mut self, other: Self) {
        self.num_tokens += other.num_tokens;
        self.gate_weight += other.gate_weight;
        self.tile_rows += other.tile_rows;
    }
}

impl Routing {
    /// Makes an empty routing with room for `max_tokens` tokens.
    pub fn with_capacity(max_tokens: usize, num_experts: usize, top_k: usize) -> Self {
        Self {
            top_k,
            width: top_k,
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
        self.topk_ids.len() / self.width
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

    /// What `expert` has to do, token by token.
    pub fn load(&self, expert: usize) -> ExpertLoad {
        let assignments = &self.permutation[self.expert_range(expert)];
        let weights = assignments.iter().map(|&assignment| f64::from(self.topk_weights[assignment as usize]));
        let num_tokens = assignments.len() as u64;
        ExpertLoad { num_tokens, gate_weight: weights.sum(), tile_rows: num_tokens }
    }

    /// Forgets all tokens; those that come next have `width` entries each.
    pub fn clear(&mut self, width: usize) {
        self.width = width;
        self.topk_ids.clear();
        self.topk_weights.clear();
        self.permutation.clear();
        self.expert_offsets.fill(0);
    }

    /// Routes a step's tokens in layer `layer`: [`Routing::push_token`] or [`Routing::push_steered`] for each row of
    /// logits `[num_experts]`, then [`Routing::group_by_expert`].
    pub fn route<'a>(
        &mut self,
        logits: impl Iterator<Item = &'a [f32]>,
        steering: &StepSteering,
        layer: usize,
    ) {
        self.clear(steering.experts_per_token.max(self.top_k));
        for (token, logits) in logits.enumerate() {
            match steering.rule(token, layer) {
                Some(rule) => self.push_steered(logits, rule, steering),
                None => self.push_token(logits),
            }
        }
        self.group_by_expert();
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
        self.push_choice(logits, 1.0, self.top_k, |chosen, expert| !chosen.contains(expert));
    }

    /// Appends one token's choice under `rule`.
    ///
    /// Forced experts are chosen, then the largest of those neither forced nor banned, `rule.top_k` in all; their
    /// order and their weights are as in [`Routing::push_token`], from logits divided by `rule.temperature`. A rule
    /// that gives experts and weights is followed as it is. The rule that says what the model does anyway gives the
    /// same bits as no rule.
    ///
    /// # Panics
    /// If `logits` is not `[num_experts]`, or the rule does not fit them.
    pub fn push_steered(&mut self, logits: &[f32], rule: &RouteRule, steering: &StepSteering) {
        assert_eq!(logits.len(), self.num_experts());
        if let Some((ids, weights)) = steering.given(rule) {
            self.topk_ids.extend_from_slice(ids);
            self.topk_weights.extend_from_slice(weights);
            self.fill_entries();
            return;
        }
        let mask = chosen_experts(logits, rule);
        let is_open = |chosen: &[u32], expert: &u32| mask >> expert & 1 == 1 && !chosen.contains(expert);
        self.push_choice(logits, rule.temperature, rule.top_k as usize, is_open);
    }

    /// Appends the `count` largest open experts, heaviest first, with the softmax over their logits.
    fn push_choice(
        &mut self,
        logits: &[f32],
        temperature: f32,
        count: usize,
        is_open: impl Fn(&[u32], &u32) -> bool,
    ) {
        let start = self.topk_ids.len();
        for _ in 0..count {
            let chosen = &self.topk_ids[start..];
            let best = largest(logits, |expert| is_open(chosen, &expert));
            self.topk_ids.push(best.expect("as many experts are open as are chosen"));
        }
        // The softmax's denominator cancels in the renormalisation, so only the chosen are exponentiated.
        let max = logits[self.topk_ids[start] as usize];
        let chosen = self.topk_ids[start..].iter();
        self.topk_weights.extend(chosen.map(|&expert| ((logits[expert as usize] - max) / temperature).exp()));
        let sum: f32 = self.topk_weights[start..].iter().sum();
        self.topk_weights[start..].iter_mut().for_each(|weight| *weight /= sum);
        self.fill_entries();
    }

    /// Leaves the rest of a token's entries empty.
    fn fill_entries(&mut self) {
        let num_entries = self.topk_ids.len().next_multiple_of(self.width);
        self.topk_ids.resize(num_entries, NONE);
        self.topk_weights.resize(num_entries, 0.0);
    }

    /// Groups all pushed tokens by expert with a counting sort: fills `expert_offsets` and `permutation`.
    pub fn group_by_expert(&mut self) {
        self.expert_offsets.fill(0);
        for &expert in self.topk_ids.iter().filter(|&&expert| expert != NONE) {
            self.expert_offsets[expert as usize + 1] += 1;
        }
        for expert in 0..self.num_experts() {
            self.expert_offsets[expert + 1] += self.expert_offsets[expert];
        }
        self.permutation.clear();
        self.permutation.resize(self.expert_offsets[self.num_experts()] as usize, 0);
        for (assignment, &expert) in self.topk_ids.iter().enumerate().filter(|&(_, &expert)| expert != NONE) {
            let next_row = &mut self.expert_offsets[expert as usize];
            self.permutation[*next_row as usize] = assignment as u32;
            *next_row += 1;
        }
        // Filling advanced every offset to its expert's end, which is the next expert's start.
        self.expert_offsets.rotate_right(1);
        self.expert_offsets[0] = 0;
    }
}

/// The largest open logit's expert, the lower id on a tie.
fn largest(logits: &[f32], is_open: impl Fn(u32) -> bool) -> Option<u32> {
    let open = (0..logits.len() as u32).filter(|&expert| is_open(expert));
    open.reduce(|best, expert| if logits[expert as usize] > logits[best as usize] { expert } else { best })
}

/// The experts that a rule chooses, one bit each.
fn chosen_experts(logits: &[f32], rule: &RouteRule) -> u64 {
    let mut chosen = rule.forced;
    while chosen.count_ones() < rule.top_k {
        let closed = chosen | rule.banned;
        let best = largest(logits, |expert| closed >> expert & 1 == 0);
        chosen |= 1 << best.expect("bans leave as many experts as are chosen");
    }
    chosen
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

    /// One steered token among four experts, with three entries for each token.
    fn steered(logits: [f32; 4], rule: RouteRule, steering: &StepSteering) -> (Vec<u32>, Vec<f32>) {
        let mut routing = Routing::with_capacity(1, 4, 2);
        routing.clear(3);
        routing.push_steered(&logits, &rule, steering);
        (routing.topk_ids, routing.topk_weights)
    }

    #[test]
    fn rules_move_the_choice_and_the_weights() {
        let step = StepSteering::default();
        let plain = RouteRule { banned: 0, forced: 0, top_k: 2, temperature: 1.0, first_given: NONE };
        let logits = [0.1, 3.0, 2.0, 1.0];
        let ids = |rule| steered(logits, rule, &step).0;
        assert_eq!(ids(plain), [1, 2, NONE]);
        assert_eq!(ids(RouteRule { top_k: 3, ..plain }), [1, 2, 3]);
        assert_eq!(ids(RouteRule { top_k: 1, ..plain }), [1, NONE, NONE]);
        assert_eq!(ids(RouteRule { banned: 0b10, ..plain }), [2, 3, NONE]);
        assert_eq!(ids(RouteRule { forced: 0b1, ..plain }), [1, 0, NONE]);
        assert_eq!(ids(RouteRule { forced: 0b1001, ..plain }), [3, 0, NONE]);
        let hot = steered(logits, RouteRule { temperature: 1e9, ..plain }, &step);
        assert_eq!(hot, (vec![1, 2, NONE], vec![0.5, 0.5, 0.0]));

        let given = StepSteering { given_ids: vec![9, 0, 3], given_weights: vec![9.0, 0.25, 0.5], ..step };
        let followed = steered(logits, RouteRule { first_given: 1, ..plain }, &given);
        assert_eq!(followed, (vec![0, 3, NONE], vec![0.25, 0.5, 0.0]));
    }

    #[test]
    fn a_rule_that_says_what_the_model_does_gives_the_same_bits_and_empty_entries_have_no_rows() {
        let logits = [0.3, -1.7, 0.9, 0.2];
        let mut plain = Routing::with_capacity(1, 4, 2);
        plain.push_token(&logits);
        let rule = RouteRule { banned: 0, forced: 0, top_k: 2, temperature: 1.0, first_given: NONE };
        let (ids, weights) = steered(logits, rule, &StepSteering::default());
        assert_eq!((&ids[..2], &weights[..2]), (&plain.topk_ids[..], &plain.topk_weights[..]));

        let mut routing = Routing::with_capacity(2, 4, 2);
        routing.clear(3);
        routing.push_steered(&logits, &rule, &StepSteering::default());
        routing.push_token(&logits);
        routing.group_by_expert();
        assert_eq!((routing.num_tokens(), routing.num_rows()), (2, 4));
        assert_eq!((routing.permutation, routing.expert_offsets), (vec![1, 4, 0, 3], vec![0, 2, 2, 4, 4]));
    }
}
