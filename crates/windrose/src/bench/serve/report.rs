//! What a load met with: rates, latencies and errors, as a table and as JSON.

use std::collections::HashMap;
use std::fmt::Write;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;
use serde_json::{Map, Value};

use super::answer::Answer;
use super::prompts::Unit;
use crate::bench::statistics::Distribution;

/// Most kinds of errors in the table; JSON has all.
const MAX_ERRORS_SHOWN: usize = 8;

/// Everything, with what is needed to repeat it.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) load: Load,
    pub(super) num_ok: usize,
    pub(super) num_failed: usize,
    /// The most frequent first.
    pub(super) errors: Vec<ErrorCount>,
    /// From the first request to the end of the last answer.
    pub(super) duration_s: f64,
    /// Of answers that succeeded, as all below.
    pub(super) num_prompt_tokens: u64,
    pub(super) num_output_tokens: u64,
    /// Whether tokens are the server's own count; else chunks of text stand in for them.
    pub(super) has_usage: bool,
    pub(super) requests_per_s: f64,
    pub(super) output_tokens_per_s: f64,
    /// Prompts and answers.
    pub(super) total_tokens_per_s: f64,
    pub(super) ttft_ms: Option<Distribution>,
    pub(super) itl_ms: Option<Distribution>,
    pub(super) tpot_ms: Option<Distribution>,
    pub(super) end_to_end_ms: Option<Distribution>,
}

/// What was asked of the server.
#[derive(Debug, Serialize)]
pub(super) struct Load {
    pub(super) url: String,
    pub(super) model: String,
    pub(super) endpoint: &'static str,
    /// `None`: no limit.
    pub(super) concurrency: Option<usize>,
    /// `None`: all are due at once.
    pub(super) request_rate: Option<f64>,
    pub(super) prompt_unit: Unit,
    pub(super) prompt_len: usize,
    pub(super) shared_prefix_len: usize,
    pub(super) output_len: usize,
    pub(super) ignore_eos: bool,
    pub(super) seed: u64,
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub(super) extra_body: Map<String, Value>,
}

/// Requests that failed alike.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct ErrorCount {
    pub(super) message: String,
    pub(super) count: usize,
}

impl Report {
    /// Sums up how every request ended.
    pub(super) fn new(load: Load, outcomes: Vec<Result<Answer>>, duration: Duration) -> Self {
        let (mut answers, mut messages) = (Vec::new(), Vec::new());
        for outcome in outcomes {
            match outcome {
                Ok(answer) => answers.push(answer),
                Err(error) => messages.push(format!("{error:#}")),
            }
        }
        let duration_s = duration.as_secs_f64();
        let num_prompt_tokens: u64 = answers.iter().map(Answer::num_prompt_tokens).sum();
        let num_output_tokens: u64 = answers.iter().map(Answer::num_output_tokens).sum();
        Self {
            load,
            num_ok: answers.len(),
            num_failed: messages.len(),
            errors: count_errors(messages),
            duration_s,
            num_prompt_tokens,
            num_output_tokens,
            has_usage: answers.iter().all(|answer| answer.usage.is_some()),
            requests_per_s: answers.len() as f64 / duration_s,
            output_tokens_per_s: num_output_tokens as f64 / duration_s,
            total_tokens_per_s: (num_prompt_tokens + num_output_tokens) as f64 / duration_s,
            ttft_ms: distribution(answers.iter().filter_map(Answer::ttft)),
            itl_ms: distribution(answers.iter().flat_map(Answer::itls)),
            tpot_ms: distribution(answers.iter().filter_map(Answer::tpot)),
            end_to_end_ms: distribution(answers.iter().map(|answer| answer.ended_at)),
        }
    }

    /// The page that people read.
    pub(super) fn table(&self) -> String {
        let mut table = String::new();
        let mut line = |text: String| writeln!(table, "{text}").expect("writing to a string");
        let load = &self.load;
        line(format!("{} at {}{}, {}", load.model, load.url, load.endpoint, load.pace()));
        line(format!(
            "requests   {} ok, {} failed in {:.2} s",
            self.num_ok, self.num_failed, self.duration_s
        ));
        line(format!(
            "tokens     {} of prompts, {} of answers",
            self.num_prompt_tokens, self.num_output_tokens
        ));
        line(format!("asked      {}", load.lengths()));
        line(format!(
            "rates      {:.2} requests/s, {:.1} output tokens/s, {:.1} tokens/s with prompts",
            self.requests_per_s, self.output_tokens_per_s, self.total_tokens_per_s
        ));
        if !self.has_usage {
            line(
                "           the server did not count all tokens: chunks of text were counted instead".into(),
            );
        }
        line(format!("\n{:<11}{:>10}{:>10}{:>10}{:>10}", "ms", "mean", "p50", "p90", "p99"));
        for (name, distribution) in [
            ("TTFT", self.ttft_ms),
            ("ITL", self.itl_ms),
            ("TPOT", self.tpot_ms),
            ("end to end", self.end_to_end_ms),
        ] {
            line(row(name, distribution));
        }
        for ErrorCount { message, count } in self.errors.iter().take(MAX_ERRORS_SHOWN) {
            line(format!("\n{count} failed: {message}"));
        }
        table
    }
}

impl Load {
    fn pace(&self) -> String {
        let limit = self.concurrency.map_or("no limit".to_owned(), |limit| format!("at most {limit}"));
        let rate = self.request_rate.map_or(String::new(), |rate| format!("{rate} requests/s, "));
        format!("{rate}{limit} in flight")
    }

    fn lengths(&self) -> String {
        let Self { prompt_len, prompt_unit, output_len, .. } = self;
        let shared = match self.shared_prefix_len {
            0 => String::new(),
            len => format!(" after {len} that all share"),
        };
        format!("prompts of {prompt_len} {prompt_unit}{shared}, answers of {output_len} tokens")
    }
}

fn row(name: &str, distribution: Option<Distribution>) -> String {
    let Some(Distribution { mean, p50, p90, p99 }) = distribution else {
        return format!("{name:<11}{:>10}", "none");
    };
    format!("{name:<11}{mean:>10.2}{p50:>10.2}{p90:>10.2}{p99:>10.2}")
}

fn distribution(times: impl Iterator<Item = Duration>) -> Option<Distribution> {
    Distribution::new(times.map(|time| 1e3 * time.as_secs_f64()))
}

fn count_errors(messages: Vec<String>) -> Vec<ErrorCount> {
    let mut counts = HashMap::new();
    messages.into_iter().for_each(|message| *counts.entry(message).or_default() += 1);
    let mut errors: Vec<_> =
        counts.into_iter().map(|(message, count)| ErrorCount { message, count }).collect();
    errors.sort_by(|a, b| b.count.cmp(&a.count).then_with(|| a.message.cmp(&b.message)));
    errors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_grouped_by_message_and_the_most_frequent_is_first() {
        let messages = ["b", "a", "b", "c"].map(str::to_owned).to_vec();
        let error = |message: &str, count| ErrorCount { message: message.to_owned(), count };
        assert_eq!(count_errors(messages), [error("b", 2), error("a", 1), error("c", 1)]);
    }
}
