//! Mixtral once: the configuration, the names in a checkpoint, the forward pass over any
//! [`Backend`](backend::Backend), and [`ModelRunner`], the seam through which the engine runs it.
//!
//! ```text
//! ModelFiles ─► ModelConfig ─► weights ─► Mixtral<B>::forward ◄─ MixtralRunner<B> ◄─ ModelRunner (engine)
//! ```
//!
//! This crate knows no device, no text and no HTTP.
#![deny(unsafe_code)]

mod checkpoint;
mod config;
mod error;
mod files;
mod gguf;
mod mixtral;
mod mixtral_runner;
mod runner;
mod summary;
mod weights;

pub use backend::{
    BackendError, Batch, ExpertLoad, LayerChoices, LayerSteering, NonFiniteLogits, RouteShape, RoutingRecord,
    SampleParams, SampleRow, Sampled, Steering, TokenLogprob, WeightType,
    sampling::{mix64, sample_row},
    steering::MAX_STEERED_EXPERTS,
};
pub use config::{Architecture, ModelConfig};
pub use error::ModelError;
pub use files::ModelFiles;
pub use gguf::{Gguf, Metadata};
pub use mixtral_runner::{MixtralRunner, RunnerOptions, WeightSource};
pub use runner::{ModelRunner, RunnerLimits, StepOutput};
pub use summary::ModelSummary;
