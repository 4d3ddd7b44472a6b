//! Mixtral, once: its weights as a backend's handles, the workspace of a step, and the forward pass.
//!
//! A layer is nine calls; the dense siblings are the same layer with one expert and no router. The pass allocates
//! nothing and reads nothing back, so a backend may record it and replay the recording.

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
    /// f32 `[logits, hidden]`.
    last: B::Tensor,
    /// bf16 `[logits, hidden]`.
    last_normed: B::Tensor,
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
        let rows = shape.num_tokens;
        backend.embed(&self.embedding, &mut w.residual);
        for (index, layer) in self.layers.iter().enumerate() {
            if index == 0 {
                backend.rms_norm(&w.residual, &layer.input_norm, self.eps, &mut w.normed, rows);
            } else {
                backend.add_rms_norm(
                    &mut w.residual,
                    &w.delta,
                    &layer.input_norm,
                    self.eps,
                    &mut w.normed,
                    rows,
                );
            }
            self.forward_layer(backend, layer, index, rows, w);
        }
        backend.add(&mut w.residual, &w.delta, rows);
        backend.gather_rows(&w.residual, &mut w.last);
        backend.rms_norm(&w.last, &self.norm, self.eps, &mut w.last_normed, shape.num_logits);
        backend.linear(&w.last_normed, &self.lm_head, &mut w.logits, shape.num_logits);
    }

    /// From the layer's normed input to `delta`, what its experts add to the residual.
    fn forward_layer(
        &self,
        backend: &mut B,
        layer: &Layer<B>,
        index: usize,
        rows: usize,
        w: &mut Workspace<B>,
    ) {
        let (kv, routing) = (&mut w.kv[index], &mut w.routings[index]);
        backend.linear(&w.normed, &layer.qkv, &mut w.qkv, rows);
        backend.rope_store_kv(&w.qkv, &self.rope, &mut w.queries, kv);
        backend.attention(&w.queries, kv, &mut w.attended);
        backend.linear(&w.attended, &layer.o, &mut w.delta, rows);
        let norm = &layer.post_attention_norm;
        backend.add_rms_norm(&mut w.residual, &w.delta, norm, self.eps, &mut w.normed, rows);
        backend.route(&w.normed, layer.router.as_ref(), routing);
        backend.experts_gate_up(&w.normed, &layer.experts, routing, &mut w.act);
        backend.experts_down(&w.act, &layer.experts, routing, &mut w.delta);
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
            last: backend.tensor(logits, hidden, DType::F32)?,
            last_normed: backend.tensor(logits, hidden, DType::Bf16)?,
            logits: backend.tensor(logits, config.vocab_size, DType::F32)?,
            kv: (0..config.num_layers).map(|_| kv_cache(backend)).collect::<Result<_, _>>()?,
            routings: (0..config.num_layers)
                .map(|_| backend.routing(tokens, config.route))
                .collect::<Result<_, _>>()?,
        })
    }
}
