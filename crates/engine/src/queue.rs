//! The bounded way in: a mailbox between the threads that submit and the engine's.
//!
//! One short lock guards the mailbox and the engine's [`Phase`] together, so that nothing can slip in after
//! the engine has found the mailbox empty for the last time. What bounds it is everything that waits, here
//! or in the scheduler; the statistics count that.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::config::EngineConfig;
use crate::stats::SharedStats;
use crate::submission::{Submission, SubmitError};

/// Whether the engine takes requests; it only ever moves down this list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// Takes requests.
    Open,
    /// Finishes what it has.
    Draining,
    /// Ends what it has.
    Aborting,
    /// Has failed.
    Stopped,
}

/// The mailbox.
pub(crate) struct Queue {
    state: Mutex<State>,
    /// Notified when the mailbox is no longer empty, or the phase has changed.
    changed: Condvar,
    config: EngineConfig,
    stats: Arc<SharedStats>,
}

struct State {
    inbox: Vec<Submission>,
    phase: Phase,
}

impl Queue {
    pub(crate) fn new(config: EngineConfig, stats: Arc<SharedStats>) -> Self {
        let state = Mutex::new(State { inbox: Vec::new(), phase: Phase::Open });
        Self { state, changed: Condvar::new(), config, stats }
    }

    /// Accepts a submission, and counts it.
    ///
    /// # Errors
    /// If the queue is full or takes nothing any more.
    pub(crate) fn push(&self, submission: Submission) -> Result<(), SubmitError> {
        let mut state = self.lock();
        match state.phase {
            Phase::Open => {}
            Phase::Draining | Phase::Aborting => return Err(SubmitError::Draining),
            Phase::Stopped => return Err(SubmitError::Stopped),
        }
        let (num_choices, num_tokens) = (submission.choices.len(), submission.num_tokens());
        let num_waiting = self.stats.num_waiting.load(Relaxed);
        let queued_tokens = self.stats.queued_tokens.load(Relaxed);
        let fits = num_waiting + num_choices <= self.config.max_queued_requests
            && queued_tokens + num_tokens <= self.config.max_queued_tokens;
        if num_waiting > 0 && !fits {
            return Err(SubmitError::QueueFull { retry_after: self.stats.retry_after() });
        }
        if num_waiting == 0 && self.stats.num_running.load(Relaxed) == 0 {
            // Until now nothing was due, so a watchdog's patience begins here.
            self.stats.heartbeat(submission.submitted_at);
        }
        self.stats.accept(num_choices, num_tokens);
        state.inbox.push(submission);
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    /// Moves all submissions to `inbox` and returns the phase; nothing follows once that is not
    /// [`Phase::Open`].
    pub(crate) fn take(&self, inbox: &mut Vec<Submission>) -> Phase {
        let mut state = self.lock();
        inbox.append(&mut state.inbox);
        state.phase
    }

    /// Moves to a later phase; an earlier one changes nothing.
    pub(crate) fn advance(&self, phase: Phase) {
        let mut state = self.lock();
        state.phase = state.phase.max(phase);
        self.stats.is_draining.fetch_or(matches!(phase, Phase::Draining | Phase::Aborting), Relaxed);
        drop(state);
        self.changed.notify_one();
    }

    /// Takes nothing any more, whatever the phase: the engine is gone.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        if state.phase == Phase::Open {
            state.phase = Phase::Stopped;
        }
    }

    /// Sleeps until there is something to do.
    pub(crate) fn wait(&self) {
        let is_idle = |state: &mut State| state.inbox.is_empty() && state.phase == Phase::Open;
        let guard = self.changed.wait_while(self.lock(), is_idle);
        drop(guard.unwrap_or_else(PoisonError::into_inner));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing under the lock leaves the state half changed, so a poisoned lock guards a good one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("config", &self.config).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::request::Choice;
    use crate::testing::{limits, request, sink};

    fn queue() -> Queue {
        let config =
            EngineConfig { max_queued_requests: 4, max_queued_tokens: 20, ..EngineConfig::default() };
        Queue::new(config, Arc::new(SharedStats::new(&limits())))
    }

    fn submission(prompt_len: usize, num_choices: usize) -> Submission {
        let choices = (0..num_choices).map(|_| Choice::free(sink().0)).collect();
        Submission { request: request(&vec![1; prompt_len], 1), choices, submitted_at: Duration::ZERO }
    }

    #[track_caller]
    fn check(prompts_and_choices: &[(usize, usize)], expected: &[bool]) {
        let queue = queue();
        let accepted = prompts_and_choices.iter().map(|&(len, n)| queue.push(submission(len, n)).is_ok());
        assert_eq!(accepted.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn the_queue_is_bounded_in_choices_and_in_tokens() {
        check(&[(1, 1); 5], &[true, true, true, true, false]);
        check(&[(1, 2), (1, 3), (1, 2)], &[true, false, true]);
        check(&[(10, 1), (11, 1), (10, 1), (1, 1)], &[true, false, true, false]);
        check(&[(5, 2), (5, 3), (5, 2)], &[true, false, true]);
    }

    #[test]
    fn an_empty_queue_accepts_a_request_of_any_size() {
        check(&[(1000, 100), (1, 1)], &[true, false]);
    }

    #[test]
    fn a_phase_never_goes_back_and_nothing_follows_the_open_one() {
        let queue = queue();
        queue.push(submission(1, 1)).unwrap();
        queue.advance(Phase::Draining);
        assert_eq!(queue.push(submission(1, 1)), Err(SubmitError::Draining));
        queue.advance(Phase::Aborting);
        queue.advance(Phase::Draining);
        let mut inbox = Vec::new();
        assert_eq!((queue.take(&mut inbox), inbox.len()), (Phase::Aborting, 1));
        queue.advance(Phase::Stopped);
        assert_eq!(queue.push(submission(1, 1)), Err(SubmitError::Stopped));
        queue.wait();
    }
}
