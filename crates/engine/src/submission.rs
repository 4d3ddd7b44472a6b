//! A request on its way in, and the one place where requests are checked: what passes here can be served, and
//! cannot make any later arithmetic overflow, divide by zero or run out of vocabulary.

use std::collections::HashSet;
use std::ops::RangeInclusive;
use std::time::Duration;

use model::{RunnerLimits, SampleParams};
use thiserror::Error;

use crate::config::limits::{
    LOGIT_BIAS, MAX_LOGIT_BIAS_ENTRIES, MAX_NUM_CHOICES, MAX_NUM_LOGPROBS, MAX_STOP_TOKENS, PENALTY,
    REPETITION_PENALTY, TEMPERATURE,
};
use crate::request::{Choice, Request};

/// Why a request was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SubmitError {
    /// The queue is full.
    #[error("the queue is full; retry in {} s", retry_after.as_secs())]
    QueueFull {
        /// The queue's tokens at the recent throughput, within 1 s and 60 s.
        retry_after: Duration,
    },
    /// The engine finishes what it has and takes nothing new.
    #[error("the server is shutting down")]
    Draining,
    /// The engine has ended because the model failed.
    #[error("the engine has stopped")]
    Stopped,
    /// The request can never be served.
    #[error("{message}")]
    Invalid {
        /// The field of [`Request`] that is wrong, as OpenAI spells it where it has a name there.
        field: &'static str,
        /// What is wrong, and what would be right.
        message: String,
    },
}

/// An accepted request, with its readers.
pub(crate) struct Submission {
    pub(crate) request: Request,
    /// As many as the request says.
    pub(crate) choices: Vec<Choice>,
    pub(crate) submitted_at: Duration,
}

impl Submission {
    /// Tokens that the queue holds for this request.
    pub(crate) fn num_tokens(&self) -> usize {
        self.request.prompt.len() * self.choices.len()
    }

    /// When the request is too late, by the engine's clock.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        self.request.deadline.map(|deadline| self.submitted_at.saturating_add(deadline))
    }
}

/// Tokens that the whole cache can hold.
pub(crate) fn cache_capacity(limits: &RunnerLimits) -> usize {
    (limits.num_blocks - 1) * limits.block_size
}

/// Checks a request against the model's limits and the engine's.
pub(crate) fn validate(request: &Request, limits: &RunnerLimits) -> Result<(), SubmitError> {
    check_lengths(request, limits)?;
    check_tokens(request, limits)?;
    check_sampling(&request.sampling)?;
    check_routing(request, limits)?;
    let num_choices = request.num_choices;
    require((1..=MAX_NUM_CHOICES).contains(&num_choices), "n", || {
        format!("n is {num_choices}; it must be between 1 and {MAX_NUM_CHOICES}")
    })?;
    for (field, count) in
        [("logprobs", request.num_logprobs), ("prompt_logprobs", request.num_prompt_logprobs)]
    {
        let count = count.unwrap_or(0);
        require(count <= MAX_NUM_LOGPROBS, field, || {
            format!("{field} is {count}; it must be at most {MAX_NUM_LOGPROBS}")
        })?;
    }
    Ok(())
}

fn check_lengths(request: &Request, limits: &RunnerLimits) -> Result<(), SubmitError> {
    let prompt_len = request.prompt.len();
    let (context, capacity) = (limits.max_model_len, cache_capacity(limits));
    require(prompt_len > 0, "prompt", || "the prompt is empty".to_owned())?;
    // A prompt to continue leaves room for one token; that token itself need not enter the cache.
    let fits_context = prompt_len + usize::from(request.max_tokens > 0) <= context;
    require(fits_context, "prompt", || {
        format!("This model's maximum context length is {context} tokens, but the prompt has {prompt_len}")
    })?;
    require(prompt_len <= capacity, "prompt", || {
        format!("the prompt has {prompt_len} tokens, and the server's cache holds {capacity}")
    })
}

fn check_tokens(request: &Request, limits: &RunnerLimits) -> Result<(), SubmitError> {
    let vocab_size = limits.vocab_size;
    let bias_tokens: Vec<u32> = request.sampling.logit_bias.iter().map(|&(token, _)| token).collect();
    let ends = [&request.eos_token_ids, &request.stop_token_ids];
    let lists = [("prompt", &request.prompt), ("logit_bias", &bias_tokens), ("eos_token_ids", ends[0])];
    for (field, tokens) in lists.into_iter().chain([("stop_token_ids", ends[1])]) {
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab_size) {
            let message = format!("{field} has token {token}; the vocabulary has {vocab_size} tokens");
            return Err(SubmitError::Invalid { field, message });
        }
    }
    require(ends[0].len() + ends[1].len() <= MAX_STOP_TOKENS, "stop_token_ids", || {
        format!("there are more than {MAX_STOP_TOKENS} stop tokens")
    })?;
    // Before min_tokens no end may be taken, so something else must be left to take.
    let distinct: HashSet<u32> = ends.into_iter().flatten().copied().collect();
    require(request.min_tokens == 0 || distinct.len() < vocab_size, "stop_token_ids", || {
        "min_tokens leaves no token to take: every token is a stop token".to_owned()
    })
}

fn check_sampling(params: &SampleParams) -> Result<(), SubmitError> {
    check_range("temperature", params.temperature, TEMPERATURE)?;
    check_range("top_p", params.top_p, 0.0..=1.0)?;
    check_range("min_p", params.min_p, 0.0..=1.0)?;
    check_range("presence_penalty", params.presence_penalty, PENALTY)?;
    check_range("frequency_penalty", params.frequency_penalty, PENALTY)?;
    check_range("repetition_penalty", params.repetition_penalty, REPETITION_PENALTY)?;
    let num_entries = params.logit_bias.len();
    require(num_entries <= MAX_LOGIT_BIAS_ENTRIES, "logit_bias", || {
        format!("logit_bias has {num_entries} entries; it may have {MAX_LOGIT_BIAS_ENTRIES}")
    })?;
    params.logit_bias.iter().try_for_each(|&(_, bias)| check_range("logit_bias", bias, LOGIT_BIAS))
}

fn check_routing(request: &Request, limits: &RunnerLimits) -> Result<(), SubmitError> {
    let layers = request.record_routing.iter().flat_map(|wanted| &wanted.layers);
    let num_layers = limits.num_layers;
    require(layers.clone().all(|&layer| (layer as usize) < num_layers), "routing", || {
        format!("the model has layers 0 to {}", num_layers - 1)
    })?;
    require(layers.is_sorted_by(|a, b| a < b), "routing", || {
        "layers are named in order, each once".to_owned()
    })?;
    let (asked, most) = match &request.steering {
        Some(steering) => (steering.experts_per_token(), limits.max_steered_experts()),
        None => (limits.top_k, limits.top_k),
    };
    require(asked <= most, "moe", || {
        format!("it needs {asked} experts per token, and a step of this server has room for {most}")
    })
}

/// Refuses what is outside, infinities and NaN included.
fn check_range(field: &'static str, value: f32, range: RangeInclusive<f32>) -> Result<(), SubmitError> {
    require(range.contains(&value), field, || {
        format!("{field} is {value}; it must be between {} and {}", range.start(), range.end())
    })
}

fn require(holds: bool, field: &'static str, message: impl FnOnce() -> String) -> Result<(), SubmitError> {
    if holds { Ok(()) } else { Err(SubmitError::Invalid { field, message: message() }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{limits, request};

    #[track_caller]
    fn check(change: impl FnOnce(&mut Request), expected: Result<(), &str>) {
        // 16 tokens of vocabulary, 40 of context, and a cache of 48.
        let limits =
            RunnerLimits { vocab_size: 16, max_model_len: 40, num_blocks: 13, block_size: 4, ..limits() };
        let mut request = request(&[1, 2, 3], 5);
        change(&mut request);
        let got = validate(&request, &limits).map_err(|error| match error {
            SubmitError::Invalid { field, .. } => field,
            other => panic!("{other:?}"),
        });
        assert_eq!(got, expected);
    }

    #[test]
    fn prompts_fit_the_vocabulary_and_the_context() {
        check(|_| (), Ok(()));
        check(|r| r.prompt = vec![], Err("prompt"));
        check(|r| r.prompt = vec![15; 39], Ok(()));
        check(|r| r.prompt = vec![15; 40], Err("prompt"));
        check(|r| (r.prompt, r.max_tokens) = (vec![15; 40], 0), Ok(()));
        check(|r| (r.prompt, r.max_tokens) = (vec![15; 41], 0), Err("prompt"));
        check(|r| r.prompt = vec![16], Err("prompt"));
        check(|r| r.max_tokens = u32::MAX, Ok(()));
    }

    #[test]
    fn prompts_fit_the_cache() {
        let limits = RunnerLimits { num_blocks: 3, block_size: 4, max_model_len: 100, ..limits() };
        assert_eq!(validate(&request(&[1; 8], 1), &limits), Ok(()));
        assert!(validate(&request(&[1; 9], 1), &limits).is_err());
    }

    #[test]
    fn every_number_has_a_range() {
        check(|r| r.num_choices = 0, Err("n"));
        check(|r| r.num_choices = MAX_NUM_CHOICES, Ok(()));
        check(|r| r.num_choices = u32::MAX, Err("n"));
        check(|r| r.num_logprobs = Some(u32::MAX), Err("logprobs"));
        check(|r| r.num_prompt_logprobs = Some(u32::MAX), Err("prompt_logprobs"));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1e9, 1e9] {
            check(|r| r.sampling.temperature = bad, Err("temperature"));
            check(|r| r.sampling.top_p = bad, Err("top_p"));
            check(|r| r.sampling.min_p = bad, Err("min_p"));
            check(|r| r.sampling.presence_penalty = bad, Err("presence_penalty"));
            check(|r| r.sampling.frequency_penalty = bad, Err("frequency_penalty"));
            check(|r| r.sampling.repetition_penalty = bad, Err("repetition_penalty"));
            check(|r| r.sampling.logit_bias = vec![(0, bad)], Err("logit_bias"));
        }
        check(|r| r.sampling.repetition_penalty = 0.0, Err("repetition_penalty"));
        check(|r| r.sampling.logit_bias = vec![(0, 1.0); MAX_LOGIT_BIAS_ENTRIES + 1], Err("logit_bias"));
    }

    #[test]
    fn token_lists_stay_inside_the_vocabulary_and_leave_a_token_to_take() {
        check(|r| r.sampling.logit_bias = vec![(16, 1.0)], Err("logit_bias"));
        check(|r| r.stop_token_ids = vec![u32::MAX], Err("stop_token_ids"));
        check(|r| r.eos_token_ids = vec![16], Err("eos_token_ids"));
        check(|r| r.stop_token_ids = vec![1; MAX_STOP_TOKENS + 1], Err("stop_token_ids"));
        check(|r| r.stop_token_ids = (0..16).collect(), Ok(()));
        check(|r| (r.stop_token_ids, r.min_tokens) = ((0..16).collect(), 1), Err("stop_token_ids"));
        check(|r| (r.stop_token_ids, r.min_tokens) = ((0..15).collect(), 1), Ok(()));
    }
}
