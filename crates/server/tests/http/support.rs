//! A server to test, and answers that are easy to look into.

use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use engine::{Clock, Engine, EngineConfig, EngineHandle, FakeRunner};
use http_body_util::BodyExt;
use model::RunnerLimits;
use serde_json::{Value, json};
use server::{AppState, ServerConfig, TextFiles, TextModel};
use tokenizers::Tokenizer;
use tower::ServiceExt;

pub(crate) const EOS: u32 = 2;
/// Longest sequence of the fake model.
pub(crate) const MAX_MODEL_LEN: usize = 512;

/// The demo model's tokenizer, as Hugging Face uses it.
pub(crate) static TOKENIZER: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::from_bytes(demo_file("tokenizer.json")).expect("the demo's tokenizer loads"));

fn demo_file(name: &str) -> &'static [u8] {
    demo::files().iter().find(|(file, _)| *file == name).expect("the demo has this file").1
}

/// The ids of a text that stands on its own, without a start token.
pub(crate) fn ids(text: &str) -> Vec<u32> {
    TOKENIZER.encode_fast(text, false).expect("the demo's tokenizer encodes").get_ids().to_vec()
}

/// A script that says `text` and ends.
pub(crate) fn say(text: &str) -> Vec<u32> {
    [ids(text), vec![EOS]].concat()
}

pub(crate) fn limits() -> RunnerLimits {
    RunnerLimits {
        vocab_size: TOKENIZER.get_vocab_size(true),
        max_model_len: MAX_MODEL_LEN,
        num_layers: 2,
        num_experts: 8,
        top_k: 2,
        block_size: 16,
        num_blocks: 257,
        max_num_batched_tokens: 256,
        max_num_seqs: 32,
        max_num_logits: 256,
    }
}

/// A model that says `script`.
pub(crate) fn scripted(script: Vec<u32>) -> FakeRunner {
    FakeRunner::new(limits()).with_script(script)
}

/// A model that takes its time, and does not end by itself.
pub(crate) fn slow() -> FakeRunner {
    scripted(ids(&"one two three ".repeat(30))).with_step_time(Duration::from_millis(10))
}

pub(crate) struct Server {
    pub(crate) app: Router,
    pub(crate) state: AppState,
    pub(crate) engine: EngineHandle,
}

/// A server over `runner` with everything else at its default.
pub(crate) fn server(runner: FakeRunner) -> Server {
    server_with(runner, ServerConfig::default(), EngineConfig::default())
}

pub(crate) fn config() -> ServerConfig {
    ServerConfig { model_name: "demo".into(), ..ServerConfig::default() }
}

pub(crate) fn server_with(runner: FakeRunner, config: ServerConfig, engine_config: EngineConfig) -> Server {
    let files = TextFiles {
        tokenizer_json: demo_file("tokenizer.json").to_vec(),
        tokenizer_config_json: Some(demo_file("tokenizer_config.json").to_vec()),
        chat_template: None,
        generation_config_json: Some(demo_file("generation_config.json").to_vec()),
    };
    let text = TextModel::new(&files).expect("the demo's text files load");
    let started = Instant::now();
    let clock: Clock = Arc::new(move || started.elapsed());
    let (engine, _thread) = Engine::spawn(Box::new(runner), engine_config, Arc::clone(&clock));
    let state = AppState::new(config, text, engine.clone(), clock).expect("the state is sound");
    Server { app: server::app(state.clone()), state, engine }
}

/// An answer, whole.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

impl Answer {
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The events of a stream, each with its data; checks the framing.
    #[track_caller]
    pub(crate) fn events(&self) -> Vec<String> {
        assert_eq!(self.headers["content-type"], "text/event-stream");
        let events = self.body.split_terminator("\n\n").filter(|event| !event.starts_with(':'));
        events.map(|event| event.strip_prefix("data: ").expect("an event is data").to_owned()).collect()
    }

    /// The chunks of a complete stream.
    #[track_caller]
    pub(crate) fn chunks(&self) -> Vec<Value> {
        let mut events = self.events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"), "{}", self.body);
        events.iter().map(|event| serde_json::from_str(event).expect("a chunk is JSON")).collect()
    }

    /// The error's `param` and `code`.
    #[track_caller]
    pub(crate) fn error(&self) -> (Value, Value) {
        let error = self.json()["error"].clone();
        assert!(error["message"].is_string() && error["type"].is_string(), "{error}");
        (error["param"].clone(), error["code"].clone())
    }
}

impl Server {
    pub(crate) async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.app.clone().oneshot(request).await.expect("a service never fails");
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.expect("a body arrives").to_bytes();
        let body = String::from_utf8(bytes.to_vec()).expect("a body is UTF-8");
        Answer { status: parts.status, headers: parts.headers, body }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).body(Body::empty()).unwrap()).await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Answer {
        self.send(post_request(path, body.to_string())).await
    }

    pub(crate) async fn chat(&self, body: Value) -> Answer {
        self.post(
            "/v1/chat/completions",
            with(json!({"messages": [{"role": "user", "content": "hi"}]}), body),
        )
        .await
    }

    pub(crate) async fn complete(&self, body: Value) -> Answer {
        self.post("/v1/completions", with(json!({"prompt": "hi", "temperature": 0}), body)).await
    }

    /// The ids that `/tokenize` gives.
    pub(crate) async fn tokenize(&self, body: Value) -> Vec<u32> {
        let answer = self.post("/tokenize", body).await;
        serde_json::from_value(answer.json()["tokens"].clone()).unwrap_or_else(|_| panic!("{}", answer.body))
    }

    /// Waits until the engine holds nothing.
    pub(crate) async fn idle(&self) {
        wait_until("the engine is idle", || {
            let stats = self.engine.stats();
            stats.num_running == 0 && stats.num_waiting == 0 && stats.num_free_blocks == stats.num_blocks
        })
        .await;
    }
}

pub(crate) fn post_request(path: &str, body: String) -> Request<Body> {
    Request::post(path).header("content-type", "application/json").body(Body::from(body)).unwrap()
}

/// `body` with the fields of `changes` over it.
pub(crate) fn with(mut body: Value, changes: Value) -> Value {
    let Value::Object(changes) = changes else { panic!("changes are fields") };
    body.as_object_mut().expect("a body is an object").extend(changes);
    body
}

/// Waits for something observable, and fails if it does not come within ten seconds.
pub(crate) async fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < Duration::from_secs(10), "not within 10 s: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// The content of a streamed chat's choice, appended up.
pub(crate) fn content(chunks: &[Value], index: usize) -> String {
    let choices = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap());
    let of_choice = choices.filter(|choice| choice["index"] == index);
    of_choice.filter_map(|choice| choice["delta"]["content"].as_str().or(choice["text"].as_str())).collect()
}
