//! `windrose bench serve` as people call it, against the real server with the demo model, and against servers that
//! say what a test tells them to.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};

fn bench_serve(url: &str, arguments: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_windrose"));
    command.args(["bench", "serve", "--url", url, "--json", "-"]).env_remove("OPENAI_API_KEY");
    command.args(arguments.split_whitespace()).output().unwrap()
}

#[track_caller]
fn report(output: &Output) -> Value {
    let log = String::from_utf8_lossy(&output.stderr);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {log}"))
}

#[track_caller]
fn assert_positive(report: &Value, figures: &[&str]) {
    for figure in figures {
        let value = report.pointer(figure).and_then(Value::as_f64).unwrap_or(f64::NAN);
        assert!(value > 0.0 && value.is_finite(), "{figure} is {value} in {report}");
    }
}

const LATENCIES: [&str; 6] =
    ["/ttft_ms/mean", "/ttft_ms/p99", "/itl_ms/p50", "/tpot_ms/p90", "/end_to_end_ms/mean", "/duration_s"];
const RATES: [&str; 3] = ["/requests_per_s", "/output_tokens_per_s", "/total_tokens_per_s"];

/// `windrose serve` on a free port.
struct Server {
    process: Child,
    url: String,
    /// Open as long as the server lives, or its next word would end it.
    _stdout: BufReader<ChildStdout>,
}

impl Server {
    fn start() -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_windrose"));
        command.args(["serve", "--port", "0", "--threads", "2"]).env("WINDROSE_API_KEYS", "secret");
        let mut process = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut stdout = BufReader::new(process.stdout.take().unwrap());
        let mut banner = String::new();
        stdout.read_line(&mut banner).unwrap();
        let url = banner.split_whitespace().last().unwrap().to_owned();
        assert!(url.starts_with("http://127.0.0.1:"), "{banner}");
        Self { process, url, _stdout: stdout }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

#[test]
fn the_real_server_answers_every_request_in_full() {
    let server = Server::start();
    let load = "--api-key secret --num-requests 6 --concurrency 3 --prompt-len 40 --output-len 12";
    for endpoint in ["chat", "completions"] {
        let output = bench_serve(&server.url, &format!("{load} --endpoint {endpoint}"));
        let report = report(&output);
        assert!(output.status.success());
        assert_eq!((&report["num_ok"], &report["num_failed"]), (&json!(6), &json!(0)), "{report}");
        assert_eq!(report["num_output_tokens"], 6 * 12, "{endpoint} ignores the end");
        assert_eq!(report["load"]["model"], "windrose-demo");
        assert_eq!(report["load"]["prompt_unit"], "tokens", "this server has /tokenize");
        assert_positive(&report, &LATENCIES);
        assert_positive(&report, &RATES);
        // Words are only nearly as many tokens as on average, and a template adds its own.
        let tokens_per_prompt = report["num_prompt_tokens"].as_f64().unwrap() / 6.0;
        assert!((30.0..60.0).contains(&tokens_per_prompt), "{endpoint}: {tokens_per_prompt}");
    }
}

#[test]
fn a_key_that_the_server_refuses_is_told_in_its_words() {
    let server = Server::start();
    let output = bench_serve(&server.url, "--num-requests 1");
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && log.contains("401"), "{log}");
}

/// Serves `answer` to the completions asked of it, numbered from 0, from a thread that lives as long as the test.
fn canned(answer: fn(usize, &HeaderMap) -> Response) -> String {
    let (address_sender, address) = std::sync::mpsc::channel::<SocketAddr>();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            address_sender.send(listener.local_addr().unwrap()).unwrap();
            let num_asked = Arc::new(AtomicUsize::new(0));
            let chat =
                async move |headers: HeaderMap| answer(num_asked.fetch_add(1, Ordering::Relaxed), &headers);
            let app = Router::new()
                .route("/v1/models", get(async || axum::Json(json!({"data": [{"id": "canned"}]}))))
                .route("/v1/chat/completions", post(chat));
            axum::serve(listener, app).await.unwrap();
        });
    });
    format!("http://{}/v1", address.recv().unwrap())
}

fn events(body: &'static str) -> Response {
    ([(header::CONTENT_TYPE, "text/event-stream")], Body::from(body)).into_response()
}

fn error(status: StatusCode, message: &str) -> Response {
    (status, axum::Json(json!({"error": {"message": message}}))).into_response()
}

const ANSWER: &str = ": keep-alive\n\n\
    data: {\"choices\": [{\"delta\": {\"role\": \"assistant\", \"content\": \"\"}}]}\r\n\r\n\
    data: {\"choices\": [{\"delta\": {\"content\": \"Hello\"}}]}\n\n: keep-alive\n\n\
    data: {\"choices\": [{\"delta\": {\"content\": \" there\"}}]}\n\n\
    data: {\"choices\": [], \"usage\": {\"prompt_tokens\": 9, \"completion_tokens\": 5}}\n\n\
    data: [DONE]\n\n";

#[test]
fn tokens_are_counted_by_the_server_and_words_measure_prompts_without_tokenize() {
    let url = canned(|_, _| events(ANSWER));
    let output = bench_serve(&url, "--num-requests 4 --request-rate 1000 --warmup 2");
    let report = report(&output);
    assert!(output.status.success());
    assert_eq!(report["num_ok"], 4);
    assert_eq!((&report["num_prompt_tokens"], &report["num_output_tokens"]), (&json!(36), &json!(20)));
    assert_eq!(
        (&report["load"]["model"], &report["load"]["prompt_unit"]),
        (&json!("canned"), &json!("words"))
    );
    assert_eq!(
        (&report["load"]["concurrency"], &report["load"]["request_rate"]),
        (&json!(null), &json!(1000.0))
    );
    assert_positive(&report, &RATES);
}

/// One request of four succeeds; the others fail in three ways.
fn one_of_four(index: usize, _: &HeaderMap) -> Response {
    match index % 4 {
        0 => events(ANSWER),
        1 => error(StatusCode::TOO_MANY_REQUESTS, "the queue is full"),
        2 => events("data: {\"error\": {\"message\": \"the engine stopped\"}}\n\n"),
        _ => events("data: {\"choices\": [{\"delta\": {\"content\": \"Hel\"}}]}\n\ndata: {\"choi"),
    }
}

#[test]
fn failures_are_counted_by_message_and_do_not_hide_the_answers() {
    let output = bench_serve(&canned(one_of_four), "--num-requests 8 --warmup 0 --concurrency 1");
    let report = report(&output);
    assert!(output.status.success(), "some requests succeeded");
    assert_eq!((&report["num_ok"], &report["num_failed"]), (&json!(2), &json!(6)));
    let expected = json!([
        {"message": "429 Too Many Requests: the queue is full", "count": 2},
        {"message": "error in the stream: the engine stopped", "count": 2},
        {"message": "the stream ended without [DONE]", "count": 2},
    ]);
    assert_eq!(report["errors"], expected);
    let table = String::from_utf8_lossy(&output.stderr);
    assert!(table.contains("2 failed: 429 Too Many Requests: the queue is full"), "{table}");
}

#[test]
fn the_status_is_a_failure_if_every_request_failed() {
    let url = canned(|_, _| error(StatusCode::SERVICE_UNAVAILABLE, "no capacity"));
    let output = bench_serve(&url, "--num-requests 3 --warmup 0");
    assert!(!output.status.success());
    assert_eq!(report(&output)["num_failed"], 3);
}

#[test]
fn the_key_is_sent_as_a_bearer_token() {
    let url = canned(|_, headers| match headers.get(header::AUTHORIZATION) {
        Some(key) if key == "Bearer from-the-environment" => events(ANSWER),
        key => error(StatusCode::UNAUTHORIZED, &format!("{key:?}")),
    });
    let mut command = Command::new(env!("CARGO_BIN_EXE_windrose"));
    command.args(["bench", "serve", "--url", &url, "--num-requests", "1", "--warmup", "0"]);
    let output = command.env("OPENAI_API_KEY", "from-the-environment").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 ok, 0 failed"));
}

#[test]
fn nobody_there_is_said_at_once() {
    let output = bench_serve("http://127.0.0.1:1", "");
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && log.contains("cannot ask http://127.0.0.1:1"), "{log}");
}
