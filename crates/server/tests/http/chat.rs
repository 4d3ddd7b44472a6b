//! Chats, whole and streamed.

use serde_json::{Value, json};

use crate::support::{Answer, content, ids, say, scripted, server, server_with, slow};

#[tokio::test]
async fn an_answer_has_openais_shape() {
    let server = server(scripted(say("Hello, café € 你好!")));
    let answer = server.chat(json!({})).await.json();
    assert_eq!(answer["object"], "chat.completion");
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert!(answer["created"].as_u64().unwrap() > 1_700_000_000);
    assert_eq!(
        (&answer["model"], &answer["system_fingerprint"]),
        (&json!("windrose"), &json!("fp_windrose"))
    );
    let expected = json!([{
        "index": 0, "finish_reason": "stop", "logprobs": null,
        "message": {"role": "assistant", "content": "Hello, café € 你好!", "refusal": null},
    }]);
    assert_eq!(answer["choices"], expected);
    let usage = &answer["usage"];
    assert_eq!(usage["completion_tokens"], say("Hello, café € 你好!").len());
    assert_eq!(
        usage["total_tokens"].as_u64().unwrap(),
        usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap()
    );
}

/// Checks the framing of a stream and returns its chunks.
#[track_caller]
fn check_stream(answer: &Answer, num_choices: usize) -> Vec<Value> {
    let chunks = answer.chunks();
    for (index, chunk) in chunks.iter().enumerate() {
        for name in ["id", "created", "model", "system_fingerprint", "object"] {
            assert_eq!(chunk[name], chunks[0][name]);
        }
        assert_eq!(
            chunk["usage"].is_object(),
            index + 1 == chunks.len() && chunk["choices"] == json!([]),
            "{chunk}"
        );
    }
    for index in 0..num_choices {
        let opening = json!({"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null});
        assert_eq!(chunks[index]["choices"], json!([opening]));
        let of_choice = |chunk: &&Value| chunk["choices"][0]["index"] == index;
        let of_choice: Vec<&Value> =
            chunks.iter().filter(of_choice).map(|chunk| &chunk["choices"][0]).collect();
        let (last, before) = of_choice.split_last().unwrap();
        assert!(last["finish_reason"].is_string() && last["delta"] == json!({}), "{last}");
        assert!(before.iter().all(|choice| choice["finish_reason"].is_null()));
        assert!(before.iter().skip(1).all(|choice| choice["delta"].get("role").is_none()));
    }
    chunks
}

#[tokio::test]
async fn a_stream_says_the_same_as_a_whole_answer() {
    let text = "Café € 你好 \n\n  naïve 🙂 end";
    let server = server(scripted(say(text)));
    let whole = server.chat(json!({"logprobs": true, "top_logprobs": 2})).await.json();
    let streamed = json!({"stream": true, "stream_options": {"include_usage": true}, "logprobs": true, "top_logprobs": 2});
    let chunks = check_stream(&server.chat(streamed).await, 1);
    assert_eq!(whole["choices"][0]["message"]["content"], text);
    assert_eq!(content(&chunks, 0), text);
    let last = chunks.last().unwrap();
    assert_eq!(last["usage"]["completion_tokens"], whole["usage"]["completion_tokens"]);
    let scores =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array()).flatten();
    let scores: Vec<Value> = scores.cloned().collect();
    assert_eq!(whole["choices"][0]["logprobs"]["content"], Value::Array(scores));
}

#[tokio::test]
async fn usage_is_null_until_the_last_chunk_and_absent_if_not_wanted() {
    let server = server(scripted(say("a b")));
    let chunks =
        server.chat(json!({"stream": true, "stream_options": {"include_usage": true}})).await.chunks();
    let (last, before) = chunks.split_last().unwrap();
    assert!(before.iter().all(|chunk| chunk.get("usage") == Some(&Value::Null)));
    assert_eq!(last["choices"], json!([]));
    let chunks = server.chat(json!({"stream": true})).await.chunks();
    assert!(
        chunks
            .iter()
            .all(|chunk| chunk.get("usage").is_none() && chunk["choices"].as_array().unwrap().len() == 1)
    );
}

#[tokio::test]
async fn choices_share_a_stream_and_each_is_whole() {
    let server = server(scripted(say("one two three")));
    let chunks = check_stream(
        &server.chat(json!({"n": 3, "stream": true, "stream_options": {"include_usage": true}})).await,
        3,
    );
    (0..3).for_each(|index| assert_eq!(content(&chunks, index), "one two three"));
    let whole = server.chat(json!({"n": 3})).await.json();
    assert_eq!(whole["choices"].as_array().unwrap().len(), 3);
    assert_eq!(whole["usage"]["completion_tokens"], 3 * say("one two three").len());
    assert_eq!(whole["usage"]["prompt_tokens"], chunks.last().unwrap()["usage"]["prompt_tokens"]);
}

#[tokio::test]
async fn logprobs_name_every_token_by_its_bytes() {
    let server = server(scripted(say("x 你 y")));
    let answer = server.chat(json!({"logprobs": true, "top_logprobs": 3})).await.json();
    let tokens = answer["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    let bytes: Vec<u8> = tokens
        .iter()
        .flat_map(|token| token["bytes"].as_array().unwrap())
        .map(|b| b.as_u64().unwrap() as u8)
        .collect();
    assert_eq!(String::from_utf8(bytes).unwrap(), "x 你 y");
    for token in &tokens {
        let top: Vec<f64> = token["top_logprobs"]
            .as_array()
            .unwrap()
            .iter()
            .map(|top| top["logprob"].as_f64().unwrap())
            .collect();
        assert!(top.len() == 3 && top.is_sorted_by(|a, b| a >= b), "{token}");
        assert!(token["logprob"].as_f64().unwrap() <= 0.0);
    }
    assert!(tokens.iter().any(|token| token["token"] == "bytes:\\xe4"), "{tokens:?}");
}

#[tokio::test]
async fn stop_strings_end_an_answer_and_never_leak() {
    let server = server(scripted(say("alpha beta STOP gamma")));
    for stop in [json!("STOP"), json!(["zzz", " STOP"]), json!(["P", "beta STOP"])] {
        let whole = server.chat(json!({"stop": stop})).await.json();
        let text = whole["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
        assert_eq!(whole["choices"][0]["finish_reason"], "stop");
        let chunks = server.chat(json!({"stop": stop, "stream": true})).await.chunks();
        assert_eq!(content(&chunks, 0), text);
        assert!(["alpha beta ", "alpha beta", "alpha "].contains(&text.as_str()), "{text:?}");
    }
    server.idle().await;
}

#[tokio::test]
async fn text_held_for_a_stop_string_is_shown_when_max_tokens_ends_the_answer() {
    let text = "one STO";
    let server = server(scripted(ids(text)));
    let max_tokens = ids(text).len();
    let body = json!({"stop": "STOP", "max_tokens": max_tokens});
    let whole = server.chat(body.clone()).await.json();
    assert_eq!(whole["choices"][0]["message"]["content"], text);
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    let chunks = server.chat(crate::support::with(body, json!({"stream": true}))).await.chunks();
    assert_eq!(content(&chunks, 0), text);
}

#[tokio::test]
async fn an_answer_fills_the_context_unless_told_otherwise() {
    let server = server(scripted(ids("a b")));
    let usage = server.chat(json!({"ignore_eos": true})).await.json()["usage"].clone();
    assert_eq!(usage["total_tokens"], crate::support::MAX_MODEL_LEN);
    let answer = server.chat(json!({"max_completion_tokens": 3, "ignore_eos": true})).await.json();
    assert_eq!(answer["usage"]["completion_tokens"], 3);
}

fn weather_tool() -> Value {
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}});
    json!({"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": parameters}})
}

#[tokio::test]
async fn a_tool_call_is_the_same_whole_and_streamed() {
    let script = [vec![5], say(r#"[{"name": "get_weather", "arguments": {"city": "Oslo"}}]"#)].concat();
    let server = server(scripted(script));
    let tools = json!({"tools": [weather_tool()], "tool_choice": "auto"});
    let whole = server.chat(tools.clone()).await.json()["choices"][0].clone();
    assert_eq!(whole["finish_reason"], "tool_calls");
    assert_eq!(whole["message"]["content"], Value::Null);
    let call = &whole["message"]["tool_calls"][0];
    assert_eq!(call["function"], json!({"name": "get_weather", "arguments": "{\"city\": \"Oslo\"}"}));
    assert!(call["id"].is_string() && call["type"] == "function");

    let chunks = server.chat(crate::support::with(tools, json!({"stream": true}))).await.chunks();
    let parts: Vec<&Value> =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"].get("tool_calls")?.get(0)).collect();
    assert!(parts.len() > 1 && parts[0]["id"].is_string() && parts[0]["type"] == "function", "{parts:?}");
    assert_eq!(parts[0]["function"]["name"], "get_weather");
    assert!(parts.iter().all(|part| part["index"] == 0));
    let repeated = |part: &&&Value| part.get("id").is_some() || part["function"].get("name").is_some();
    assert_eq!(parts[1..].iter().filter(repeated).count(), 0, "said once");
    let arguments = parts.iter().map(|part| part["function"]["arguments"].as_str().unwrap());
    assert_eq!(arguments.collect::<String>(), call["function"]["arguments"]);
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
    assert_eq!(content(&chunks, 0), "");
}

#[tokio::test]
async fn without_tools_a_tool_call_is_not_one() {
    let script = [vec![5], say("[]")].concat();
    let server = server(scripted(script));
    for body in [json!({}), json!({"tools": [weather_tool()], "tool_choice": "none"})] {
        let answer = server.chat(body).await.json()["choices"][0].clone();
        assert_eq!((&answer["message"]["content"], &answer["finish_reason"]), (&json!("[]"), &json!("stop")));
    }
}

#[tokio::test]
async fn a_silent_stream_is_kept_open_with_comments() {
    let config = server::ServerConfig {
        keep_alive_interval: Some(std::time::Duration::from_millis(2)),
        ..Default::default()
    };
    let server = server_with(slow(), config, engine::EngineConfig::default());
    let answer = server.chat(json!({"stream": true, "max_tokens": 5, "ignore_eos": true})).await;
    assert!(answer.body.contains(": keep-alive\n\n"), "{}", answer.body);
    assert!(!answer.chunks().is_empty());
}
