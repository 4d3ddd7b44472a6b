//! Everything that a client can be told instead of an answer, in OpenAI's shape:
//! `{"error": {"message", "type", "param", "code"}}`. This is the one place that maps errors to HTTP.
//!
//! Messages speak of the request and nothing else: no addresses, no paths, no internals.

use std::time::Duration;

use axum::Json;
use axum::http::header::{CONNECTION, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use engine::SubmitError;
use serde::Serialize;

use crate::text::model::TextError;

/// Most characters of a client's own words that a message repeats.
const MAX_QUOTED_CHARS: usize = 100;
/// When to come back to a server that shuts down: by then another has taken its place.
const DRAINING_RETRY_AFTER: Duration = Duration::from_secs(5);

/// An error as a client sees it.
#[derive(Debug, Clone)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) body: ErrorBody,
    retry_after: Option<Duration>,
    closes_connection: bool,
}

/// The object under `error`.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct ErrorBody {
    pub(crate) message: String,
    #[serde(rename = "type")]
    pub(crate) kind: &'static str,
    pub(crate) param: Option<String>,
    pub(crate) code: Option<&'static str>,
}

#[derive(Serialize)]
pub(crate) struct ErrorEnvelope<'a> {
    pub(crate) error: &'a ErrorBody,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: &'static str, message: impl Into<String>) -> Self {
        let body = ErrorBody { message: message.into(), kind, param: None, code: Some(code) };
        Self { status, body, retry_after: None, closes_connection: false }
    }

    fn refused(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self::new(status, "invalid_request_error", code, message)
    }

    /// 400: the field at `param` is wrong.
    pub(crate) fn invalid(param: impl Into<String>, code: &'static str, message: impl Into<String>) -> Self {
        Self::refused(StatusCode::BAD_REQUEST, code, message).at(param)
    }

    /// 400: the body is not what the endpoint takes.
    pub(crate) fn invalid_body(message: impl Into<String>) -> Self {
        Self::refused(StatusCode::BAD_REQUEST, "invalid_json", message)
    }

    /// 400: prompt and answer do not fit the model.
    pub(crate) fn context_length_exceeded(param: &str, max_model_len: usize, requested: &str) -> Self {
        let message =
            format!("This model's maximum context length is {max_model_len} tokens. However, {requested}.");
        Self::invalid(param, "context_length_exceeded", message)
    }

    pub(crate) fn unauthorized() -> Self {
        let message = "Incorrect API key provided. Send one as 'Authorization: Bearer <key>'.";
        Self::refused(StatusCode::UNAUTHORIZED, "invalid_api_key", message)
    }

    pub(crate) fn model_not_found(model: &str) -> Self {
        let message = format!("The model {} does not exist or you do not have access to it.", quoted(model));
        Self::refused(StatusCode::NOT_FOUND, "model_not_found", message).at("model")
    }

    /// 404: the caller has no answer of this id under way.
    pub(crate) fn request_not_found(id: &str) -> Self {
        let message = format!("No answer with id {} is under way.", quoted(id));
        Self::refused(StatusCode::NOT_FOUND, "request_not_found", message).at("id")
    }

    pub(crate) fn unknown_route(method: &str, path: &str) -> Self {
        Self::refused(
            StatusCode::NOT_FOUND,
            "unknown_url",
            format!("Unknown request URL: {method} {}.", quoted(path)),
        )
    }

    pub(crate) fn method_not_allowed(method: &str, path: &str) -> Self {
        let message = format!("Not allowed to {method} on {}.", quoted(path));
        Self::refused(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
    }

    pub(crate) fn body_too_large(max_bytes: usize) -> Self {
        let message = format!("The request body is larger than {max_bytes} bytes.");
        Self::refused(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message).closing()
    }

    pub(crate) fn body_timeout() -> Self {
        Self::refused(
            StatusCode::REQUEST_TIMEOUT,
            "request_timeout",
            "The request body did not arrive in time.",
        )
        .closing()
    }

    pub(crate) fn unsupported_media_type() -> Self {
        let message =
            "The request body must be sent as 'Content-Type: application/json', without Content-Encoding.";
        Self::refused(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message)
    }

    pub(crate) fn draining() -> Self {
        let message = "The server is shutting down. Please retry.";
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", "draining", message);
        Self { retry_after: Some(DRAINING_RETRY_AFTER), ..error }.closing()
    }

    pub(crate) fn deadline_exceeded() -> Self {
        let message = "The request's deadline_ms passed before its answer began.";
        Self::refused(StatusCode::REQUEST_TIMEOUT, "deadline_exceeded", message).at("deadline_ms")
    }

    /// The reader of a stream let too much pile up, and was cancelled.
    pub(crate) fn read_too_slowly() -> Self {
        Self::refused(
            StatusCode::REQUEST_TIMEOUT,
            "client_too_slow",
            "The answer was read too slowly and was cancelled.",
        )
    }

    pub(crate) fn internal() -> Self {
        let message = "The server had an error while processing your request.";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "internal_error", message)
    }

    pub(crate) fn model_failed() -> Self {
        let message = "The model failed while processing your request.";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "model_error", message)
    }

    /// What went wrong with a text at `param`.
    pub(crate) fn text(error: &TextError, param: &str) -> Self {
        Self::invalid(param, "invalid_value", capitalised(&error.to_string()))
    }

    /// What the engine answered; `prompt_param` is what the endpoint calls its prompt.
    pub(crate) fn submission(error: SubmitError, prompt_param: &str) -> Self {
        match error {
            SubmitError::QueueFull { retry_after } => {
                let message = "The server has too many requests waiting. Please retry later.";
                let error = Self::new(
                    StatusCode::TOO_MANY_REQUESTS,
                    "rate_limit_error",
                    "rate_limit_exceeded",
                    message,
                );
                Self { retry_after: Some(retry_after), ..error }
            }
            SubmitError::Draining => Self::draining(),
            SubmitError::Stopped => {
                let message = "The engine has stopped; the server must be restarted.";
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", "engine_stopped", message)
            }
            SubmitError::Invalid { field, message } => {
                let param = if field == "prompt" { prompt_param } else { field };
                Self::invalid(param, "invalid_value", format!("Invalid '{param}': {message}."))
            }
        }
    }

    /// 400: there is no such response to go on from, or it is another key's.
    pub(crate) fn previous_response_not_found(id: &str) -> Self {
        let message = format!("Previous response with id {} not found.", quoted(id));
        Self::invalid("previous_response_id", "previous_response_not_found", message)
    }

    /// 404: there is no such response, or it is another key's.
    pub(crate) fn response_not_found(id: &str) -> Self {
        let message = format!("Response with id {} not found.", quoted(id));
        Self::refused(StatusCode::NOT_FOUND, "response_not_found", message).at("id")
    }

    /// 400: only what runs in the background can be cancelled as OpenAI does it, and nothing does.
    pub(crate) fn response_not_cancellable() -> Self {
        let message = "Cannot cancel a synchronous response. POST /v1/cancel/{id} ends one under way.";
        Self::invalid("id", "response_not_cancellable", message)
    }

    /// Speaks of the field as the endpoint calls it, where its words were translated into a chat's.
    pub(crate) fn renamed(mut self, name: impl FnOnce(&str) -> String) -> Self {
        if let Some(old) = self.body.param.take() {
            let new = name(&old);
            self.body.message = self.body.message.replace(&format!("'{old}'"), &format!("'{new}'"));
            self.body.param = Some(new);
        }
        self
    }

    /// 429: the request's grammar did not get its turn.
    pub(crate) fn too_many_grammars() -> Self {
        let message = "The server is compiling too many grammars. Please retry later.";
        let error =
            Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "rate_limit_exceeded", message);
        Self { retry_after: Some(DRAINING_RETRY_AFTER), ..error }
    }

    /// Names the field that is wrong, by its path in the JSON body.
    pub(crate) fn at(mut self, param: impl Into<String>) -> Self {
        self.body.param = Some(param.into());
        self
    }

    fn closing(self) -> Self {
        Self { closes_connection: true, ..self }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(ErrorEnvelope { error: &self.body })).into_response();
        response.extensions_mut().insert(self.body);
        let headers = response.headers_mut();
        if let Some(after) = self.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(after.as_secs_f64().ceil().max(1.0) as u64));
        }
        if self.closes_connection {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// A client's words in quotation marks, shortened, and safe to print anywhere.
pub(crate) fn quoted(text: &str) -> String {
    let shown: String = text.chars().take(MAX_QUOTED_CHARS).flat_map(char::escape_default).collect();
    let ellipsis = if text.chars().nth(MAX_QUOTED_CHARS).is_some() { "..." } else { "" };
    format!("'{shown}{ellipsis}'")
}

fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}
