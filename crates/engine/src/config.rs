//! What an operator chooses, and the fixed limits that nobody needs to choose.

use std::sync::Arc;
use std::time::Duration;

/// Monotonic time since some start. The engine has no clock of its own: tests pass time in.
pub type Clock = Arc<dyn Fn() -> Duration + Send + Sync>;

/// The engine's share of `config.toml`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineConfig {
    /// Most sequences in a step; the runner's own limit applies too.
    pub max_num_seqs: usize,
    /// Most tokens in a step, of prompts and outputs together; the runner's own limit applies too.
    pub max_num_batched_tokens: usize,
    /// Most choices that may wait. A request's choices count singly. A request that finds the queue empty
    /// is accepted whatever its size.
    pub max_queued_requests: usize,
    /// Most prompt tokens that may wait, counted and excepted like `max_queued_requests`.
    pub max_queued_tokens: usize,
    /// Keeps the blocks of finished sequences for prompts that begin in the same way.
    pub enable_prefix_cache: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_num_seqs: 256,
            max_num_batched_tokens: 2048,
            max_queued_requests: 1024,
            max_queued_tokens: 1 << 20,
            enable_prefix_cache: true,
        }
    }
}

/// What one request may ask for at most. The server's own limits may be tighter; these keep the engine's
/// memory and time bounded, and its arithmetic finite, whoever submits.
pub mod limits {
    use std::ops::RangeInclusive;

    /// Most choices of a request.
    pub const MAX_NUM_CHOICES: u32 = 128;
    /// Most entries of `logit_bias`: each is applied at every token.
    pub const MAX_LOGIT_BIAS_ENTRIES: usize = 1024;
    /// Most `eos_token_ids` and `stop_token_ids` together.
    pub const MAX_STOP_TOKENS: usize = 1024;
    /// Most alternatives reported beside a token.
    pub const MAX_NUM_LOGPROBS: u32 = 100;
    /// Temperatures.
    pub const TEMPERATURE: RangeInclusive<f32> = 0.0..=100.0;
    /// A single token's bias.
    pub const LOGIT_BIAS: RangeInclusive<f32> = -1000.0..=1000.0;
    /// Presence and frequency penalties.
    pub const PENALTY: RangeInclusive<f32> = -100.0..=100.0;
    /// Repetition penalties; they divide logits, so zero is not among them.
    pub const REPETITION_PENALTY: RangeInclusive<f32> = 0.01..=100.0;
}
