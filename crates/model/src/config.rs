//! The shape of a model, read from Hugging Face's `config.json` (or, in `gguf/config.rs`, from a GGUF file) and checked
//! before anything is allocated.
//!
//! One description covers Mixtral and its dense siblings: a dense model has one expert per layer and no router.
//! Whatever changes the mathematics and is not implemented (rope scaling, biases, other activations) is refused
//! by name rather than ignored.

use backend::{AttentionShape, RouteShape};
use serde::Deserialize;
use serde_json::Value;

use crate::{ModelError, ModelFiles};

/// Largest accepted value of any size in a configuration; products of four of them fit in a `u64`.
const MAX_SIZE: usize = 1 << 16;
/// Largest accepted vocabulary.
const MAX_VOCAB_SIZE: usize = 1 << 22;
/// Largest accepted context.
const MAX_POSITIONS: usize = 1 << 24;

/// The architectures that the forward pass covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// `MixtralForCausalLM`: every layer a sparse mixture of experts.
    Mixtral,
    /// `MistralForCausalLM`: dense, possibly with a sliding window.
    Mistral,
    /// `LlamaForCausalLM`: dense.
    Llama,
}

impl Architecture {
    const ALL: [Self; 3] = [Self::Mixtral, Self::Mistral, Self::Llama];

    /// The name in `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mixtral => "MixtralForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Llama => "LlamaForCausalLM",
        }
    }
}

/// The shape of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Which family's names the checkpoint uses.
    pub architecture: Architecture,
    /// Features of the residual stream.
    pub hidden_size: usize,
    /// Inner features of an expert.
    pub ffn_size: usize,
    /// Transformer layers.
    pub num_layers: usize,
    /// Size of the vocabulary.
    pub vocab_size: usize,
    /// Positions the model was trained for.
    pub max_position_embeddings: usize,
    /// The attention of every layer.
    pub attention: AttentionShape,
    /// The routing of every layer; one of one expert if dense.
    pub route: RouteShape,
    /// Added to the mean square in RMS norms.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Whether the output projection is the embedding table.
    pub tie_word_embeddings: bool,
    /// Tokens that end a sequence.
    pub eos_token_ids: Vec<u32>,
}

/// `config.json` as written; `Value` where several types are in use.
#[derive(Deserialize)]
struct RawConfig {
    architectures: Option<Vec<String>>,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: usize,
    num_local_experts: Option<usize>,
    num_experts_per_tok: Option<usize>,
    rms_norm_eps: f32,
    rope_theta: Option<f32>,
    rope_scaling: Option<Value>,
    /// Where `transformers` 5 and later keep theta and scaling.
    rope_parameters: Option<RopeParameters>,
    sliding_window: Option<u32>,
    use_sliding_window: Option<bool>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    tie_word_embeddings: Option<bool>,
    quantization_config: Option<Value>,
    eos_token_id: Option<Value>,
}

#[derive(Deserialize)]
struct RopeParameters {
    rope_theta: Option<f32>,
    rope_type: Option<String>,
}

impl ModelConfig {
    /// Reads and checks a model's `config.json`, or the metadata of its GGUF file.
    ///
    /// # Errors
    /// [`ModelError::Config`] naming the key, what was found and what is accepted.
    pub fn load(files: &ModelFiles) -> Result<Self, ModelError> {
        if let ModelFiles::Gguf(gguf) = files {
            return gguf.config();
        }
        let file = files.display_name("config.json");
        let contents = files.read("config.json")?.ok_or_else(|| ModelError::File {
            file: file.clone(),
            reason: "there is no such file".to_owned(),
        })?;
        let parsed = serde_json::from_slice(&contents).map_err(|e| e.to_string());
        parsed.and_then(Self::from_raw).map_err(|reason| ModelError::Config { file, reason })
    }

    /// Whether layers choose among experts; the dense siblings do not.
    pub fn has_router(&self) -> bool {
        self.architecture == Architecture::Mixtral
    }

    fn from_raw(raw: RawConfig) -> Result<Self, String> {
        let architecture = raw.architecture()?;
        raw.refuse_unsupported()?;
        let rope_theta = raw.rope_theta()?;
        let route = match architecture {
            Architecture::Mixtral => RouteShape {
                num_experts: raw.num_local_experts.unwrap_or(8),
                top_k: raw.num_experts_per_tok.unwrap_or(2),
            },
            Architecture::Mistral | Architecture::Llama => RouteShape { num_experts: 1, top_k: 1 },
        };
        let num_heads = raw.num_attention_heads;
        let attention = AttentionShape {
            num_heads,
            num_kv_heads: raw.num_key_value_heads.unwrap_or(num_heads),
            head_dim: raw.head_dim.unwrap_or(raw.hidden_size / num_heads.max(1)),
            sliding_window: match architecture {
                Architecture::Llama => None,
                _ if raw.use_sliding_window == Some(false) => None,
                _ => raw.sliding_window,
            },
        };
        let config = Self {
            architecture,
            hidden_size: raw.hidden_size,
            ffn_size: raw.intermediate_size,
            num_layers: raw.num_hidden_layers,
            vocab_size: raw.vocab_size,
            max_position_embeddings: raw.max_position_embeddings,
            attention,
            route,
            rms_norm_eps: raw.rms_norm_eps,
            rope_theta,
            tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(false),
            eos_token_ids: token_ids(raw.eos_token_id.as_ref())?,
        };
        config.check_sizes()?;
        Ok(config)
    }

    /// Checks what is independent of where the sizes came from.
    pub(crate) fn check_sizes(&self) -> Result<(), String> {
        let AttentionShape { num_heads, num_kv_heads, head_dim, sliding_window } = self.attention;
        let RouteShape { num_experts, top_k } = self.route;
        let sizes = [
            ("hidden_size", self.hidden_size, MAX_SIZE),
            ("intermediate_size", self.ffn_size, 4 * MAX_SIZE),
            ("num_hidden_layers", self.num_layers, MAX_SIZE),
            ("vocab_size", self.vocab_size, MAX_VOCAB_SIZE),
            ("max_position_embeddings", self.max_position_embeddings, MAX_POSITIONS),
            ("num_attention_heads", num_heads, MAX_SIZE),
            ("num_key_value_heads", num_kv_heads, num_heads),
            ("head_dim", head_dim, MAX_SIZE),
            ("num_local_experts", num_experts, MAX_SIZE),
            ("num_experts_per_tok", top_k, num_experts),
            ("sliding_window", sliding_window.unwrap_or(1) as usize, usize::MAX),
        ];
        for (key, size, max) in sizes {
            if !(1..=max).contains(&size) {
                return Err(format!("{key} is {size}, expected 1 to {max}"));
            }
        }
        if num_heads % num_kv_heads != 0 {
            return Err(format!(
                "num_attention_heads is {num_heads}, expected a multiple of num_key_value_heads ({num_kv_heads})"
            ));
        }
        if head_dim % 2 != 0 {
            return Err(format!("head_dim is {head_dim}, expected an even number"));
        }
        let eps_fits = self.rms_norm_eps.is_finite() && self.rms_norm_eps > 0.0;
        if !eps_fits || !self.rope_theta.is_finite() || self.rope_theta <= 0.0 {
            return Err("rms_norm_eps and rope_theta must be positive numbers".to_owned());
        }
        Ok(())
    }
}

impl RawConfig {
    fn architecture(&self) -> Result<Architecture, String> {
        let named = self.architectures.as_deref().unwrap_or_default();
        let known = Architecture::ALL.into_iter().find(|known| named.iter().any(|name| name == known.name()));
        known.ok_or_else(|| {
            let supported = Architecture::ALL.map(Architecture::name).join(", ");
            format!("architectures is {named:?}, and this build runs {supported}")
        })
    }

    fn refuse_unsupported(&self) -> Result<(), String> {
        let activation = self.hidden_act.as_deref().unwrap_or("silu");
        if activation != "silu" {
            return Err(format!("hidden_act is \"{activation}\", only \"silu\" is supported"));
        }
        if self.attention_bias == Some(true) || self.mlp_bias == Some(true) {
            return Err("attention_bias and mlp_bias must be false: biases are not supported".to_owned());
        }
        if let Some(quantization) = self.quantization_config.as_ref().filter(|value| !value.is_null()) {
            let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unnamed");
            return Err(format!(
                "quantization_config ({method}) is not supported, give the unquantised checkpoint"
            ));
        }
        let scaling = self.rope_scaling.as_ref().filter(|value| !value.is_null());
        let scaling_type = scaling.map(|value| {
            let named = value.get("rope_type").or_else(|| value.get("type"));
            named.and_then(Value::as_str).unwrap_or("unnamed")
        });
        let parameters_type = self.rope_parameters.as_ref().and_then(|p| p.rope_type.as_deref());
        match scaling_type.or(parameters_type) {
            None | Some("default") => Ok(()),
            Some(other) => {
                Err(format!("rope scaling of type \"{other}\" is not supported, only unscaled rope is"))
            }
        }
    }

    fn rope_theta(&self) -> Result<f32, String> {
        let newer = self.rope_parameters.as_ref().and_then(|p| p.rope_theta);
        newer.or(self.rope_theta).ok_or_else(|| "rope_theta is missing".to_owned())
    }
}

/// One id, a list of ids, or none.
fn token_ids(value: Option<&Value>) -> Result<Vec<u32>, String> {
    let id = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| format!("eos_token_id has {value}, expected token ids"))
    };
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().map(id).collect(),
        Some(single) => Ok(vec![id(single)?]),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn mixtral() -> Value {
        json!({
            "architectures": ["MixtralForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
            "max_position_embeddings": 512, "num_local_experts": 8, "num_experts_per_tok": 2,
            "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": null, "eos_token_id": 2
        })
    }

    fn parse(config: Value) -> Result<ModelConfig, String> {
        serde_json::from_value(config).map_err(|e| e.to_string()).and_then(ModelConfig::from_raw)
    }

    #[test]
    fn mixtral_is_read() {
        let config = parse(mixtral()).unwrap();
        assert_eq!(config.attention.head_dim, 16);
        assert_eq!(config.route, RouteShape { num_experts: 8, top_k: 2 });
        assert_eq!(config.eos_token_ids, [2]);
    }

    #[test]
    fn theta_is_found_where_newer_transformers_write_it() {
        let mut config = mixtral();
        config.as_object_mut().unwrap().remove("rope_theta");
        config["rope_parameters"] = json!({"rope_theta": 5e5, "rope_type": "default"});
        assert_eq!(parse(config).unwrap().rope_theta, 5e5);
    }

    #[track_caller]
    fn check_refused(key: &str, value: Value, expected_words: &str) {
        let mut config = mixtral();
        config[key] = value;
        let error = parse(config).expect_err("a broken config must be refused");
        assert!(error.contains(expected_words), "{key}: {error}");
    }

    #[test]
    fn nonsense_and_unsupported_mathematics_are_refused_by_name() {
        check_refused("architectures", json!(["GPT2LMHeadModel"]), "GPT2LMHeadModel");
        check_refused("architectures", json!([]), "MixtralForCausalLM");
        check_refused("hidden_size", json!(0), "hidden_size is 0");
        check_refused("hidden_size", json!(1u64 << 40), "hidden_size");
        check_refused("hidden_size", json!(-1), "invalid value");
        check_refused("num_attention_heads", json!(0), "num_attention_heads is 0");
        check_refused("num_key_value_heads", json!(3), "multiple of num_key_value_heads");
        check_refused("num_local_experts", json!(0), "num_local_experts is 0");
        check_refused("num_experts_per_tok", json!(9), "num_experts_per_tok is 9");
        check_refused("head_dim", json!(15), "even");
        check_refused("sliding_window", json!(0), "sliding_window is 0");
        check_refused("rms_norm_eps", json!(-1.0), "rms_norm_eps");
        check_refused("hidden_act", json!("gelu"), "gelu");
        check_refused("attention_bias", json!(true), "attention_bias");
        check_refused("rope_scaling", json!({"type": "yarn", "factor": 4}), "yarn");
        check_refused("rope_parameters", json!({"rope_type": "llama3", "rope_theta": 1.0}), "llama3");
        check_refused("quantization_config", json!({"quant_method": "awq"}), "awq");
        check_refused("eos_token_id", json!("</s>"), "eos_token_id");
    }
}
