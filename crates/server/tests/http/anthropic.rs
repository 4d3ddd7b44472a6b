//! `/v1/messages`: Anthropic's words for what a chat does, whole and streamed.

use axum::http::StatusCode;
use engine::EngineConfig;
use serde_json::{Value, json};
use server::ServerConfig;

use crate::support::{Answer, Server, config, ids, post_request, say, scripted, server, server_with, with};

async fn message(server: &Server, body: Value) -> Answer {
    let base = json!({"max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]});
    server.post("/v1/messages", with(base, body)).await
}

/// The events of a stream; checks that each has its name.
#[track_caller]
fn events(answer: &Answer) -> Vec<Value> {
    let event = |text: &str| {
        let (name, data) = text.split_once("\ndata: ").expect("an event has data");
        let event: Value = serde_json::from_str(data).expect("data is JSON");
        assert_eq!(name.strip_prefix("event: "), event["type"].as_str());
        event
    };
    answer.body.split_terminator("\n\n").map(event).collect()
}

fn kinds(events: &[Value]) -> Vec<&str> {
    let mut kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    kinds.dedup();
    kinds
}

#[tokio::test]
async fn a_message_says_the_same_whole_and_streamed() {
    let server = server(scripted(say("Café 你好! STOP more")));
    for (body, text, reason, stop) in [
        (json!({}), "Café 你好! STOP more", "end_turn", Value::Null),
        (json!({"stop_sequences": [" STOP", "x"]}), "Café 你好!", "stop_sequence", json!(" STOP")),
        (json!({"max_tokens": 2}), "", "max_tokens", Value::Null),
    ] {
        let whole = message(&server, body.clone()).await.json();
        let events = events(&message(&server, with(body, json!({"stream": true}))).await);
        let streamed: String = events.iter().filter_map(|event| event["delta"]["text"].as_str()).collect();
        assert_eq!((&whole["type"], &whole["role"]), (&json!("message"), &json!("assistant")));
        assert_eq!(whole["content"], json!([{"type": "text", "text": streamed}]));
        assert!(streamed == text || reason == "max_tokens", "{streamed}");
        assert_eq!((&whole["stop_reason"], &whole["stop_sequence"]), (&json!(reason), &stop));
        let expected = [
            "message_start",
            "ping",
            "content_block_start",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ];
        assert_eq!(kinds(&events), expected);
        let end = &events[events.len() - 2];
        assert_eq!(end["delta"], json!({"stop_reason": reason, "stop_sequence": stop}));
        assert_eq!(end["usage"]["output_tokens"], whole["usage"]["output_tokens"]);
    }
}

#[tokio::test]
async fn calls_are_blocks() {
    let script = [ids("so "), vec![5], say(r#"[{"name": "f", "arguments": {"a": 1}}]"#)].concat();
    let server = server(scripted(script));
    let tools = json!({"tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "auto"}});
    let whole = message(&server, tools.clone()).await.json();
    assert_eq!((&whole["stop_reason"], &whole["content"][0]["text"]), (&json!("tool_use"), &json!("so ")));
    let call = &whole["content"][1];
    assert_eq!(
        (&call["type"], &call["name"], &call["input"]),
        (&json!("tool_use"), &json!("f"), &json!({"a": 1}))
    );
    let events = events(&message(&server, with(tools, json!({"stream": true}))).await);
    let block = events.iter().find(|event| event["content_block"]["type"] == "tool_use").unwrap();
    assert_eq!((&block["index"], &block["content_block"]["input"]), (&json!(1), &json!({})));
    let arguments: String =
        events.iter().filter_map(|event| event["delta"]["partial_json"].as_str()).collect();
    assert_eq!(serde_json::from_str::<Value>(&arguments).unwrap(), json!({"a": 1}));
}

#[tokio::test]
async fn a_message_asks_the_model_what_a_chat_asks() {
    let server = server(scripted(say("x")));
    let body = json!({
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "abcdefghi", "name": "f", "input": {"a": 1}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "abcdefghi", "content": [{"type": "text", "text": "7"}]},
            ]},
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}, "description": "d"}],
    });
    let messages = json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [
            {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}},
        ]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "7"},
    ]);
    let function = json!({"name": "f", "parameters": {"type": "object"}, "description": "d"});
    let chat = json!({"messages": messages, "tools": [{"type": "function", "function": function}]});
    let num_tokens = server.tokenize(chat).await.len();
    let counted = server.post("/v1/messages/count_tokens", body.clone()).await.json();
    assert_eq!(counted, json!({"input_tokens": num_tokens}));
    let usage = message(&server, body).await.json()["usage"].clone();
    let (fresh, cached) = (usage["input_tokens"].as_u64(), usage["cache_read_input_tokens"].as_u64());
    assert_eq!((fresh.unwrap() + cached.unwrap()) as usize, num_tokens);
}

#[tokio::test]
async fn errors_have_anthropics_shape_here_and_openais_elsewhere() {
    let config = ServerConfig { api_keys: vec!["key".into()], ..config() };
    let server = server_with(scripted(say("x")), config, EngineConfig::default());
    let send = |key: &'static str, path: &'static str, body: Value| {
        let mut request = post_request(path, body.to_string());
        request.headers_mut().insert("x-api-key", key.parse().unwrap());
        server.send(request)
    };
    let base = || json!({"max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]});
    assert_eq!(send("key", "/v1/messages", base()).await.status, StatusCode::OK);
    for (key, changes, status, kind, words) in [
        ("no", json!({}), 401, "authentication_error", "API key"),
        ("key", json!({"model": "m"}), 404, "not_found_error", "'m'"),
        ("key", json!({"max_tokens": null}), 400, "invalid_request_error", "'max_tokens'"),
        ("key", json!({"max_tokens": 0}), 400, "invalid_request_error", "'max_tokens'"),
        ("key", json!({"temperature": 3}), 400, "invalid_request_error", "'temperature'"),
        ("key", json!({"stop_sequences": [""]}), 400, "invalid_request_error", "'stop_sequences[0]'"),
        ("key", json!({"thinking": {"type": "enabled"}}), 400, "invalid_request_error", "'thinking.type'"),
        ("key", json!({"system": 1}), 400, "invalid_request_error", "'system'"),
        (
            "key",
            json!({"messages": [{"role": "system", "content": "x"}]}),
            400,
            "invalid_request_error",
            "messages[0].role",
        ),
        (
            "key",
            json!({"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
            400,
            "invalid_request_error",
            "messages[0].content[0].type",
        ),
        (
            "key",
            json!({"tools": [{"name": "a b", "input_schema": {}}]}),
            400,
            "invalid_request_error",
            "'tools[0].name'",
        ),
        (
            "key",
            json!({"tools": [{"type": "bash_20250124", "name": "b"}]}),
            400,
            "invalid_request_error",
            "'tools[0].type'",
        ),
        ("key", json!({"n": 1}), 400, "invalid_request_error", "'n'"),
    ] {
        let answer = send(key, "/v1/messages", with(base(), changes.clone())).await;
        let body = answer.json();
        assert_eq!(
            (answer.status.as_u16(), &body["error"]["type"]),
            (status, &json!(kind)),
            "{changes}: {body}"
        );
        assert!(
            body["type"] == "error" && body["error"]["message"].as_str().unwrap().contains(words),
            "{body}"
        );
    }
    let openai = send("no", "/v1/chat/completions", json!({})).await;
    assert_eq!(openai.error().1, json!("invalid_api_key"));
}
