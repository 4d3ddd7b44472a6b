//! `POST /v1/messages` and `POST /v1/messages/count_tokens`: Anthropic's form of a chat, for clients that have no
//! other. As with Responses, a request is translated into a chat's fields and checked there.
//!
//! Text and functions only: no images, documents, thinking or hosted tools. The sampling parameters have OpenAI's
//! ranges.

pub(crate) mod error;
mod message;
pub(crate) mod request;
mod stream;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::answer::Meta;
use crate::body::read_json;
use crate::error::ApiError;
use crate::generation::Arrival;
use crate::narration::narrate;
use crate::state::AppState;
use message::MessageObject;
use request::{Budget, own_name};
use stream::MessageNarrator;

/// Answers a conversation.
pub(crate) async fn messages(State(state): State<AppState>, request: Request) -> Result<Response, ApiError> {
    let arrival = Arrival::of(&request);
    let fields = read_json(&state, request).await?;
    let mut chat = request::take(fields, &state, Budget::Required)?;
    let meta = Meta::new(&state, "msg_", None);
    let (mut generation, _) =
        chat.start(&state, meta.id(), arrival).await.map_err(|error| error.renamed(own_name))?;
    let message = MessageObject::new(&meta);
    if let Some(options) = chat.params.streamed {
        let keep_alive_interval = options.keep_alive_interval.unwrap_or(state.config.keep_alive_interval);
        return Ok(narrate(generation, MessageNarrator::new(message), keep_alive_interval));
    }
    let answer = generation.finish().await?.pop().unwrap_or_default();
    Ok(Json(message.ended(answer, generation.usage())).into_response())
}

/// Counts what a conversation would send to the model.
pub(crate) async fn count_tokens(
    State(state): State<AppState>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let fields = read_json(&state, request).await?;
    let mut chat = request::take(fields, &state, Budget::Absent)?;
    let num_tokens = chat.count_tokens(&state).await.map_err(|error| error.renamed(own_name))?;
    Ok(Json(json!({"input_tokens": num_tokens})))
}
