//! What probes are told. The engine is asked for its [`Stats`] only, which take no lock, so that a probe is
//! answered in microseconds however long a step takes.
//!
//! - live: the engine runs, and has taken a step recently if there is work. Red: restart the process.
//! - ready: live, not shutting down, and room in the queue. Red: send requests elsewhere.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use engine::Stats;
use serde_json::json;

use crate::lifecycle::Phase;
use crate::state::AppState;

/// Answers `/livez` and `/health`.
pub(crate) async fn live(State(state): State<AppState>) -> Response {
    answer(ailment(&state, &state.engine.stats()))
}

/// Answers `/readyz`.
pub(crate) async fn ready(State(state): State<AppState>) -> Response {
    let stats = state.engine.stats();
    answer(ailment(&state, &stats).or_else(|| absence(&state, &stats)))
}

/// Answers `/version`.
pub(crate) async fn version(State(state): State<AppState>) -> Response {
    Json(json!({"version": state.config.version})).into_response()
}

fn answer(reason: Option<&'static str>) -> Response {
    match reason {
        None => Json(json!({"status": "ok"})).into_response(),
        Some(reason) => {
            (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"status": "unavailable", "reason": reason})))
                .into_response()
        }
    }
}

/// Why the process should be restarted.
fn ailment(state: &AppState, stats: &Stats) -> Option<&'static str> {
    if stats.is_stopped && state.lifecycle.phase() != Phase::Draining {
        return Some("the engine has stopped");
    }
    let has_work = stats.num_waiting + stats.num_running > 0;
    let silence = (state.clock)().saturating_sub(stats.last_step_at);
    (has_work && silence > state.config.stall_timeout).then_some("the engine has work and takes no step")
}

/// Why requests should go elsewhere.
fn absence(state: &AppState, stats: &Stats) -> Option<&'static str> {
    let limits = state.engine.config();
    if state.lifecycle.phase() != Phase::Serving || stats.is_draining {
        return Some("the server is shutting down");
    }
    let is_full =
        stats.num_waiting >= limits.max_queued_requests || stats.queued_tokens >= limits.max_queued_tokens;
    is_full.then_some("the queue is full")
}
