//! One choice of one request: the engine's events in, what the client is told out.
//!
//! ```text
//! Event ─► ChoiceStream ─► ChoiceText: detokenizer ─► stop strings ─► text, logprobs, tool calls ─► Delta
//! ```
//!
//! Streams forward each [`Delta`], whole answers append them up: both give the same bytes because there is
//! nothing else. A choice that meets a stop string drops its receiver, and the engine frees it.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use engine::{Event, EventSink, FinishReason, SinkClosed};
use futures_util::Stream;
use model::RoutingRecord;
use serde::Serialize;
use tokio::sync::mpsc;

use crate::accounting::ChoiceMeter;
use crate::choice_text::{ChoiceText, Delta, Ending, TextOptions};
use crate::error::ApiError;
use crate::logprobs::{prompt_logprobs, prompt_scores};
use crate::text::vocabulary::Vocabulary;

/// Events of one choice that may wait for a slow reader before it is cancelled.
const MAX_WAITING_EVENTS: usize = 1024;

/// The way from the engine to one choice: bounded, and never waited for.
pub(crate) struct ChannelSink(mpsc::Sender<Event>);

impl EventSink for ChannelSink {
    fn send(&mut self, event: Event) -> Result<(), SinkClosed> {
        self.0.try_send(event).map_err(|_| SinkClosed)
    }

    fn is_closed(&self) -> bool {
        self.0.is_closed()
    }
}

/// How far a prompt is, in llama.cpp's words.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct PromptProgress {
    /// Tokens of the prompt.
    total: usize,
    /// Of these, from the prefix cache.
    cache: u32,
    /// Of these, done.
    processed: u32,
    /// Since the first step.
    time_ms: u64,
}

/// The deltas of one choice, with its index.
pub(crate) struct ChoiceStream {
    index: usize,
    /// `None` once the choice has ended.
    receiver: Option<mpsc::Receiver<Event>>,
    text: ChoiceText,
    vocabulary: Arc<Vocabulary>,
    prompt: Arc<[u32]>,
    returns_token_ids: bool,
    num_prompt_logprobs: Option<u32>,
    started_at: Instant,
    num_cached_tokens: u32,
    /// Where the tokens went that were read before the next one is taken.
    routing: Option<RoutingRecord>,
    meter: ChoiceMeter,
}

impl ChoiceStream {
    /// Opens a choice, and the sink through which the engine feeds it.
    pub(crate) fn open(
        index: usize,
        vocabulary: &Arc<Vocabulary>,
        prompt: Arc<[u32]>,
        options: &TextOptions,
        meter: ChoiceMeter,
    ) -> (Box<dyn EventSink>, Self) {
        let (sender, receiver) = mpsc::channel(MAX_WAITING_EVENTS);
        let text = ChoiceText::new(vocabulary, &prompt, options);
        let vocabulary = Arc::clone(vocabulary);
        (
            Box::new(ChannelSink(sender)),
            Self {
                index,
                receiver: Some(receiver),
                text,
                vocabulary,
                prompt,
                returns_token_ids: options.returns_token_ids,
                num_prompt_logprobs: options.num_prompt_logprobs,
                started_at: Instant::now(),
                num_cached_tokens: 0,
                routing: None,
                meter,
            },
        )
    }

    /// Counts the choice as accepted.
    pub(crate) fn accept(&mut self) {
        self.meter.accept();
    }

    /// Ends the choice where it is; `None` if it has ended before.
    pub(crate) fn part(mut self) -> Option<(usize, Delta)> {
        self.receiver.take()?;
        let mut delta = Delta::default();
        self.text.finish(Ending::Length, &mut delta);
        Some((self.index, delta))
    }

    fn take(&mut self, event: Event) -> Result<Delta, ApiError> {
        let mut delta = Delta::default();
        match event {
            Event::Started { num_cached_tokens, queue_time } => {
                self.meter.started(queue_time);
                delta.num_cached_tokens = u64::from(num_cached_tokens);
                delta.has_started = true;
                (self.started_at, self.num_cached_tokens) = (Instant::now(), num_cached_tokens);
            }
            Event::Progress { num_computed_tokens } => {
                delta.progress = Some(PromptProgress {
                    total: self.prompt.len(),
                    cache: self.num_cached_tokens,
                    processed: num_computed_tokens,
                    time_ms: self.started_at.elapsed().as_millis() as u64,
                });
            }
            Event::PromptLogprobs(scores) => {
                delta.prompt_scores = Some(prompt_scores(&self.vocabulary, &self.prompt, &scores));
                delta.prompt_logprobs = self
                    .num_prompt_logprobs
                    .map(|num| prompt_logprobs(&self.vocabulary, &self.prompt, &scores, num));
            }
            Event::Routing(record) => {
                // It is told beside the token that was taken behind it, which follows at once.
                self.routing = Some(record);
            }
            Event::Token(sampled) => {
                delta.routing = self.routing.take();
                self.meter.token();
                if self.returns_token_ids {
                    delta.token_ids.push(sampled.token);
                }
                if self.text.push(&sampled, &mut delta) {
                    self.text.finish(Ending::Stop, &mut delta);
                    self.end(FinishReason::Stop);
                }
            }
            Event::Finished(reason) => {
                let ending = self.ending(reason)?;
                delta.routing = self.routing.take();
                self.text.finish(ending, &mut delta);
                self.end(reason);
            }
        }
        Ok(delta)
    }

    /// How the engine's reason reads to a client: an answer that was cut is still an answer, unless nothing
    /// of it was there yet.
    fn ending(&mut self, reason: FinishReason) -> Result<Ending, ApiError> {
        let has_begun = self.meter.num_tokens() > 0;
        let error = match reason {
            FinishReason::Stop => return Ok(Ending::Stop),
            FinishReason::Length => return Ok(Ending::Length),
            FinishReason::Deadline | FinishReason::Shutdown if has_begun => return Ok(Ending::Length),
            FinishReason::Deadline => ApiError::deadline_exceeded(),
            FinishReason::Shutdown => ApiError::draining(),
            FinishReason::Cancelled => ApiError::read_too_slowly(),
            FinishReason::Error => ApiError::model_failed(),
        };
        self.end(reason);
        Err(error)
    }

    fn end(&mut self, reason: FinishReason) {
        self.receiver = None;
        self.meter.finish(reason);
    }
}

impl Stream for ChoiceStream {
    type Item = (usize, Result<Delta, ApiError>);

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        let Some(receiver) = &mut this.receiver else { return Poll::Ready(None) };
        let said = match ready!(receiver.poll_recv(cx)) {
            Some(event) => this.take(event),
            // The engine let go without a last word: the buffer was full.
            None => this.ending(FinishReason::Cancelled).map(|_| Delta::default()),
        };
        Poll::Ready(Some((this.index, said)))
    }
}
