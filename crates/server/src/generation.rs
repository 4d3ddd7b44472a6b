//! From validated requests to one merged stream of deltas, which both kinds of answer are made of.
//!
//! Dropping a [`Generation`] is how a client leaves: its receivers go with it, and the engine frees their
//! sequences in its next step.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use engine::{Choice, Request};
use futures_util::StreamExt;
use futures_util::stream::SelectAll;
use serde::Serialize;

use crate::accounting::ChoiceMeter;
use crate::auth::Caller;
use crate::choice::ChoiceStream;
use crate::choice_text::{Delta, TextOptions};
use crate::error::ApiError;
use crate::lifecycle::InFlight;
use crate::running::RunningAnswer;
use crate::state::AppState;
use crate::timing::{Stopwatch, Timings};

/// Tokens of a request, as OpenAI counts them: a prompt once for all its choices.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u64,
    pub(crate) completion_tokens: u64,
    pub(crate) total_tokens: u64,
    prompt_tokens_details: PromptTokensDetails,
}

#[derive(Debug, Clone, Copy, Default, Serialize)]
struct PromptTokensDetails {
    cached_tokens: u64,
}

impl Usage {
    /// Prompt tokens that came from the prefix cache.
    pub(crate) fn cached_tokens(&self) -> u64 {
        self.prompt_tokens_details.cached_tokens
    }
}

/// When a request came, and whose it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrival {
    at: Instant,
    pub(crate) caller: Caller,
}

impl Arrival {
    /// Of a request that is just being taken in.
    pub(crate) fn of(request: &axum::extract::Request) -> Self {
        Self { at: Instant::now(), caller: Caller::of(request) }
    }
}

/// All choices of all prompts of one request, under way. Choice `c` of prompt `p` has index
/// `p * num_choices + c`.
pub(crate) struct Generation {
    choices: SelectAll<ChoiceStream>,
    num_choices: usize,
    choices_per_prompt: usize,
    usage: Usage,
    stopwatch: Stopwatch,
    /// Ends of choices that were cancelled, to be told yet.
    parting: VecDeque<(usize, Delta)>,
    answer: RunningAnswer,
    _in_flight: InFlight,
}

impl Generation {
    /// Submits one engine request per prompt, all with the same number of choices.
    ///
    /// # Errors
    /// If the engine refuses any of them; those before it are cancelled. `prompt_param` is what the
    /// endpoint calls its prompt.
    pub(crate) fn start(
        state: &AppState,
        requests: Vec<Request>,
        options: &TextOptions,
        arrival: Arrival,
        prompt_param: &str,
    ) -> Result<Self, ApiError> {
        let choices_per_prompt = requests.first().map_or(1, |request| request.num_choices as usize);
        let num_choices = requests.len() * choices_per_prompt;
        let prompt_tokens = requests.iter().map(|request| request.prompt.len() as u64).sum();
        let id = requests.first().map_or("", |request| request.id.as_str());
        let answer = state.running.enter(id, arrival.caller);
        let mut choices = SelectAll::new();
        for (first_index, request) in (0..).step_by(choices_per_prompt).zip(requests) {
            choices.extend(submit(state, request, first_index, options, arrival.at, prompt_param)?);
        }
        let usage = Usage { prompt_tokens, total_tokens: prompt_tokens, ..Usage::default() };
        Ok(Self {
            choices,
            num_choices,
            choices_per_prompt,
            usage,
            stopwatch: Stopwatch::new(arrival.at),
            parting: VecDeque::new(),
            answer,
            _in_flight: state.lifecycle.enter(),
        })
    }

    /// The next thing to tell the client, and of which choice; `None` at the end. Choices take turns.
    pub(crate) async fn next(&mut self) -> Option<Result<(usize, Delta), ApiError>> {
        loop {
            let (index, delta) = match self.parting.pop_front() {
                Some((index, delta)) => (index, Ok(delta)),
                None => tokio::select! {
                    biased;
                    () = self.answer.cancelled() => {
                        self.part();
                        continue;
                    }
                    said = self.choices.next() => said?,
                },
            };
            let delta = match delta {
                Ok(delta) => delta,
                Err(error) => return Some(Err(error)),
            };
            self.stopwatch.note(&delta);
            self.usage.completion_tokens += delta.num_tokens;
            self.usage.total_tokens += delta.num_tokens;
            // The other choices of a prompt find the first one's blocks; that is no saving to report.
            if index % self.choices_per_prompt == 0 {
                self.usage.prompt_tokens_details.cached_tokens += delta.num_cached_tokens;
            }
            if !delta.is_silent() || delta.num_tokens > 0 {
                return Some(Ok((index, delta)));
            }
        }
    }

    /// Runs to the end, and returns each choice as one delta.
    ///
    /// # Errors
    /// If any choice fails; the others are cancelled.
    pub(crate) async fn finish(&mut self) -> Result<Vec<Delta>, ApiError> {
        let mut answers: Vec<Delta> = (0..self.num_choices).map(|_| Delta::default()).collect();
        while let Some(said) = self.next().await {
            let (index, delta) = said?;
            answers[index].append(delta);
        }
        Ok(answers)
    }

    /// Ends every choice where it is, and the engine's work with it.
    fn part(&mut self) {
        let choices = std::mem::take(&mut self.choices);
        let mut parting: Vec<(usize, Delta)> = choices.into_iter().filter_map(ChoiceStream::part).collect();
        parting.sort_by_key(|&(index, _)| index);
        self.parting.extend(parting);
    }

    /// Where the time went so far.
    pub(crate) fn timings(&self) -> Timings {
        self.stopwatch.timings(&self.usage)
    }

    /// What was used so far.
    pub(crate) fn usage(&self) -> Usage {
        self.usage
    }
}

fn submit(
    state: &AppState,
    request: Request,
    first_index: usize,
    options: &TextOptions,
    arrived_at: Instant,
    prompt_param: &str,
) -> Result<Vec<ChoiceStream>, ApiError> {
    let prompt: Arc<[u32]> = request.prompt.as_slice().into();
    let vocabulary = state.text.tokenizer.vocabulary();
    let open = |index: usize| {
        let meter = ChoiceMeter::new(&state.metrics, arrived_at, prompt.len());
        ChoiceStream::open(first_index + index, vocabulary, Arc::clone(&prompt), options, meter)
    };
    let (sinks, mut streams): (Vec<_>, Vec<_>) = (0..request.num_choices as usize).map(open).unzip();
    let hides_space = options.detokenizer(vocabulary, &prompt).hides_space();
    let constraints = options.bound.start(sinks.len(), hides_space);
    let choice = |(sink, constraint)| Choice { sink, constraint };
    let choices = sinks.into_iter().zip(constraints).map(choice).collect();
    state.engine.submit(request, choices).map_err(|error| ApiError::submission(error, prompt_param))?;
    streams.iter_mut().for_each(ChoiceStream::accept);
    Ok(streams)
}
