//! The reader of one choice: what it was told, and how it misbehaves.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use engine::{Choice, Constraint, Event, EventSink, FinishReason, Request, SinkClosed};

use crate::grammar::Grammar;
use crate::oracle::Outcome;

/// One choice, seen from outside.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) request: Arc<Request>,
    pub(crate) choice: u32,
    pub(crate) grammar: Option<Grammar>,
    pub(crate) submitted_at: Duration,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
pub(crate) struct State {
    /// Events that the sink took.
    pub(crate) events: Vec<Event>,
    /// Tokens that the engine offered, taken or not.
    pub(crate) num_tokens_offered: u64,
    /// Ends that the engine offered, taken or not.
    pub(crate) ends: Vec<FinishReason>,
    /// Events that may pile up unread; a client that stalls never reads.
    pub(crate) capacity: usize,
    pub(crate) has_left: bool,
    /// The sink refused an event, because the client had left or stalled.
    pub(crate) has_refused: bool,
    /// The engine has dropped its sink.
    pub(crate) is_dropped: bool,
}

impl Client {
    pub(crate) fn new(
        request: Arc<Request>,
        choice: u32,
        grammar: Option<Grammar>,
        submitted_at: Duration,
        capacity: usize,
    ) -> Self {
        let state = Arc::new(Mutex::new(State { capacity, ..State::default() }));
        Self { request, choice, grammar, submitted_at, state }
    }

    /// What goes to the engine.
    pub(crate) fn choice(&self) -> Choice {
        let sink = Box::new(Sink { state: Arc::clone(&self.state) });
        let constraint =
            self.grammar.map(|grammar| Box::new(grammar.start(self.choice)) as Box<dyn Constraint>);
        Choice { sink, constraint }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Whether nothing may be left of the choice in the engine.
    pub(crate) fn must_be_gone(&self, now: Duration) -> bool {
        let state = self.state();
        let is_late = self.request.deadline.is_some_and(|deadline| self.submitted_at + deadline <= now);
        state.has_left || state.has_refused || is_late
    }

    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.state, &other.state)
    }

    /// Prompt tokens that came from the cache.
    pub(crate) fn num_cached_tokens(&self) -> usize {
        match self.state().events.first() {
            Some(Event::Started { num_cached_tokens, .. }) => *num_cached_tokens as usize,
            _ => 0,
        }
    }

    /// Prompt and output, as far as it was told.
    pub(crate) fn text(&self) -> Vec<u32> {
        let state = self.state();
        let token = |event: &Event| match event {
            Event::Token(sampled) => Some(sampled.token),
            _ => None,
        };
        self.request.prompt.iter().copied().chain(state.events.iter().filter_map(token)).collect()
    }

    /// Compares all that was told with what the choice would have been told alone.
    pub(crate) fn check(&self, alone: &Outcome) {
        let state = self.state();
        let [end] = state.ends[..] else { panic!("a choice ends exactly once, not {:?}", state.ends) };
        let is_progress = |event: &&Event| matches!(event, Event::Progress { .. });
        let is_token = |event: &Event| matches!(event, Event::Token(_));
        let before_tokens = state.events.iter().position(is_token).unwrap_or(state.events.len());
        assert!(!state.events[before_tokens..].iter().any(|event| is_progress(&event)), "progress ends");
        let last_progress = state.events.iter().rfind(is_progress);
        let mut events = state.events.iter().filter(|event| !is_progress(event)).peekable();
        let has_started = events.next_if(|event| matches!(event, Event::Started { .. })).is_some();
        let scores = match events.next_if(|event| matches!(event, Event::PromptLogprobs(_))) {
            Some(Event::PromptLogprobs(scores)) => Some(scores),
            _ => None,
        };
        let mut tokens = Vec::new();
        while let Some(Event::Token(token)) = events.next_if(|event| matches!(event, Event::Token(_))) {
            tokens.push(token.clone());
        }
        if !tokens.is_empty() {
            let whole = Event::Progress { num_computed_tokens: self.request.prompt.len() as u32 };
            assert_eq!(
                last_progress,
                self.request.reports_progress.then_some(&whole).filter(|_| self.choice == 0)
            );
        }
        match events.next() {
            Some(Event::Finished(reason)) => assert_eq!(*reason, end),
            None => assert!(state.has_left || state.has_refused, "only a client that left misses its end"),
            Some(other) => panic!("{other:?} is out of order"),
        }
        assert!(events.next().is_none(), "nothing follows the end");
        assert!(has_started || (scores.is_none() && tokens.is_empty()), "nothing precedes the start");

        assert!(alone.tokens.starts_with(&tokens), "{tokens:?} is no prefix of {:?}", alone.tokens);
        assert!(scores.is_none() || scores == alone.prompt_logprobs.as_ref(), "{scores:?}");
        if matches!(end, FinishReason::Stop | FinishReason::Length) {
            assert_eq!(end, alone.reason);
            assert_eq!(tokens.len(), alone.tokens.len());
            assert_eq!(scores, alone.prompt_logprobs.as_ref());
        }
    }
}

struct Sink {
    state: Arc<Mutex<State>>,
}

impl EventSink for Sink {
    fn send(&mut self, event: Event) -> Result<(), SinkClosed> {
        let mut state = self.state.lock().unwrap();
        match event {
            Event::Token(_) => state.num_tokens_offered += 1,
            Event::Finished(reason) => state.ends.push(reason),
            _ => {}
        }
        if state.has_left || state.events.len() >= state.capacity {
            state.has_refused = true;
            return Err(SinkClosed);
        }
        state.events.push(event);
        Ok(())
    }

    fn is_closed(&self) -> bool {
        self.state.lock().unwrap().has_left
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.state.lock().unwrap().is_dropped = true;
    }
}
