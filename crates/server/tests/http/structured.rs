//! Structured output over HTTP: a fake model, whose every token is a hash, must still write what was asked.

use axum::http::StatusCode;
use engine::FakeRunner;
use serde_json::{Value, json};

use crate::support::{content, limits, say, scripted, server, with};

fn person() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["a", "é", "c d"]}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": false,
    })
}

fn json_schema(schema: Value) -> Value {
    json!({"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": schema}})
}

fn tool(name: &str, is_strict: bool) -> Value {
    json!({"type": "function", "function": {"name": name, "parameters": person(), "strict": is_strict}})
}

#[track_caller]
fn check_person(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text:?}"));
    let fields = value.as_object().unwrap();
    assert_eq!(fields.len(), 3, "{text}");
    assert!(value["name"].as_str().unwrap().chars().count() <= 8, "{text}");
    assert!(value["age"].as_u64().unwrap() <= 120, "{text}");
}

#[tokio::test]
async fn every_choice_is_what_the_schema_says_whole_and_streamed() {
    let server = server(FakeRunner::new(limits()));
    for seed in 0..4 {
        let body = json!({"response_format": json_schema(person()), "n": 4, "temperature": 2, "seed": seed});
        let whole = server.chat(body.clone()).await.json();
        let chunks = server.chat(with(body, json!({"stream": true}))).await.chunks();
        for index in 0..4 {
            let choice = &whole["choices"][index];
            assert_eq!(content(&chunks, index), choice["message"]["content"]);
            if choice["finish_reason"] == "stop" {
                check_person(choice["message"]["content"].as_str().unwrap());
            } else {
                assert_eq!(choice["finish_reason"], "length");
            }
        }
    }
    server.idle().await;
}

#[tokio::test]
async fn texts_of_a_regex_a_choice_a_grammar_and_any_object() {
    let server = server(FakeRunner::new(limits()));
    let words = json!(["yes", " no", "per haps"]);
    for (body, is_right) in [
        (
            json!({"regex": "^[ab]{3}-[0-9]$"}),
            (|text| text.len() == 5 && text.contains('-')) as fn(&str) -> bool,
        ),
        (json!({"choice": words}), |text| ["yes", " no", "per haps"].contains(&text)),
        (json!({"grammar": "start: \"<\" /[0-9]{1,3}/ \">\""}), |text| {
            text.starts_with('<') && text.ends_with('>')
        }),
    ] {
        for body in [json!({"structured_outputs": body}), body] {
            let body = with(body, json!({"temperature": 1.5, "n": 3}));
            for (answer, field) in
                [(server.chat(body.clone()).await, "message"), (server.complete(body.clone()).await, "text")]
            {
                for choice in answer.json()["choices"].as_array().unwrap() {
                    let text = choice[field].as_str().or(choice["message"]["content"].as_str()).unwrap();
                    assert!(is_right(text) && choice["finish_reason"] == "stop", "{body}: {choice}");
                }
            }
        }
    }
    for seed in 0..3 {
        let outputs = json!({"json": person(), "json_object": false, "regex": null});
        let body = json!({"structured_outputs": outputs, "temperature": 2, "max_tokens": 300, "seed": seed});
        let choice = server.complete(body).await.json()["choices"][0].clone();
        if choice["finish_reason"] == "stop" {
            check_person(choice["text"].as_str().unwrap());
        }
    }
    let scripted = crate::support::server(scripted(say("{\"a\": [1, {\"b\": null}]} and more")));
    for form in [
        json!({"response_format": {"type": "json_object"}}),
        json!({"structured_outputs": {"json_object": true}}),
    ] {
        let answer = scripted.chat(with(form, json!({"temperature": 0}))).await.json();
        assert_eq!(answer["choices"][0]["message"]["content"], "{\"a\": [1, {\"b\": null}]}");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    }
}

#[tokio::test]
async fn an_answer_of_allowed_tokens_has_no_other_and_ends_if_it_may() {
    let server = server(FakeRunner::new(limits()));
    for (allowed, end) in [(vec![400, 37, 400], "length"), (vec![37, 400, 2], "stop")] {
        let body = json!({
            "allowed_token_ids": allowed, "return_token_ids": true, "logit_bias": {"2": 100}, "max_tokens": 9, "n": 3,
        });
        for answer in [server.chat(body.clone()).await, server.complete(body).await] {
            for choice in answer.json()["choices"].as_array().unwrap() {
                let taken = choice["token_ids"].as_array().unwrap();
                assert!(taken.iter().all(|id| allowed.contains(&id.as_i64().unwrap())), "{choice}");
                assert_eq!(choice["finish_reason"], end);
            }
        }
    }
}

#[tokio::test]
async fn an_answer_that_is_cut_says_so() {
    let server = server(FakeRunner::new(limits()));
    let body = json!({"response_format": json_schema(person()), "max_tokens": 4});
    assert_eq!(server.chat(body).await.json()["choices"][0]["finish_reason"], "length");
    let body =
        json!({"tools": [tool("f", true)], "tool_choice": "required", "max_tokens": 30, "logit_bias": {}});
    let choice = server.chat(body).await.json()["choices"][0].clone();
    assert_eq!(choice["finish_reason"], "length", "{choice}");
}

#[tokio::test]
async fn ends_that_are_not_let_through_still_end_it() {
    let server = server(FakeRunner::new(limits()));
    for more in [json!({"min_tokens": 100}), json!({"ignore_eos": true}), json!({"logit_bias": {"2": -100}})]
    {
        let body = with(json!({"choice": ["yes", "yes and no"]}), more);
        let choice = server.chat(body).await.json()["choices"][0].clone();
        assert_eq!(choice["finish_reason"], "stop");
        assert!(["yes", "yes and no"].contains(&choice["message"]["content"].as_str().unwrap()), "{choice}");
    }
}

#[tokio::test]
async fn forced_calls_are_calls_with_arguments_that_fit() {
    let server = server(FakeRunner::new(limits()));
    let tools = json!({"tools": [tool("first", false), tool("other", false)], "parallel_tool_calls": false});
    let named = |name: &str| json!({"type": "function", "function": {"name": name}});
    let allowed =
        json!({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named("other")]}});
    for (choice, end, names) in [
        (json!("required"), "tool_calls", vec!["first", "other"]),
        (named("other"), "stop", vec!["other"]),
        (allowed, "tool_calls", vec!["other"]),
    ] {
        for seed in 0..3 {
            let body = with(tools.clone(), json!({"tool_choice": choice, "temperature": 2, "seed": seed}));
            let whole = server.chat(body.clone()).await.json()["choices"][0].clone();
            let chunks = server.chat(with(body, json!({"stream": true}))).await.chunks();
            let parts: Vec<&Value> = chunks
                .iter()
                .filter_map(|chunk| chunk["choices"][0]["delta"].get("tool_calls")?.get(0))
                .collect();
            let call = &whole["message"]["tool_calls"][0]["function"];
            let arguments = parts.iter().filter_map(|part| part["function"]["arguments"].as_str());
            assert_eq!(call["arguments"], arguments.collect::<String>());
            assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], whole["finish_reason"]);
            if whole["finish_reason"] == "length" {
                continue;
            }
            assert_eq!(whole["finish_reason"], end);
            assert!(names.contains(&call["name"].as_str().unwrap()), "{whole}");
            check_person(call["arguments"].as_str().unwrap());
            assert_eq!(whole["message"]["tool_calls"].as_array().unwrap().len(), 1);
        }
    }
}

#[tokio::test]
async fn a_strict_tool_binds_a_call_that_the_model_begins_itself() {
    let server = server(scripted(vec![5]));
    let body = json!({"tools": [tool("f", true)], "temperature": 1, "parallel_tool_calls": false, "seed": 3});
    let choice = server.chat(body).await.json()["choices"][0].clone();
    if choice["finish_reason"] == "tool_calls" {
        check_person(choice["message"]["tool_calls"][0]["function"]["arguments"].as_str().unwrap());
    } else {
        assert_eq!(choice["finish_reason"], "length", "{choice}");
    }
}

#[tokio::test]
async fn what_cannot_be_compiled_is_a_400_at_its_place() {
    let server = server(scripted(say("x")));
    let bad = json!({"type": "object", "properties": {"a": {"items": {"type": "strin"}}}});
    let bad_tool = json!({"type": "function", "function": {"name": "g", "parameters": bad, "strict": true}});
    let schema = "response_format.json_schema.schema";
    let named = json!({"type": "function", "function": {"name": "nobody"}});
    let outputs = |outputs: Value| json!({"structured_outputs": outputs});
    for (body, param) in [
        (json!({"response_format": json_schema(bad.clone())}), format!("{schema}.properties.a.items")),
        (json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}), schema.into()),
        (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema".into()),
        (json!({"response_format": json_schema(json!([]))}), schema.into()),
        (json!({"response_format": json_schema(json!({"enum": ["x".repeat(200_000)]}))}), schema.into()),
        (json!({"regex": "("}), "regex".into()),
        (json!({"grammar": "start: x"}), "grammar".into()),
        (json!({"choice": []}), "choice".into()),
        (json!({"regex": "a", "choice": ["a"]}), "choice".into()),
        (outputs(json!({"json": bad.clone()})), "structured_outputs.json.properties.a.items".into()),
        (outputs(json!({"json": "{}"})), "structured_outputs.json".into()),
        (outputs(json!({"regex": "("})), "structured_outputs.regex".into()),
        (outputs(json!({"regex": {}})), "structured_outputs.regex".into()),
        (outputs(json!({"choice": ["a", 1]})), "structured_outputs.choice[1]".into()),
        (outputs(json!({"grammar": ""})), "structured_outputs.grammar".into()),
        (outputs(json!({"json_object": "yes"})), "structured_outputs.json_object".into()),
        (outputs(json!({"backend": "auto"})), "structured_outputs.backend".into()),
        (outputs(json!({"regex": "a", "json_object": true})), "structured_outputs".into()),
        (outputs(json!({})), "structured_outputs".into()),
        (with(outputs(json!({"regex": "a"})), json!({"regex": "a"})), "regex".into()),
        (outputs(json!("regex")), "structured_outputs".into()),
        (json!({"allowed_token_ids": []}), "allowed_token_ids".into()),
        (json!({"allowed_token_ids": [5, 1 << 20]}), "allowed_token_ids[1]".into()),
        (json!({"allowed_token_ids": 5}), "allowed_token_ids".into()),
        (json!({"allowed_token_ids": [5], "regex": "a"}), "allowed_token_ids".into()),
        (json!({"allowed_token_ids": [5], "tools": [tool("f", true)]}), "allowed_token_ids".into()),
        (
            json!({"tools": [tool("f", true), bad_tool]}),
            "tools[1].function.parameters.properties.a.items".into(),
        ),
        (json!({"tools": [tool("f", true)], "tool_choice": named}), "tool_choice.function.name".into()),
        (json!({"tools": [tool("f", true)], "tool_choice": "sometimes"}), "tool_choice".into()),
    ] {
        let answer = server.chat(body.clone()).await;
        assert_eq!((answer.status, answer.error().0), (StatusCode::BAD_REQUEST, json!(param)), "{body:.200}");
        let message = answer.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(!message.contains(".rs") && !message.contains('/'), "{message}");
        let fine = server.chat(json!({"regex": "[ab]{2}"})).await.json();
        assert_eq!(fine["choices"][0]["message"]["content"].as_str().map(str::len), Some(2));
    }
}
