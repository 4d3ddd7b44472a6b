//! From names in a checkpoint to [`WeightView`]s of checked shape and type, whichever of the known layouts the
//! checkpoint uses; or dummy views of the same shapes, for measuring models that nobody can download.
//!
//! | what | name | shape |
//! |---|---|---|
//! | expert `e` (Mixtral) | `block_sparse_moe.experts.{e}.w1 / w3 / w2.weight` | `[ffn, hidden]` ×2, `[hidden, ffn]` |
//! | all experts, fused | `{block_sparse_moe, mlp}.experts.gate_up_proj / down_proj` | `[E, 2 ffn, hidden]`, `[E, hidden, ffn]` |
//! | router | `{block_sparse_moe, mlp}.gate.weight` | `[E, hidden]` |
//! | dense | `mlp.gate_proj / up_proj / down_proj.weight` | as one expert |

use backend::sampling::mix64;
use backend::{ExpertsView, WeightData, WeightView};

use crate::checkpoint::{Checkpoint, StoredTensor};
use crate::{ModelConfig, ModelError, ModelFiles};

/// Standard deviation of dummy matrices, as models are initialised.
const DUMMY_STD: f32 = 0.02;

/// Where a model's weights come from.
#[derive(Debug)]
pub(crate) enum Weights {
    Stored(Checkpoint),
    Dummy { seed: u64 },
}

/// The stored weights of one layer.
pub(crate) struct LayerWeights {
    pub(crate) input_norm: WeightView,
    pub(crate) qkv: [WeightView; 3],
    pub(crate) o: WeightView,
    pub(crate) post_attention_norm: WeightView,
    pub(crate) router: Option<WeightView>,
    pub(crate) experts: ExpertsView,
}

impl Weights {
    pub(crate) fn stored(files: &ModelFiles, config: &ModelConfig) -> Result<Self, ModelError> {
        Checkpoint::open(files, config).map(Self::Stored)
    }

    /// Takes what has been read of a checkpoint out of this process's memory, for weights that were converted.
    pub(crate) fn release_pages(&self) {
        if let Self::Stored(checkpoint) = self {
            checkpoint.release_pages();
        }
    }

    /// The embedding table `[vocab, hidden]`.
    pub(crate) fn embedding(&mut self, config: &ModelConfig) -> Result<WeightView, ModelError> {
        self.matrix("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    }

    /// The last norm and the output projection `[vocab, hidden]`; `None` if that is the embedding table.
    pub(crate) fn head(
        &mut self,
        config: &ModelConfig,
    ) -> Result<(WeightView, Option<WeightView>), ModelError> {
        let norm = self.norm("model.norm.weight", config.hidden_size)?;
        let head = match config.tie_word_embeddings {
            true => None,
            false => Some(self.matrix("lm_head.weight", config.vocab_size, config.hidden_size)?),
        };
        Ok((norm, head))
    }

    /// Everything of layer `layer`.
    pub(crate) fn layer(&mut self, layer: usize, config: &ModelConfig) -> Result<LayerWeights, ModelError> {
        let prefix = format!("model.layers.{layer}");
        let hidden = config.hidden_size;
        let (q, kv) = (config.attention.q_features(), config.attention.kv_features());
        let mut projection = |name: &str, rows, cols| {
            self.matrix(&format!("{prefix}.self_attn.{name}_proj.weight"), rows, cols)
        };
        let qkv = [projection("q", q, hidden)?, projection("k", kv, hidden)?, projection("v", kv, hidden)?];
        let o = projection("o", hidden, q)?;
        let (router, experts) = match config.has_router() {
            true => self.sparse(&prefix, config)?,
            false => (None, self.dense(&prefix, config)?),
        };
        Ok(LayerWeights {
            input_norm: self.norm(&format!("{prefix}.input_layernorm.weight"), hidden)?,
            qkv,
            o,
            post_attention_norm: self.norm(&format!("{prefix}.post_attention_layernorm.weight"), hidden)?,
            router,
            experts,
        })
    }

    /// Refuses a checkpoint with tensors that nothing asked for: they would change what the model computes.
    pub(crate) fn finish(&self, config: &ModelConfig) -> Result<(), ModelError> {
        let Self::Stored(checkpoint) = self else { return Ok(()) };
        let harmless = |name: &str| {
            // Derived buffers that old versions saved, and the head that a tied model does not use.
            name.ends_with("rotary_emb.inv_freq") || (config.tie_word_embeddings && name == "lm_head.weight")
        };
        match checkpoint.remaining().into_iter().find(|(name, _)| !harmless(name)) {
            None => Ok(()),
            Some((_, tensor)) => {
                let reason = format!(
                    "unexpected in a {} with {} layers",
                    config.architecture.name(),
                    config.num_layers
                );
                Err(tensor_error(tensor, reason))
            }
        }
    }

    fn sparse(
        &mut self,
        prefix: &str,
        config: &ModelConfig,
    ) -> Result<(Option<WeightView>, ExpertsView), ModelError> {
        let (hidden, ffn, num_experts) = (config.hidden_size, config.ffn_size, config.route.num_experts);
        let newer = format!("{prefix}.mlp");
        let block = match self {
            Self::Stored(checkpoint) if checkpoint.contains(&format!("{newer}.gate.weight")) => newer,
            _ => format!("{prefix}.block_sparse_moe"),
        };
        let router = Some(self.matrix(&format!("{block}.gate.weight"), num_experts, hidden)?);
        let fused = format!("{block}.experts.gate_up_proj");
        if let Self::Stored(checkpoint) = self
            && checkpoint.contains(&fused)
        {
            let gate_up = fused_experts(checkpoint, &fused, [num_experts, 2 * ffn, hidden])?;
            let (gate, up) = gate_up.iter().map(|expert| split_rows(expert, ffn)).unzip();
            let down =
                fused_experts(checkpoint, &format!("{block}.experts.down_proj"), [num_experts, hidden, ffn])?;
            return Ok((router, ExpertsView { gate, up, down }));
        }
        let mut experts = |name: &str, rows, cols| {
            let names = (0..num_experts).map(|expert| format!("{block}.experts.{expert}.{name}.weight"));
            names.map(|name| self.matrix(&name, rows, cols)).collect::<Result<Vec<_>, _>>()
        };
        let (gate, up) = (experts("w1", ffn, hidden)?, experts("w3", ffn, hidden)?);
        let down = experts("w2", hidden, ffn)?;
        Ok((router, ExpertsView { gate, up, down }))
    }

    fn dense(&mut self, prefix: &str, config: &ModelConfig) -> Result<ExpertsView, ModelError> {
        let mut projection = |name: &str, rows, cols| {
            self.matrix(&format!("{prefix}.mlp.{name}_proj.weight"), rows, cols).map(|view| vec![view])
        };
        let (hidden, ffn) = (config.hidden_size, config.ffn_size);
        Ok(ExpertsView {
            gate: projection("gate", ffn, hidden)?,
            up: projection("up", ffn, hidden)?,
            down: projection("down", hidden, ffn)?,
        })
    }

    fn norm(&mut self, name: &str, features: usize) -> Result<WeightView, ModelError> {
        match self {
            Self::Stored(checkpoint) => view(&checkpoint.take(name)?, &[features]),
            Self::Dummy { seed } => Ok(dummy(*seed, name, 1, features, 1.0)),
        }
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<WeightView, ModelError> {
        match self {
            Self::Stored(checkpoint) => view(&checkpoint.take(name)?, &[rows, cols]),
            Self::Dummy { seed } => Ok(dummy(*seed, name, rows, cols, 0.0)),
        }
    }
}

/// A seeded tensor: the seed depends on the name, so that no two are alike.
fn dummy(seed: u64, name: &str, rows: usize, cols: usize, mean: f32) -> WeightView {
    let seed = name.bytes().fold(mix64(seed), |hash, byte| mix64(hash ^ u64::from(byte)));
    let data = WeightData::Dummy { seed, mean, std: DUMMY_STD };
    WeightView { rows, cols, dtype: backend::WeightType::Bf16, data }
}

/// Checks a stored tensor's shape; leading dimensions become rows.
fn view(tensor: &StoredTensor, expected: &[usize]) -> Result<WeightView, ModelError> {
    let StoredTensor { dtype, shape, bytes, row_order, .. } = tensor;
    if shape != expected {
        return Err(tensor_error(tensor, format!("expected shape {expected:?}, found {shape:?}")));
    }
    let cols = *expected.last().expect("a weight has a dimension");
    let rows = expected[..expected.len() - 1].iter().product();
    let data = WeightData::Stored(row_order.restore(bytes, dtype.row_bytes(cols)));
    Ok(WeightView { rows, cols, dtype: *dtype, data })
}

/// One view per expert of a tensor `[num_experts, rows, cols]`.
fn fused_experts(
    checkpoint: &mut Checkpoint,
    name: &str,
    shape: [usize; 3],
) -> Result<Vec<WeightView>, ModelError> {
    let all = view(&checkpoint.take(name)?, &shape)?;
    let [num_experts, rows, _] = shape;
    Ok((0..num_experts).map(|expert| row_range(&all, expert * rows, rows)).collect())
}

/// The first `rows` rows and the rest.
fn split_rows(view: &WeightView, rows: usize) -> (WeightView, WeightView) {
    (row_range(view, 0, rows), row_range(view, rows, view.rows - rows))
}

fn row_range(view: &WeightView, start: usize, rows: usize) -> WeightView {
    let WeightData::Stored(bytes) = &view.data else { unreachable!("only stored tensors are fused") };
    let row_bytes = view.dtype.row_bytes(view.cols);
    let bytes = bytes.slice(start * row_bytes..(start + rows) * row_bytes);
    WeightView { rows, data: WeightData::Stored(bytes), ..*view }
}

fn tensor_error(tensor: &StoredTensor, reason: String) -> ModelError {
    ModelError::Tensor { file: tensor.file.to_string(), tensor: tensor.name.clone(), reason }
}
