//! `x-request-id`: taken from the client if it is harmless, made here otherwise, and sent back with every
//! answer, errors included.

use axum::extract::Request;
use axum::http::HeaderName;
use axum::http::HeaderValue;
use axum::middleware::Next;
use axum::response::Response;
use tracing::Instrument;

use crate::random;

const HEADER: HeaderName = HeaderName::from_static("x-request-id");
const MAX_BYTES: usize = 128;

/// Names the request in its answer and in the log.
pub(crate) async fn identify(request: Request, next: Next) -> Response {
    let given = request.headers().get(HEADER).filter(|id| is_harmless(id.as_bytes())).cloned();
    let id = given.unwrap_or_else(fresh);
    let span = tracing::info_span!("http", id = id.to_str().unwrap_or_default());
    let mut response = next.run(request).instrument(span).await;
    response.headers_mut().insert(HEADER, id);
    response
}

/// Letters, digits and a few signs: nothing that could forge a line of a log.
fn is_harmless(id: &[u8]) -> bool {
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.:/+=".contains(byte);
    (1..=MAX_BYTES).contains(&id.len()) && id.iter().all(is_plain)
}

fn fresh() -> HeaderValue {
    HeaderValue::try_from(random::id("req-")).unwrap_or(HeaderValue::from_static("req"))
}
