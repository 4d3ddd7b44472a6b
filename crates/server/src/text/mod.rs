//! Words: everything between characters and token ids. No HTTP here.
//!
//! ```text
//! messages ─► template ─► rendered text ─► tokenizer ─► ids ─► engine ─► ids ─► detokenizer ─► stop ─► text
//! ```

mod gguf;
pub(crate) mod model;

pub(crate) mod python_json;
mod strftime;
pub(crate) mod template;

pub(crate) mod control;
pub(crate) mod tokenizer;

pub(crate) mod detokenizer;
pub(crate) mod vocabulary;

pub(crate) mod stop;
