//! The prompts of a completion: text or token ids, one or many.

use serde_json::Value;

use super::fields::{Fields, list_at, string_at, wrong_type, wrong_value};
use super::params::{indexed, required, token_ids};
use crate::error::ApiError;
use crate::state::AppState;
use crate::text::detokenizer::Detokenizer;
use crate::text::model::{TextError, TextModel};

/// A prompt as it came.
#[derive(Debug)]
pub(crate) enum Prompt {
    Text(String),
    Ids(Vec<u32>),
}

/// A prompt as the model reads it, and as it is shown again.
pub(crate) struct EncodedPrompt {
    pub(crate) ids: Vec<u32>,
    /// Empty unless `echo`.
    pub(crate) echo: String,
}

impl Prompt {
    pub(crate) fn encode(self, text: &TextModel, echo: bool) -> Result<EncodedPrompt, TextError> {
        match self {
            Self::Text(prompt) => {
                let ids = text.tokenizer.encode(&prompt)?;
                Ok(EncodedPrompt { ids, echo: if echo { prompt } else { String::new() } })
            }
            Self::Ids(ids) => {
                let echo = if echo { decode(text, &ids) } else { String::new() };
                Ok(EncodedPrompt { ids, echo })
            }
        }
    }
}

/// The text of whole token ids.
pub(crate) fn decode(text: &TextModel, ids: &[u32]) -> String {
    let mut detokenizer = Detokenizer::new(text.tokenizer.vocabulary().clone());
    let mut decoded = String::new();
    ids.iter().for_each(|&id| detokenizer.push(id, &mut decoded));
    detokenizer.finish(&mut decoded);
    decoded
}

/// A string, an array of strings, of token ids, or of arrays of token ids.
pub(crate) fn take(fields: &mut Fields, state: &AppState) -> Result<Vec<Prompt>, ApiError> {
    let max_bytes = state.config.max_prompt_bytes;
    let items = match required(fields, "prompt")? {
        text @ Value::String(_) => return Ok(vec![Prompt::Text(string_at("prompt", text, max_bytes)?)]),
        Value::Array(items) => items,
        other => return Err(wrong_type("prompt", "a string, token ids, or an array of them", &other)),
    };
    if items.is_empty() {
        return Err(wrong_value("prompt", "it must not be empty"));
    }
    if items[0].is_number() {
        return Ok(vec![take_ids("prompt", &items, state)?]);
    }
    let prompts = list_at("prompt", Value::Array(items), state.config.max_prompts)?;
    let prompt = |(path, prompt): (String, Value)| match prompt {
        Value::Array(ids) => take_ids(&path, &ids, state),
        text => string_at(&path, text, max_bytes).map(Prompt::Text),
    };
    indexed("prompt", prompts).into_iter().map(prompt).collect()
}

/// Token ids; the context is checked before each of them is.
fn take_ids(path: &str, ids: &[Value], state: &AppState) -> Result<Prompt, ApiError> {
    let limits = state.engine.limits();
    if ids.is_empty() {
        return Err(wrong_value(path, "it must not be empty"));
    }
    if ids.len() > limits.max_model_len {
        let requested = format!("your prompt has {} tokens", ids.len());
        return Err(ApiError::context_length_exceeded(path, limits.max_model_len, &requested));
    }
    token_ids(path, ids, limits.vocab_size).map(Prompt::Ids)
}
