//! Errors in Anthropic's shape, on its routes: `{"type": "error", "error": {"type", "message"}}`.
//!
//! A layer around all others rewords what they answered, so that a missing key or a full queue has this shape too.

use axum::body::Body;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::Response;
use serde_json::{Value, json};

use crate::error::{ApiError, ErrorBody};

/// Rewords errors of Anthropic's routes.
pub(crate) async fn reword(request: Request, next: Next) -> Response {
    let is_anthropics = request.uri().path().starts_with("/v1/messages");
    let mut response = next.run(request).await;
    if is_anthropics && let Some(body) = response.extensions_mut().remove::<ErrorBody>() {
        *response.body_mut() = Body::from(worded(response.status(), &body.message).to_string());
    }
    response
}

/// An error in the midst of a stream.
pub(super) fn event(error: &ApiError) -> Value {
    worded(error.status, &error.body.message)
}

fn worded(status: StatusCode, message: &str) -> Value {
    let kind = match status.as_u16() {
        401 => "authentication_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        500.. => "api_error",
        _ => "invalid_request_error",
    };
    json!({"type": "error", "error": {"type": kind, "message": message}})
}
