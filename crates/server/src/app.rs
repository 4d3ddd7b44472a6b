//! The routes, and the layers around them, from the outside in:
//!
//! ```text
//! request id ─► CORS ─► Anthropic's errors ─► API key ─► HTTP metrics ─► panics caught ─► shutting down? ─► route
//! ```

use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE};
use axum::http::{HeaderName, HeaderValue, Method};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowOrigin, CorsLayer};

use crate::api::{anthropic, cancel, chat, completions, models, responses, routing_analysis, tokenize};
use crate::error::ApiError;
use crate::lifecycle::Phase;
use crate::state::AppState;
use crate::{auth, health, reference, request_id};

/// The whole server as a service, without a socket.
pub fn app(state: AppState) -> Router {
    let generating = Router::new()
        .route("/v1/chat/completions", post(chat::chat_completions))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/routing/analyze", post(routing_analysis::analyze))
        .route("/v1/responses", post(responses::create))
        .route("/v1/messages", post(anthropic::messages))
        .route("/v1/messages/count_tokens", post(anthropic::count_tokens))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route_layer(from_fn_with_state(state.clone(), refuse_while_draining));
    let router = Router::new()
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::get))
        .route("/v1/responses/{id}", get(responses::stored::get).delete(responses::stored::delete))
        .route("/v1/responses/{id}/input_items", get(responses::stored::input_items))
        .route("/v1/responses/{id}/cancel", post(responses::stored::cancel))
        .route("/v1/cancel/{id}", post(cancel::cancel))
        .route("/openapi.json", get(reference::openapi))
        .route("/docs", get(reference::docs))
        .route("/livez", get(health::live))
        .route("/readyz", get(health::ready))
        .route("/health", get(health::live))
        .route("/version", get(health::version))
        .route("/metrics", get(metrics))
        .merge(generating)
        .fallback(unknown_route)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(CatchPanicLayer::custom(|_| ApiError::internal().into_response()))
        .layer(from_fn_with_state(state.clone(), count_request))
        .layer(from_fn_with_state(state.clone(), auth::authenticate));
    let router = router.layer(from_fn(anthropic::error::reword));
    let origins = &state.config.cors_allowed_origins;
    let router = if origins.is_empty() { router } else { router.layer(cors(origins)) };
    router.layer(from_fn(request_id::identify)).with_state(state)
}

async fn metrics(State(state): State<AppState>) -> Result<Response, ApiError> {
    let page = state.metrics.render(&state.engine.stats()).map_err(|_| ApiError::internal())?;
    Ok(([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], page).into_response())
}

async fn unknown_route(request: Request) -> ApiError {
    ApiError::unknown_route(request.method().as_str(), request.uri().path())
}

async fn method_not_allowed(request: Request) -> ApiError {
    ApiError::method_not_allowed(request.method().as_str(), request.uri().path())
}

async fn refuse_while_draining(
    State(state): State<AppState>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    match state.lifecycle.phase() {
        Phase::Serving | Phase::Leaving => Ok(next.run(request).await),
        Phase::Draining => Err(ApiError::draining()),
    }
}

/// Counts by route and never by path, so that no client can make up series.
async fn count_request(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let route =
        request.extensions().get::<MatchedPath>().map_or("other".to_owned(), |path| path.as_str().to_owned());
    let method = known_method(request.method());
    let response = next.run(request).await;
    state
        .metrics
        .http_requests
        .with_label_values(&[route.as_str(), method, response.status().as_str()])
        .inc();
    response
}

fn known_method(method: &Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "POST" => "POST",
        "DELETE" => "DELETE",
        "HEAD" => "HEAD",
        "OPTIONS" => "OPTIONS",
        _ => "other",
    }
}

/// Lets pages of these origins call the API, without cookies.
fn cors(origins: &[String]) -> CorsLayer {
    let any = origins.iter().any(|origin| origin == "*");
    let listed = origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok());
    let request_id = HeaderName::from_static("x-request-id");
    let api_key = HeaderName::from_static("x-api-key");
    CorsLayer::new()
        .allow_origin(if any { AllowOrigin::any() } else { AllowOrigin::list(listed) })
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        .allow_headers([AUTHORIZATION, CONTENT_TYPE, api_key, request_id.clone()])
        .expose_headers([request_id])
}
