//! Policy on token ids: requests wait in a bounded queue, a scheduler batches their tokens continuously over
//! one paged cache, and one plain thread runs step after step.
//!
//! ```text
//! EngineHandle::submit ─► queue ─► Scheduler::schedule ─► ModelRunner::execute ─► Scheduler::update ─► EventSink
//!   any thread          bounded   └──────────────────── one Engine, one thread ────────────────────┘
//! ```
//!
//! A step is those three calls. The scheduler under them is a state machine without threads, clocks or
//! randomness of its own, so a whole engine runs in a seeded loop (`tests/simulation.rs`).
//!
//! This crate knows no text, no HTTP and no wall clock of its own, and never waits for a client.
#![forbid(unsafe_code)]

mod constraint;
mod recording;
mod request;

mod config;
mod submission;

mod handle;
mod queue;

mod engine;
mod mask_turns;
mod scheduler;
mod sequence;

mod block_hash;
mod block_manager;

mod routing_stats;
mod stats;

mod fake;
#[cfg(test)]
mod testing;

pub use config::{Clock, EngineConfig, limits};
pub use constraint::Constraint;
pub use engine::{Engine, EngineError, EngineThread, Progress};
pub use fake::FakeRunner;
pub use handle::EngineHandle;
pub use recording::RecordRouting;
pub use request::{Choice, Event, EventSink, FinishReason, PromptLogprob, Request, SinkClosed};
pub use routing_stats::{LayerStats, RoutingStats};
pub use stats::Stats;
pub use submission::SubmitError;
