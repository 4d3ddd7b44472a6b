//! Mixtral, once: its weights as a backend's handles, the workspace of a step, and the forward pass.
//!
//! A layer is nine calls; the dense siblings are the same layer with one expert and no router. The pass allocates
//! nothing and reads nothing back, so a backend may record it and replay the recording.
//!
//! Of the last layer, tokens whose logits nobody wants leave their keys and values, and no more: what comes after its
//! attention feeds nothing but their own logits. In a prompt that is all tokens but one. Only a step whose routing is
//! recorded or steered takes all of them through it.

use backend::{Backend, DType, MatrixUse, RopeTable, StepShape};

use crate::weights::Weights;
use crate::{ModelConfig, ModelError, RunnerLimits};

/// The weights of a model on a backend.
pub(crate) struct Mixtral<B: Backend> {
    embedding: B::Matrix,
    layers: Vec<Layer<B>>,
    norm: B::Vector,
    lm_head: B::Matrix,
    rope: B::Rope,
    eps: f32,
}

struct Layer<B: Backend> {
    input_norm: B::Vector,
    qkv: B::Matrix,
    o: B::Matrix,
    post_attention_norm: B::Vector,
    router: Option<B::Matrix>,
    experts: B::Experts,
}

/// Everything that a step writes, sized at start for the largest step.
pub(crate) struct Workspace<B: Backend> {
    /// f32 `[tokens, hidden]`.
    residual: B::Tensor,
    /// f32 `[tokens, hidden]`: what attention or the experts add to the residual.
    delta: B::Tensor,
    /// bf16 `[tokens, hidden]`.
    normed: B::Tensor,
    /// f32 `[tokens, q + 2 kv]`.
    qkv: B::Tensor,
    /// bf16 `[tokens, q]`.
    queries: B::Tensor,
    /// bf16 `[tokens, q]`.
    attended: B::Tensor,
    /// bf16 `[tokens × top_k, ffn]`.
    act: B::Tensor,
    /// f32 `[logits, hidden]`: the rows of `residual` whose logits are wanted.
    last_residual: B::Tensor,
    /// bf16 `[logits, q]`: the same rows of `attended`.
    last_attended: B::Tensor,
    /// f32 `[logits, vocab]`.
    pub(crate) logits: B::Tensor,
    /// Per layer.
    kv: Vec<B::KvCache>,
    /// Per layer, kept until the next step so that it can be read.
    pub(crate) routings: Vec<B::Routing>,
}

impl<B: Backend> Mixtral<B> {
    /// Hands every weight to the backend; `progress` is called with the layers done after each.
    pub(crate) fn load(
        backend: &mut B,
        config: &ModelConfig,
        weights: &mut Weights,
        max_model_len: usize,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Self, ModelError> {
        let rope = RopeTable::new(config.rope_theta, config.attention.head_dim, max_model_len);
        let table = weights.embedding(config)?;
        let mut layers = Vec::with_capacity(config.num_layers);
        for index in 0..config.num_layers {
            layers.push(Layer::load(backend, config, weights, index)?);
            weights.release_pages();
            progress(index + 1);
        }
        let (norm, lm_head) = weights.head(config)?;
        weights.finish(config)?;
        // A tied head is the same table in another role: a backend may keep what it multiplies in another format.
        let lm_head = lm_head.unwrap_or_else(|| table.clone());
        let model = Self {
            embedding: backend.matrix(&[table], MatrixUse::Lookup)?,
            layers,
            norm: backend.vector(&norm)?,
            lm_head: backend.matrix(&[lm_head], MatrixUse::Product)?,
            rope: backend.rope(&rope)?,
            eps: config.rms_norm_eps,
        };
        weights.release_pages();
        Ok(model)
    }

    /// One step's tokens to logits: embeds, runs every layer, projects the rows whose logits are wanted.
    pub(crate) fn forward(&self, backend: &mut B, shape: StepShape, w: &mut Workspace<B>) {
        backend.embed(&self.embedding, &mut w.residual);
        let first_norm = &self.layers[0].input_norm;
        backend.rms_norm(&w.residual, first_norm, self.eps, &mut w.normed, shape.num_tokens);
        for index in 0..self.layers.len() {
            self.forward_layer(backend, index, shape, w);
        }
        backend.linear(&w.normed, &self.lm_head, &mut w.logits, shape.num_logits);
    }

    /// One layer, from its normed input in `normed` to that of the next one, or of the head.
    ///
    /// A pruned last layer goes on after its attention with the rows whose logits are wanted, so its routing has
    /// `num_logits` tokens.
    fn forward_layer(&self, backend: &mut B, index: usize, shape: StepShape, w: &mut Workspace<B>) {
        let layer = &self.layers[index];
        let next = self.layers.get(index + 1);
        let is_pruned = next.is_none() && !shape.routes_all_tokens;
        let (kv, routing) = (&mut w.kv[index], &mut w.routings[index]);
        backend.linear(&w.normed, &layer.qkv, &mut w.qkv, shape.num_tokens);
        backend.rope_store_kv(&w.qkv, &self.rope, &mut w.queries, kv);
        backend.attention(&w.queries, kv, &mut w.attended);

        let (residual, attended, rows) = if is_pruned {
            backend.gather_rows(&w.residual, &mut w.last_residual);
            backend.gather_rows(&w.attended, &mut w.last_attended);
            (&mut w.last_residual, &w.last_attended, shape.num_logits)
        } else {
            (&mut w.residual, &w.attended, shape.num_tokens)
        };
        backend.linear(attended, &layer.o, &mut w.delta, rows);
        let norm = &layer.post_attention_norm;
        backend.add_rms_norm(residual, &w.delta, norm, self.eps, &mut w.normed, rows);
        backend.route(&w.normed, layer.router.as_ref(), routing, index, rows);
        backend.experts_gate_up(&w.normed, &layer.experts, routing, &mut w.act);
        backend.experts_down(&w.act, &layer.experts, routing, &mut w.delta);

        if next.is_none() && !is_pruned {
            backend.add(&mut w.residual, &w.delta, rows);
            backend.gather_rows(&w.residual, &mut w.last_residual);
            backend.rms_norm(&w.last_residual, &self.norm, self.eps, &mut w.normed, shape.num_logits);
        } else {
            let next_norm = next.map_or(&self.norm, |next| &next.input_norm);
            backend.add_rms_norm(residual, &w.delta, next_norm, self.eps, &mut w.normed, rows);
        }
    }
}

impl<B: Backend> Layer<B> {
    fn load(
        backend: &mut B,
        config: &ModelConfig,
        weights: &mut Weights,
        index: usize,
    ) -> Result<Self, ModelError> {
        let weights = weights.layer(index, config)?;
        let router = weights.router.map(|router| backend.matrix(&[router], MatrixUse::Exact));
        Ok(Self {
            input_norm: backend.vector(&weights.input_norm)?,
            qkv: backend.matrix(&weights.qkv, MatrixUse::Product)?,
            o: backend.matrix(&[weights.o], MatrixUse::Product)?,
            post_attention_norm: backend.vector(&weights.post_attention_norm)?,
            router: router.transpose()?,
            experts: backend.experts(&weights.experts)?,
        })
    }
}

impl<B: Backend> Workspace<B> {
    pub(crate) fn new(
        backend: &mut B,
        config: &ModelConfig,
        limits: &RunnerLimits,
    ) -> Result<Self, ModelError> {
        let (tokens, logits) = (limits.max_num_batched_tokens, limits.max_num_logits);
        let (hidden, attention) = (config.hidden_size, config.attention);
        let q = attention.q_features();
        let kv_cache = |backend: &mut B| backend.kv_cache(attention, limits.num_blocks, limits.block_size);
        Ok(Self {
            residual: backend.tensor(tokens, hidden, DType::F32)?,
            delta: backend.tensor(tokens, hidden, DType::F32)?,
            normed: backend.tensor(tokens, hidden, DType::Bf16)?,
            qkv: backend.tensor(tokens, attention.qkv_features(), DType::F32)?,
            queries: backend.tensor(tokens, q, DType::Bf16)?,
            attended: backend.tensor(tokens, q, DType::Bf16)?,
            act: backend.tensor(tokens * config.route.top_k, config.ffn_size, DType::Bf16)?,
            last_residual: backend.tensor(logits, hidden, DType::F32)?,
            last_attended: backend.tensor(logits, q, DType::Bf16)?,
            logits: backend.tensor(logits, config.vocab_size, DType::F32)?,
            kv: (0..config.num_layers).map(|_| kv_cache(backend)).collect::<Result<_, _>>()?,
            routings: (0..config.num_layers)
                .map(|_| backend.routing(tokens, config.route))
                .collect::<Result<_, _>>()?,
        })
    }
}

/// Bytes of the tensors of a [`Workspace`].
pub(crate) fn workspace_bytes(config: &ModelConfig, tokens: usize, logits: usize) -> u64 {
    const BF16_BYTES: usize = 2;
    const F32_BYTES: usize = 4;
    let (hidden, attention) = (config.hidden_size, &config.attention);
    let q = attention.q_features();
    let token = F32_BYTES * (2 * hidden + attention.qkv_features())
        + BF16_BYTES * (hidden + 2 * q + config.route.top_k * config.ffn_size);
    let logit = F32_BYTES * (hidden + config.vocab_size) + BF16_BYTES * q;
    (tokens * token + logits * logit) as u64
}
