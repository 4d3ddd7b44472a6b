//! The reader of one choice: what it was told, and how it misbehaves.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use engine::{Choice, Constraint, Event, EventSink, FakeRunner, FinishReason, Request, SinkClosed};
use model::RoutingRecord;

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

    /// What goes to the engine. `now_us`: its clock.
    pub(crate) fn choice(&self, now_us: &Arc<AtomicU64>) -> Choice {
        let sink = Box::new(Sink { state: Arc::clone(&self.state) });
        let constraint = self.grammar.map(|grammar| -> Box<dyn Constraint> {
            Box::new(grammar.start(self.choice, Arc::clone(now_us)))
        });
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
        let is_of_text = |event: &&Event| matches!(event, Event::Token(_) | Event::Routing(_));
        while let Some(event) = events.next_if(is_of_text) {
            if let Event::Token(token) = event {
                tokens.push(token.clone());
            }
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

impl Client {
    /// Compares the routing that was told with where the model sends tokens: each position that was asked for once and
    /// in order, and the record of all that a token was taken from before that token.
    pub(crate) fn check_routing(&self, runner: &FakeRunner) {
        let (text, state) = (self.text(), self.state());
        let prompt_len = self.request.prompt.len();
        let Some(wanted) = &self.request.record_routing else {
            assert!(!state.events.iter().any(|event| matches!(event, Event::Routing(_))));
            return;
        };
        let mut next = if wanted.prompt && self.choice == 0 { 0 } else { prompt_len - 1 };
        let mut num_tokens = 0;
        for event in &state.events {
            match event {
                Event::Routing(record) => {
                    assert_eq!((record.start as usize, &record.layers), (next, &wanted.layers));
                    next = record.end() as usize;
                    check_record(record, &text, runner);
                }
                Event::Token(_) => {
                    num_tokens += 1;
                    assert_eq!(next, prompt_len + num_tokens - 1, "a token's record comes before it");
                }
                _ => {}
            }
        }
        if self.request.max_tokens == 0 && state.ends == [FinishReason::Length] && !state.has_refused {
            assert_eq!(next, prompt_len);
        }
    }
}

fn check_record(record: &RoutingRecord, text: &[u32], runner: &FakeRunner) {
    for (token, position) in (record.start as usize..record.end() as usize).enumerate() {
        for (index, &layer) in record.layers.iter().enumerate() {
            let expected = runner.experts(layer as usize, text[position]).map(|expert| expert as u32);
            assert!(record.choice(token, index).0.iter().copied().eq(expected));
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
