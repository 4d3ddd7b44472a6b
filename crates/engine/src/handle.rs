//! The engine's front: what any thread may ask of it, none of which waits for a step.

use std::sync::Arc;

use model::RunnerLimits;

use crate::config::{Clock, EngineConfig};
use crate::queue::{Phase, Queue};
use crate::request::{Choice, Request};
use crate::stats::{SharedStats, Stats};
use crate::submission::{Submission, SubmitError, validate};

/// A way to one engine; clones lead to the same one. When the last is dropped, the engine drains and ends.
#[derive(Clone)]
pub struct EngineHandle {
    shared: Arc<Shared>,
}

struct Shared {
    queue: Arc<Queue>,
    stats: Arc<SharedStats>,
    limits: RunnerLimits,
    config: EngineConfig,
    clock: Clock,
}

impl EngineHandle {
    pub(crate) fn new(
        queue: Arc<Queue>,
        stats: Arc<SharedStats>,
        limits: RunnerLimits,
        config: EngineConfig,
        clock: Clock,
    ) -> Self {
        Self { shared: Arc::new(Shared { queue, stats, limits, config, clock }) }
    }

    /// Checks a request and puts it on the queue. From then on each choice's sink is told how it goes, and
    /// dropping a sink's reader is how a client leaves.
    ///
    /// # Errors
    /// [`SubmitError`]: the request can never be served, or not now. The choices' sinks have been told nothing.
    ///
    /// # Panics
    /// If there are not as many choices as the request says.
    pub fn submit(&self, request: Request, choices: Vec<Choice>) -> Result<(), SubmitError> {
        validate(&request, &self.shared.limits)?;
        assert_eq!(choices.len(), request.num_choices as usize, "each choice has a sink");
        self.shared.queue.push(Submission { request, choices, submitted_at: (self.shared.clock)() })
    }

    /// The model's sizes.
    pub fn limits(&self) -> &RunnerLimits {
        &self.shared.limits
    }

    /// The engine's own configuration, as it was given.
    pub fn config(&self) -> &EngineConfig {
        &self.shared.config
    }

    /// What the engine has done and what it holds; takes no lock.
    pub fn stats(&self) -> Stats {
        self.shared.stats.snapshot()
    }

    /// Refuses new requests with [`SubmitError::Draining`]; what waits and runs goes on, and then the engine
    /// ends.
    pub fn drain(&self) {
        self.shared.queue.advance(Phase::Draining);
    }

    /// Like [`drain`](Self::drain), but what waits and runs ends with
    /// [`FinishReason::Shutdown`](crate::FinishReason::Shutdown) before the next step.
    pub fn abort(&self) {
        self.shared.queue.advance(Phase::Aborting);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.queue.advance(Phase::Draining);
    }
}

impl std::fmt::Debug for EngineHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineHandle").field("stats", &self.stats()).finish_non_exhaustive()
    }
}
