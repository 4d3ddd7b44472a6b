//! Seam A: [`ModelRunner`], what the engine knows of a model. A plain [`Batch`] goes in; tokens, and what was
//! asked for beside them, come out.

use backend::steering::MAX_STEERED_EXPERTS;
use backend::{
    BackendError, Batch, ExpertLoad, LayerChoices, NonFiniteLogits, RouteShape, SampleRow, Sampled,
};

/// The fixed sizes of a loaded model and of its cache; everything the engine plans with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunnerLimits {
    /// Token ids are `0..vocab_size`.
    pub vocab_size: usize,
    /// Most tokens a sequence may have, prompt and output together.
    pub max_model_len: usize,
    /// Layers of the model.
    pub num_layers: usize,
    /// Experts per layer; 1 for a dense model.
    pub num_experts: usize,
    /// Experts that each token visits per layer.
    pub top_k: usize,
    /// Tokens per cache block.
    pub block_size: usize,
    /// Cache blocks, the padding block 0 included.
    pub num_blocks: usize,
    /// Most tokens in a batch.
    pub max_num_batched_tokens: usize,
    /// Most sequences in a batch.
    pub max_num_seqs: usize,
    /// Most rows of logits in a batch; at least `max_num_seqs`.
    pub max_num_logits: usize,
}

/// What one step gave.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepOutput {
    /// One result per entry of the batch's `logits_indices`, in that order.
    pub sampled: Vec<Result<Sampled, NonFiniteLogits>>,
    /// `[num_layers, num_experts]` what each expert had to do in this step. A model may spare the last layer's
    /// experts the tokens whose logits are not wanted.
    pub expert_loads: Vec<ExpertLoad>,
    /// What each layer's router chose for each token; empty unless the batch asks for it.
    pub choices: Vec<LayerChoices>,
    /// Seconds that the device computed, where it has a clock of its own.
    pub device_seconds: Option<f64>,
}

impl RunnerLimits {
    /// A layer's experts, and how many of them a token visits.
    pub fn route(&self) -> RouteShape {
        RouteShape { num_experts: self.num_experts, top_k: self.top_k }
    }

    /// Most experts per token that a request may ask for: with so many for all of them, a step still has room for
    /// a token of every sequence.
    pub fn max_steered_experts(&self) -> usize {
        let room = self.max_expert_rows() / self.max_num_seqs.max(1);
        room.min(self.num_experts).min(MAX_STEERED_EXPERTS).max(self.top_k)
    }

    /// Most rows of experts that a layer computes in a step.
    pub fn max_expert_rows(&self) -> usize {
        self.max_num_batched_tokens * self.top_k
    }
}

/// A loaded model with its cache, ready to run steps.
pub trait ModelRunner: Send {
    /// The sizes to plan with; they never change.
    fn limits(&self) -> &RunnerLimits;

    /// Runs one step; `rows` has one entry per entry of `batch.logits_indices`.
    ///
    /// # Errors
    /// If the device failed. Every sequence of the batch has lost its step; the cache may be garbage.
    ///
    /// # Panics
    /// If the batch breaks an invariant ([`Batch::assert_valid`]) or a limit.
    fn execute(&mut self, batch: &Batch, rows: &[SampleRow<'_>]) -> Result<StepOutput, BackendError>;
}
