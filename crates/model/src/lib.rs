//! Mixtral once: the configuration, the names in a checkpoint, the forward pass over any
//! [`Backend`](backend::Backend), and [`ModelRunner`], the seam through which the engine runs it.
//!
//! This crate knows no device, no text and no HTTP.
#![deny(unsafe_code)]

mod runner;

pub use backend::{
    BackendError, Batch, NonFiniteLogits, SampleParams, SampleRow, Sampled, TokenLogprob, sampling::mix64,
};
pub use runner::{ModelRunner, RunnerLimits, StepOutput};
