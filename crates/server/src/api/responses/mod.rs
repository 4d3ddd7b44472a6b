//! `POST /v1/responses`: OpenAI's newer form of a chat. A request is translated into a chat's fields, which chat
//! itself checks, and the answer into output items; what a model is asked and how it answers is a chat's.
//!
//! ```text
//! items, instructions ─► request (translated) ─► ChatRequest ─► Generation ─► output (items) ─► stream or object
//!                           ▲ previous items ───────────── StoredResponses ◄── object, if `store`
//! ```
//!
//! There are no hosted tools, no reasoning, no conversations and no work in the background.

mod items;
mod object;
mod output;
pub(crate) mod request;
pub(crate) mod stored;
mod stream;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};

use crate::answer::Meta;
use crate::body::read_json;
use crate::choice_text::Delta;
use crate::error::ApiError;
use crate::generation::Arrival;
use crate::narration::narrate;
use crate::state::AppState;
use object::ResponseObject;
use output::Output;
use request::{ResponseRequest, own_name};
use stream::ResponseNarrator;

/// Answers items with items.
pub(crate) async fn create(State(state): State<AppState>, request: Request) -> Result<Response, ApiError> {
    let arrival = Arrival::of(&request);
    let fields = read_json(&state, request).await?;
    let ResponseRequest { mut chat, object, input, is_stored } =
        ResponseRequest::take(fields, &state, arrival.caller)?;
    let meta = Meta::new(&state, "resp_", chat.params.service_tier);
    let (mut generation, _) =
        chat.start(&state, meta.id(), arrival).await.map_err(|error| error.renamed(own_name))?;
    let object = ResponseObject::new(object, &meta);
    let shelf = is_stored.then(|| stored::Shelf::new(state.clone(), arrival.caller, input));
    let output = Output::new(chat.top_logprobs.is_some());
    if let Some(options) = chat.params.streamed {
        let keep_alive_interval = options.keep_alive_interval.unwrap_or(state.config.keep_alive_interval);
        return Ok(narrate(generation, ResponseNarrator::new(object, output, shelf), keep_alive_interval));
    }
    let answer: Delta = generation.finish().await?.pop().unwrap_or_default();
    let response = object.ended(answer.ending, output.items(answer), generation.usage());
    if let Some(shelf) = shelf {
        shelf.put(meta.id(), &response);
    }
    Ok(Json(response).into_response())
}
