//! A generation told as server-sent events, in whatever words an endpoint has for it.
//!
//! The loop is the same everywhere: what it begins with, each delta, its end or its failure. A [`Narrator`] is
//! the words.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Serialize;

use crate::choice_text::Delta;
use crate::error::ApiError;
use crate::generation::Generation;

/// The words of one endpoint.
pub(crate) trait Narrator: Send + 'static {
    /// Before anything is generated.
    fn open(&mut self, generation: &Generation, events: &mut Events);

    /// What one choice adds.
    fn tell(&mut self, index: usize, delta: Delta, generation: &Generation, events: &mut Events);

    /// After all choices have ended.
    fn close(&mut self, generation: &Generation, events: &mut Events);

    /// Instead of [`close`](Narrator::close): nothing follows.
    fn fail(&mut self, error: &ApiError, generation: &Generation, events: &mut Events);
}

/// Events that are ready to go.
#[derive(Default)]
pub(crate) struct Events(VecDeque<Event>);

impl Events {
    /// Appends an event with JSON.
    pub(crate) fn push(&mut self, data: &impl Serialize) {
        self.append(Event::default().json_data(data));
    }

    /// Appends an event with a name.
    pub(crate) fn push_named(&mut self, name: &str, data: &impl Serialize) {
        self.append(Event::default().event(name).json_data(data));
    }

    /// Appends an event with words of the protocol.
    pub(crate) fn push_word(&mut self, word: &str) {
        self.0.push_back(Event::default().data(word));
    }

    fn append(&mut self, event: Result<Event, axum::Error>) {
        match event {
            Ok(event) => self.0.push_back(event),
            Err(error) => tracing::error!(%error, "an event could not be written"),
        }
    }
}

/// Streams a generation. Dropping the response, as the HTTP server does when the client leaves, drops the
/// generation.
pub(crate) fn narrate(
    generation: Generation,
    mut narrator: impl Narrator,
    keep_alive_interval: Option<Duration>,
) -> Response {
    let mut events = Events::default();
    narrator.open(&generation, &mut events);
    let story = Story { generation, narrator, events, is_over: false };
    let sse = Sse::new(stream::unfold(story, Story::next));
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

struct Story<N> {
    generation: Generation,
    narrator: N,
    events: Events,
    is_over: bool,
}

impl<N: Narrator> Story<N> {
    async fn next(mut self) -> Option<(Result<Event, Infallible>, Self)> {
        while self.events.0.is_empty() && !self.is_over {
            match self.generation.next().await {
                Some(Ok((index, delta))) => {
                    self.narrator.tell(index, delta, &self.generation, &mut self.events);
                }
                Some(Err(error)) => {
                    self.narrator.fail(&error, &self.generation, &mut self.events);
                    self.is_over = true;
                }
                None => {
                    self.narrator.close(&self.generation, &mut self.events);
                    self.is_over = true;
                }
            }
        }
        let event = self.events.0.pop_front()?;
        Some((Ok(event), self))
    }
}
