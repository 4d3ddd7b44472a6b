//! `POST /v1/cancel/{id}`: ends an answer that is under way, whole or streamed, chat, completion or response.
//!
//! Its reader gets what there is, as if a limit had cut it (`finish_reason: "length"`): OpenAI's clients know
//! no other word for an answer that is not whole. Leaving a stream needs none of this; it cancels too.

use axum::Json;
use axum::extract::{Extension, Path, State};
use serde_json::{Value, json};

use crate::auth::Caller;
use crate::error::ApiError;
use crate::state::AppState;

/// Cancels the caller's answer of this id.
pub(crate) async fn cancel(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    if state.running.cancel(&id, caller) {
        Ok(Json(json!({"id": id, "object": "cancellation", "cancelled": true})))
    } else {
        Err(ApiError::request_not_found(&id))
    }
}
