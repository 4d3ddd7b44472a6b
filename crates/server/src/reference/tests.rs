//! The reference against the server: its routes, and what its handlers take.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use engine::{Clock, Engine, EngineConfig, FakeRunner};
use http_body_util::BodyExt;
use model::RunnerLimits;
use serde_json::Value;
use tower::ServiceExt;

use super::document;
use crate::api::record::{self, Kind};
use crate::config::ServerConfig;
use crate::state::AppState;
use crate::text::model::{TextFiles, TextModel};

fn state() -> AppState {
    let file = |name: &str| {
        let (_, contents) = demo::files().iter().find(|(file, _)| *file == name).expect("the demo has it");
        contents.to_vec()
    };
    let files = TextFiles {
        tokenizer_json: file("tokenizer.json"),
        tokenizer_config_json: Some(file("tokenizer_config.json")),
        chat_template: None,
        generation_config_json: Some(file("generation_config.json")),
    };
    let limits = RunnerLimits {
        vocab_size: 1536,
        max_model_len: 512,
        num_layers: 2,
        num_experts: 8,
        top_k: 2,
        block_size: 16,
        num_blocks: 257,
        max_num_batched_tokens: 256,
        max_num_seqs: 32,
        max_num_logits: 256,
    };
    let started = Instant::now();
    let clock: Clock = Arc::new(move || started.elapsed());
    let runner = FakeRunner::new(limits);
    let (engine, _thread) = Engine::spawn(Box::new(runner), EngineConfig::default(), Arc::clone(&clock));
    let text = TextModel::new(&files).unwrap();
    AppState::new(ServerConfig::default(), text, engine, clock).unwrap()
}

/// The document as clients read it.
fn described(state: &AppState) -> Value {
    serde_json::to_value(document(state)).unwrap()
}

/// The bodies' schemas by path.
fn bodies(document: &Value) -> Vec<(String, Value)> {
    let paths = document["paths"].as_object().unwrap().iter();
    let body = |item: &Value| item["post"]["requestBody"]["content"]["application/json"]["schema"].clone();
    paths.map(|(path, item)| (path.clone(), body(item))).filter(|(_, body)| !body.is_null()).collect()
}

#[test]
fn every_route_is_described_and_no_other() {
    let mut routes = BTreeSet::new();
    for route in include_str!("../app.rs").split(".route(").skip(1) {
        let (path, methods) = route.trim_start().trim_start_matches('"').split_once('"').unwrap();
        let methods = methods.split("\n        .").next().unwrap();
        let path = path.replace("{*", "{");
        for method in ["get", "post", "delete"] {
            if methods.contains(&format!("{method}(")) {
                routes.insert((path.clone(), method.to_owned()));
            }
        }
    }
    let document = described(&state());
    let items = document["paths"].as_object().unwrap().iter();
    let methods = |(path, item): (&String, &Value)| {
        let methods = item.as_object().unwrap().keys();
        methods.map(|method| (path.clone(), method.clone())).collect::<Vec<_>>()
    };
    assert_eq!(items.flat_map(methods).collect::<BTreeSet<_>>(), routes);
}

/// Every field of a schema by its path, arrays at their first place.
fn fields(schema: &Value, path: &str, found: &mut BTreeMap<String, Value>) {
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        found.insert(path.clone(), field.clone());
        fields_within(field, &path, found);
    }
}

fn fields_within(field: &Value, path: &str, found: &mut BTreeMap<String, Value>) {
    fields(field, path, found);
    if !field["items"].is_null() {
        fields_within(&field["items"], &format!("{path}[0]"), found);
    }
    let variants = field["oneOf"].as_array().into_iter().flatten();
    variants.for_each(|variant| fields_within(variant, path, found));
}

/// A path with every index 0.
fn at_first(path: &str) -> String {
    let mut parts = path.split('[');
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |path, part| format!("{path}[0]{}", part.split_once(']').map_or("", |(_, rest)| rest)))
}

/// Whether a schema says what the handler takes.
fn agrees(schema: &Value, kind: Kind) -> bool {
    let is = |name: &str| match schema["oneOf"].as_array() {
        Some(variants) => variants.iter().all(|variant| variant["type"] == name),
        None => schema["type"] == name,
    };
    let within = |min: f64, max: f64| {
        schema["minimum"].as_f64() == Some(min) && schema["maximum"].as_f64() == Some(max)
    };
    match kind {
        Kind::Any => true,
        Kind::Boolean => is("boolean"),
        Kind::Integer(min, max) => is("integer") && within(min as f64, max as f64),
        Kind::Number(min, max) => is("number") && within(min, max),
        Kind::String => is("string"),
        Kind::Object => is("object"),
        Kind::List(max_len) => is("array") && schema["maxItems"] == max_len,
    }
}

#[tokio::test]
async fn handlers_accept_the_examples_and_take_what_is_described() {
    let state = state();
    let bodies = bodies(&described(&state));
    assert_eq!(bodies.len(), 8);
    for (path, schema) in bodies {
        let mut described = BTreeMap::new();
        fields(&schema, "", &mut described);
        let mut taken = BTreeSet::new();
        for example in schema["examples"].as_array().unwrap() {
            record::open();
            let request = Request::post(&path).header("content-type", "application/json");
            let request = request.body(Body::from(example.to_string())).unwrap();
            let response = crate::app(state.clone()).oneshot(request).await.unwrap();
            let status = response.status();
            let body = response.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(status, StatusCode::OK, "{path} {example}: {}", String::from_utf8_lossy(&body));
            for (name, kind) in record::taken() {
                let name = at_first(&name);
                let schema = described.get(&name).unwrap_or_else(|| panic!("{path} takes {name} unsaid"));
                assert!(agrees(schema, kind), "{path} {name} is taken as {kind:?}: {schema}");
                taken.insert(name);
            }
        }
        let untaken: Vec<&String> = described.keys().filter(|name| !taken.contains(*name)).collect();
        assert!(untaken.is_empty(), "{path} does not take {untaken:?}");
    }
}

#[test]
fn the_readme_names_the_parameters_and_endpoints_that_are_described() {
    let readme = include_str!("../../../../README.md");
    let document = described(&state());
    for path in document["paths"].as_object().unwrap().keys() {
        assert!(readme.contains(&format!("{path}`")), "{path} is not in README.md");
    }
    for (path, column) in [("/v1/chat/completions", 2), ("/v1/completions", 3)] {
        // | `name` | ✓ or nothing, for a chat | the same for a completion | values |
        let rows = readme.lines().filter(|line| line.starts_with("| `"));
        let cells = rows.map(|row| row.split('|').map(str::trim).collect::<Vec<_>>());
        let ticked = cells.filter(|cells| cells.len() == 6 && cells[column] == "✓");
        let ticked: BTreeSet<&str> = ticked.map(|cells| cells[1].trim_matches('`')).collect();
        let bodies = bodies(&document);
        let (_, schema) = bodies.iter().find(|(of, _)| of == path).unwrap();
        let described: BTreeSet<&str> =
            schema["properties"].as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(ticked, described, "{path}");
    }
}
