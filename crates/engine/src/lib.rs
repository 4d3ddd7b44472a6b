//! Policy on token ids: requests wait in a bounded queue, a scheduler batches their tokens continuously over
//! one paged cache, and one plain thread runs step after step.
//!
//! ```text
//! EngineHandle::submit ─► queue ─► Scheduler::schedule ─► ModelRunner::execute ─► Scheduler::update ─► EventSink
//! ```
//!
//! This crate knows no text, no HTTP and no wall clock of its own, and never waits for a client.
#![forbid(unsafe_code)]

mod request;

pub use request::{Event, EventSink, FinishReason, PromptLogprob, Request, SinkClosed};
