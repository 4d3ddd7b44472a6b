//! [`Backend`]: the verbs a transformer with routed experts is made of, each specified to the rounding.
//!
//! # Numbers
//! Weights are bf16, unless the backend was told to quantise those of its products. The residual stream and everything a reduction produces is f32; whatever feeds a matrix
//! product is rounded to bf16 first (the outputs of `rms_norm`, `attention`, `experts_gate_up`, the queries,
//! keys and values), because that is what tensor cores and `vdpbf16ps` multiply. Accumulation is f32. A
//! tensor's [`DType`] says which of the two it holds, and a verb that writes it rounds to it.
//!
//! # Determinism
//! A row's result never depends on which other rows are in the step, on how a prompt was cut into chunks, or
//! on where its blocks lie: reductions run in an order fixed by the row's own position and shape.
//!
//! # Replay
//! Between [`Backend::begin_step`] and [`Backend::finish_step`] verbs allocate nothing, read nothing back and
//! shape their launches from [`StepShape`] alone. What varies from step to step (token ids, positions, block
//! tables, expert counts) lives on the device. So one `forward` can run eagerly, or be captured once per shape
//! and replayed by [`Backend::run`]. Device errors are sticky and surface in `finish_step`.

use thiserror::Error;

use crate::{
    Batch, ExpertLoad, LayerChoices, NonFiniteLogits, RopeTable, Routing, SampleRow, Sampled, StepShape,
    WeightView,
};

/// Element type of an activation tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DType {
    /// Rounded to bf16: feeds a matrix product.
    Bf16,
    /// f32: the residual stream, projections before rotation, logits.
    F32,
}

/// What a backend cannot do, or no longer can.
#[derive(Debug, Error)]
pub enum BackendError {
    /// The start-up allocations do not fit.
    #[error("{what} needs {needed_bytes} bytes, which this device does not have")]
    OutOfMemory {
        /// What was being allocated.
        what: String,
        /// Size of the allocation.
        needed_bytes: u64,
    },
    /// The model has a shape that this backend's kernels do not cover.
    #[error("this backend does not support {0}")]
    Unsupported(String),
    /// The device failed; nothing computed since the last `finish_step` can be trusted.
    #[error("the device failed: {0}")]
    Device(String),
}

/// The attention of one layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads; a multiple of `num_kv_heads`.
    pub num_heads: usize,
    /// Key and value heads, each shared by `num_heads / num_kv_heads` query heads.
    pub num_kv_heads: usize,
    /// Features per head, even.
    pub head_dim: usize,
    /// A token sees itself and the `sliding_window - 1` tokens before it; `None`: everything before it.
    pub sliding_window: Option<u32>,
}

impl AttentionShape {
    /// Features of all query heads.
    pub fn q_features(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Features of all key heads (and of all value heads).
    pub fn kv_features(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Features of queries, keys and values side by side, the rows of the fused projection.
    pub fn qkv_features(&self) -> usize {
        self.q_features() + 2 * self.kv_features()
    }
}

/// What a matrix is for, which decides in which format a backend may keep it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MatrixUse {
    /// Its rows are looked up, one part only: kept in bf16, whatever the format.
    Lookup,
    /// It decides to which experts a token goes: kept in bf16, whatever the format.
    Exact,
    /// Activations are multiplied with it: kept in the format that the backend was told to use.
    Product,
}

/// How many experts a layer has and how many of them a token visits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteShape {
    /// Experts in the layer.
    pub num_experts: usize,
    /// Experts per token, `1..=num_experts`.
    pub top_k: usize,
}

/// The stored weights of one layer's experts, one view per expert in each list.
#[derive(Debug)]
pub struct ExpertsView {
    /// `num_experts` × `[ffn, hidden]` (checkpoint name `w1`).
    pub gate: Vec<WeightView>,
    /// `num_experts` × `[ffn, hidden]` (checkpoint name `w3`).
    pub up: Vec<WeightView>,
    /// `num_experts` × `[hidden, ffn]` (checkpoint name `w2`).
    pub down: Vec<WeightView>,
}

/// A device that can run a transformer with routed experts.
///
/// `rows` is the number of leading rows of its tensors that a verb works on; it is `num_tokens` or
/// `num_logits` of the step's [`StepShape`], which may be zero. A verb panics if a tensor's shape or dtype does not
/// fit.
pub trait Backend: Send + 'static {
    /// Activations `[max_rows, features]` of one [`DType`], allocated at start.
    type Tensor: Send;
    /// A norm's weight `[features]`.
    type Vector: Send;
    /// A matrix `[out, in]`.
    type Matrix: Send;
    /// The gate, up and down matrices of one layer's experts.
    type Experts: Send;
    /// One layer's paged keys and values.
    type KvCache: Send;
    /// One layer's [`Routing`] of the current step.
    type Routing: Send;
    /// A [`RopeTable`] on the device.
    type Rope: Send;

    /// What runs here, for people: `cpu avx2, 2 threads`.
    fn describe(&self) -> String;

    /// Bits that the weights made for [`MatrixUse::Product`], experts included, take on average.
    fn weight_bits(&self) -> f64;

    /// Allocates a tensor `[max_rows, features]`, zeroed.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`], as for every method that makes a handle.
    fn tensor(
        &mut self,
        max_rows: usize,
        features: usize,
        dtype: DType,
    ) -> Result<Self::Tensor, BackendError>;

    /// Makes a norm's weight from a `[1, features]` view.
    fn vector(&mut self, view: &WeightView) -> Result<Self::Vector, BackendError>;

    /// Makes one matrix of several stacked along their rows (queries, keys and values become one product).
    fn matrix(&mut self, parts: &[WeightView], purpose: MatrixUse) -> Result<Self::Matrix, BackendError>;

    /// Makes the experts of one layer.
    fn experts(&mut self, view: &ExpertsView) -> Result<Self::Experts, BackendError>;

    /// Uploads the angles.
    fn rope(&mut self, table: &RopeTable) -> Result<Self::Rope, BackendError>;

    /// Allocates one layer's cache of `num_blocks` blocks of `block_size` tokens, keys and values in bf16 unless the
    /// backend was told to quantise them.
    fn kv_cache(
        &mut self,
        shape: AttentionShape,
        num_blocks: usize,
        block_size: usize,
    ) -> Result<Self::KvCache, BackendError>;

    /// Allocates one layer's routing for up to `max_tokens` tokens, or fewer that have more entries each.
    fn routing(&mut self, max_tokens: usize, shape: RouteShape) -> Result<Self::Routing, BackendError>;

    /// Copies f32 rows into a tensor, rounding to its dtype. For tests and tools, never within a step.
    fn upload(&mut self, tensor: &mut Self::Tensor, values: &[f32]);

    /// Reads the first `rows` rows of a tensor. For tests and tools, never within a step.
    fn download(&mut self, tensor: &Self::Tensor, rows: usize) -> Vec<f32>;

    /// Starts a step: puts the batch on the device and says how the step's launches are shaped.
    fn begin_step(&mut self, batch: &Batch) -> Result<StepShape, BackendError>;

    /// Runs `forward`, or replays what an earlier call with the same shape captured.
    fn run(&mut self, shape: StepShape, mut forward: impl FnMut(&mut Self, StepShape))
    where
        Self: Sized,
    {
        forward(self, shape);
    }

    /// `out[t] = table[token_ids[t]]`, f32; `table` was made for [`MatrixUse::Lookup`].
    fn embed(&mut self, table: &Self::Matrix, out: &mut Self::Tensor);

    /// `x += y`, both f32.
    fn add(&mut self, x: &mut Self::Tensor, y: &Self::Tensor, rows: usize);

    /// `out = x / sqrt(mean(x²) + eps) * weight` over the features; `x` f32, the statistics f32, `out` bf16.
    ///
    /// Source: Root Mean Square Layer Normalization (arXiv 1910.07467).
    fn rms_norm(
        &mut self,
        x: &Self::Tensor,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Tensor,
        rows: usize,
    );

    /// `residual += delta; out = rms_norm(residual)`. The default body is the specification.
    fn add_rms_norm(
        &mut self,
        residual: &mut Self::Tensor,
        delta: &Self::Tensor,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Tensor,
        rows: usize,
    ) {
        self.add(residual, delta, rows);
        self.rms_norm(residual, weight, eps, out, rows);
    }

    /// `out[t, o] = Σ_i x[t, i] · weight[o, i]`; `x` bf16, accumulation f32, `out` of either dtype.
    fn linear(&mut self, x: &Self::Tensor, weight: &Self::Matrix, out: &mut Self::Tensor, rows: usize);

    /// Turns queries and keys by their positions' angles and stores keys and values in the cache.
    ///
    /// `qkv` is f32 `[tokens, q | k | v]`, heads contiguous within each part. Rotation is f32; `q_out` and the
    /// cache receive bf16. Pairing of features: see [`RopeTable`].
    fn rope_store_kv(
        &mut self,
        qkv: &Self::Tensor,
        rope: &Self::Rope,
        q_out: &mut Self::Tensor,
        kv: &mut Self::KvCache,
    );

    /// Causal attention of every query token over its sequence's cached keys and values.
    ///
    /// `q` and `out` are bf16 `[tokens, heads × head_dim]`; query head `h` reads kv head
    /// `h / (num_heads / num_kv_heads)`. `out = softmax(q·Kᵀ / sqrt(head_dim)) · V` with f32 scores, weights
    /// and sums.
    ///
    /// Source: Attention Is All You Need (arXiv 1706.03762), GQA (2305.13245), paging (2309.06180).
    fn attention(&mut self, q: &Self::Tensor, kv: &Self::KvCache, out: &mut Self::Tensor);

    /// Routes every row of layer `layer`: [`Routing::route`] on the f32 logits `x · routerᵀ`, under the batch's
    /// steering.
    ///
    /// `router` is `[num_experts, hidden]`, made for [`MatrixUse::Exact`]. With `None` the layer is dense: every
    /// row goes to expert 0 with weight 1. The experts then work on as many tokens as were routed here. In a step with
    /// steered tokens the rows are all its tokens.
    fn route(
        &mut self,
        x: &Self::Tensor,
        router: Option<&Self::Matrix>,
        routing: &mut Self::Routing,
        layer: usize,
        rows: usize,
    );

    /// `act[r] = silu(gate_e · x_t) * (up_e · x_t)` for every row `r` of the permutation, token `t` on expert
    /// `e`; `x` bf16 `[tokens, hidden]`, products f32, `act` bf16 `[tokens × width, ffn]` in permutation order.
    ///
    /// Source: SwiGLU, GLU Variants Improve Transformer (arXiv 2002.05202).
    fn experts_gate_up(
        &mut self,
        x: &Self::Tensor,
        experts: &Self::Experts,
        routing: &Self::Routing,
        act: &mut Self::Tensor,
    );

    /// `out[t] = Σ_e weight(t, e) · (down_e · act[row(t, e)])`, summed over the token's experts by ascending
    /// id; `act` bf16 `[tokens × width, ffn]` in permutation order, `out` f32 `[tokens, hidden]`.
    fn experts_down(
        &mut self,
        act: &Self::Tensor,
        experts: &Self::Experts,
        routing: &Self::Routing,
        out: &mut Self::Tensor,
    );

    /// `out[i] = x[logits_indices[i]]`, both of the same dtype.
    fn gather_rows(&mut self, x: &Self::Tensor, out: &mut Self::Tensor);

    /// Takes one token per row of f32 logits `[num_logits, vocab]`, as [`crate::sampling::sample_row`] does.
    ///
    /// `rows` are in the order of the batch's `logits_indices`; the results come from `finish_step`.
    fn sample(&mut self, logits: &Self::Tensor, rows: &[SampleRow<'_>]);

    /// Waits for the step and returns what `sample` took: the only values that a step reads back.
    ///
    /// # Errors
    /// The first device error since `begin_step`.
    fn finish_step(&mut self) -> Result<Vec<Result<Sampled, NonFiniteLogits>>, BackendError>;

    /// Seconds that the step just finished took on the device, by its own clock; `None` where the caller's time is the
    /// device's. What the device waited between steps is not in them.
    fn device_seconds(&self) -> Option<f64> {
        None
    }

    /// Reads a layer's routing of the step just finished.
    fn read_routing(&mut self, routing: &Self::Routing) -> Routing;

    /// Reads the experts and weights of all tokens of the step just finished, a layer each: `topk_ids` and
    /// `topk_weights` of its [`Routing`], which are all that a record needs.
    fn read_choices(&mut self, routings: &[Self::Routing]) -> Vec<LayerChoices> {
        let read = |routing| {
            let Routing { width, topk_ids, topk_weights, .. } = self.read_routing(routing);
            LayerChoices { width, ids: topk_ids, weights: topk_weights }
        };
        routings.iter().map(read).collect()
    }

    /// Adds the step's tokens per expert of one layer, the sums of their gate weights and the rows of the tiles that
    /// they were multiplied in to `loads` `[num_experts]`.
    fn add_expert_loads(&mut self, routing: &Self::Routing, loads: &mut [ExpertLoad]) {
        let routing = self.read_routing(routing);
        for (expert, load) in loads.iter_mut().enumerate() {
            *load += routing.load(expert);
        }
    }
}
