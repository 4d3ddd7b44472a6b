//! `POST /v1/cancel/{id}`: ends an answer that is under way, whole or streamed, chat, completion or response.
//!
//! Its reader gets what there is, as if a limit had cut it (`finish_reason: "length"`): OpenAI's clients know
//! no other word for an answer that is not whole. Leaving a stream needs none of this; it cancels too.

use axum::extract::{Path, Request, State};
use axum::{Json, RequestExt};
use serde_json::{Value, json};

use crate::auth::Caller;
use crate::error::ApiError;
use crate::state::AppState;

/// Cancels the caller's answer of this id.
pub(crate) async fn cancel(
    State(state): State<AppState>,
    mut request: Request,
) -> Result<Json<Value>, ApiError> {
    let Path(id) = request.extract_parts::<Path<String>>().await.map_err(|_| ApiError::internal())?;
    if state.running.cancel(&id, Caller::of(&request)) {
        Ok(Json(json!({"id": id, "object": "cancellation", "cancelled": true})))
    } else {
        Err(ApiError::request_not_found(&id))
    }
}
