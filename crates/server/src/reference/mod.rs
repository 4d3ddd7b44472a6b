//! The API's description of itself: `GET /openapi.json` (OpenAPI 3.1), and `GET /docs`, a page that shows it.
//!
//! Handlers take their fields one by one and are not generated from this; the tests here send every example
//! through the server, note what the handlers take, and compare names, types and ranges both ways. Answers are
//! not described field by field: OpenAI's and Anthropic's own references are.

mod bodies;
mod examples;
mod operations;
mod schema;
#[cfg(test)]
mod tests;

use axum::Json;
use axum::extract::State;
use axum::response::Html;
use utoipa::openapi::{InfoBuilder, LicenseBuilder, OpenApi, OpenApiBuilder};

use crate::state::AppState;

/// Describes the API with the limits of this very server.
pub(crate) async fn openapi(State(state): State<AppState>) -> Json<OpenApi> {
    Json(document(&state))
}

/// Shows the description to people.
pub(crate) async fn docs() -> Html<&'static str> {
    Html(include_str!("docs.html"))
}

fn document(state: &AppState) -> OpenApi {
    let license = LicenseBuilder::new().name("Apache-2.0").build();
    let info = InfoBuilder::new()
        .title("Windrose")
        .version(&state.config.version)
        .description(Some("OpenAI's API, and Anthropic's messages, in front of one Mixtral-family model."))
        .license(Some(license))
        .build();
    OpenApiBuilder::new().info(info).paths(operations::paths(state)).build()
}
