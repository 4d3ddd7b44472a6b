//! `POST /tokenize` and `POST /detokenize`, as vLLM has them: a prompt or a conversation to token ids, and back.

use axum::Json;
use axum::extract::{Request, State};
use serde::Serialize;

use super::chat::Conversation;
use super::fields::list_at;
use super::params::{check_model, required, token_ids};
use super::prompts::decode;
use crate::body::read_json;
use crate::error::ApiError;
use crate::state::AppState;
use crate::text::model::TextModel;

#[derive(Serialize)]
pub(crate) struct Tokenized {
    count: usize,
    max_model_len: usize,
    tokens: Vec<u32>,
}

#[derive(Serialize)]
pub(crate) struct Detokenized {
    prompt: String,
}

/// Encodes a `prompt` as completions do (`add_special_tokens`: with the start token, the default), or
/// `messages` as chat does.
pub(crate) async fn tokenize(
    State(state): State<AppState>,
    request: Request,
) -> Result<Json<Tokenized>, ApiError> {
    let mut fields = read_json(&state, request).await?;
    check_model(&mut fields, &state.config.model_name)?;
    let max_bytes = state.config.max_prompt_bytes;
    let prompt = fields.string("prompt", max_bytes)?;
    let tokens = if let Some(prompt) = prompt {
        let add_special_tokens = fields.boolean("add_special_tokens")?.unwrap_or(true);
        fields.finish()?;
        let encode = move |text: &TextModel| {
            if add_special_tokens {
                text.tokenizer.encode(&prompt)
            } else {
                text.tokenizer.encode_bare(&prompt)
            }
        };
        state.with_text("prompt", encode).await?
    } else {
        let (conversation, _) = Conversation::take(&mut fields, &state)?;
        fields.finish()?;
        state.with_text("messages", move |text| conversation.encode(text, max_bytes)).await?
    };
    let max_model_len = state.engine.limits().max_model_len;
    Ok(Json(Tokenized { count: tokens.len(), max_model_len, tokens }))
}

/// Decodes `tokens`; control tokens add nothing.
pub(crate) async fn detokenize(
    State(state): State<AppState>,
    request: Request,
) -> Result<Json<Detokenized>, ApiError> {
    let mut fields = read_json(&state, request).await?;
    check_model(&mut fields, &state.config.model_name)?;
    let tokens = required(&mut fields, "tokens")?;
    fields.finish()?;
    let tokens = list_at("tokens", tokens, state.config.max_prompt_bytes)?;
    let ids = token_ids("tokens", &tokens, state.engine.limits().vocab_size)?;
    let prompt = state.with_text("tokens", move |text| Ok(decode(text, &ids))).await?;
    Ok(Json(Detokenized { prompt }))
}
