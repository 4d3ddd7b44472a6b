//! What a client asked ([`Request`]) and what it is told ([`Event`] through an [`EventSink`]), in token ids.

use std::sync::Arc;
use std::time::Duration;

use model::{RoutingRecord, SampleParams, Sampled, Steering, TokenLogprob};

use crate::constraint::Constraint;
use crate::recording::RecordRouting;

/// What a client asked. Immutable once submitted.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Names the request in logs; not necessarily unique.
    pub id: String,
    /// Prompt token ids; at least one.
    pub prompt: Vec<u32>,
    /// Number of independent continuations (`n`), which share the prompt's blocks.
    pub num_choices: u32,
    /// How tokens are taken. Choice `i` draws with seed `mix64(seed + i)` for `i > 0`, with `seed` for 0.
    pub sampling: SampleParams,
    /// Most tokens to generate per choice; 0 scores the prompt and generates nothing.
    pub max_tokens: u32,
    /// Tokens to generate before `eos_token_ids` and `stop_token_ids` may be taken.
    pub min_tokens: u32,
    /// The model's own ends of sequence; they finish a choice unless `ignore_eos`.
    pub eos_token_ids: Vec<u32>,
    /// Generates past the ends of sequence; under a constraint, does not take them.
    pub ignore_eos: bool,
    /// Further tokens that finish a choice.
    pub stop_token_ids: Vec<u32>,
    /// Reports log-probabilities of generated tokens, and of this many likeliest alternatives.
    pub num_logprobs: Option<u32>,
    /// Reports log-probabilities of prompt tokens, and of this many likeliest alternatives.
    pub num_prompt_logprobs: Option<u32>,
    /// Reports how far the prompt is, after each step that computed some of it.
    pub reports_progress: bool,
    /// Lower runs earlier; equal priorities run in order of arrival.
    pub priority: i32,
    /// Time from submission after which the request ends with [`FinishReason::Deadline`].
    pub deadline: Option<Duration>,
    /// Requests share cached prefixes only with requests of the same salt.
    pub cache_salt: Option<String>,
    /// Reports to which experts the tokens went.
    pub record_routing: Option<RecordRouting>,
    /// Decides with the routers to which experts the tokens go. Keys and values depend on it, so such a request shares
    /// them with nobody.
    pub steering: Option<Arc<Steering>>,
}

/// One choice on its way in: who is told how it goes, and what bounds it.
pub struct Choice {
    /// Its reader.
    pub sink: Box<dyn EventSink>,
    /// What its tokens are bound to, beyond what the request says.
    pub constraint: Option<Box<dyn Constraint>>,
}

impl Choice {
    /// A choice that only its request bounds.
    pub fn free(sink: Box<dyn EventSink>) -> Self {
        Self { sink, constraint: None }
    }
}

/// Why a choice ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// A token of `eos_token_ids` or `stop_token_ids` was taken, and is the last token sent; or the choice's
    /// constraint is complete.
    Stop,
    /// `max_tokens` or the model's context is used up.
    Length,
    /// The client left, or stopped reading.
    Cancelled,
    /// The request's deadline passed.
    Deadline,
    /// The engine is shutting down and will not finish this choice.
    Shutdown,
    /// The model or its device failed, or the choice's constraint did.
    Error,
}

impl FinishReason {
    /// Number of reasons.
    pub const COUNT: usize = 6;

    /// All reasons; each stands at its own [`FinishReason::index`].
    pub const ALL: [Self; Self::COUNT] =
        [Self::Stop, Self::Length, Self::Cancelled, Self::Deadline, Self::Shutdown, Self::Error];

    /// Position in [`FinishReason::ALL`] and in [`Stats::finished`](crate::Stats::finished).
    pub const fn index(self) -> usize {
        self as usize
    }

    /// The reason in one lower-case word, for metrics and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
            Self::Deadline => "deadline",
            Self::Shutdown => "shutdown",
            Self::Error => "error",
        }
    }
}

/// One prompt token's log-probability given the tokens before it.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptLogprob {
    /// The token itself.
    pub logprob: TokenLogprob,
    /// The likeliest tokens in its place, likeliest first.
    pub top_logprobs: Vec<TokenLogprob>,
}

/// What a client is told about one choice, in this order:
/// `Started (PromptLogprobs)? (Routing? Token)* Routing? Finished`, with any number of `Progress` before the first token.
/// A choice that ends while it waits has no `Started`.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The choice was scheduled for the first time.
    Started {
        /// Prompt tokens whose keys and values came from the prefix cache.
        num_cached_tokens: u32,
        /// Time between submission and this step.
        queue_time: Duration,
    },
    /// This many tokens of the prompt are computed (choice 0 only, and only if asked for). Fewer than before
    /// after a preemption.
    Progress {
        /// Prompt tokens computed or found in the prefix cache.
        num_computed_tokens: u32,
    },
    /// The whole prompt was scored (choice 0 only). The first entry is `None`: nothing precedes it.
    PromptLogprobs(Vec<Option<PromptLogprob>>),
    /// Where the tokens went that were read since the last record. The token that comes next was taken behind the last
    /// of them; itself it goes nowhere until it is read.
    Routing(RoutingRecord),
    /// One more token.
    Token(Sampled),
    /// The choice ended; nothing follows.
    Finished(FinishReason),
}

/// The client is gone, or has let its events pile up to the sink's limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SinkClosed;

/// The bounded way out to the reader of one choice. The engine never waits on it: a reader that is gone or
/// has stalled is cancelled, and its blocks are free in the same step.
pub trait EventSink: Send {
    /// Hands over an event without blocking.
    ///
    /// # Errors
    /// [`SinkClosed`] if the reader is gone or its buffer is full.
    fn send(&mut self, event: Event) -> Result<(), SinkClosed>;

    /// Whether the reader is gone.
    fn is_closed(&self) -> bool;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finish_reason_stands_at_its_index_under_its_own_name() {
        let names: Vec<_> = FinishReason::ALL.iter().map(|reason| reason.as_str()).collect();
        assert_eq!(names, ["stop", "length", "cancelled", "deadline", "shutdown", "error"]);
        assert!(FinishReason::ALL.iter().zip(0..).all(|(reason, index)| reason.index() == index));
    }
}
