//! `GET /v1/models` and `GET /v1/models/{id}`.

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;

use crate::error::ApiError;
use crate::state::AppState;

#[derive(Serialize)]
pub(crate) struct Models {
    object: &'static str,
    data: Vec<Model>,
}

#[derive(Serialize)]
pub(crate) struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    max_model_len: usize,
}

/// Lists the one model that is served.
pub(crate) async fn list(State(state): State<AppState>) -> Json<Models> {
    Json(Models { object: "list", data: vec![served(&state)] })
}

/// Describes the served model; a name may contain slashes.
pub(crate) async fn get(
    State(state): State<AppState>,
    Path(id): Path<String>,
) -> Result<Json<Model>, ApiError> {
    if id == state.config.model_name { Ok(Json(served(&state))) } else { Err(ApiError::model_not_found(&id)) }
}

fn served(state: &AppState) -> Model {
    Model {
        id: state.config.model_name.clone(),
        object: "model",
        created: state.started_at_unix,
        owned_by: "windrose",
        max_model_len: state.engine.limits().max_model_len,
    }
}
