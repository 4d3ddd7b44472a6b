//! Every route, with what it takes.

use axum::http::Method;
use serde_json::Value;
use utoipa::openapi::content::ContentBuilder;
use utoipa::openapi::path::{HttpMethod, OperationBuilder, ParameterBuilder, ParameterIn, PathItem};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::{Paths, PathsBuilder, Required, ResponseBuilder};

use super::schema::{Named, closed, integer, string, word};
use super::{bodies, examples};
use crate::api::responses::stored::MAX_LIMIT;
use crate::state::AppState;

struct Body {
    fields: Vec<Named>,
    required: &'static [&'static str],
    examples: Vec<Value>,
}

pub(super) fn paths(state: &AppState) -> Paths {
    let mut paths = PathsBuilder::new();
    for (method, path, about, body) in operations(state) {
        let method = if method == Method::POST {
            HttpMethod::Post
        } else if method == Method::DELETE {
            HttpMethod::Delete
        } else {
            HttpMethod::Get
        };
        paths = paths.path(path, PathItem::new(method, operation(state, path, about, body)));
    }
    paths.build()
}

/// Each route with its method and what it does.
fn operations(state: &AppState) -> Vec<(Method, &'static str, &'static str, Option<Body>)> {
    let body = |fields, required, examples| Some(Body { fields, required, examples });
    let (get, post, delete) = (Method::GET, Method::POST, Method::DELETE);
    let chat = body(bodies::chat(state), &["messages"], examples::chat());
    let completion = body(bodies::completion(state), &["prompt"], examples::completion());
    let response = body(bodies::response(state), &["input"], examples::response());
    let message = body(bodies::message(state), &["messages", "max_tokens"], examples::message());
    let count = body(bodies::message_count(state), &["messages"], examples::message_count());
    let analysis = body(bodies::analysis(state), &[], examples::analysis());
    let tokenize = body(bodies::tokenize(state), &[], examples::tokenize());
    let detokenize = body(bodies::detokenize(state), &["tokens"], examples::detokenize());
    vec![
        (post.clone(), "/v1/chat/completions", "Answers a conversation, whole or streamed", chat),
        (post.clone(), "/v1/completions", "Continues text or token ids, whole or streamed", completion),
        (post.clone(), "/v1/responses", "Answers items with items, whole or streamed", response),
        (get.clone(), "/v1/responses/{id}", "Gives a kept response again", None),
        (delete, "/v1/responses/{id}", "Forgets a response", None),
        (get.clone(), "/v1/responses/{id}/input_items", "Pages through what a response answered", None),
        (post.clone(), "/v1/responses/{id}/cancel", "Says why a response cannot be cancelled", None),
        (post.clone(), "/v1/messages", "Answers a conversation in Anthropic's form", message),
        (post.clone(), "/v1/messages/count_tokens", "Counts what a conversation sends to the model", count),
        (post.clone(), "/v1/routing/analyze", "Says how the routers take given texts", analysis),
        (post.clone(), "/v1/cancel/{id}", "Ends an answer under way; its reader gets what there is", None),
        (get.clone(), "/v1/models", "Lists the served model", None),
        (get.clone(), "/v1/models/{id}", "Describes the served model", None),
        (post.clone(), "/tokenize", "Text or a conversation to token ids", tokenize),
        (post, "/detokenize", "Token ids to text", detokenize),
        (get.clone(), "/livez", "Whether the engine steps when it has work", None),
        (get.clone(), "/readyz", "Whether new requests are welcome", None),
        (get.clone(), "/health", "As /livez", None),
        (get.clone(), "/metrics", "Metrics for Prometheus", None),
        (get.clone(), "/version", "The version", None),
        (get.clone(), "/openapi.json", "This description", None),
        (get, "/docs", "This description as a page", None),
    ]
}

fn operation(state: &AppState, path: &str, about: &str, body: Option<Body>) -> OperationBuilder {
    let mut operation = OperationBuilder::new()
        .summary(Some(about))
        .response("200", ResponseBuilder::new().description("The answer"))
        .response("4XX", ResponseBuilder::new().description("`error` says what is wrong, and where"));
    if path.contains("{id}") {
        let id = ParameterBuilder::new().name("id").parameter_in(ParameterIn::Path).required(Required::True);
        let of = if path.contains("models") {
            word(&[&state.config.model_name], "The served model")
        } else {
            string("An answer's id")
        };
        operation = operation.parameter(id.schema(Some(of)));
    }
    if path.ends_with("input_items") {
        let queries = [
            ("order", word(&["asc", "desc"], "Default: desc")),
            ("limit", integer(1..=MAX_LIMIT as i64, "Items of a page")),
            ("after", string("An item's id")),
        ];
        for (name, of) in queries {
            let query = ParameterBuilder::new().name(name).parameter_in(ParameterIn::Query);
            operation = operation.parameter(query.schema(Some(of)));
        }
    }
    let Some(body) = body else { return operation };
    let schema = closed(about, body.fields).examples(body.examples);
    let schema = body.required.iter().fold(schema, |schema, name| schema.required(*name));
    let content = ContentBuilder::new().schema(Some(schema)).build();
    let request = RequestBodyBuilder::new().content("application/json", content);
    operation.request_body(Some(request.required(Some(Required::True)).build()))
}
