//! The shape of a model, from a GGUF file's keys.
//!
//! Converters write Mixtral, Mistral and Llama alike as architecture `llama`; with `llama.expert_count` it is a
//! mixture, with `llama.attention.sliding_window` it has a window. A `llama.` key that is not known here may change
//! the mathematics, so it is refused by name, as is rope scaling in any of its forms.

use backend::{AttentionShape, RouteShape};

use super::metadata::Metadata;
use super::tensors::GgufTensor;
use crate::{Architecture, ModelConfig, ModelError};

const ARCHITECTURE: &str = "llama";
/// Base of the rotary frequencies where a file has none, as in ggml.
const DEFAULT_ROPE_THETA: f64 = 10_000.0;

/// Keys that are read here or say nothing about the mathematics; all begin with `llama.`.
const KNOWN: [&str; 20] = [
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "vocab_size",
    "expert_count",
    "expert_used_count",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "attention.causal",
    "tensor_data_layout",
];

/// Keys with the one value that changes nothing. A gating function of 1 is the softmax.
const NEUTRAL: [(&str, f64); 8] = [
    ("rope.scaling.factor", 1.0),
    ("rope.scaling.attn_factor", 1.0),
    ("rope.scale_linear", 1.0),
    ("expert_gating_func", 1.0),
    ("expert_shared_count", 0.0),
    ("expert_weights_scale", 1.0),
    ("logit_scale", 1.0),
    ("residual_scale", 1.0),
];

/// Reads and checks the shape of a model.
pub(super) fn read<'a>(
    metadata: &Metadata,
    tensors: impl Iterator<Item = &'a GgufTensor> + Clone,
) -> Result<ModelConfig, ModelError> {
    refuse_unsupported(metadata)?;
    if let Some(scaling) = tensors.clone().find(|tensor| tensor.name.starts_with("rope_f")) {
        let reason = format!("{} scales the rope, and only unscaled rope is supported", scaling.name);
        return Err(metadata.error(reason));
    }
    let vocab_size =
        size(metadata, "vocab_size")?.unwrap_or_else(|| metadata.list_len("tokenizer.ggml.tokens"));
    let attention = attention(metadata)?;
    let num_experts = size(metadata, "expert_count")?.filter(|&count| count > 0);
    let eos_token_id = metadata.size("tokenizer.ggml.eos_token_id")?;
    let config = ModelConfig {
        architecture: match (num_experts, attention.sliding_window) {
            (Some(_), _) => Architecture::Mixtral,
            (None, Some(_)) => Architecture::Mistral,
            (None, None) => Architecture::Llama,
        },
        hidden_size: required(metadata, "embedding_length")?,
        ffn_size: required(metadata, "feed_forward_length")?,
        num_layers: required(metadata, "block_count")?,
        vocab_size,
        max_position_embeddings: required(metadata, "context_length")?,
        attention,
        route: match num_experts {
            Some(num_experts) => RouteShape { num_experts, top_k: required(metadata, "expert_used_count")? },
            None => RouteShape { num_experts: 1, top_k: 1 },
        },
        rms_norm_eps: number(metadata, "attention.layer_norm_rms_epsilon")?.unwrap_or(f64::NAN) as f32,
        rope_theta: number(metadata, "rope.freq_base")?.unwrap_or(DEFAULT_ROPE_THETA) as f32,
        tie_word_embeddings: is_tied(tensors),
        eos_token_ids: eos_token_id.and_then(|id| u32::try_from(id).ok()).into_iter().collect(),
    };
    let named = |reason: String| metadata.error(format!("{reason} (keys by their names in config.json)"));
    config.check_sizes().map_err(named)?;
    Ok(config)
}

/// Whether the table of tokens is the output projection as well.
pub(super) fn is_tied<'a>(mut tensors: impl Iterator<Item = &'a GgufTensor>) -> bool {
    !tensors.any(|tensor| tensor.name == "output.weight")
}

fn attention(metadata: &Metadata) -> Result<AttentionShape, ModelError> {
    let num_heads = required(metadata, "attention.head_count")?;
    let hidden_size = required(metadata, "embedding_length")?;
    let head_dim = size(metadata, "attention.key_length")?.unwrap_or(hidden_size / num_heads.max(1));
    for key in ["attention.value_length", "rope.dimension_count"] {
        if let Some(other) = size(metadata, key)?.filter(|&other| other != head_dim) {
            return Err(
                metadata.error(format!("llama.{key} is {other}, expected the head's {head_dim} features"))
            );
        }
    }
    let window = size(metadata, "attention.sliding_window")?.filter(|&window| window > 0);
    Ok(AttentionShape {
        num_heads,
        num_kv_heads: size(metadata, "attention.head_count_kv")?.unwrap_or(num_heads),
        head_dim,
        // A window wider than any context is none.
        sliding_window: window.and_then(|window| u32::try_from(window).ok()),
    })
}

fn refuse_unsupported(metadata: &Metadata) -> Result<(), ModelError> {
    let architecture = metadata.text("general.architecture")?.unwrap_or_default();
    if architecture != ARCHITECTURE {
        let reason = format!(
            "general.architecture is \"{architecture}\", and this build runs \"{ARCHITECTURE}\": Mixtral, Mistral \
             and Llama"
        );
        return Err(metadata.error(reason));
    }
    let scaling = metadata.text("llama.rope.scaling.type")?.unwrap_or_default();
    if !matches!(scaling.as_str(), "" | "none") {
        let reason = format!("rope scaling of type \"{scaling}\" is not supported, only unscaled rope is");
        return Err(metadata.error(reason));
    }
    for (key, neutral) in NEUTRAL {
        if let Some(value) = number(metadata, key)?.filter(|&value| value != neutral) {
            return Err(metadata.error(format!("llama.{key} is {value}, and only {neutral} is supported")));
        }
    }
    let is_known = |key: &&str| KNOWN.contains(key) || NEUTRAL.iter().any(|(neutral, _)| neutral == key);
    let keys = metadata.keys().filter_map(|key| key.strip_prefix("llama."));
    match keys.filter(|key| !is_known(key)).min() {
        None => Ok(()),
        Some(key) => {
            let reason =
                format!("llama.{key} is not known to this build, which would compute something else without");
            Err(metadata.error(reason))
        }
    }
}

fn size(metadata: &Metadata, key: &str) -> Result<Option<usize>, ModelError> {
    metadata.size(&format!("llama.{key}"))
}

fn number(metadata: &Metadata, key: &str) -> Result<Option<f64>, ModelError> {
    metadata.number(&format!("llama.{key}"))
}

fn required(metadata: &Metadata, key: &str) -> Result<usize, ModelError> {
    size(metadata, key)?.ok_or_else(|| metadata.error(format!("llama.{key} is missing")))
}
