//! `/v1/responses`: items in, items out, whole and streamed, and what is kept of them.

use axum::body::Body;
use axum::http::{Request, StatusCode};
use engine::EngineConfig;
use serde_json::{Value, json};
use server::ServerConfig;

use crate::support::{Answer, Server, config, ids, post_request, say, scripted, server, server_with, with};

async fn respond(server: &Server, body: Value) -> Answer {
    server.post("/v1/responses", with(json!({"input": "hi"}), body)).await
}

/// The events of a complete stream; checks that each has its name, and its number.
#[track_caller]
fn events(answer: &Answer) -> Vec<Value> {
    assert_eq!(answer.headers["content-type"], "text/event-stream", "{}", answer.body);
    let event = |(number, text): (usize, &str)| {
        let (name, data) = text.split_once("\ndata: ").expect("an event has data");
        let event: Value = serde_json::from_str(data).expect("data is JSON");
        assert_eq!(name.strip_prefix("event: "), event["type"].as_str());
        assert_eq!(event["sequence_number"], number);
        event
    };
    answer.body.split_terminator("\n\n").enumerate().map(event).collect()
}

fn kinds(events: &[Value]) -> Vec<&str> {
    let mut kinds: Vec<&str> = events
        .iter()
        .map(|event| event["type"].as_str().unwrap().strip_prefix("response.").unwrap_or("error"))
        .collect();
    kinds.dedup();
    kinds
}

/// A response without what differs from one to the next.
fn timeless(response: &Value) -> Value {
    let mut response = response.clone();
    for name in ["id", "created_at", "completed_at"] {
        assert!(!response[name].is_null() || response["status"] != "completed", "{name}: {response}");
        response[name] = Value::Null;
    }
    for item in response["output"].as_array_mut().unwrap() {
        assert!(item["id"].is_string());
        item["id"] = Value::Null;
        if item["type"] == "function_call" {
            item["call_id"] = Value::Null;
        }
    }
    response["usage"]["input_tokens_details"] = Value::Null;
    response
}

#[tokio::test]
async fn a_response_has_openais_shape_whole_and_streamed() {
    let server = server(scripted(say("Café 你好!")));
    let whole = respond(&server, json!({"metadata": {"a": "b"}, "temperature": 0.5})).await.json();
    assert!(whole["id"].as_str().unwrap().starts_with("resp_"));
    for (name, value) in [
        ("object", json!("response")),
        ("status", json!("completed")),
        ("error", Value::Null),
        ("incomplete_details", Value::Null),
        ("metadata", json!({"a": "b"})),
        ("temperature", json!(0.5)),
        ("top_p", json!(1.0)),
        ("tools", json!([])),
        ("tool_choice", json!("auto")),
        ("parallel_tool_calls", json!(true)),
        ("truncation", json!("disabled")),
        ("store", json!(true)),
    ] {
        assert_eq!(whole[name], value, "{name}");
    }
    let part = json!({"type": "output_text", "text": "Café 你好!", "annotations": [], "logprobs": []});
    let item = &whole["output"][0];
    assert_eq!(
        (&item["type"], &item["role"], &item["status"]),
        (&json!("message"), &json!("assistant"), &json!("completed"))
    );
    assert_eq!(item["content"], json!([part]));
    assert_eq!(whole["usage"]["output_tokens"], say("Café 你好!").len());

    let streamed = json!({"metadata": {"a": "b"}, "temperature": 0.5, "stream": true});
    let events = events(&respond(&server, streamed).await);
    let expected = [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ];
    assert_eq!(kinds(&events), expected);
    let text: String = events.iter().filter_map(|event| event["delta"].as_str()).collect();
    assert_eq!(text, "Café 你好!");
    assert_eq!(timeless(&events.last().unwrap()["response"]), timeless(&whole));
    assert_eq!(events[0]["response"]["status"], "in_progress");
    let ids: Vec<&Value> = events.iter().filter_map(|event| event.get("item_id")).collect();
    assert!(ids.iter().all(|id| **id == events[2]["item"]["id"]));
}

#[tokio::test]
async fn a_response_asks_the_model_what_a_chat_asks() {
    let server = server(scripted(say("x")));
    let call =
        json!({"type": "function_call", "call_id": "abcdefghi", "name": "f", "arguments": "{\"a\": 1}"});
    let body = json!({
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            call,
            {"type": "function_call_output", "call_id": "abcdefghi", "output": "7"},
        ],
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": false}],
    });
    let response = respond(&server, body).await.json();
    let messages = json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [
            {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}},
        ]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "7"},
    ]);
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]);
    let tokens = server.tokenize(json!({"messages": messages, "tools": tools})).await;
    assert_eq!(response["usage"]["input_tokens"], tokens.len(), "{response}");
}

#[tokio::test]
async fn calls_are_items_of_their_own() {
    let script =
        [vec![5], say(r#"[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]"#)].concat();
    let server = server(scripted(script));
    let tools = json!({"tools": [{"type": "function", "name": "f"}, {"type": "function", "name": "g"}]});
    let whole = respond(&server, tools.clone()).await.json();
    let output = whole["output"].as_array().unwrap();
    assert_eq!(
        (output.len(), &output[0]["name"], &output[0]["arguments"]),
        (2, &json!("f"), &json!("{\"a\": 1}"))
    );
    assert!(output[0]["call_id"].as_str().unwrap().len() == 9 && output[0]["status"] == "completed");
    let events = events(&respond(&server, with(tools.clone(), json!({"stream": true}))).await);
    let call = [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ];
    assert_eq!(kinds(&events)[2..6], call);
    assert_eq!(events.last().unwrap()["response"]["output"].as_array().unwrap().len(), 2);
    assert_eq!(timeless(&events.last().unwrap()["response"]), timeless(&whole));
    let single = respond(&server, with(tools, json!({"parallel_tool_calls": false}))).await.json();
    assert_eq!(single["output"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn an_answer_that_is_cut_is_incomplete() {
    let server = server(scripted(ids("one two three four")));
    let whole = respond(&server, json!({"max_output_tokens": 2})).await.json();
    assert_eq!(
        (&whole["status"], &whole["incomplete_details"]),
        (&json!("incomplete"), &json!({"reason": "max_output_tokens"}))
    );
    assert_eq!(
        (&whole["output"][0]["status"], &whole["max_output_tokens"]),
        (&json!("incomplete"), &json!(2))
    );
    let events = events(&respond(&server, json!({"max_output_tokens": 2, "stream": true})).await);
    assert_eq!(kinds(&events).last(), Some(&"incomplete"));
    assert_eq!(timeless(&events.last().unwrap()["response"]), timeless(&whole));
}

#[tokio::test]
async fn a_failure_in_a_stream_is_told_twice() {
    let server = server(scripted(say("one two three four")).with_device_failure_at(4));
    let events = events(&respond(&server, json!({"stream": true})).await);
    let [.., error, failed] = &events[..] else { panic!("{events:?}") };
    assert_eq!((&error["type"], &error["code"]), (&json!("error"), &json!("model_error")));
    assert_eq!(
        (&failed["type"], &failed["response"]["status"]),
        (&json!("response.failed"), &json!("failed"))
    );
}

#[tokio::test]
async fn logprobs_are_included_on_request() {
    let server = server(scripted(say("x y")));
    for (body, num_top) in [
        (json!({"include": ["message.output_text.logprobs"]}), 0),
        (json!({"include": ["message.output_text.logprobs"], "top_logprobs": 2}), 2),
    ] {
        let whole = respond(&server, body.clone()).await.json();
        let logprobs = whole["output"][0]["content"][0]["logprobs"].as_array().unwrap().clone();
        assert!(
            !logprobs.is_empty()
                && logprobs.iter().all(|l| l["top_logprobs"].as_array().unwrap().len() == num_top)
        );
        let events = events(&respond(&server, with(body, json!({"stream": true}))).await);
        let deltas = events.iter().filter(|event| event["type"] == "response.output_text.delta");
        let streamed: Vec<Value> =
            deltas.flat_map(|event| event["logprobs"].as_array().unwrap().clone()).collect();
        assert_eq!(streamed, logprobs);
    }
}

#[tokio::test]
async fn a_response_goes_on_from_an_earlier_one() {
    let server = server(scripted(say("x")));
    let first = respond(&server, json!({"input": "one", "instructions": "Be brief."})).await.json();
    for stream in [false, true] {
        let body = json!({"input": "two", "previous_response_id": first["id"], "stream": stream});
        let answer = respond(&server, body).await;
        let second = if stream { events(&answer).pop().unwrap()["response"].clone() } else { answer.json() };
        // Instructions are not carried on.
        let messages = json!([
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "x"},
            {"role": "user", "content": "two"},
        ]);
        let tokens = server.tokenize(json!({"messages": messages})).await;
        assert_eq!(second["usage"]["input_tokens"], tokens.len());
        assert_eq!(second["previous_response_id"], first["id"]);
        let path = format!("/v1/responses/{}", second["id"].as_str().unwrap());
        assert_eq!(server.get(&path).await.json(), second);
        let items = server.get(&format!("{path}/input_items?order=asc&limit=2")).await.json();
        let roles: Vec<&str> =
            items["data"].as_array().unwrap().iter().map(|item| item["role"].as_str().unwrap()).collect();
        assert_eq!((roles, &items["has_more"]), (vec!["user", "assistant"], &json!(true)));
        let rest = format!("{path}/input_items?order=asc&after={}", items["last_id"].as_str().unwrap());
        let rest = server.get(&rest).await.json();
        assert_eq!(
            (rest["data"][0]["content"][0]["text"].as_str(), &rest["has_more"]),
            (Some("two"), &json!(false))
        );
    }
    let path = format!("/v1/responses/{}", first["id"].as_str().unwrap());
    let delete = || server.send(Request::delete(&path).body(Body::empty()).unwrap());
    assert_eq!(delete().await.json()["deleted"], true);
    assert_eq!(
        (delete().await.status, server.get(&path).await.status),
        (StatusCode::NOT_FOUND, StatusCode::NOT_FOUND)
    );
    let gone = respond(&server, json!({"previous_response_id": first["id"]})).await;
    assert_eq!(gone.error(), (json!("previous_response_id"), json!("previous_response_not_found")));
    assert_eq!(gone.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn what_is_not_to_be_stored_or_is_another_keys_is_not_found() {
    let config =
        ServerConfig { api_keys: vec!["one".into(), "two".into()], max_stored_responses: 1, ..config() };
    let server = server_with(scripted(say("x")), config, EngineConfig::default());
    let send = |key: &'static str, mut request: Request<Body>| {
        request.headers_mut().insert("x-api-key", key.parse().unwrap());
        server.send(request)
    };
    let create = |body: Value| {
        send("one", post_request("/v1/responses", with(json!({"input": "hi"}), body).to_string()))
    };
    let get = |key, response: &Value| {
        let path = format!("/v1/responses/{}", response["id"].as_str().unwrap());
        send(key, Request::get(path).body(Body::empty()).unwrap())
    };
    let unstored = create(json!({"store": false})).await.json();
    assert_eq!(get("one", &unstored).await.status, StatusCode::NOT_FOUND);
    let stored = create(json!({})).await.json();
    assert_eq!(get("one", &stored).await.status, StatusCode::OK);
    assert_eq!(get("two", &stored).await.status, StatusCode::NOT_FOUND);
    let cancel = |key, response: &Value| {
        let path = format!("/v1/responses/{}/cancel", response["id"].as_str().unwrap());
        send(key, Request::post(path).body(Body::empty()).unwrap())
    };
    let refused = cancel("one", &stored).await;
    assert_eq!(
        (refused.status, refused.error().1),
        (StatusCode::BAD_REQUEST, json!("response_not_cancellable"))
    );
    assert_eq!(cancel("two", &stored).await.error().1, json!("response_not_found"));
    assert_eq!(cancel("one", &unstored).await.error().1, json!("response_not_found"));
    create(json!({})).await;
    assert_eq!(get("one", &stored).await.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn wrong_fields_are_refused_by_their_own_names() {
    let server = server(scripted(say("x")));
    let user = |content: Value| json!([{"role": "user", "content": content}]);
    for (changes, param, code) in [
        (json!({"input": null}), "input", "missing_required_parameter"),
        (json!({"input": []}), "input", "invalid_value"),
        (json!({"input": 1}), "input", "invalid_type"),
        (json!({"input": [1]}), "input[0]", "invalid_type"),
        (json!({"input": [{"type": "reasoning"}]}), "input[0].type", "invalid_value"),
        (json!({"input": [{"role": "tool", "content": "x"}]}), "input[0].role", "invalid_value"),
        (
            json!({"input": user(json!([{"type": "input_image"}]))}),
            "input[0].content[0].type",
            "invalid_value",
        ),
        (
            json!({"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "["}]}),
            "input[0].arguments",
            "invalid_value",
        ),
        (json!({"input": [{"role": "user", "content": "x", "z": 1}]}), "input[0].z", "unknown_parameter"),
        (json!({"messages": []}), "messages", "unknown_parameter"),
        (json!({"n": 2}), "n", "unknown_parameter"),
        (json!({"conversation": "c"}), "conversation", "unknown_parameter"),
        (json!({"background": true}), "background", "invalid_value"),
        (json!({"reasoning": {"effort": "low"}}), "reasoning.effort", "invalid_value"),
        (json!({"truncation": "auto"}), "truncation", "invalid_value"),
        (json!({"include": ["file_search_call.results"]}), "include[0]", "invalid_value"),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type", "invalid_value"),
        (json!({"tools": [{"type": "function"}]}), "tools[0].name", "missing_required_parameter"),
        (json!({"tools": [{"type": "function", "name": "a b"}]}), "tools[0].name", "invalid_value"),
        (json!({"text": {"verbosity": "high"}}), "text.verbosity", "invalid_value"),
        (json!({"max_output_tokens": 0}), "max_output_tokens", "integer_below_min_value"),
        (json!({"top_logprobs": 21}), "top_logprobs", "integer_above_max_value"),
        (json!({"max_output_tokens": 512}), "input", "context_length_exceeded"),
        (json!({"temperature": 3}), "temperature", "decimal_above_max_value"),
        (json!({"store": "x"}), "store", "invalid_type"),
        (json!({"previous_response_id": "resp_x"}), "previous_response_id", "previous_response_not_found"),
    ] {
        let answer = respond(&server, changes.clone()).await;
        assert_eq!(
            (answer.status, answer.error()),
            (StatusCode::BAD_REQUEST, (json!(param), json!(code))),
            "{changes}"
        );
    }
    for accepted in [
        json!({"reasoning": {}, "background": false, "truncation": "disabled", "include": [], "user": "u"}),
        json!({"reasoning": null, "text": {"format": {"type": "text"}}, "tool_choice": "none", "top_k": 3}),
    ] {
        let answer = respond(&server, accepted).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.body);
    }
}
