//! What a model is, in numbers that follow from its shape alone: parameters in all and per token, bytes, and
//! what a token keeps in the cache.
//!
//! The seeds of confusion about "8x7B" are answered here: experts belong to a layer (32 layers of 8 experts
//! are 256 experts), attention is shared, and a token visits only some of them.

use crate::ModelConfig;

/// Bytes of a bf16 element.
const BF16_BYTES: u64 = 2;

/// The numbers of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelSummary {
    /// All parameters.
    pub total_parameters: u64,
    /// All parameters but those of the experts that a token does not visit.
    pub active_parameters: u64,
    /// Parameters of one expert (gate, up and down).
    pub expert_parameters: u64,
    /// Parameters of one layer's attention.
    pub attention_parameters: u64,
    /// Parameters that activations are multiplied with, which a backend may quantise: attention, experts and the
    /// output projection.
    pub product_parameters: u64,
    /// Parameters of a table that is the output projection as well; a backend that quantises keeps it in both forms.
    pub tied_parameters: u64,
    /// Experts in all layers together; 0 if dense.
    pub total_experts: u64,
    /// Heads of a token in the cache: keys and values, of all layers.
    pub kv_heads_per_token: u64,
}

impl ModelSummary {
    /// Adds up a model's matrices and norms.
    pub fn new(config: &ModelConfig) -> Self {
        let hidden = config.hidden_size as u64;
        let layers = config.num_layers as u64;
        let experts = config.route.num_experts as u64;
        let attention = &config.attention;
        let qkv_and_o = (attention.qkv_features() + attention.q_features()) as u64 * hidden;
        let expert = 3 * hidden * config.ffn_size as u64;
        let router = if config.has_router() { experts * hidden } else { 0 };
        let norms = 2 * hidden;
        let table = config.vocab_size as u64 * hidden;
        let tables = if config.tie_word_embeddings { table } else { 2 * table };
        let layer = |visited: u64| qkv_and_o + norms + router + visited * expert;
        Self {
            total_parameters: layers * layer(experts) + tables + hidden,
            active_parameters: layers * layer(config.route.top_k as u64) + tables + hidden,
            expert_parameters: expert,
            attention_parameters: qkv_and_o,
            product_parameters: layers * (qkv_and_o + experts * expert) + table,
            tied_parameters: if config.tie_word_embeddings { table } else { 0 },
            total_experts: if config.has_router() { layers * experts } else { 0 },
            kv_heads_per_token: layers * 2 * attention.num_kv_heads as u64,
        }
    }

    /// Bytes of all weights when those of products take `product_bits` each and the others are bf16.
    pub fn weight_bytes(&self, product_bits: f64) -> u64 {
        let quantised = product_bits < 8.0 * BF16_BYTES as f64;
        let twice = if quantised { self.tied_parameters } else { 0 };
        let exact = self.total_parameters - self.product_parameters + twice;
        exact * BF16_BYTES + (self.product_parameters as f64 * product_bits / 8.0) as u64
    }
}

#[cfg(test)]
mod tests {
    use backend::{AttentionShape, RouteShape};

    use super::*;
    use crate::Architecture;

    #[test]
    fn mixtral_8x7b_adds_up_to_the_published_numbers() {
        let config = ModelConfig {
            architecture: Architecture::Mixtral,
            hidden_size: 4096,
            ffn_size: 14336,
            num_layers: 32,
            vocab_size: 32000,
            max_position_embeddings: 32768,
            attention: AttentionShape { num_heads: 32, num_kv_heads: 8, head_dim: 128, sliding_window: None },
            route: RouteShape { num_experts: 8, top_k: 2 },
            rms_norm_eps: 1e-5,
            rope_theta: 1e6,
            tie_word_embeddings: false,
            eos_token_ids: vec![2],
        };
        let summary = ModelSummary::new(&config);
        assert_eq!(summary.total_parameters, 46_702_792_704);
        assert_eq!(summary.active_parameters, 12_879_925_248);
        assert_eq!(summary.total_experts, 256);
        assert_eq!(summary.kv_heads_per_token, 512);
        assert_eq!(summary.weight_bytes(16.0), 2 * 46_702_792_704);
        assert_eq!(summary.weight_bytes(8.5) >> 20, 47_441);
    }
}
