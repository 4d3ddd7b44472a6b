//! What the engine has done and what it holds: atomics that it writes as it goes, and [`Stats`], a snapshot
//! that anyone can take without a lock.
//!
//! Each number is written before the event that lets a client notice it, so that a client which has seen its
//! last event finds itself counted. Numbers of one snapshot may be a few instructions apart, except that
//! choices are never counted as finished before they are counted as accepted.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::time::Duration;

use model::RunnerLimits;

use crate::request::FinishReason;
use crate::routing_stats::{RoutingStats, SharedRoutingStats};

/// Counters since the start, and gauges now.
#[derive(Debug, Clone, PartialEq)]
pub struct Stats {
    /// Choices that wait: submitted and not yet begun, or preempted.
    pub num_waiting: usize,
    /// Choices that take part in steps.
    pub num_running: usize,
    /// Tokens of the choices that wait.
    pub queued_tokens: usize,
    /// Cache blocks, the padding block excluded.
    pub num_blocks: usize,
    /// Cache blocks that nobody holds.
    pub num_free_blocks: usize,
    /// Those free blocks that still hold a prefix.
    pub num_cached_blocks: usize,
    /// Steps that ran to their end.
    pub num_steps: u64,
    /// How long the device has computed steps, by its own clock where it has one: what is missing to the time that has
    /// passed, it was idle.
    pub computed_for: Duration,
    /// When a step last began or ended, or work last reached an idle engine; by the engine's clock.
    pub last_step_at: Duration,
    /// New requests are refused for good, because of [`EngineHandle::drain`](crate::EngineHandle::drain) or
    /// [`abort`](crate::EngineHandle::abort).
    pub is_draining: bool,
    /// The engine has ended: after a drain or an abort, or because the model failed.
    pub is_stopped: bool,
    /// Prompt tokens of the requests begun, whatever their end; once per request.
    pub prompt_tokens: u64,
    /// Tokens generated for all choices, whatever their end.
    pub generation_tokens: u64,
    /// Prompt tokens looked up in the prefix cache, once per request.
    pub prefix_cache_queries: u64,
    /// Those of them that were found.
    pub prefix_cache_hits: u64,
    /// Times that a choice lost its blocks to another, to be recomputed later.
    pub num_preemptions: u64,
    /// Choices accepted: the sum of `finished`, `num_waiting` and `num_running`.
    pub num_accepted: u64,
    /// Choices ended, by [`FinishReason::index`].
    pub finished: [u64; FinishReason::COUNT],
    /// How tokens were spread over experts.
    pub routing: RoutingStats,
}

/// The atomics behind [`Stats`].
#[derive(Debug, Default)]
pub(crate) struct SharedStats {
    pub(crate) num_waiting: AtomicUsize,
    pub(crate) num_running: AtomicUsize,
    pub(crate) queued_tokens: AtomicUsize,
    pub(crate) num_blocks: usize,
    pub(crate) num_free_blocks: AtomicUsize,
    pub(crate) num_cached_blocks: AtomicUsize,
    pub(crate) num_steps: AtomicU64,
    computed_for_ns: AtomicU64,
    last_step_at_ns: AtomicU64,
    pub(crate) is_draining: AtomicBool,
    pub(crate) is_stopped: AtomicBool,
    pub(crate) prompt_tokens: AtomicU64,
    pub(crate) generation_tokens: AtomicU64,
    pub(crate) prefix_cache_queries: AtomicU64,
    pub(crate) prefix_cache_hits: AtomicU64,
    pub(crate) num_preemptions: AtomicU64,
    num_accepted: AtomicU64,
    finished: [AtomicU64; FinishReason::COUNT],
    pub(crate) routing: SharedRoutingStats,
    /// Recent throughput; 0 while unknown.
    tokens_per_second: AtomicU64,
}

impl SharedStats {
    pub(crate) fn new(limits: &RunnerLimits) -> Self {
        let num_blocks = limits.num_blocks - 1;
        Self {
            num_blocks,
            num_free_blocks: num_blocks.into(),
            routing: SharedRoutingStats::new(limits),
            ..Self::default()
        }
    }

    pub(crate) fn snapshot(&self) -> Stats {
        // Seeing a choice finished (acquire, release) makes everything before visible: that it was accepted.
        let finished = std::array::from_fn(|index| self.finished[index].load(Acquire));
        Stats {
            num_waiting: self.num_waiting.load(Relaxed),
            num_running: self.num_running.load(Relaxed),
            queued_tokens: self.queued_tokens.load(Relaxed),
            num_blocks: self.num_blocks,
            num_free_blocks: self.num_free_blocks.load(Relaxed),
            num_cached_blocks: self.num_cached_blocks.load(Relaxed),
            num_steps: self.num_steps.load(Relaxed),
            computed_for: Duration::from_nanos(self.computed_for_ns.load(Relaxed)),
            last_step_at: Duration::from_nanos(self.last_step_at_ns.load(Relaxed)),
            is_draining: self.is_draining.load(Relaxed),
            is_stopped: self.is_stopped.load(Relaxed),
            prompt_tokens: self.prompt_tokens.load(Relaxed),
            generation_tokens: self.generation_tokens.load(Relaxed),
            prefix_cache_queries: self.prefix_cache_queries.load(Relaxed),
            prefix_cache_hits: self.prefix_cache_hits.load(Relaxed),
            num_preemptions: self.num_preemptions.load(Relaxed),
            num_accepted: self.num_accepted.load(Relaxed),
            finished,
            routing: self.routing.snapshot(),
        }
    }

    /// Counts `num_choices` accepted choices, which wait from now on.
    pub(crate) fn accept(&self, num_choices: usize, num_tokens: usize) {
        self.num_accepted.fetch_add(num_choices as u64, Relaxed);
        self.num_waiting.fetch_add(num_choices, Relaxed);
        self.queued_tokens.fetch_add(num_tokens, Relaxed);
    }

    /// A preempted choice waits again.
    pub(crate) fn enter_waiting(&self, num_tokens: usize) {
        self.num_waiting.fetch_add(1, Relaxed);
        self.queued_tokens.fetch_add(num_tokens, Relaxed);
    }

    /// A choice runs, or ends without having run.
    pub(crate) fn leave_waiting(&self, num_tokens: usize) {
        self.num_waiting.fetch_sub(1, Relaxed);
        self.queued_tokens.fetch_sub(num_tokens, Relaxed);
    }

    /// Counts a choice that has ended.
    pub(crate) fn finish(&self, reason: FinishReason) {
        self.finished[reason.index()].fetch_add(1, Release);
    }

    /// Counts what a step took of the device's time.
    pub(crate) fn computed(&self, took: Duration) {
        self.computed_for_ns.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Relaxed);
    }

    /// Notes a sign of life.
    pub(crate) fn heartbeat(&self, now: Duration) {
        self.last_step_at_ns.store(u64::try_from(now.as_nanos()).unwrap_or(u64::MAX), Relaxed);
    }

    pub(crate) fn set_tokens_per_second(&self, tokens_per_second: f64) {
        self.tokens_per_second.store(tokens_per_second.ceil() as u64, Relaxed);
    }

    /// How long the queue will take to shrink noticeably: its tokens at the recent throughput, at least one
    /// second and at most a minute.
    pub(crate) fn retry_after(&self) -> Duration {
        let queued = self.queued_tokens.load(Relaxed) as u64;
        let seconds = queued.checked_div(self.tokens_per_second.load(Relaxed)).unwrap_or(0);
        Duration::from_secs(seconds.clamp(1, 60))
    }
}

/// Tokens per second of the engine at work: an exponentially weighted mean over about
/// [`Throughput::WINDOW_SECONDS`] of step time. Idle time does not count.
#[derive(Debug, Default)]
pub(crate) struct Throughput {
    tokens: f64,
    seconds: f64,
}

impl Throughput {
    const WINDOW_SECONDS: f64 = 10.0;

    /// Takes in a step, and returns the mean; 0 if all steps took no time.
    pub(crate) fn record(&mut self, num_tokens: usize, took: Duration) -> f64 {
        let decay = (-took.as_secs_f64() / Self::WINDOW_SECONDS).exp();
        self.tokens = self.tokens * decay + num_tokens as f64;
        self.seconds = self.seconds * decay + took.as_secs_f64();
        if self.seconds > 0.0 { self.tokens / self.seconds } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_retry_after(queued_tokens: usize, tokens_per_second: f64, expected_seconds: u64) {
        let stats = SharedStats::default();
        stats.accept(1, queued_tokens);
        stats.set_tokens_per_second(tokens_per_second);
        assert_eq!(stats.retry_after(), Duration::from_secs(expected_seconds));
    }

    #[test]
    fn retry_after_is_the_queue_at_the_recent_throughput() {
        check_retry_after(3000, 100.0, 30);
        check_retry_after(3, 100.0, 1);
        check_retry_after(1_000_000, 100.0, 60);
        check_retry_after(1_000_000, 0.0, 1);
        check_retry_after(50, 0.01, 50);
    }

    #[test]
    fn throughput_follows_recent_steps_and_not_idle_time() {
        let mut throughput = Throughput::default();
        assert_eq!(throughput.record(10, Duration::ZERO), 0.0);
        let mut rate = 0.0;
        (0..1000).for_each(|_| rate = throughput.record(10, Duration::from_millis(100)));
        assert!((rate - 100.0).abs() < 1.0, "{rate}");
        (0..1000).for_each(|_| rate = throughput.record(40, Duration::from_millis(100)));
        assert!((rate - 400.0).abs() < 4.0, "{rate}");
    }
}
