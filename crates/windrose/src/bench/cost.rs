//! What a step asks of a machine, counted from the model's shape and from what was routed: bytes of weights and of cached
//! keys and values, and operations on weights.
//!
//! Norms, the embedding's rows, activations, and attention's scores are left out: they are small beside the matrices, and
//! leaving them out keeps the shares on the low side.
//!
//! Behind the last layer's attention only those tokens are computed whose logits are wanted, and only those count.

use model::{Batch, ExpertLoad, ModelConfig, ModelSummary};

/// Bits of a router's weight.
const ROUTER_BITS: f64 = 16.0;

/// The matrices of a model, in parameters.
pub(super) struct Cost {
    /// Bits of a weight of everything but routers.
    bits: f64,
    num_layers: u64,
    /// Queries, keys and values of a layer.
    qkv: u64,
    /// What attention's result is multiplied with, of a layer.
    output: u64,
    /// Of a layer.
    router: u64,
    expert: u64,
    lm_head: u64,
    /// Experts that a token visits in a layer.
    top_k: u64,
    /// Bytes of a token's keys and values in all layers.
    token_bytes: u64,
    /// Tokens that one sees at most, itself included.
    window: u64,
}

impl Cost {
    /// The cost of a model with weights of `bits` bits and `token_bytes` of cache per token.
    pub(super) fn new(config: &ModelConfig, bits: f64, token_bytes: u64) -> Self {
        let summary = ModelSummary::new(config);
        let hidden = config.hidden_size as u64;
        let output = (config.attention.q_features() * config.hidden_size) as u64;
        let router = if config.has_router() { config.route.num_experts as u64 * hidden } else { 0 };
        Self {
            bits,
            num_layers: config.num_layers as u64,
            qkv: summary.attention_parameters - output,
            output,
            router,
            expert: summary.expert_parameters,
            lm_head: config.vocab_size as u64 * hidden,
            top_k: config.route.top_k as u64,
            token_bytes,
            window: config.attention.sliding_window.map_or(u64::MAX, |window| window as u64),
        }
    }

    /// Bytes that a step must have read at least: of the weights that it touched, and of the keys and values that its
    /// tokens see, once per sequence. `loads` is `[num_layers, num_experts]`.
    pub(super) fn read_bytes(&self, batch: &Batch, loads: &[ExpertLoad]) -> u64 {
        let seen = (0..batch.num_seqs()).map(|seq| {
            let before_first = self.window.saturating_add(batch.query_range(seq).len() as u64 - 1);
            u64::from(batch.seq_lens[seq]).min(before_first)
        });
        self.weight_bytes(batch.logits_indices.len(), loads) + seen.sum::<u64>() * self.token_bytes
    }

    fn weight_bytes(&self, num_logits: usize, loads: &[ExpertLoad]) -> u64 {
        let num_touched = loads.iter().filter(|load| load.num_tokens > 0).count() as u64;
        let (num_finished, lm_head) =
            if num_logits > 0 { (self.num_layers, self.lm_head) } else { (self.num_layers - 1, 0) };
        let products =
            self.num_layers * self.qkv + num_finished * self.output + num_touched * self.expert + lm_head;
        let routers = num_finished * self.router;
        ((products as f64 * self.bits + routers as f64 * ROUTER_BITS) / 8.0) as u64
    }

    /// Operations of a step's matrix products, where a multiplication and its addition are two.
    pub(super) fn operations(&self, num_tokens: usize, num_logits: usize) -> u64 {
        let after_attention = self.output + self.router + self.top_k * self.expert;
        let per_token = self.num_layers * self.qkv + (self.num_layers - 1) * after_attention;
        let per_logit = after_attention + self.lm_head;
        2 * (num_tokens as u64 * per_token + num_logits as u64 * per_logit)
    }
}

#[cfg(test)]
mod tests {
    use model::ModelFiles;

    use super::*;

    #[test]
    fn one_token_touches_the_active_parameters() {
        let config = ModelConfig::load(&ModelFiles::Embedded(demo::files())).unwrap();
        let (cost, summary) = (Cost::new(&config, 16.0, 100), ModelSummary::new(&config));
        let norms = (2 * config.num_layers + 1) * config.hidden_size;
        let embedding = if config.tie_word_embeddings { 0 } else { config.vocab_size * config.hidden_size };
        let expected = summary.active_parameters - (norms + embedding) as u64;

        let mut one_token = vec![ExpertLoad::default(); config.num_layers * config.route.num_experts];
        for layer in one_token.chunks_mut(config.route.num_experts) {
            layer[..config.route.top_k].fill(ExpertLoad { num_tokens: 1, gate_weight: 0.5, tile_rows: 1 });
        }
        assert_eq!(cost.weight_bytes(1, &one_token), 2 * expected);
        assert_eq!(cost.operations(1, 1), 2 * expected);
        assert!(cost.weight_bytes(0, &one_token) < 2 * expected);
        let mut batch = Batch::new();
        batch.push_sequence(&[1], 6, &[1], 16);
        batch.logits_indices.push(0);
        assert_eq!(cost.read_bytes(&batch, &one_token), 2 * expected + 700);
        assert!(cost.operations(2, 1) < 4 * expected - 2 * cost.lm_head);
    }
}
