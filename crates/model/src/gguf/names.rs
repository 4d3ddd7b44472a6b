//! From a GGUF file's tensors to those of a checkpoint: ggml's names become Hugging Face's, experts that lie in one
//! tensor become one each, and rows that converters have moved are marked, so that nothing above knows of GGUF.
//!
//! | GGUF | checkpoint |
//! |---|---|
//! | `blk.{i}.ffn_gate_exps.weight` `[E, ffn, hidden]` | `model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight` |
//! | `blk.{i}.ffn_gate.{e}.weight`, in files before 2024-04 | the same |
//! | all others | the tables below |
//!
//! ggml rotates neighbouring features where Hugging Face rotates the halves of a head, so converters interleave the
//! rows of the query and key projections; see [`RowOrder`].

use std::collections::HashMap;
use std::sync::Arc;

use super::Gguf;
use super::tensors::GgufTensor;
use crate::checkpoint::{RowOrder, StoredTensor};
use crate::{ModelConfig, ModelError};

const MODEL: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];
/// After `blk.{i}.` and after `model.layers.{i}.`.
const LAYER: [(&str, &str); 10] = [
    ("attn_norm.weight", "input_layernorm.weight"),
    (QUERY, "self_attn.q_proj.weight"),
    (KEY, "self_attn.k_proj.weight"),
    ("attn_v.weight", "self_attn.v_proj.weight"),
    ("attn_output.weight", "self_attn.o_proj.weight"),
    ("ffn_norm.weight", "post_attention_layernorm.weight"),
    ("ffn_gate_inp.weight", "block_sparse_moe.gate.weight"),
    ("ffn_gate.weight", "mlp.gate_proj.weight"),
    ("ffn_up.weight", "mlp.up_proj.weight"),
    ("ffn_down.weight", "mlp.down_proj.weight"),
];
const EXPERT: [(&str, &str); 3] = [("ffn_gate", "w1"), ("ffn_up", "w3"), ("ffn_down", "w2")];
const QUERY: &str = "attn_q.weight";
const KEY: &str = "attn_k.weight";

/// What a name in a GGUF file stands for.
enum Meaning {
    Tensor(String),
    /// The matrix of every expert, by what comes before and after the expert's number.
    Experts {
        before: String,
        after: String,
    },
}

/// All tensors by their names in a checkpoint. What has no such name keeps its own, for the loader to refuse.
pub(crate) fn checkpoint_tensors(
    gguf: &Gguf,
    config: &ModelConfig,
) -> Result<HashMap<String, StoredTensor>, ModelError> {
    let mut tensors = HashMap::new();
    for shard in &gguf.shards {
        for tensor in &shard.contents.tensors {
            for (name, stored) in translate(&shard.file, tensor, config)? {
                if let Some(other) = tensors.insert(name, stored) {
                    let reason = format!("it is there twice, the other is {} in {}", other.name, other.file);
                    return Err(error(&shard.file, tensor, reason));
                }
            }
        }
    }
    Ok(tensors)
}

/// The name in a GGUF file of a checkpoint's tensor, for messages about one that is missing.
pub(crate) fn spelling(canonical: &str) -> String {
    let find = |table: &[(&str, &str)], name: &str| {
        table.iter().find(|(_, canonical)| *canonical == name).map(|(ggml, _)| (*ggml).to_owned())
    };
    let layer = canonical.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
    let spelled = match layer {
        None => find(&MODEL, canonical),
        Some((layer, rest)) => {
            let matrix = rest.strip_suffix(".weight").and_then(|rest| rest.rsplit('.').next());
            let experts = || Some(format!("{}_exps.weight", find(&EXPERT, matrix?)?));
            find(&LAYER, rest).or_else(experts).map(|rest| format!("blk.{layer}.{rest}"))
        }
    };
    spelled.unwrap_or_else(|| canonical.to_owned())
}

fn translate(
    file: &Arc<str>,
    tensor: &GgufTensor,
    config: &ModelConfig,
) -> Result<Vec<(String, StoredTensor)>, ModelError> {
    let stored = StoredTensor {
        file: file.clone(),
        name: tensor.name.clone(),
        dtype: tensor.dtype,
        shape: tensor.shape.clone(),
        bytes: tensor.bytes.clone(),
        row_order: row_order(&tensor.name, config),
    };
    match meaning(&tensor.name) {
        None => Ok(vec![(tensor.name.clone(), stored)]),
        Some(Meaning::Tensor(name)) => Ok(vec![(name, stored)]),
        Some(Meaning::Experts { before, after }) => {
            let num_experts = config.route.num_experts;
            if tensor.shape.len() != 3 || tensor.shape[0] != num_experts {
                let reason = format!("expected shape [{num_experts}, rows, cols], found {:?}", tensor.shape);
                return Err(error(file, tensor, reason));
            }
            let expert_bytes = tensor.bytes.len() / num_experts;
            let expert = |expert: usize| {
                let bytes = tensor.bytes.slice(expert * expert_bytes..(expert + 1) * expert_bytes);
                let shape = tensor.shape[1..].to_vec();
                (format!("{before}{expert}{after}"), StoredTensor { shape, bytes, ..stored.clone() })
            };
            Ok((0..num_experts).map(expert).collect())
        }
    }
}

fn meaning(name: &str) -> Option<Meaning> {
    if let Some((_, canonical)) = MODEL.iter().find(|(ggml, _)| *ggml == name) {
        return Some(Meaning::Tensor((*canonical).to_owned()));
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    if let Some((_, canonical)) = LAYER.iter().find(|(ggml, _)| *ggml == rest) {
        return Some(Meaning::Tensor(format!("model.layers.{layer}.{canonical}")));
    }
    EXPERT.iter().find_map(|(ggml, canonical)| {
        let expert = rest.strip_prefix(ggml)?.strip_suffix(".weight")?;
        let before = format!("model.layers.{layer}.block_sparse_moe.experts.");
        let after = format!(".{canonical}.weight");
        match expert {
            "_exps" => Some(Meaning::Experts { before, after }),
            expert => Some(Meaning::Tensor(format!("{before}{}{after}", expert.strip_prefix('.')?))),
        }
    })
}

fn row_order(name: &str, config: &ModelConfig) -> RowOrder {
    let is_layer = name.starts_with("blk.");
    match name.splitn(3, '.').nth(2) {
        Some(QUERY | KEY) if is_layer => RowOrder::Interleaved { head_dim: config.attention.head_dim },
        _ => RowOrder::Canonical,
    }
}

fn error(file: &str, tensor: &GgufTensor, reason: String) -> ModelError {
    ModelError::Tensor { file: file.to_owned(), tensor: tensor.name.clone(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_translated_both_ways() {
        let check = |ggml: &str, canonical: &str| {
            let Some(Meaning::Tensor(name)) = meaning(ggml) else { panic!("{ggml} is not known") };
            assert_eq!(name, canonical);
            assert_eq!(spelling(canonical), ggml);
        };
        check("output.weight", "lm_head.weight");
        check("blk.12.attn_q.weight", "model.layers.12.self_attn.q_proj.weight");
        check("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight");
        check("blk.3.ffn_gate_inp.weight", "model.layers.3.block_sparse_moe.gate.weight");

        let expert = "model.layers.1.block_sparse_moe.experts.7.w3.weight";
        assert!(matches!(meaning("blk.1.ffn_up.7.weight"), Some(Meaning::Tensor(name)) if name == expert));
        assert!(matches!(meaning("blk.1.ffn_up_exps.weight"), Some(Meaning::Experts { .. })));
        assert_eq!(spelling(expert), "blk.1.ffn_up_exps.weight");
        for unknown in ["rope_freqs.weight", "blk.0.attn_q.bias", "blk.0.ffn_gate_shexp.weight", "blk.0"] {
            assert!(meaning(unknown).is_none(), "{unknown}");
        }
    }
}
