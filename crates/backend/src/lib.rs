//! The vocabulary that models and devices share: the [`Backend`] trait, the ragged [`Batch`], weight
//! views, expert [`Routing`] and sampling, with a plain f32 [`reference`] implementation that is the oracle
//! and a [`conformance`] suite that every backend passes.
//!
//! A verb of [`Backend`] is a whole fused kernel of a transformer layer, not a tensor primitive; its doc
//! comment is its specification. This crate deliberately has no SIMD, no threads, no device and no
//! knowledge of Mixtral.
//!
//! ```text
//! model ──► Backend (verbs) ◄── reference | cpu | cuda
//! ```
#![forbid(unsafe_code)]

mod batch;
pub mod conformance;
pub mod reference;
mod rope;
mod routing;
pub mod sampling;
pub mod steering;
mod verbs;
mod weights;

pub use batch::{Batch, StepShape};
pub use reference::Reference;
pub use rope::RopeTable;
pub use routing::{ExpertLoad, LayerChoices, Routing};
pub use sampling::{NonFiniteLogits, SampleParams, SampleRow, Sampled, TokenLogprob};
pub use steering::{LayerSteering, RouteRule, RoutingRecord, Steering, StepSteering};
pub use verbs::{AttentionShape, Backend, BackendError, DType, ExpertsView, MatrixUse, RouteShape};
pub use weights::{WeightData, WeightType, WeightView, dummy_value};
