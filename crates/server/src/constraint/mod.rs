//! Structured output: what a client says an answer must look like, as a mask of tokens for each step.
//!
//! ```text
//! response_format, tools ─► Source ─► Compiler (a thread, a deadline, a cache) ─► Template
//! engine ◄─ Bound::start ◄─ a matcher per choice, from the templates of its text and of its tool calls
//! ```
//!
//! Grammars, their parsers and the walk over the vocabulary are llguidance's; this module decides what a
//! grammar says, what it may cost and where in an answer it holds. It knows no HTTP, and nothing of how an
//! answer is read again: that is the business of `choice_text.rs`.

mod bound;
mod byte_classes;
mod compiler;
mod location;
mod source;
mod vocabulary_trie;

pub(crate) use bound::{Bound, mask_of};
pub(crate) use compiler::{Compiler, GrammarError};
pub(crate) use source::{Calls, Source, Tool};

#[cfg(test)]
mod tests;
