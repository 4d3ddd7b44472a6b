//! Two ways to tell a client what a [`Generation`] yields: whole, or as server-sent events.
//!
//! Chat and completions word their answers differently and agree on all else; a [`Wording`] is the
//! difference. A stream is: opening chunks, one chunk per delta, one chunk with each choice's
//! `finish_reason`, usage and timings if they were asked for, `[DONE]`. An error after the stream began is an event with
//! an `error` object, and nothing follows it: a stream without `[DONE]` is not complete.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, stream};
use serde::Serialize;

use crate::api::params::Params;
use crate::choice::PromptProgress;
use crate::choice_text::{Delta, Ending};
use crate::error::{ApiError, ErrorEnvelope};
use crate::generation::{Generation, Usage};
use crate::logprobs::PromptLogprobs;
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
    created: u64,
    model: Arc<str>,
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
    let events = VecDeque::new();
    let mut answer =
        StreamedAnswer { generation, wording, meta, options, has_timings, events, is_over: false };
    answer.open();
    let keep_alive_interval = options.keep_alive_interval.unwrap_or(state.config.keep_alive_interval);
    Ok(sse(stream::unfold(answer, StreamedAnswer::next), keep_alive_interval))
}

/// Events as a response that is kept open and passed on at once.
pub(crate) fn sse(
    events: impl Stream<Item = Result<Event, Infallible>> + Send + 'static,
    keep_alive_interval: Option<Duration>,
) -> Response {
    let sse = Sse::new(events);
    let mut response = match keep_alive_interval {
        Some(interval) => {
            sse.keep_alive(KeepAlive::new().interval(interval).text("keep-alive")).into_response()
        }
        None => sse.into_response(),
    };
    // Tells nginx and its kin not to collect the events.
    response
        .headers_mut()
        .insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response
}

/// An answer as it is streamed. Dropping it, as the HTTP server does when the client leaves, drops the
/// generation.
struct StreamedAnswer<W> {
    generation: Generation,
    wording: W,
    meta: Meta,
    options: StreamOptions,
    has_timings: bool,
    /// Events that are ready to go.
    events: VecDeque<Event>,
    is_over: bool,
}

impl<W: Wording> StreamedAnswer<W> {
    async fn next(mut self) -> Option<(Result<Event, Infallible>, Self)> {
        while self.events.is_empty() && !self.is_over {
            match self.generation.next().await {
                Some(Ok((index, delta))) => self.push_delta(index, delta),
                Some(Err(error)) => self.fail(&error),
                None => self.close(),
            }
        }
        let event = self.events.pop_front()?;
        Some((Ok(event), self))
    }

    fn open(&mut self) {
        let mut aside = self.wording.aside(&mut []);
        for choice in self.wording.opening() {
            self.push_choice(choice, std::mem::take(&mut aside));
        }
    }

    fn push_delta(&mut self, index: usize, delta: Delta) {
        let ending = delta.ending;
        if let Some(progress) = delta.progress {
            let aside = Aside { prompt_progress: Some(progress), ..Aside::default() };
            self.push_choice(self.wording.silence(index), aside);
        }
        if let Some(choice) = self.wording.chunk(index, delta) {
            self.push_choice(choice, Aside::default());
        }
        if let Some(ending) = ending {
            self.push_choice(self.wording.closing(index, ending), Aside::default());
        }
    }

    fn push_choice(&mut self, choice: W::ChunkChoice, aside: Aside) {
        let so_far = self.options.continuous_usage.then(|| self.generation.usage());
        self.push_chunk(vec![choice], self.options.include_usage.then_some(so_far), aside);
    }

    fn push_chunk(&mut self, choices: Vec<W::ChunkChoice>, usage: Option<Option<Usage>>, aside: Aside) {
        let event =
            Event::default().json_data(Envelope::new(&self.meta, W::CHUNK_OBJECT, choices, usage, aside));
        match event {
            Ok(event) => self.events.push_back(event),
            Err(_) => self.fail(&ApiError::internal()),
        }
    }

    fn close(&mut self) {
        let usage = self.options.include_usage.then(|| Some(self.generation.usage()));
        let timings = self.has_timings.then(|| self.generation.timings());
        if usage.is_some() || timings.is_some() {
            self.push_chunk(Vec::new(), usage, Aside { timings, ..Aside::default() });
        }
        self.events.push_back(Event::default().data("[DONE]"));
        self.is_over = true;
    }

    fn fail(&mut self, error: &ApiError) {
        let event = Event::default().json_data(ErrorEnvelope { error: &error.body });
        self.events.extend(event.ok());
        self.is_over = true;
    }
}
