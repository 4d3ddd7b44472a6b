//! The server in process: the real tokenizer and chat template of the demo model over the engine's fake
//! model, whose answers a test scripts.

mod anthropic;
mod chat;
mod completions;
mod errors;
mod extras;
mod leaving;
mod metrics;
mod responses;
mod structured;
mod support;
mod text;
