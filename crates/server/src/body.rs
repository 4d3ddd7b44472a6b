//! Reading a request's body: of the right type, within its limit, in time, once.

use axum::body::Body;
use axum::extract::Request;
use axum::http::HeaderMap;
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};

use crate::api::fields::Fields;
use crate::error::ApiError;
use crate::state::AppState;

/// Reads and parses a JSON object.
///
/// # Errors
/// 415, 413, 408 or 400.
pub(crate) async fn read_json(state: &AppState, request: Request) -> Result<Fields, ApiError> {
    let config = &state.config;
    check_type(request.headers())?;
    check_length(request.headers(), config.max_body_bytes)?;
    let reading = collect(request.into_body(), config.max_body_bytes);
    let body = tokio::time::timeout(config.body_read_timeout, reading)
        .await
        .map_err(|_| ApiError::body_timeout())??;
    Fields::parse(&body)
}

/// A missing type is refused too: a page of another origin can send such a request without asking.
fn check_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = content_type.split(';').next().unwrap_or_default().trim();
    let is_plain = headers.get(CONTENT_ENCODING).is_none_or(|encoding| encoding == "identity");
    if essence.eq_ignore_ascii_case("application/json") && is_plain {
        Ok(())
    } else {
        Err(ApiError::unsupported_media_type())
    }
}

/// Refuses by the announced length, before anything is read.
fn check_length(headers: &HeaderMap, max_bytes: usize) -> Result<(), ApiError> {
    let announced = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|len| len > max_bytes as u64) {
        Err(ApiError::body_too_large(max_bytes))
    } else {
        Ok(())
    }
}

async fn collect(body: Body, max_bytes: usize) -> Result<Bytes, ApiError> {
    match Limited::new(body, max_bytes).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(ApiError::body_too_large(max_bytes)),
        Err(_) => Err(ApiError::invalid_body("The request body could not be read.")),
    }
}
