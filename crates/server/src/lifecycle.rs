//! Where the server stands between its start and its end.
//!
//! ```text
//! Serving ──signal──► Leaving ──drain_grace──► Draining ──idle or shutdown_timeout──► gone
//!          not ready, still accepting   refuses with 503, streams finish
//! ```

use std::sync::atomic::{AtomicU8, Ordering};

use tokio::sync::watch;

/// What the server does with new requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// Takes them.
    Serving,
    /// Takes them, and tells load balancers to stop sending any.
    Leaving,
    /// Refuses them.
    Draining,
}

/// The phase, and the number of requests in flight.
#[derive(Debug)]
pub(crate) struct Lifecycle {
    phase: AtomicU8,
    in_flight: watch::Sender<usize>,
}

impl Lifecycle {
    pub(crate) fn new() -> Self {
        Self { phase: AtomicU8::new(Phase::Serving as u8), in_flight: watch::Sender::new(0) }
    }

    pub(crate) fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            0 => Phase::Serving,
            1 => Phase::Leaving,
            _ => Phase::Draining,
        }
    }

    /// Goes on to `phase`, never back.
    pub(crate) fn advance(&self, phase: Phase) {
        self.phase.fetch_max(phase as u8, Ordering::Relaxed);
    }

    /// Counts a request in flight until the guard is dropped.
    pub(crate) fn enter(&self) -> InFlight {
        self.in_flight.send_modify(|num| *num += 1);
        InFlight(self.in_flight.clone())
    }

    /// Waits until no request is in flight.
    pub(crate) async fn idle(&self) {
        // The sender is `self`'s own, so that waiting cannot fail.
        let _ = self.in_flight.subscribe().wait_for(|&num| num == 0).await;
    }
}

/// A request in flight.
#[derive(Debug)]
pub(crate) struct InFlight(watch::Sender<usize>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.send_modify(|num| *num -= 1);
    }
}
