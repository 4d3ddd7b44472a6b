//! Broken models end in one readable error that names what is wrong, never in a panic.

mod checkpoints;
mod gguf;
mod support;
