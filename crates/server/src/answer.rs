//! Two ways to tell a client what a [`Generation`] yields: whole, or as server-sent events.
//!
//! Chat and completions word their answers differently and agree on all else; a [`Wording`] is the
//! difference. A stream is: opening chunks, one chunk per delta, one chunk with each choice's
//! `finish_reason`, usage and timings if they were asked for, `[DONE]`. An error after the stream began is an event with
//! an `error` object, and nothing follows it: a stream without `[DONE]` is not complete.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::api::params::Params;
use crate::choice::PromptProgress;
use crate::choice_text::{Delta, Ending};
use crate::error::{ApiError, ErrorEnvelope};
use crate::generation::{Generation, Usage};
use crate::logprobs::PromptLogprobs;
use crate::narration::{Events, Narrator, narrate};
use crate::random;
use crate::state::{AppState, unix_now};
use crate::timing::Timings;

/// How one endpoint words the choices of its answers.
pub(crate) trait Wording: Send + 'static {
    /// `object` of a whole answer.
    const OBJECT: &'static str;
    /// `object` of a chunk.
    const CHUNK_OBJECT: &'static str;
    /// A choice of a whole answer.
    type Choice: Serialize;
    /// A choice in a chunk.
    type ChunkChoice: Serialize;

    /// What each choice begins with in a stream, in index order.
    fn opening(&self) -> Vec<Self::ChunkChoice>;

    /// What a delta adds in a stream, its ending aside; `None` if nothing.
    fn chunk(&self, index: usize, delta: Delta) -> Option<Self::ChunkChoice>;

    /// The end of a choice in a stream.
    fn closing(&self, index: usize, ending: Ending) -> Self::ChunkChoice;

    /// A choice in a chunk to which nothing is added.
    fn silence(&self, index: usize) -> Self::ChunkChoice;

    /// What an endpoint says of the prompt beside the choices, whole (`answers`) or in a stream's first chunk.
    fn aside(&mut self, _answers: &mut [Delta]) -> Aside {
        Aside::default()
    }

    /// The choices of a whole answer.
    fn whole(&self, answers: Vec<Delta>) -> Vec<Self::Choice>;
}

/// What stands beside an answer's choices if it was asked for.
#[derive(Default, Serialize)]
pub(crate) struct Aside {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_logprobs: Option<PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_progress: Option<PromptProgress>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) timings: Option<Timings>,
}

/// What is the same in all chunks of an answer.
#[derive(Debug, Clone)]
pub(crate) struct Meta {
    id: String,
    pub(crate) created: u64,
    pub(crate) model: Arc<str>,
    system_fingerprint: Arc<str>,
    service_tier: Option<&'static str>,
}

impl Meta {
    pub(crate) fn new(state: &AppState, id_prefix: &str, service_tier: Option<&'static str>) -> Self {
        Self {
            id: random::id(id_prefix),
            created: unix_now(),
            model: state.config.model_name.as_str().into(),
            system_fingerprint: state.config.system_fingerprint.as_str().into(),
            service_tier,
        }
    }

    /// The answer's id, which names the request in logs too.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }
}

/// An answer, or a chunk of one.
#[derive(Serialize)]
struct Envelope<'a, Choice> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    service_tier: Option<&'static str>,
    choices: Vec<Choice>,
    /// Absent, null or there.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
    #[serde(flatten)]
    aside: Aside,
}

impl<'a, Choice> Envelope<'a, Choice> {
    fn new(
        meta: &'a Meta,
        object: &'static str,
        choices: Vec<Choice>,
        usage: Option<Option<Usage>>,
        aside: Aside,
    ) -> Self {
        Self {
            id: &meta.id,
            object,
            created: meta.created,
            model: &meta.model,
            system_fingerprint: &meta.system_fingerprint,
            service_tier: meta.service_tier,
            choices,
            usage,
            aside,
        }
    }
}

/// What a client asked of its stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct StreamOptions {
    pub(crate) include_usage: bool,
    /// The usage so far in every chunk.
    pub(crate) continuous_usage: bool,
    /// How far the prompt is.
    pub(crate) reports_progress: bool,
    /// Its own interval of comments instead of the server's; `Some(None)`: none.
    pub(crate) keep_alive_interval: Option<Option<Duration>>,
}

/// Answers in the way that was asked for.
pub(crate) async fn respond<W: Wording>(
    mut generation: Generation,
    mut wording: W,
    meta: Meta,
    params: &Params,
    state: &AppState,
) -> Result<Response, ApiError> {
    let has_timings = params.has_timings;
    let Some(options) = params.streamed else {
        let mut answers = generation.finish().await?;
        let aside = wording.aside(&mut answers);
        let aside = Aside { timings: has_timings.then(|| generation.timings()), ..aside };
        let choices = wording.whole(answers);
        let envelope = Envelope::new(&meta, W::OBJECT, choices, Some(Some(generation.usage())), aside);
        return Ok(Json(envelope).into_response());
    };
    let keep_alive_interval = options.keep_alive_interval.unwrap_or(state.config.keep_alive_interval);
    Ok(narrate(generation, ChunkNarrator { wording, meta, options, has_timings }, keep_alive_interval))
}

/// An answer as it is streamed.
struct ChunkNarrator<W> {
    wording: W,
    meta: Meta,
    options: StreamOptions,
    has_timings: bool,
}

impl<W: Wording> Narrator for ChunkNarrator<W> {
    fn open(&mut self, generation: &Generation, events: &mut Events) {
        let mut aside = self.wording.aside(&mut []);
        for choice in self.wording.opening() {
            self.push_choice(choice, std::mem::take(&mut aside), generation, events);
        }
    }

    fn tell(&mut self, index: usize, delta: Delta, generation: &Generation, events: &mut Events) {
        let ending = delta.ending;
        if let Some(progress) = delta.progress {
            let aside = Aside { prompt_progress: Some(progress), ..Aside::default() };
            self.push_choice(self.wording.silence(index), aside, generation, events);
        }
        if let Some(choice) = self.wording.chunk(index, delta) {
            self.push_choice(choice, Aside::default(), generation, events);
        }
        if let Some(ending) = ending {
            self.push_choice(self.wording.closing(index, ending), Aside::default(), generation, events);
        }
    }

    fn close(&mut self, generation: &Generation, events: &mut Events) {
        let usage = self.options.include_usage.then(|| Some(generation.usage()));
        let timings = self.has_timings.then(|| generation.timings());
        if usage.is_some() || timings.is_some() {
            self.push_chunk(Vec::new(), usage, Aside { timings, ..Aside::default() }, events);
        }
        events.push_word("[DONE]");
    }

    fn fail(&mut self, error: &ApiError, _generation: &Generation, events: &mut Events) {
        events.push(&ErrorEnvelope { error: &error.body });
    }
}

impl<W: Wording> ChunkNarrator<W> {
    fn push_choice(
        &self,
        choice: W::ChunkChoice,
        aside: Aside,
        generation: &Generation,
        events: &mut Events,
    ) {
        let so_far = self.options.continuous_usage.then(|| generation.usage());
        self.push_chunk(vec![choice], self.options.include_usage.then_some(so_far), aside, events);
    }

    fn push_chunk(
        &self,
        choices: Vec<W::ChunkChoice>,
        usage: Option<Option<Usage>>,
        aside: Aside,
        events: &mut Events,
    ) {
        events.push(&Envelope::new(&self.meta, W::CHUNK_OBJECT, choices, usage, aside));
    }
}
