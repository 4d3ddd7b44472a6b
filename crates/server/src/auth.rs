//! API keys: the outermost layer that decides, so that nothing behind it can be reached without a key. What is
//! open is listed here, and everything else is not.

use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use axum::middleware::Next;
use axum::response::Response;
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use crate::config::ServerConfig;
use crate::error::ApiError;
use crate::state::AppState;

/// Paths that probes read without a key, and the reference, which says nothing of any request.
const OPEN_PATHS: [&str; 6] = ["/livez", "/readyz", "/health", "/version", "/openapi.json", "/docs"];

/// Which key a request came with, so that what it leaves behind can be told from others'. Without keys everyone
/// is the same caller.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Caller(u64);

impl Caller {
    pub(crate) fn of(request: &Request) -> Self {
        request.extensions().get().copied().unwrap_or_default()
    }
}

/// Lets a request pass if it presents one of the keys, if there are none, or if its path is open.
pub(crate) async fn authenticate(
    State(state): State<AppState>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let caller = caller(&state.config.api_keys, request.headers());
    request.extensions_mut().insert(caller.unwrap_or_default());
    if caller.is_some() || is_open(&state.config, request.uri().path()) {
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

/// The place of the presented key. Compares with every key in full, so that time tells nothing but a key's length.
fn caller(keys: &[String], headers: &HeaderMap) -> Option<Caller> {
    let key = presented_key(headers)?;
    let (mut found, mut place) = (Choice::from(0), 0);
    for (candidate, index) in keys.iter().zip(1_u64..) {
        let equals = candidate.as_bytes().ct_eq(key);
        place.conditional_assign(&index, equals);
        found |= equals;
    }
    bool::from(found).then_some(Caller(place))
}

/// `Authorization: Bearer`, as OpenAI's clients have it, or `x-api-key`, as Anthropic's.
fn presented_key(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers.get(AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.as_bytes().split_at_checked("Bearer ".len())?;
        scheme.eq_ignore_ascii_case(b"Bearer ").then_some(key)
    });
    bearer.or_else(|| headers.get("x-api-key").map(|value| value.as_bytes()))
}
