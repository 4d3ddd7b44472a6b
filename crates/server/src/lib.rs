//! Words and HTTP: OpenAI's API in front of an [`engine`].
//!
//! ```text
//! HTTP ─► app (layers) ─► api (fields, checked) ─► text (template, tokenizer) ─► Generation ─► engine
//! HTTP ◄─ answer (whole or streamed) ◄─ choice (detokenizer, stop strings, scores) ◄─ events ◄─┘
//! ```
//!
//! [`TextModel`] reads and writes for a model, [`AppState`] is what all requests share, [`app`] is the server
//! as a service and [`serve`] runs it on a socket. This crate runs no forward pass and knows no device.
#![forbid(unsafe_code)]

mod app;
mod serve;

mod auth;
mod body;
mod health;
mod request_id;

mod api;

mod reference;

mod answer;
mod choice;
mod choice_text;
mod generation;
mod logprobs;
mod narration;
mod routing;
mod running;
mod stored;
mod timing;
mod tool_calls;

mod constraint;

mod text;

mod accounting;
mod metrics;

mod config;
mod error;
mod lifecycle;
mod random;
mod state;

pub use app::app;
pub use config::ServerConfig;
pub use metrics::metric_names;
pub use serve::{Leave, serve};
pub use state::AppState;
pub use text::model::{TextError, TextFiles, TextModel};
