//! `GET` and `DELETE /v1/responses/{id}`, `GET /v1/responses/{id}/input_items` and `POST /v1/responses/{id}/cancel`:
//! responses that were kept.

use std::collections::HashMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, Path, Query, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::api::fields::wrong_value;
use crate::auth::Caller;
use crate::error::ApiError;
use crate::state::AppState;
use crate::stored::StoredResponse;

/// Items of a page, if the client does not say.
const DEFAULT_LIMIT: usize = 20;
pub(crate) const MAX_LIMIT: usize = 100;

/// Where one response goes when it is complete.
pub(super) struct Shelf {
    state: AppState,
    owner: Caller,
    input: Vec<Value>,
}

impl Shelf {
    pub(super) fn new(state: AppState, owner: Caller, input: Vec<Value>) -> Self {
        Self { state, owner, input }
    }

    pub(super) fn put(self, id: &str, response: &Value) {
        let input = Value::Array(self.input).to_string();
        let stored = StoredResponse { owner: self.owner, response: response.to_string(), input };
        self.state.responses.put(id.to_owned(), stored);
    }
}

/// Gives a response again.
pub(crate) async fn get(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let stored = find(&state, &id, caller)?;
    Ok(([(CONTENT_TYPE, "application/json")], stored.response.clone()).into_response())
}

/// Forgets a response.
pub(crate) async fn delete(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    if state.responses.delete(&id, caller) {
        Ok(Json(json!({"id": id, "object": "response", "deleted": true})))
    } else {
        Err(ApiError::response_not_found(&id))
    }
}

/// Says why a response is not cancelled.
pub(crate) async fn cancel(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> ApiError {
    if state.running.has(&id, caller) {
        return ApiError::response_not_cancellable();
    }
    find(&state, &id, caller).map_or_else(|error| error, |_| ApiError::response_not_cancellable())
}

/// Pages through what a response answered, the newest first unless asked otherwise.
pub(crate) async fn input_items(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Json<Value>, ApiError> {
    let stored = find(&state, &id, caller)?;
    let mut items: Vec<Value> = serde_json::from_str(&stored.input).map_err(|_| ApiError::internal())?;
    match query.get("order").map_or("desc", String::as_str) {
        "desc" => items.reverse(),
        "asc" => {}
        _ => return Err(wrong_value("order", "expected 'asc' or 'desc'")),
    }
    let limit = query.get("limit").map_or(Ok(DEFAULT_LIMIT), |limit| limit.parse());
    let limit = limit.ok().filter(|limit| (1..=MAX_LIMIT).contains(limit));
    let limit = limit.ok_or_else(|| wrong_value("limit", &format!("expected 1 to {MAX_LIMIT}")))?;
    let first = match query.get("after") {
        None => 0,
        Some(after) => {
            let found = items.iter().position(|item| item["id"] == **after);
            found.ok_or_else(|| wrong_value("after", "there is no such item"))? + 1
        }
    };
    let has_more = items.len() > first + limit;
    let page: Vec<Value> = items.into_iter().skip(first).take(limit).collect();
    let id_of = |item: Option<&Value>| item.map_or(Value::Null, |item| item["id"].clone());
    let (first_id, last_id) = (id_of(page.first()), id_of(page.last()));
    Ok(Json(json!({
        "object": "list", "data": page, "first_id": first_id, "last_id": last_id, "has_more": has_more,
    })))
}

fn find(state: &AppState, id: &str, caller: Caller) -> Result<Arc<StoredResponse>, ApiError> {
    state.responses.get(id, caller).ok_or_else(|| ApiError::response_not_found(id))
}
