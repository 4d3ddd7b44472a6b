//! Everything that a client can do wrong, and what it is told.

use axum::body::Body;
use axum::http::{Request, StatusCode};
use engine::EngineConfig;
use serde_json::{Value, json};
use server::ServerConfig;

use crate::support::{config, post_request, say, scripted, server, server_with, slow, with};

fn chat_body() -> Value {
    json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2})
}

fn completion_body() -> Value {
    json!({"prompt": "hi", "max_tokens": 2})
}

#[tokio::test]
async fn wrong_fields_are_refused_by_path() {
    let server = server(scripted(say("x")));
    let user = |content: Value| json!([{"role": "user", "content": content}]);
    let call =
        |call: Value| json!([{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [call]}]);
    for (changes, param, code) in [
        (json!({"messages": null}), "messages", "missing_required_parameter"),
        (json!({"messages": []}), "messages", "invalid_value"),
        (json!({"messages": "hi"}), "messages", "invalid_type"),
        (json!({"messages": ["hi"]}), "messages[0]", "invalid_type"),
        (json!({"messages": [{"content": "hi"}]}), "messages[0].role", "missing_required_parameter"),
        (json!({"messages": [{"role": "robot", "content": "hi"}]}), "messages[0].role", "invalid_value"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content", "missing_required_parameter"),
        (json!({"messages": user(json!(1))}), "messages[0].content", "invalid_type"),
        (
            json!({"messages": user(json!([{"type": "image_url"}]))}),
            "messages[0].content[0].type",
            "invalid_value",
        ),
        (
            json!({"messages": user(json!([{"type": "text"}]))}),
            "messages[0].content[0].text",
            "missing_required_parameter",
        ),
        (
            json!({"messages": [{"role": "user", "content": "x", "z": 1}]}),
            "messages[0].z",
            "unknown_parameter",
        ),
        (
            json!({"messages": [{"role": "tool", "content": "x"}]}),
            "messages[0].tool_call_id",
            "missing_required_parameter",
        ),
        (
            json!({"messages": call(json!({"id": "a", "type": "function", "function": {"name": "f", "arguments": "{"}}))}),
            "messages[1].tool_calls[0].function.arguments",
            "invalid_value",
        ),
        (json!({"messages": [{"role": "assistant", "content": "x"}]}), "messages", "invalid_value"),
        (json!({"temperature": 2.1}), "temperature", "decimal_above_max_value"),
        (json!({"temperature": -0.1}), "temperature", "decimal_below_min_value"),
        (json!({"temperature": "1"}), "temperature", "invalid_type"),
        (json!({"top_p": 1.01}), "top_p", "decimal_above_max_value"),
        (json!({"n": 0}), "n", "integer_below_min_value"),
        (json!({"n": 129}), "n", "integer_above_max_value"),
        (json!({"n": 1.5}), "n", "invalid_type"),
        (json!({"stop": ["a", "b", "c", "d", "e"]}), "stop", "array_above_max_length"),
        (json!({"stop": ["a", ""]}), "stop[1]", "invalid_value"),
        (json!({"stop": 1}), "stop", "invalid_type"),
        (json!({"stop_token_ids": [1_000_000]}), "stop_token_ids[0]", "integer_above_max_value"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias", "invalid_value"),
        (json!({"logit_bias": {"1000000": 1}}), "logit_bias", "invalid_value"),
        (json!({"logit_bias": {"5": 101}}), "logit_bias.5", "decimal_above_max_value"),
        (json!({"top_logprobs": 1}), "top_logprobs", "invalid_value"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs", "integer_above_max_value"),
        (json!({"logprobs": 1}), "logprobs", "invalid_type"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options", "invalid_value"),
        (json!({"stream": true, "stream_options": {"x": 1}}), "stream_options.x", "unknown_parameter"),
        (json!({"min_tokens": 3}), "min_tokens", "invalid_value"),
        (json!({"max_completion_tokens": 3}), "max_tokens", "invalid_value"),
        (json!({"max_tokens": 0}), "max_tokens", "integer_below_min_value"),
        (json!({"max_tokens": 512}), "messages", "context_length_exceeded"),
        (json!({"metadata": {"a": 1}}), "metadata.a", "invalid_type"),
        (json!({"store": true}), "store", "invalid_value"),
        (json!({"service_tier": "flex"}), "service_tier", "invalid_value"),
        (json!({"user": 1}), "user", "invalid_type"),
        (json!({"cache_salt": ""}), "cache_salt", "invalid_value"),
        (json!({"deadline_ms": 0}), "deadline_ms", "integer_below_min_value"),
        (json!({"response_format": {"type": "xml"}}), "response_format.type", "invalid_value"),
        (json!({"response_format": {}}), "response_format.type", "missing_required_parameter"),
        (
            json!({"tools": [{"type": "function", "function": {"name": "a b"}}]}),
            "tools[0].function.name",
            "invalid_value",
        ),
        (json!({"tool_choice": "required"}), "tool_choice", "invalid_value"),
        (json!({"chat_template": "{{ 1 }}"}), "chat_template", "unknown_parameter"),
        (json!({"prompt_logprobs": 21}), "prompt_logprobs", "integer_above_max_value"),
        (json!({"return_token_ids": 1}), "return_token_ids", "invalid_type"),
        (json!({"return_tokens_as_token_ids": "yes"}), "return_tokens_as_token_ids", "invalid_type"),
        (json!({"timings": 1}), "timings", "invalid_type"),
        (json!({"return_progress": true}), "return_progress", "invalid_value"),
        (json!({"sse_ping_interval": 5}), "sse_ping_interval", "invalid_value"),
        (json!({"stream": true, "sse_ping_interval": 0}), "sse_ping_interval", "invalid_value"),
        (json!({"verbosity": "low"}), "verbosity", "invalid_value"),
        (json!({"reasoning_effort": "high"}), "reasoning_effort", "invalid_value"),
        (
            json!({"stream": true, "stream_options": {"continuous_usage_stats": true}}),
            "stream_options.continuous_usage_stats",
            "invalid_value",
        ),
        (json!({"best_of": 2}), "best_of", "unknown_parameter"),
        (json!({"nonsense": false}), "nonsense", "unknown_parameter"),
    ] {
        let answer = server.post("/v1/chat/completions", with(chat_body(), changes.clone())).await;
        assert_eq!(
            (answer.status, answer.error()),
            (StatusCode::BAD_REQUEST, (json!(param), json!(code))),
            "{changes}"
        );
    }
}

#[tokio::test]
async fn wrong_fields_of_completions_are_refused_by_path() {
    let server = server(scripted(say("x")));
    let many = vec!["x"; 1025];
    for (changes, param, code) in [
        (json!({"prompt": null}), "prompt", "missing_required_parameter"),
        (json!({"prompt": []}), "prompt", "invalid_value"),
        (json!({"prompt": {}}), "prompt", "invalid_type"),
        (json!({"prompt": [[]]}), "prompt[0]", "invalid_value"),
        (json!({"prompt": [1, "x"]}), "prompt[1]", "invalid_type"),
        (json!({"prompt": [-1]}), "prompt[0]", "integer_below_min_value"),
        (json!({"prompt": ["x", 1]}), "prompt[1]", "invalid_type"),
        (json!({"prompt": vec![5; 513]}), "prompt", "context_length_exceeded"),
        (json!({"prompt": many}), "prompt", "array_above_max_length"),
        (json!({"prompt": vec!["x"; 9], "n": 128}), "n", "invalid_value"),
        (json!({"logprobs": 6}), "logprobs", "integer_above_max_value"),
        (json!({"best_of": 1, "n": 2}), "best_of", "invalid_value"),
        (json!({"best_of": 2, "stream": true}), "best_of", "invalid_value"),
        (json!({"suffix": "x"}), "suffix", "unknown_parameter"),
        (json!({"messages": []}), "messages", "unknown_parameter"),
    ] {
        let answer = server.post("/v1/completions", with(completion_body(), changes.clone())).await;
        assert_eq!(
            (answer.status, answer.error()),
            (StatusCode::BAD_REQUEST, (json!(param), json!(code))),
            "{changes}"
        );
    }
}

#[tokio::test]
async fn integers_of_every_size_in_every_field_are_answered_or_refused_by_name() {
    let server = server(scripted(say("x")));
    let fields = [
        "n",
        "max_tokens",
        "max_completion_tokens",
        "min_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "logit_bias",
        "seed",
        "logprobs",
        "top_logprobs",
        "best_of",
        "echo",
        "ignore_eos",
        "stop_token_ids",
        "stop",
        "stream",
        "stream_options",
        "priority",
        "cache_salt",
        "deadline_ms",
        "user",
        "metadata",
        "model",
        "tools",
        "tool_choice",
        "messages",
        "prompt",
        "service_tier",
        "store",
        "response_format",
        "regex",
        "choice",
        "grammar",
        "structured_outputs",
        "allowed_token_ids",
        "parallel_tool_calls",
    ];
    for (path, body) in [("/v1/chat/completions", chat_body()), ("/v1/completions", completion_body())] {
        for field in fields {
            for number in
                ["-1", "0", "2147483648", "9223372036854775808", "1180591620717411303424", "1e300", "-0.5"]
            {
                let mut body = body.clone();
                body.as_object_mut().unwrap().remove(field);
                let rest = body.to_string();
                let body = format!("{{\"{field}\": {number}, {}", &rest[1..]);
                let answer = server.send(post_request(path, body.clone())).await;
                if answer.status != StatusCode::OK {
                    assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{body}: {}", answer.body);
                    let (param, _) = answer.error();
                    let known = [field, "messages", "prompt", "max_tokens", "deadline_ms"];
                    assert!(known.contains(&param.as_str().unwrap()), "{body}: {}", answer.body);
                }
            }
        }
    }
}

#[tokio::test]
async fn bodies_that_are_no_objects_are_refused() {
    let server = server(scripted(say("x")));
    let deep = format!("{{\"a\": {}{}}}", "[".repeat(10_000), "]".repeat(10_000));
    for body in ["", "{", "[]", "null", "{\"temperature\": NaN}", "\u{0}", &deep] {
        let answer = server.send(post_request("/v1/chat/completions", body.to_owned())).await;
        assert_eq!(
            (answer.status, answer.error().1),
            (StatusCode::BAD_REQUEST, json!("invalid_json")),
            "{body:.20}"
        );
    }
}

#[tokio::test]
async fn routes_methods_and_types_are_checked() {
    let server = server(scripted(say("x")));
    let answer = server.get("/v1/nonsense").await;
    assert_eq!((answer.status, answer.error().1), (StatusCode::NOT_FOUND, json!("unknown_url")));
    let answer = server.get("/v1/chat/completions").await;
    assert_eq!(
        (answer.status, answer.error().1),
        (StatusCode::METHOD_NOT_ALLOWED, json!("method_not_allowed"))
    );
    assert_eq!(answer.headers["allow"], "POST");
    let answer = server.send(Request::delete("/v1/models").body(Body::empty()).unwrap()).await;
    assert_eq!(
        (answer.status, answer.headers["allow"].to_str().unwrap()),
        (StatusCode::METHOD_NOT_ALLOWED, "GET,HEAD")
    );
    for (header, value) in [("content-type", "text/plain"), ("x-none", "1"), ("content-encoding", "gzip")] {
        let mut request = Request::post("/v1/completions").header(header, value);
        if header == "content-encoding" {
            request = request.header("content-type", "application/json");
        }
        let answer = server.send(request.body(Body::from("{}")).unwrap()).await;
        assert_eq!(
            (answer.status, answer.error().1),
            (StatusCode::UNSUPPORTED_MEDIA_TYPE, json!("unsupported_media_type"))
        );
    }
}

#[tokio::test]
async fn bodies_and_prompts_have_limits() {
    let config = ServerConfig { max_body_bytes: 1000, max_prompt_bytes: 100, ..config() };
    let server = server_with(scripted(say("x")), config, EngineConfig::default());
    let body = |len: usize| json!({"prompt": "a".repeat(len)});
    let answer = server.post("/v1/completions", body(1000)).await;
    assert_eq!(
        (answer.status, answer.error().1),
        (StatusCode::PAYLOAD_TOO_LARGE, json!("request_too_large"))
    );
    let answer = server.post("/v1/completions", body(101)).await;
    assert_eq!(
        (answer.status, answer.error()),
        (StatusCode::BAD_REQUEST, (json!("prompt"), json!("string_above_max_length")))
    );
    let many = json!([{"role": "user", "content": "a".repeat(60)}, {"role": "assistant", "content": "b".repeat(60)}, {"role": "user", "content": "c"}]);
    let answer = server.chat(json!({"messages": many})).await;
    assert_eq!((answer.status, answer.error().0), (StatusCode::BAD_REQUEST, json!("messages")));
}

#[tokio::test]
async fn models_are_named_or_not_found() {
    let server = server_with(scripted(say("x")), config(), EngineConfig::default());
    for (model, status) in [(json!("demo"), 200), (Value::Null, 200), (json!("gpt-4"), 404), (json!(""), 404)]
    {
        let answer = server.chat(json!({"model": model})).await;
        assert_eq!(answer.status.as_u16(), status, "{model}");
        if status == 404 {
            assert_eq!(answer.error(), (json!("model"), json!("model_not_found")));
        }
    }
    assert_eq!(server.get("/v1/models").await.json()["data"][0]["id"], "demo");
    assert_eq!(server.get("/v1/models/demo").await.json()["max_model_len"], crate::support::MAX_MODEL_LEN);
    assert_eq!(server.get("/v1/models/org/demo").await.error().1, "model_not_found");
}

#[tokio::test]
async fn a_context_overflow_says_so_in_the_words_that_clients_look_for() {
    let server = server(scripted(say("x")));
    let long = "one two three ".repeat(200);
    for body in [json!({"messages": [{"role": "user", "content": long}]}), json!({"max_tokens": 100_000})] {
        for stream in [false, true] {
            let answer = server.chat(with(body.clone(), json!({"stream": stream}))).await;
            assert_eq!(answer.error().1, "context_length_exceeded");
            let message = answer.json()["error"]["message"].as_str().unwrap().to_owned();
            assert!(message.starts_with("This model's maximum context length is 512 tokens"), "{message}");
        }
    }
}

#[tokio::test]
async fn a_full_queue_is_429_with_a_time_to_come_back() {
    let engine_config = EngineConfig { max_num_seqs: 1, max_queued_requests: 1, ..EngineConfig::default() };
    let server = server_with(slow(), config(), engine_config);
    let answers = futures_util::future::join_all((0..6).map(|_| server.chat(json!({"max_tokens": 5})))).await;
    let refused: Vec<_> =
        answers.iter().filter(|answer| answer.status == StatusCode::TOO_MANY_REQUESTS).collect();
    assert!(!refused.is_empty() && refused.len() < 6);
    for answer in refused {
        assert_eq!(answer.error().1, "rate_limit_exceeded");
        assert!(answer.headers["retry-after"].to_str().unwrap().parse::<u64>().unwrap() >= 1);
    }
}

#[tokio::test]
async fn keys_guard_everything_but_probes() {
    let config = ServerConfig { api_keys: vec!["first".into(), "second".into()], ..config() };
    let server = server_with(scripted(say("x")), config, EngineConfig::default());
    let get = |path: &str, key: Option<&str>| {
        let request = Request::get(path);
        key.into_iter()
            .fold(request, |request, key| request.header("authorization", key))
            .body(Body::empty())
            .unwrap()
    };
    for (path, key, status) in [
        ("/v1/models", None, 401),
        ("/v1/models", Some("Bearer "), 401),
        ("/v1/models", Some("Bearer secon"), 401),
        ("/v1/models", Some("Basic second"), 401),
        ("/v1/models", Some("Bearer first"), 200),
        ("/v1/models", Some("bearer second"), 200),
        ("/nonsense", None, 401),
        ("/v1/chat/completions", None, 401),
        ("//livez", None, 401),
        ("/livez", None, 200),
        ("/readyz", None, 200),
        ("/health", None, 200),
        ("/version", None, 200),
        ("/metrics", None, 200),
    ] {
        let answer = server.send(get(path, key)).await;
        assert_eq!(answer.status.as_u16(), status, "{path} {key:?}");
        if status == 401 {
            assert_eq!(answer.error().1, "invalid_api_key");
            assert_eq!(answer.headers["www-authenticate"], "Bearer");
        }
    }
    let config =
        ServerConfig { api_keys: vec!["k".into()], protect_metrics: true, ..crate::support::config() };
    let server = server_with(scripted(say("x")), config, EngineConfig::default());
    assert_eq!(server.get("/metrics").await.status, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn request_ids_come_back_if_they_are_harmless() {
    let server = server(scripted(say("x")));
    let long = "a".repeat(129);
    for (sent, is_kept) in [("abc-1", true), ("a b", false), (long.as_str(), false), ("a\"b", false)] {
        let request = Request::get("/nonsense").header("x-request-id", sent).body(Body::empty()).unwrap();
        let returned = server.send(request).await.headers["x-request-id"].to_str().unwrap().to_owned();
        assert_eq!(returned == sent, is_kept, "{sent}");
        assert!(!returned.is_empty());
    }
}

#[tokio::test]
async fn cors_is_off_unless_origins_are_listed() {
    let preflight = || {
        let request = Request::options("/v1/chat/completions").header("origin", "https://a.example");
        request.header("access-control-request-method", "POST").body(Body::empty()).unwrap()
    };
    let closed = server(scripted(say("x"))).send(preflight()).await;
    assert!(!closed.headers.contains_key("access-control-allow-origin"));
    for (origins, expected) in [("https://a.example", true), ("https://b.example", false)] {
        let config = ServerConfig {
            cors_allowed_origins: vec![origins.into()],
            api_keys: vec!["k".into()],
            ..config()
        };
        let open = server_with(scripted(say("x")), config, EngineConfig::default()).send(preflight()).await;
        assert_eq!(open.headers.contains_key("access-control-allow-origin"), expected, "{origins}");
        assert!(!open.headers.contains_key("access-control-allow-credentials"));
    }
}
