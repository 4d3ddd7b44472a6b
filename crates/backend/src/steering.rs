//! Routing that a request steers or repeats: what it asks for ([`Steering`]), what that makes of one token in one
//! layer ([`RouteRule`]), and what was routed before ([`RoutingRecord`]).
//!
//! ```text
//! Steering (a request) ─► StepSteering (a batch): token_rows ─► rules [row, layer] ─► Routing::push_steered
//! ```
//!
//! Whatever does not depend on a router's logits is settled here, on the host: which experts a random router takes,
//! and which position of a record a token repeats. So a device knows four numbers per token and layer, and a step
//! without steered tokens carries nothing. A token's rule depends on its request and position alone, never on its
//! batch. This file routes nothing itself, and does not know what requests look like outside.

use std::sync::Arc;

use crate::RouteShape;
use crate::sampling::mix64;

/// Most experts of a layer that can be steered: as many as a mask has bits.
pub const MAX_STEERED_EXPERTS: usize = 64;

/// In place of an expert: nothing more is routed to. In place of a row or an index: there is none.
pub const NONE: u32 = u32::MAX;

/// How a request steers the router of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSteering {
    /// Experts per token.
    pub top_k: u32,
    /// Experts that no token goes to, one bit each.
    pub banned: u64,
    /// Experts that every token goes to, at most `top_k` of them; the others are chosen as ever.
    pub forced: u64,
    /// Divides the chosen experts' logits before their softmax: the choice stays, the weights are flattened (> 1) or
    /// sharpened (< 1).
    pub temperature: f32,
    /// Chooses at random instead of by the logits, uniformly among the experts that are not banned; the weights are
    /// still the router's.
    pub random_seed: Option<u64>,
}

impl LayerSteering {
    /// A layer as it is without steering.
    pub fn new(top_k: usize) -> Self {
        Self { top_k: top_k as u32, banned: 0, forced: 0, temperature: 1.0, random_seed: None }
    }

    /// The rule for one position of layer `layer`.
    fn rule(&self, num_experts: usize, layer: usize, position: u32) -> RouteRule {
        let forced = match self.random_seed {
            None => self.forced,
            Some(seed) => {
                self.draw(num_experts, mix64(mix64(seed ^ mix64(layer as u64)) ^ u64::from(position)))
            }
        };
        let Self { top_k, banned, temperature, .. } = *self;
        RouteRule { banned, forced, top_k, temperature, first_given: NONE }
    }

    /// The forced experts, and as many random ones as there is room for.
    fn draw(&self, num_experts: usize, seed: u64) -> u64 {
        let closed = self.banned | self.forced;
        let mut open: Vec<u64> = (0..num_experts as u64).filter(|expert| closed >> expert & 1 == 0).collect();
        open.sort_unstable_by_key(|&expert| mix64(seed ^ mix64(expert)));
        let num_drawn = (self.top_k - self.forced.count_ones()) as usize;
        open.iter().take(num_drawn).fold(self.forced, |drawn, expert| drawn | 1 << expert)
    }
}

/// What the routers of some layers chose for neighbouring tokens of one sequence.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RoutingRecord {
    /// Position of the first token.
    pub start: u32,
    /// The layers, ascending.
    pub layers: Vec<u32>,
    /// Entries per token and layer.
    pub width: usize,
    /// `[tokens, layers, width]` expert ids, heaviest first; [`NONE`] where a token has fewer.
    pub ids: Vec<u32>,
    /// `[tokens, layers, width]` gate weights; 0 where a token has no expert.
    pub weights: Vec<f32>,
}

impl RoutingRecord {
    /// Makes an empty record that begins with position `start`.
    pub fn new(start: u32, layers: Vec<u32>, width: usize) -> Self {
        Self { start, layers, width, ids: Vec::new(), weights: Vec::new() }
    }

    /// Entries per token.
    fn token_entries(&self) -> usize {
        self.layers.len() * self.width
    }

    /// Number of tokens.
    pub fn num_tokens(&self) -> usize {
        self.ids.len() / self.token_entries().max(1)
    }

    /// Position after the last token.
    pub fn end(&self) -> u32 {
        self.start + self.num_tokens() as u32
    }

    /// The experts and weights of a token in the `index`-th of the record's layers, without empty entries.
    pub fn choice(&self, token: usize, index: usize) -> (&[u32], &[f32]) {
        filled_entries(&self.ids, &self.weights, token * self.layers.len() + index, self.width)
    }

    /// Appends the next token's choice in the next layer.
    pub fn push_choice(&mut self, ids: &[u32], weights: &[f32]) {
        let num_empty = self.width.checked_sub(ids.len()).expect("a choice is not wider than its record");
        self.ids.extend_from_slice(ids);
        self.ids.extend(std::iter::repeat_n(NONE, num_empty));
        self.weights.extend_from_slice(weights);
        self.weights.extend(std::iter::repeat_n(0.0, num_empty));
    }

    /// Appends the tokens that follow this record's last.
    pub fn append(&mut self, later: &RoutingRecord) {
        debug_assert_eq!((self.end(), self.width, &self.layers), (later.start, later.width, &later.layers));
        self.ids.extend_from_slice(&later.ids);
        self.weights.extend_from_slice(&later.weights);
    }
}

/// The experts and weights in the `index`-th run of `width` entries, without the empty ones at its end.
pub(crate) fn filled_entries<'a>(
    ids: &'a [u32],
    weights: &'a [f32],
    index: usize,
    width: usize,
) -> (&'a [u32], &'a [f32]) {
    let entries = index * width..(index + 1) * width;
    let (ids, weights) = (&ids[entries.clone()], &weights[entries]);
    let count = ids.iter().position(|&id| id == NONE).unwrap_or(width);
    (&ids[..count], &weights[..count])
}

/// What a request asks of all routers.
#[derive(Debug, Clone, PartialEq)]
pub struct Steering {
    shape: RouteShape,
    layers: Vec<LayerSteering>,
    replay: Option<Arc<RoutingRecord>>,
}

impl Steering {
    /// Makes a steering of layers, one entry each, that repeats `replay` at the positions and layers that it has.
    ///
    /// # Panics
    /// If there are more than [`MAX_STEERED_EXPERTS`] experts, a layer's rule cannot be kept, or the record names
    /// layers or experts that there are not: requests were checked.
    pub fn new(shape: RouteShape, layers: Vec<LayerSteering>, replay: Option<Arc<RoutingRecord>>) -> Self {
        assert!(shape.num_experts <= MAX_STEERED_EXPERTS);
        for layer in &layers {
            let num_open = shape.num_experts as u32 - layer.banned.count_ones();
            assert!((1..=num_open).contains(&layer.top_k) && layer.forced.count_ones() <= layer.top_k);
            assert!(layer.banned & layer.forced == 0 && layer.temperature > 0.0);
        }
        if let Some(replay) = &replay {
            assert!(replay.layers.iter().all(|&layer| (layer as usize) < layers.len()));
            assert!(replay.ids.iter().all(|&id| id == NONE || (id as usize) < shape.num_experts));
        }
        Self { shape, layers, replay }
    }

    /// Most experts that a token of this request visits in a layer; at least as many as without steering.
    pub fn experts_per_token(&self) -> usize {
        let steered = self.layers.iter().map(|layer| layer.top_k as usize).max();
        let replayed = self.replay.as_ref().map(|replay| replay.width);
        steered.into_iter().chain(replayed).fold(self.shape.top_k, usize::max)
    }

    /// Whether tokens have rules of their own: what is random or repeated differs from position to position.
    fn varies_at(&self, position: u32) -> bool {
        let repeats =
            self.replay.as_ref().is_some_and(|replay| (replay.start..replay.end()).contains(&position));
        repeats || self.layers.iter().any(|layer| layer.random_seed.is_some())
    }
}

/// What decides a token's experts in one layer, beside the router's logits.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
pub struct RouteRule {
    /// Experts that are not chosen, one bit each.
    pub banned: u64,
    /// Experts that are chosen whatever their logits.
    pub forced: u64,
    /// Experts to choose.
    pub top_k: u32,
    /// Divides the chosen experts' logits before their softmax.
    pub temperature: f32,
    /// First of the `top_k` entries of [`StepSteering::given_ids`] and `given_weights` to take as they are, without
    /// regard to the logits; or [`NONE`].
    pub first_given: u32,
}

/// The steered tokens of a step. Empty if there are none, which costs nothing.
#[derive(Debug, Default, PartialEq)]
pub struct StepSteering {
    /// Most experts that a token of this step visits in a layer; 0 if no token is steered.
    pub experts_per_token: usize,
    /// Layers that have rules.
    pub num_layers: usize,
    /// Row of `rules` for each token as far as the last steered one, or [`NONE`].
    pub token_rows: Vec<u32>,
    /// `[rows, layers]`.
    pub rules: Vec<RouteRule>,
    /// Experts of tokens that repeat a record, heaviest first.
    pub given_ids: Vec<u32>,
    /// Their gate weights.
    pub given_weights: Vec<f32>,
}

impl Clone for StepSteering {
    fn clone(&self) -> Self {
        let mut steering = Self::default();
        steering.clone_from(self);
        steering
    }

    fn clone_from(&mut self, source: &Self) {
        (self.experts_per_token, self.num_layers) = (source.experts_per_token, source.num_layers);
        self.token_rows.clone_from(&source.token_rows);
        self.rules.clone_from(&source.rules);
        self.given_ids.clone_from(&source.given_ids);
        self.given_weights.clone_from(&source.given_weights);
    }
}

impl StepSteering {
    /// Whether no token is steered.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// The rule of a token in a layer.
    pub fn rule(&self, token: usize, layer: usize) -> Option<&RouteRule> {
        let row = self.token_rows.get(token).copied().filter(|&row| row != NONE)?;
        Some(&self.rules[row as usize * self.num_layers + layer])
    }

    /// What a rule gives instead of a choice.
    pub fn given(&self, rule: &RouteRule) -> Option<(&[u32], &[f32])> {
        let first = (rule.first_given != NONE).then_some(rule.first_given as usize)?;
        let entries = first..first + rule.top_k as usize;
        Some((&self.given_ids[entries.clone()], &self.given_weights[entries]))
    }

    pub(crate) fn clear(&mut self) {
        self.experts_per_token = 0;
        self.token_rows.clear();
        self.rules.clear();
        self.given_ids.clear();
        self.given_weights.clear();
    }

    /// Steers tokens `first_token..`, which stand at `positions`.
    pub(crate) fn push(&mut self, steering: &Steering, first_token: usize, positions: &[u32]) {
        self.experts_per_token = self.experts_per_token.max(steering.experts_per_token());
        self.num_layers = steering.layers.len();
        self.token_rows.resize(first_token, NONE);
        let mut common_row = None;
        for &position in positions {
            let row = match common_row.filter(|_| !steering.varies_at(position)) {
                Some(row) => row,
                None => self.push_row(steering, position),
            };
            if !steering.varies_at(position) {
                common_row = Some(row);
            }
            self.token_rows.push(row);
        }
    }

    fn push_row(&mut self, steering: &Steering, position: u32) -> u32 {
        let row = self.rules.len() / self.num_layers;
        for (index, layer) in steering.layers.iter().enumerate() {
            let mut rule = layer.rule(steering.shape.num_experts, index, position);
            if let Some((ids, weights)) = replayed(steering, index, position) {
                (rule.top_k, rule.first_given) = (ids.len() as u32, self.given_ids.len() as u32);
                self.given_ids.extend_from_slice(ids);
                self.given_weights.extend_from_slice(weights);
            }
            self.rules.push(rule);
        }
        row as u32
    }
}

/// What the record of a request has for a layer and a position.
fn replayed(steering: &Steering, layer: usize, position: u32) -> Option<(&[u32], &[f32])> {
    let replay = steering.replay.as_deref()?;
    let token = position.checked_sub(replay.start).filter(|_| position < replay.end())?;
    let index = replay.layers.binary_search(&(layer as u32)).ok()?;
    Some(replay.choice(token as usize, index))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: RouteShape = RouteShape { num_experts: 8, top_k: 2 };

    #[test]
    fn tokens_of_a_sequence_share_a_rule_unless_it_depends_on_their_position() {
        let steering = Steering::new(SHAPE, vec![LayerSteering::new(2), LayerSteering::new(1)], None);
        let mut step = StepSteering::default();
        step.push(&steering, 2, &[5, 6, 7]);
        assert_eq!(step.token_rows, [NONE, NONE, 0, 0, 0]);
        assert_eq!((step.rule(1, 0), step.rule(9, 0)), (None, None));
        assert_eq!((step.rule(4, 0).unwrap().top_k, step.rule(4, 1).unwrap().top_k), (2, 1));
        assert_eq!(step.experts_per_token, 2);
    }

    #[test]
    fn records_are_repeated_where_they_have_something() {
        let mut record = RoutingRecord::new(6, vec![1], 3);
        record.push_choice(&[4, 2], &[0.75, 0.25]);
        assert_eq!((record.num_tokens(), record.end()), (1, 7));
        let layers = vec![LayerSteering::new(2); 2];
        let steering = Steering::new(SHAPE, layers, Some(Arc::new(record)));
        assert_eq!(steering.experts_per_token(), 3);
        let mut step = StepSteering::default();
        step.push(&steering, 0, &[5, 6, 7]);
        assert_eq!(step.token_rows, [0, 1, 0]);
        let given = |token, layer| step.given(step.rule(token, layer).unwrap());
        assert_eq!(given(1, 1), Some((&[4, 2][..], &[0.75, 0.25][..])));
        assert!([(0, 1), (1, 0), (2, 1)].into_iter().all(|(token, layer)| given(token, layer).is_none()));
    }

    #[test]
    fn random_routers_are_uniform_and_depend_on_seed_layer_and_position_alone() {
        let layer = LayerSteering { banned: 1, forced: 2, random_seed: Some(7), ..LayerSteering::new(3) };
        let mut counts = [0u32; 8];
        for position in 0..6000 {
            let forced = layer.rule(8, 3, position).forced;
            assert_eq!((forced.count_ones(), forced & 3), (3, 2));
            (0..8).for_each(|expert| counts[expert] += (forced >> expert & 1) as u32);
        }
        assert!(counts[2..].iter().all(|&count| (1850..2150).contains(&count)), "{counts:?}");
        let forced = |layer_index| {
            (0..9).map(|position| layer.rule(8, layer_index, position).forced).collect::<Vec<_>>()
        };
        assert_ne!(forced(3), forced(4));
    }
}
