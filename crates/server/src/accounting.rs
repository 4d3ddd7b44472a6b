//! Every accepted choice is counted once when it begins and once when it ends, whatever its end.
//!
//! The meter belongs to the choice, and dropping it is how a client leaves: then the choice counts as
//! cancelled. So accepted = ok (stop, length) + error + cancelled at any quiet moment, and no path through
//! the code can forget it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::FinishReason;

use crate::metrics::Metrics;

/// Times and counts one choice.
pub(crate) struct ChoiceMeter {
    metrics: Arc<Metrics>,
    arrived_at: Instant,
    last_token_at: Option<Instant>,
    num_prompt_tokens: usize,
    num_tokens: u64,
    is_open: bool,
}

impl ChoiceMeter {
    /// A choice of a request that arrived at `arrived_at`, not yet accepted.
    pub(crate) fn new(metrics: &Arc<Metrics>, arrived_at: Instant, num_prompt_tokens: usize) -> Self {
        let metrics = Arc::clone(metrics);
        Self { metrics, arrived_at, last_token_at: None, num_prompt_tokens, num_tokens: 0, is_open: false }
    }

    pub(crate) fn accept(&mut self) {
        self.is_open = true;
        self.metrics.requests_accepted.inc();
    }

    pub(crate) fn started(&self, queue_time: Duration) {
        self.metrics.queue_seconds.observe(queue_time.as_secs_f64());
    }

    pub(crate) fn token(&mut self) {
        let now = Instant::now();
        match self.last_token_at.replace(now) {
            None => self.metrics.first_token_seconds.observe((now - self.arrived_at).as_secs_f64()),
            Some(last) => self.metrics.inter_token_seconds.observe((now - last).as_secs_f64()),
        }
        self.num_tokens += 1;
    }

    /// Tokens of the choice so far.
    pub(crate) fn num_tokens(&self) -> u64 {
        self.num_tokens
    }

    /// Counts the end; later ends count nothing.
    pub(crate) fn finish(&mut self, reason: FinishReason) {
        if !std::mem::take(&mut self.is_open) {
            return;
        }
        let (prompt_tokens, tokens) = (self.num_prompt_tokens, self.num_tokens);
        tracing::debug!(reason = reason.as_str(), prompt_tokens, tokens, "a choice ended");
        self.metrics.requests_finished.with_label_values(&[reason.as_str()]).inc();
        self.metrics.request_seconds.observe(self.arrived_at.elapsed().as_secs_f64());
        self.metrics.request_prompt_tokens.observe(self.num_prompt_tokens as f64);
        self.metrics.request_generation_tokens.observe(self.num_tokens as f64);
    }
}

impl Drop for ChoiceMeter {
    fn drop(&mut self) {
        self.finish(FinishReason::Cancelled);
    }
}
