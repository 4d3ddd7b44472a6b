//! Where the time of a request went, in llama.cpp's words (`timings`), with the wait before them.
//!
//! ```text
//! arrival ──queue_ms──► first step ──prompt_ms──► first token ──predicted_ms──► last token
//! ```
//!
//! Choices and prompts of one request are one: from the first of them that starts to the last that ends.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::choice_text::Delta;
use crate::generation::Usage;

/// Notes when a request got how far.
#[derive(Debug)]
pub(crate) struct Stopwatch {
    arrived_at: Instant,
    started_at: Option<Instant>,
    first_token_at: Option<Instant>,
    last_token_at: Option<Instant>,
}

/// The durations between these, and the tokens in them.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Timings {
    /// From arrival to the first step, tokenizing included.
    queue_ms: f64,
    /// Prompt tokens from the prefix cache.
    cache_n: u64,
    /// Prompt tokens computed.
    prompt_n: u64,
    prompt_ms: f64,
    prompt_per_second: f64,
    /// Tokens generated.
    predicted_n: u64,
    predicted_ms: f64,
    predicted_per_second: f64,
}

impl Stopwatch {
    pub(crate) fn new(arrived_at: Instant) -> Self {
        Self { arrived_at, started_at: None, first_token_at: None, last_token_at: None }
    }

    pub(crate) fn note(&mut self, delta: &Delta) {
        if delta.has_started {
            self.started_at.get_or_insert_with(Instant::now);
        }
        if delta.num_tokens > 0 {
            let now = Instant::now();
            self.first_token_at.get_or_insert(now);
            self.last_token_at = Some(now);
        }
    }

    pub(crate) fn timings(&self, usage: &Usage) -> Timings {
        let now = Instant::now();
        let started_at = self.started_at.unwrap_or(now);
        let first_token_at = self.first_token_at.unwrap_or(now);
        let prompt = first_token_at.saturating_duration_since(started_at);
        let predicted = self.last_token_at.unwrap_or(first_token_at).duration_since(first_token_at);
        let cache_n = usage.cached_tokens();
        let prompt_n = usage.prompt_tokens.saturating_sub(cache_n);
        Timings {
            queue_ms: milliseconds(started_at.duration_since(self.arrived_at)),
            cache_n,
            prompt_n,
            prompt_ms: milliseconds(prompt),
            prompt_per_second: per_second(prompt_n, prompt),
            predicted_n: usage.completion_tokens,
            predicted_ms: milliseconds(predicted),
            // The first token belongs to the prompt's time.
            predicted_per_second: per_second(usage.completion_tokens.saturating_sub(1), predicted),
        }
    }
}

pub(crate) fn milliseconds(time: Duration) -> f64 {
    // Microseconds are as fine as anyone measures over a network.
    time.as_micros() as f64 / 1e3
}

/// 0 where there was no time to measure: JSON has no infinity.
fn per_second(count: u64, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { count as f64 / time.as_secs_f64() }
}
