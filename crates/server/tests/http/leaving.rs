//! Clients that leave, engines that fail, and the server's own way out.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use engine::{EngineConfig, FakeRunner};
use http_body_util::BodyExt;
use model::RunnerLimits;
use serde_json::json;
use server::{Leave, ServerConfig, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tower::ServiceExt;

use crate::support::{
    Server, config, limits, post_request, say, scripted, server, server_with, slow, wait_until,
};

const CHAT: &str =
    r#"{"messages": [{"role": "user", "content": "hi"}], "stream": true, "ignore_eos": true, "n": 3}"#;

#[tokio::test]
async fn a_stream_that_is_dropped_frees_everything() {
    let server = server(slow());
    for _ in 0..20 {
        let response =
            server.app.clone().oneshot(post_request("/v1/chat/completions", CHAT.into())).await.unwrap();
        let mut body = response.into_body();
        body.frame().await.unwrap().unwrap();
    }
    server.idle().await;
    let stats = server.engine.stats();
    assert_eq!(stats.num_accepted, 60);
    let page = server.get("/metrics").await.body;
    let cancelled = page
        .lines()
        .find(|line| line.starts_with("windrose_requests_finished_total{finished_reason=\"cancelled\""));
    assert!(cancelled.is_some_and(|line| line.ends_with(" 60")), "{cancelled:?}");
}

#[tokio::test]
async fn a_whole_answer_that_nobody_waits_for_is_cancelled() {
    let server = server(slow());
    let body = CHAT.replace("\"stream\": true", "\"stream\": false");
    let answer = server.app.clone().oneshot(post_request("/v1/chat/completions", body));
    assert!(tokio::time::timeout(Duration::from_millis(100), answer).await.is_err());
    server.idle().await;
    assert_eq!(server.engine.stats().num_accepted, 3);
}

#[tokio::test]
async fn a_stream_that_nobody_reads_is_cancelled_and_says_so() {
    let fast = FakeRunner::new(RunnerLimits { max_model_len: 4000, ..limits() });
    let server = server(fast);
    let response = server
        .app
        .clone()
        .oneshot(post_request("/v1/chat/completions", CHAT.replace("\"n\": 3", "\"n\": 1")));
    let mut body = response.await.unwrap().into_body();
    body.frame().await.unwrap().unwrap();
    server.idle().await;
    let rest = body.collect().await.unwrap().to_bytes();
    let rest = String::from_utf8_lossy(&rest);
    assert!(rest.contains("client_too_slow") && !rest.contains("[DONE]"), "{}", &rest[rest.len() - 300..]);
}

#[tokio::test]
async fn a_response_under_way_is_known_to_the_url_that_cannot_cancel_it() {
    let server = server(slow());
    let body = json!({"input": "hi", "stream": true}).to_string();
    let response = server.app.clone().oneshot(post_request("/v1/responses", body)).await.unwrap();
    let mut stream = response.into_body();
    let first = stream.frame().await.unwrap().unwrap().into_data().unwrap();
    let first = String::from_utf8_lossy(&first).into_owned();
    let id = first.split("\"id\":\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap();
    let post = |path: String| server.send(post_request(&path, String::new()));
    let refused = post(format!("/v1/responses/{id}/cancel")).await;
    assert_eq!(refused.error().1, json!("response_not_cancellable"), "{first}");
    assert_eq!(post(format!("/v1/cancel/{id}")).await.json()["cancelled"], true);
    let rest = stream.collect().await.unwrap().to_bytes();
    assert!(String::from_utf8_lossy(&rest).contains("response.incomplete"));
}

#[tokio::test]
async fn a_deadline_cuts_an_answer_short() {
    let server = server(slow());
    let answer = server.chat(json!({"deadline_ms": 200, "ignore_eos": true})).await.json();
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    // A prompt of several steps: its deadline passes before its first token.
    let engine_config = EngineConfig { max_num_batched_tokens: 2, ..EngineConfig::default() };
    let server = server_with(slow(), config(), engine_config);
    let answer = server.chat(json!({"deadline_ms": 1})).await;
    assert_eq!((answer.status, answer.error().1), (StatusCode::REQUEST_TIMEOUT, json!("deadline_exceeded")));
}

#[tokio::test]
async fn a_failing_model_is_said_and_turns_the_server_red() {
    let failing = || server(scripted(say("one two three four")).with_device_failure_at(4));
    let server = failing();
    let answer = server.chat(json!({})).await;
    assert_eq!((answer.status, answer.error().1), (StatusCode::INTERNAL_SERVER_ERROR, json!("model_error")));
    let server = failing();
    let answer = server.chat(json!({"stream": true})).await;
    let events = answer.events();
    assert!(events.last().unwrap().starts_with("{\"error\":{"), "{events:?}");
    wait_until("the engine has stopped", || server.engine.stats().is_stopped).await;
    assert_eq!(server.get("/livez").await.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(server.get("/readyz").await.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(server.chat(json!({})).await.status, StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn a_panicking_model_is_an_answer_too() {
    let server = server(scripted(say("one two")).with_panic_at(2));
    let answer = server.chat(json!({})).await;
    assert!(answer.status.is_server_error(), "{}", answer.body);
    answer.error();
}

#[tokio::test]
async fn a_server_with_nothing_to_do_is_live_and_ready() {
    let config = ServerConfig { stall_timeout: Duration::ZERO, ..config() };
    let server = server_with(scripted(say("x")), config, EngineConfig::default());
    for path in ["/livez", "/readyz", "/health"] {
        assert_eq!(server.get(path).await.status, StatusCode::OK, "{path}");
    }
    assert_eq!(server.get("/version").await.json(), json!({"version": env!("CARGO_PKG_VERSION")}));
}

#[tokio::test]
async fn an_engine_that_has_work_and_takes_no_step_is_not_live() {
    let stalled = scripted(say("x")).with_step_time(Duration::from_secs(2));
    let config = ServerConfig { stall_timeout: Duration::from_millis(100), ..config() };
    let server = server_with(stalled, config, EngineConfig::default());
    let probe = async {
        while server.get("/livez").await.status == StatusCode::OK {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        _ = server.chat(json!({"max_tokens": 5})) => panic!("the answer came before the probe turned red"),
        () = probe => {}
    }
}

#[tokio::test]
async fn a_full_queue_is_not_ready() {
    let engine_config = EngineConfig { max_num_seqs: 1, max_queued_requests: 1, ..EngineConfig::default() };
    let server = server_with(slow(), config(), engine_config);
    let chats = futures_util::future::join_all((0..3).map(|_| server.chat(json!({"max_tokens": 30}))));
    let probe = async {
        while server.get("/readyz").await.status == StatusCode::OK {
            tokio::task::yield_now().await;
        }
        assert_eq!(server.get("/livez").await.status, StatusCode::OK);
    };
    tokio::join!(chats, probe);
}

/// A server on a socket, until told to leave.
struct Running {
    address: SocketAddr,
    leave: oneshot::Sender<()>,
    task: JoinHandle<std::io::Result<()>>,
}

async fn run(server: &Server) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (leave, left) = oneshot::channel();
    let shutdown = async {
        let _ = left.await;
        Leave::AfterGrace
    };
    Running { address, leave, task: tokio::spawn(serve(listener, server.state.clone(), shutdown)) }
}

/// Sends a request on a connection of its own, which the server is asked to close.
async fn open(address: SocketAddr, method: &str, path: &str, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head =
        format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json");
    let request = format!("{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    stream.write_all(request.as_bytes()).await.unwrap();
    stream
}

async fn rest(mut stream: TcpStream) -> String {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    String::from_utf8(bytes).unwrap()
}

async fn ask(address: SocketAddr, method: &str, path: &str, body: &str) -> String {
    rest(open(address, method, path, body).await).await
}

fn leaving_config(drain_grace: Duration, shutdown_timeout: Duration) -> ServerConfig {
    ServerConfig { drain_grace, shutdown_timeout, ..config() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaving_is_announced_then_refused_and_streams_finish() {
    let server = server_with(
        slow(),
        leaving_config(Duration::from_millis(500), Duration::from_secs(20)),
        EngineConfig::default(),
    );
    let running = run(&server).await;
    let chat = CHAT.replace("\"n\": 3", "\"max_tokens\": 120");
    let mut streaming = open(running.address, "POST", "/v1/chat/completions", &chat).await;
    let mut first = [0; 16];
    streaming.read_exact(&mut first).await.unwrap();
    assert!(ask(running.address, "GET", "/readyz", "").await.starts_with("HTTP/1.1 200"));

    running.leave.send(()).unwrap();
    while !ask(running.address, "GET", "/readyz", "").await.starts_with("HTTP/1.1 503") {}
    assert!(ask(running.address, "GET", "/livez", "").await.starts_with("HTTP/1.1 200"));
    let accepted =
        ask(running.address, "POST", "/v1/chat/completions", &CHAT.replace("\"n\": 3", "\"max_tokens\": 1"))
            .await;
    assert!(accepted.starts_with("HTTP/1.1 200"), "{accepted}");

    wait_until("the engine drains", || server.engine.stats().is_draining).await;
    let refused = ask(running.address, "POST", "/v1/chat/completions", CHAT).await.to_lowercase();
    assert!(refused.starts_with("http/1.1 503"), "{refused}");
    assert!(refused.contains("retry-after:") && refused.contains("connection: close"), "{refused}");
    let streamed = rest(streaming).await;
    assert!(streamed.contains("\"finish_reason\":\"length\"") && streamed.contains("[DONE]"), "{streamed}");
    running.task.await.unwrap().unwrap();
    assert!(TcpStream::connect(running.address).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_that_outlast_the_shutdown_timeout_are_ended_cleanly() {
    let server = server_with(
        slow(),
        leaving_config(Duration::ZERO, Duration::from_millis(100)),
        EngineConfig::default(),
    );
    let running = run(&server).await;
    let mut streaming = open(running.address, "POST", "/v1/chat/completions", CHAT).await;
    let mut first = [0; 16];
    streaming.read_exact(&mut first).await.unwrap();
    wait_until("tokens flow", || server.engine.stats().generation_tokens > 6).await;
    running.leave.send(()).unwrap();
    let started = Instant::now();
    running.task.await.unwrap().unwrap();
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    let streamed = rest(streaming).await;
    assert_eq!(streamed.matches("\"finish_reason\":\"length\"").count(), 3, "{streamed}");
    assert!(streamed.contains("[DONE]"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_heads_and_idle_connections_are_closed() {
    let config = ServerConfig {
        header_read_timeout: Duration::from_millis(200),
        drain_grace: Duration::ZERO,
        ..config()
    };
    let server = server_with(scripted(say("x")), config, EngineConfig::default());
    let running = run(&server).await;
    let mut half = TcpStream::connect(running.address).await.unwrap();
    half.write_all(b"POST /v1/completions HTTP/1.1\r\nHost:").await.unwrap();
    let mut idle = TcpStream::connect(running.address).await.unwrap();
    idle.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let both = tokio::time::timeout(Duration::from_secs(5), async { (rest(half).await, rest(idle).await) });
    let (_, idle) = both.await.expect("both connections are closed in time");
    assert!(idle.starts_with("HTTP/1.1 200"), "{idle}");
    running.leave.send(()).unwrap();
    running.task.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_bodies_and_huge_heads_are_refused() {
    let config =
        ServerConfig { body_read_timeout: Duration::from_millis(100), max_header_bytes: 8 << 10, ..config() };
    let server = server_with(scripted(say("x")), config, EngineConfig::default());
    let running = run(&server).await;
    let mut slow = TcpStream::connect(running.address).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{";
    slow.write_all(head.as_bytes()).await.unwrap();
    let answer = rest(slow).await;
    assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("request_timeout"), "{answer}");
    let mut huge = TcpStream::connect(running.address).await.unwrap();
    let head = format!("GET /livez HTTP/1.1\r\nHost: x\r\nX-Big: {}\r\n\r\n", "a".repeat(20_000));
    let _ = huge.write_all(head.as_bytes()).await;
    let mut answer = [0; 12];
    huge.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 431");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_hangs_up_frees_its_sequences() {
    let server = server(slow());
    let running = run(&server).await;
    for body in [CHAT.to_owned(), CHAT.replace("\"stream\": true", "\"stream\": false")] {
        let mut stream = open(running.address, "POST", "/v1/chat/completions", &body).await;
        if body.contains("\"stream\": true") {
            stream.read_exact(&mut [0; 16]).await.unwrap();
        }
        wait_until("the request runs", || server.engine.stats().num_running > 0).await;
        drop(stream);
        server.idle().await;
    }
}
