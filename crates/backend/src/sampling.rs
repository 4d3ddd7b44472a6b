//! From a row of logits to a token: the plain implementation, which is the specification for devices that
//! sample on their own.
//!
//! Order: logit bias, repetition penalty, presence and frequency penalties, banned tokens, then all but the allowed
//! ones; then greedy, or temperature, top-k, top-p, min-p and one draw, among integers ([`weights`]). Randomness is an input: [`uniform`] of
//! the request's seed and the token's index, so a request's luck depends on nothing but itself.
//!
//! This file does not know why a token is banned or allowed, or what ends a sequence; that is the engine's policy.

pub mod weights;

use std::collections::HashMap;

use thiserror::Error;

use crate::sampling::weights::{Weighted, least_weight, weight_scale};

/// Logits that are compared side by side.
const LANES: usize = 16;

/// How a sequence's tokens are taken.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleParams {
    /// Softens (> 1) or sharpens (< 1) the distribution; 0 takes the likeliest token.
    pub temperature: f32,
    /// Keeps the `top_k` likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Keeps the fewest likeliest tokens whose probabilities sum to at least `top_p`; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least `min_p` times as likely as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Subtracted from the logit of every token already generated.
    pub presence_penalty: f32,
    /// Subtracted once per time that the token was already generated.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in the prompt or the output; 1 is off.
    pub repetition_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the sequence's draws.
    pub seed: u64,
}

impl Default for SampleParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

impl SampleParams {
    /// Always the likeliest token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Whether the likeliest token is taken.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0 || self.top_k == 1
    }

    /// Whether neither bias nor penalties touch the logits.
    fn leaves_logits(&self) -> bool {
        let has_penalties =
            self.presence_penalty != 0.0 || self.frequency_penalty != 0.0 || self.repetition_penalty != 1.0;
        self.logit_bias.is_empty() && !has_penalties
    }
}

/// What to do with one row of logits.
#[derive(Debug, Clone, Copy)]
pub struct SampleRow<'a> {
    /// How to take the token.
    pub params: &'a SampleParams,
    /// The prompt, for the repetition penalty.
    pub prompt: &'a [u32],
    /// The tokens generated so far, for the penalties; their number indexes the draw.
    pub output: &'a [u32],
    /// Tokens that must not be taken now (an end of sequence before `min_tokens`).
    pub banned: &'a [u32],
    /// If there, only these tokens may be taken: bit `t % 32` of word `t / 32` is token `t`, and what lies behind
    /// the last word is not allowed. Log-probabilities do not change with it.
    pub allowed: Option<&'a [u32]>,
    /// Take this token whatever the logits say: its log-probability is all that is wanted (prompt scoring).
    pub forced: Option<u32>,
    /// Report log-probabilities: the token's own, and of this many likeliest tokens.
    pub num_logprobs: Option<u32>,
}

/// What bias, penalties and bans do to one token's logit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogitEdit {
    /// Token id.
    pub token: u32,
    /// Added first; minus infinity for a banned token.
    pub bias: f32,
    /// Then divides a positive logit and multiplies any other.
    pub repetition: f32,
    /// Then taken away.
    pub subtracted: f32,
}

impl LogitEdit {
    /// The edited logit.
    pub fn apply(&self, logit: f32) -> f32 {
        let biased = logit + self.bias;
        let scaled = if biased > 0.0 { biased / self.repetition } else { biased * self.repetition };
        scaled - self.subtracted
    }
}

impl<'a> SampleRow<'a> {
    /// A row without a history, of which only the token is wanted.
    pub fn new(params: &'a SampleParams) -> Self {
        Self {
            params,
            prompt: &[],
            output: &[],
            banned: &[],
            allowed: None,
            forced: None,
            num_logprobs: None,
        }
    }

    /// The draw for the token that comes next.
    pub fn uniform(&self) -> f64 {
        uniform(self.params.seed, self.output.len() as u64)
    }

    /// What is done to the logits before a token is taken, each token once, in no order.
    pub fn edits(&self) -> impl Iterator<Item = LogitEdit> + use<> {
        let params = self.params;
        let mut edits: HashMap<u32, LogitEdit> = HashMap::new();
        let mut edit = |token, change: &dyn Fn(&mut LogitEdit)| {
            let untouched = LogitEdit { token, bias: 0.0, repetition: 1.0, subtracted: 0.0 };
            change(edits.entry(token).or_insert(untouched));
        };
        for &(token, bias) in &params.logit_bias {
            edit(token, &|edit| edit.bias += bias);
        }
        if params.repetition_penalty != 1.0 {
            for &token in self.prompt.iter().chain(self.output) {
                edit(token, &|edit| edit.repetition = params.repetition_penalty);
            }
        }
        if params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
            let mut counts: HashMap<u32, u32> = HashMap::new();
            self.output.iter().for_each(|&token| *counts.entry(token).or_default() += 1);
            for (token, count) in counts {
                let subtracted = params.presence_penalty + params.frequency_penalty * count as f32;
                edit(token, &|edit| edit.subtracted = subtracted);
            }
        }
        for &token in self.banned {
            edit(token, &|edit| edit.bias = f32::NEG_INFINITY);
        }
        edits.into_values()
    }
}

/// A token and its natural log-probability under the model's own distribution (before bias, penalties and
/// temperature).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    /// Token id.
    pub token: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// How many tokens are likelier, plus one.
    pub rank: u32,
}

/// One taken token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// Token id.
    pub token: u32,
    /// The taken token's log-probability, if the row asked for any.
    pub logprob: Option<TokenLogprob>,
    /// The likeliest tokens, likeliest first, if the row asked for them.
    pub top_logprobs: Vec<TokenLogprob>,
}

/// A row of logits with no largest finite value: the model is broken, or bias and bans left no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("no token can be taken: the logits are not finite numbers")]
pub struct NonFiniteLogits;

/// Takes one token from `logits` `[vocab]`.
///
/// It is compiled into its caller, as is the search for the largest logit, and so for the caller's instruction set.
///
/// # Errors
/// [`NonFiniteLogits`] if a logit is NaN or positive infinity, or none is finite.
#[inline(always)]
pub fn sample_row(logits: &[f32], row: &SampleRow<'_>) -> Result<Sampled, NonFiniteLogits> {
    let max = finite_max(logits)?;
    let token = match row.forced {
        Some(token) => token,
        None => take_token(logits, max, row)?,
    };
    let Some(num_logprobs) = row.num_logprobs else {
        return Ok(Sampled { token, logprob: None, top_logprobs: Vec::new() });
    };
    let log_sum = f64::from(max) + logits.iter().map(|&x| f64::from(x - max).exp()).sum::<f64>().ln();
    let logprob = |token: u32| (f64::from(logits[token as usize]) - log_sum) as f32;
    let top = likeliest(logits, num_logprobs as usize);
    let top_logprobs =
        top.into_iter().zip(1..).map(|(token, rank)| TokenLogprob { token, logprob: logprob(token), rank });
    let own = logits[token as usize];
    let rank = 1 + logits.iter().filter(|&&x| x > own).count() as u32;
    Ok(Sampled {
        token,
        logprob: Some(TokenLogprob { token, logprob: logprob(token), rank }),
        top_logprobs: top_logprobs.collect(),
    })
}

/// The largest logit, if the row can be sampled from.
#[inline(always)]
fn finite_max(logits: &[f32]) -> Result<f32, NonFiniteLogits> {
    // Lanes, and comparisons that compile to single instructions: vocabularies are long, and this is most of what a
    // greedy token costs.
    let (mut lanes, mut nans) = ([f32::NEG_INFINITY; LANES], [0; LANES]);
    let (chunks, rest) = logits.as_chunks::<LANES>();
    for chunk in chunks {
        for ((lane, nan), &x) in lanes.iter_mut().zip(&mut nans).zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
            *nan |= u32::from(x.is_nan());
        }
    }
    let max = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, &x| max.max(x));
    let sound = max.is_finite() && nans == [0; LANES] && !rest.iter().any(|x| x.is_nan());
    if sound { Ok(max) } else { Err(NonFiniteLogits) }
}

/// Takes one token from logits of which the largest is `max`.
fn take_token(logits: &[f32], max: f32, row: &SampleRow<'_>) -> Result<u32, NonFiniteLogits> {
    let params = row.params;
    if params.leaves_logits() && row.banned.is_empty() && row.allowed.is_none() {
        return Ok(take_adjusted(logits, max, row));
    }
    let adjusted = adjust(logits, row);
    // Bias, bans and what is not allowed may have left nothing, or overflowed.
    let max = finite_max(&adjusted)?;
    Ok(take_adjusted(&adjusted, max, row))
}

/// Takes one token from logits that nothing more is added to.
fn take_adjusted(logits: &[f32], max: f32, row: &SampleRow<'_>) -> u32 {
    let params = row.params;
    if params.is_greedy() {
        return first_of(logits, max);
    }
    let weights = weights::weights(logits, max, weight_scale(params.temperature));
    let uniform = row.uniform();
    let least_weight = least_weight(params.min_p);
    let Some(mut kept) = keep_heaviest(&weights, params) else {
        return weights::draw(&weights, least_weight, uniform);
    };
    kept.retain(|&(_, weight)| weight >= least_weight);
    weights::draw_of(kept, uniform)
}

/// What top-k and then top-p keep; `None` if they keep all.
fn keep_heaviest(weights: &[u32], params: &SampleParams) -> Option<Vec<Weighted>> {
    let top_k = Some(params.top_k as usize).filter(|&k| k > 0 && k < weights.len());
    let wanted = |total: u64| (f64::from(params.top_p) * total as f64).ceil() as u64;
    match (top_k, params.top_p < 1.0) {
        (None, false) => None,
        (None, true) => {
            let wanted = wanted(weights::total(weights.iter().copied()));
            Some(weights::heaviest(weights, |_, sum| sum >= wanted))
        }
        (Some(k), limits_sum) => {
            let mut kept = weights::heaviest(weights, |count, _| count >= k);
            if limits_sum {
                let wanted = wanted(weights::total(kept.iter().map(|&(_, weight)| weight)));
                weights::truncate(&mut kept, |_, sum| sum >= wanted);
            }
            Some(kept)
        }
    }
}

/// The logits after bias, penalties and bans, those of tokens that are not allowed at minus infinity.
fn adjust(logits: &[f32], row: &SampleRow<'_>) -> Vec<f32> {
    let mut logits = logits.to_vec();
    for edit in row.edits() {
        let logit = &mut logits[edit.token as usize];
        *logit = edit.apply(*logit);
    }
    if let Some(allowed) = row.allowed {
        forbid_others(&mut logits, allowed);
    }
    logits
}

fn forbid_others(logits: &mut [f32], allowed: &[u32]) {
    let words = allowed.iter().copied().chain(std::iter::repeat(0));
    for (logits, word) in logits.chunks_mut(u32::BITS as usize).zip(words) {
        for (bit, logit) in logits.iter_mut().enumerate() {
            *logit = if word >> bit & 1 == 1 { *logit } else { f32::NEG_INFINITY };
        }
    }
}

/// The lowest token with this logit, which some token has.
fn first_of(logits: &[f32], logit: f32) -> u32 {
    let holds_it = |chunk: &[f32]| chunk.iter().fold(false, |found, &x| found | (x == logit));
    let chunk = logits.chunks(LANES).position(holds_it).expect("some token has the logit");
    let rest = &logits[chunk * LANES..];
    (chunk * LANES + rest.iter().position(|&x| x == logit).expect("as above")) as u32
}

/// The `count` tokens with the largest logits, largest first, the lower id first on a tie.
fn likeliest(logits: &[f32], count: usize) -> Vec<u32> {
    let mut tokens: Vec<u32> = (0..logits.len() as u32).collect();
    let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let count = count.min(tokens.len());
    if count == 0 {
        return Vec::new();
    }
    if count < tokens.len() {
        tokens.select_nth_unstable_by(count - 1, order);
        tokens.truncate(count);
    }
    tokens.sort_unstable_by(order);
    tokens
}

/// The draw for the `index`-th generated token of a sequence with this seed, in `0.0..1.0` with 53 bits.
pub fn uniform(seed: u64, index: u64) -> f64 {
    let bits = mix64(mix64(seed).wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// A bijective hash of 64 bits (the finaliser of SplitMix64; Steele, Lea and Flood, OOPSLA 2014).
pub fn mix64(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests;
