//! What a request gets when it runs alone: a loop over the model's own answers, with no engine, no batch and
//! no cache in sight.

use std::sync::Arc;

use engine::{Constraint, FakeRunner, FinishReason, PromptLogprob, Request};
use model::{ModelRunner, SampleRow, Sampled, mix64};

use crate::client::Client;
use crate::grammar::FakeConstraint;
use crate::scenario::EOS;

/// The whole outcome of one choice.
#[derive(Debug, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) prompt_logprobs: Option<Vec<Option<PromptLogprob>>>,
    pub(crate) tokens: Vec<Sampled>,
    pub(crate) reason: FinishReason,
}

/// Runs a client's choice on `runner`'s model.
pub(crate) fn run_alone(runner: &FakeRunner, client: &Client) -> Outcome {
    let (request, choice) = (&*client.request, client.choice);
    let constraint = client.grammar.map(|grammar| grammar.start(choice, Arc::default()));
    let (tokens, reason) = generate(runner, request, choice, constraint);
    // What cannot take its first token never runs.
    let runs = request.max_tokens == 0 || !tokens.is_empty();
    let prompt_logprobs = request.num_prompt_logprobs.filter(|_| choice == 0 && runs);
    let prompt_logprobs = prompt_logprobs.map(|count| score(runner, request, count));
    Outcome { prompt_logprobs, tokens, reason }
}

fn generate(
    runner: &FakeRunner,
    request: &Request,
    choice: u32,
    mut constraint: Option<FakeConstraint>,
) -> (Vec<Sampled>, FinishReason) {
    let limits = runner.limits();
    let mut params = request.sampling.clone();
    if choice > 0 {
        params.seed = mix64(params.seed.wrapping_add(choice.into()));
    }
    let ends = [request.eos_token_ids.clone(), request.stop_token_ids.clone()].concat();
    let is_eos = |token| request.eos_token_ids.contains(&token) && !request.ignore_eos;
    let mut text = request.prompt.clone();
    let mut tokens = Vec::new();
    loop {
        // The last token need not enter the cache.
        let is_full = text.len() > (limits.num_blocks - 1) * limits.block_size;
        if tokens.len() == request.max_tokens as usize || text.len() == limits.max_model_len || is_full {
            return (tokens, FinishReason::Length);
        }
        let (prompt, output) = text.split_at(request.prompt.len());
        let is_early = output.len() < request.min_tokens as usize;
        let never_ends = constraint.is_some() && request.ignore_eos;
        let banned: &[u32] = match (is_early, never_ends) {
            (true, _) => &ends,
            (false, true) => &request.eos_token_ids,
            (false, false) => &[],
        };
        let allowed = constraint.as_ref().and_then(Constraint::allowed);
        if let Some(reason) = allowed.and_then(|allowed| dead_end(allowed, banned)) {
            return (tokens, reason);
        }
        let row = SampleRow {
            params: &params,
            prompt,
            output,
            banned,
            allowed,
            forced: None,
            num_logprobs: request.num_logprobs,
        };
        let sampled = runner.sample_after(&text, &row).expect("the fake model's logits are finite");
        let token = sampled.token;
        text.push(token);
        tokens.push(sampled);
        if is_eos(token) || request.stop_token_ids.contains(&token) {
            return (tokens, FinishReason::Stop);
        }
        if let Some(constraint) = &mut constraint {
            constraint.accept(token);
            if constraint.is_complete() {
                return (tokens, FinishReason::Stop);
            }
            constraint.prepare();
        }
    }
}

/// How a text ends that can take no token, given the one word of its mask.
fn dead_end(allowed: &[u32], banned: &[u32]) -> Option<FinishReason> {
    let Some(word) = allowed.first() else { return Some(FinishReason::Error) };
    let left = banned.iter().fold(*word, |word, token| word & !(1 << token));
    let reason = if word >> EOS & 1 == 1 { FinishReason::Stop } else { FinishReason::Length };
    (left == 0).then_some(reason)
}

fn score(runner: &FakeRunner, request: &Request, count: u32) -> Vec<Option<PromptLogprob>> {
    let score = |position: usize| {
        let row = SampleRow {
            forced: Some(request.prompt[position]),
            num_logprobs: Some(count),
            ..SampleRow::new(&request.sampling)
        };
        let sampled = runner.sample_after(&request.prompt[..position], &row).expect("finite logits");
        Some(PromptLogprob { logprob: sampled.logprob?, top_logprobs: sampled.top_logprobs })
    };
    (0..request.prompt.len()).map(|position| if position == 0 { None } else { score(position) }).collect()
}
