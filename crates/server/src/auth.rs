//! API keys: the outermost layer that decides, so that nothing behind it can be reached without a key. What is
//! open is listed here, and everything else is not.

use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use axum::middleware::Next;
use axum::response::Response;
use subtle::{Choice, ConstantTimeEq};

use crate::config::ServerConfig;
use crate::error::ApiError;
use crate::state::AppState;

/// Paths that probes and Prometheus read without a key.
const OPEN_PATHS: [&str; 4] = ["/livez", "/readyz", "/health", "/version"];

/// Lets a request pass if it presents one of the keys, if there are none, or if its path is open.
pub(crate) async fn authenticate(
    State(state): State<AppState>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    if is_open(&state.config, request.uri().path()) || has_key(&state.config.api_keys, request.headers()) {
        Ok(next.run(request).await)
    } else {
        Err(ApiError::unauthorized())
    }
}

fn is_open(config: &ServerConfig, path: &str) -> bool {
    config.api_keys.is_empty()
        || OPEN_PATHS.contains(&path)
        || (path == "/metrics" && !config.protect_metrics)
}

/// Compares with every key in full, so that time tells nothing but a key's length.
fn has_key(keys: &[String], headers: &HeaderMap) -> bool {
    let presented = headers.get(AUTHORIZATION).map_or(&b""[..], |value| value.as_bytes());
    let Some((scheme, key)) = presented.split_at_checked("Bearer ".len()) else { return false };
    let equals = |found: Choice, candidate: &String| found | candidate.as_bytes().ct_eq(key);
    scheme.eq_ignore_ascii_case(b"Bearer ") && keys.iter().fold(Choice::from(0), equals).into()
}
