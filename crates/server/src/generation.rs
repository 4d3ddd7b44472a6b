//! From validated requests to one merged stream of deltas, which both kinds of answer are made of.
//!
//! Dropping a [`Generation`] is how a client leaves: its receivers go with it, and the engine frees their
//! sequences in its next step.

use std::sync::Arc;
use std::time::Instant;

use engine::Request;
use futures_util::StreamExt;
use futures_util::stream::SelectAll;
use serde::Serialize;

use crate::accounting::ChoiceMeter;
use crate::choice::ChoiceStream;
use crate::choice_text::{Delta, TextOptions};
use crate::error::ApiError;
use crate::lifecycle::InFlight;
use crate::state::AppState;

/// Tokens of a request, as OpenAI counts them: a prompt once for all its choices.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
    prompt_tokens_details: PromptTokensDetails,
}

#[derive(Debug, Clone, Copy, Default, Serialize)]
struct PromptTokensDetails {
    cached_tokens: u64,
}

/// All choices of all prompts of one request, under way. Choice `c` of prompt `p` has index
/// `p * num_choices + c`.
pub(crate) struct Generation {
    choices: SelectAll<ChoiceStream>,
    num_choices: usize,
    choices_per_prompt: usize,
    usage: Usage,
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
        arrived_at: Instant,
        prompt_param: &str,
    ) -> Result<Self, ApiError> {
        let choices_per_prompt = requests.first().map_or(1, |request| request.num_choices as usize);
        let num_choices = requests.len() * choices_per_prompt;
        let prompt_tokens = requests.iter().map(|request| request.prompt.len() as u64).sum();
        let mut choices = SelectAll::new();
        for (first_index, request) in (0..).step_by(choices_per_prompt).zip(requests) {
            choices.extend(submit(state, request, first_index, options, arrived_at, prompt_param)?);
        }
        let usage = Usage { prompt_tokens, total_tokens: prompt_tokens, ..Usage::default() };
        Ok(Self { choices, num_choices, choices_per_prompt, usage, _in_flight: state.lifecycle.enter() })
    }

    /// The next thing to tell the client, and of which choice; `None` at the end. Choices take turns.
    pub(crate) async fn next(&mut self) -> Option<Result<(usize, Delta), ApiError>> {
        loop {
            let (index, delta) = self.choices.next().await?;
            let delta = match delta {
                Ok(delta) => delta,
                Err(error) => return Some(Err(error)),
            };
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
    state.engine.submit(request, sinks).map_err(|error| ApiError::submission(error, prompt_param))?;
    streams.iter_mut().for_each(ChoiceStream::accept);
    Ok(streams)
}
