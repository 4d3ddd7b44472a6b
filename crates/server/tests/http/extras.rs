//! What a request may ask for beside its answer: token ids, scores of the prompt, usage and timings, progress; and
//! how an answer is ended from outside.

use axum::body::Body;
use axum::http::{Request, StatusCode};
use engine::EngineConfig;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use server::ServerConfig;
use tower::ServiceExt;

use crate::support::{config, content, ids, post_request, say, scripted, server, server_with, slow, with};

fn token_ids(chunks: &[Value], index: usize) -> Vec<u32> {
    let choices = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap());
    let ids = choices.filter(|choice| choice["index"] == index);
    ids.filter_map(|choice| choice["token_ids"].as_array())
        .flatten()
        .map(|id| id.as_u64().unwrap() as u32)
        .collect()
}

#[tokio::test]
async fn token_ids_are_those_of_the_prompt_and_of_everything_taken() {
    let server = server(scripted(say("one STOP two")));
    let stop = json!({"return_token_ids": true, "stop": " STOP", "n": 2});
    let prompt = server.tokenize(json!({"messages": [{"role": "user", "content": "hi"}]})).await;
    let whole = server.chat(stop.clone()).await.json();
    assert_eq!(whole["prompt_token_ids"], json!(prompt));
    let taken = &whole["choices"][1]["token_ids"];
    assert_eq!(*taken, json!(ids("one STOP")));
    let chunks = server.chat(with(stop.clone(), json!({"stream": true}))).await.chunks();
    assert_eq!(
        (&chunks[0]["prompt_token_ids"], &chunks[1]["prompt_token_ids"]),
        (&json!(prompt), &Value::Null)
    );
    assert_eq!(json!(token_ids(&chunks, 1)), *taken);

    let prompts = json!({"prompt": ["a", [1, 5]], "return_token_ids": true});
    let whole = server.complete(prompts.clone()).await.json();
    let chunks = server.complete(with(prompts, json!({"stream": true}))).await.chunks();
    for index in 0..2 {
        let choice = &whole["choices"][index];
        assert_eq!(choice["token_ids"], json!(say("one STOP two")));
        assert_eq!(json!(token_ids(&chunks, index)), choice["token_ids"]);
        let first = chunks.iter().find(|chunk| chunk["choices"][0]["index"] == index).unwrap();
        assert_eq!(first["choices"][0]["prompt_token_ids"], choice["prompt_token_ids"]);
    }
    assert_eq!(whole["choices"][1]["prompt_token_ids"], json!([1, 5]));
    let plain = server.chat(json!({})).await.json();
    assert!(plain.get("prompt_token_ids").is_none() && plain["choices"][0].get("token_ids").is_none());
}

#[tokio::test]
async fn logprobs_name_tokens_by_their_ids_on_request() {
    let server = server(scripted(say("one two")));
    let named = |ids: &[u32]| json!(ids.iter().map(|id| format!("token_id:{id}")).collect::<Vec<_>>());
    let body = json!({"return_tokens_as_token_ids": true});
    let completion = json!({"prompt": [[1, 300]], "logprobs": 2, "echo": true});
    let whole = server.complete(with(completion, body.clone())).await.json();
    let logprobs = &whole["choices"][0]["logprobs"];
    let expected = [vec![1, 300], ids("one two")].concat();
    assert_eq!(logprobs["tokens"], named(&expected));
    for (token, top) in expected.iter().zip(logprobs["top_logprobs"].as_array().unwrap()).skip(1) {
        let top = top.as_object().unwrap();
        assert!(top.len() >= 2 && top.contains_key(&format!("token_id:{token}")), "{top:?}");
        assert!(top.keys().all(|name| name.starts_with("token_id:")), "{top:?}");
    }
    let chat = with(json!({"logprobs": true, "top_logprobs": 1, "stream": true}), body);
    let chunks = server.chat(chat).await.chunks();
    let scores = chunks.iter().filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array());
    let scores: Vec<&Value> = scores.flatten().collect();
    assert_eq!(json!(scores.iter().map(|score| &score["token"]).collect::<Vec<_>>()), named(&ids("one two")));
    assert!(scores.iter().all(|score| score["token"] == score["top_logprobs"][0]["token"]));
}

#[tokio::test]
async fn prompts_are_scored_as_by_vllm() {
    let server = server(scripted(say("x")));
    let prompt = server.tokenize(json!({"prompt": "one two"})).await;
    let check = |scores: &Value, num: usize| {
        let scores = scores.as_array().unwrap();
        assert_eq!((scores.len(), &scores[0]), (prompt.len(), &Value::Null));
        for (score, id) in scores.iter().zip(&prompt).skip(1) {
            let own = &score[id.to_string()];
            assert!(own["logprob"].as_f64().unwrap() <= 0.0 && own["rank"].as_u64().unwrap() >= 1, "{score}");
            assert!(own["decoded_token"].is_string());
            assert!((num.max(1)..=num + 1).contains(&score.as_object().unwrap().len()), "{score}");
        }
    };
    for num in [0, 1, 20] {
        let body = json!({"prompt": "one two", "prompt_logprobs": num, "n": 2});
        let answer = server.complete(body).await.json();
        (0..2).for_each(|index| check(&answer["choices"][index]["prompt_logprobs"], num));
        assert_eq!(answer["choices"][0]["logprobs"], Value::Null);
    }
    let both = json!({"prompt": "one two", "prompt_logprobs": 3, "echo": true, "logprobs": 1});
    let choice = server.complete(both).await.json()["choices"][0].clone();
    check(&choice["prompt_logprobs"], 3);
    let top = choice["logprobs"]["top_logprobs"].as_array().unwrap();
    assert!(top[1..prompt.len()].iter().all(|top| top.as_object().unwrap().len() <= 2), "{top:?}");
    let chat = server.chat(json!({"prompt_logprobs": 1})).await.json();
    assert!(chat["prompt_logprobs"].as_array().unwrap().len() > 1);
    let streamed = server.chat(json!({"prompt_logprobs": 1, "stream": true})).await;
    assert_eq!(streamed.error(), (json!("prompt_logprobs"), json!("invalid_value")));
}

#[tokio::test]
async fn usage_can_come_with_every_chunk() {
    let server = server(scripted(say("a b c")));
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let chunks = server.chat(json!({"stream": true, "stream_options": options})).await.chunks();
    let counts: Vec<u64> =
        chunks.iter().map(|chunk| chunk["usage"]["completion_tokens"].as_u64().unwrap()).collect();
    assert!(counts.is_sorted() && counts[0] == 0, "{counts:?}");
    assert_eq!(*counts.last().unwrap() as usize, say("a b c").len());
}

#[tokio::test]
async fn timings_come_whole_and_in_the_last_chunk() {
    let server = server(slow());
    let body = json!({"timings": true, "max_tokens": 5, "ignore_eos": true});
    let whole = server.chat(body.clone()).await.json();
    let chunks = server.chat(with(body, json!({"stream": true}))).await.chunks();
    let (last, before) = chunks.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert!(before.iter().all(|chunk| chunk.get("timings").is_none()));
    for timings in [&whole["timings"], &last["timings"]] {
        assert_eq!(timings["predicted_n"], 5);
        // Four steps of ten milliseconds follow the first token.
        assert!(timings["predicted_ms"].as_f64().unwrap() >= 30.0, "{timings}");
        assert!(timings["prompt_ms"].as_f64().unwrap() >= 5.0, "{timings}");
        assert!(timings["queue_ms"].as_f64().unwrap() >= 0.0, "{timings}");
        assert_eq!(
            timings["prompt_n"].as_u64().unwrap() + timings["cache_n"].as_u64().unwrap(),
            whole["usage"]["prompt_tokens"].as_u64().unwrap()
        );
    }
}

#[tokio::test]
async fn a_stream_says_how_far_its_prompt_is() {
    let engine_config = EngineConfig { max_num_batched_tokens: 4, ..EngineConfig::default() };
    let server = server_with(scripted(say("x")), config(), engine_config);
    let body = json!({"prompt": [(300..310).collect::<Vec<u32>>()], "stream": true, "return_progress": true});
    let chunks = server.complete(body).await.chunks();
    let progress: Vec<&Value> = chunks.iter().filter_map(|chunk| chunk.get("prompt_progress")).collect();
    let processed: Vec<u64> = progress.iter().map(|p| p["processed"].as_u64().unwrap()).collect();
    assert_eq!(processed, [0, 4, 8, 10]);
    assert!(progress.iter().all(|p| p["total"] == 10 && p["cache"] == 0 && p["time_ms"].is_u64()));
    assert_eq!(content(&chunks, 0), " x");
}

#[tokio::test]
async fn a_stream_may_choose_its_own_silence() {
    let config = ServerConfig { keep_alive_interval: Some(std::time::Duration::from_millis(2)), ..config() };
    let server = server_with(slow(), config, EngineConfig::default());
    let body = json!({"stream": true, "max_tokens": 5, "ignore_eos": true, "sse_ping_interval": -1});
    let answer = server.chat(body).await;
    assert!(!answer.body.contains("keep-alive"), "{}", answer.body);
}

fn with_key(request: Request<Body>, key: &str) -> Request<Body> {
    let (mut parts, body) = request.into_parts();
    parts.headers.insert("authorization", format!("Bearer {key}").parse().unwrap());
    Request::from_parts(parts, body)
}

#[tokio::test]
async fn an_answer_can_be_ended_by_its_id_and_only_by_its_owner() {
    let config = ServerConfig { api_keys: vec!["one".into(), "two".into()], ..config() };
    let server = server_with(slow(), config, EngineConfig::default());
    for (path, mut body) in [
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "hi"}], "n": 2})),
        ("/v1/completions", json!({"prompt": "hi", "n": 2, "max_tokens": 400})),
    ] {
        body = with(
            body,
            json!({"stream": true, "ignore_eos": true, "stream_options": {"include_usage": true}}),
        );
        let request = with_key(post_request(path, body.to_string()), "one");
        let mut answer = server.app.clone().oneshot(request).await.unwrap().into_body();
        let mut text = String::new();
        for _ in 0..6 {
            let frame = answer.frame().await.unwrap().unwrap();
            text.push_str(std::str::from_utf8(frame.data_ref().unwrap()).unwrap());
        }
        let first: Value =
            serde_json::from_str(text.lines().next().unwrap().strip_prefix("data: ").unwrap()).unwrap();
        let cancel = |key| {
            let path = format!("/v1/cancel/{}", first["id"].as_str().unwrap());
            server.send(with_key(Request::post(path).body(Body::empty()).unwrap(), key))
        };
        assert_eq!(cancel("two").await.status, StatusCode::NOT_FOUND);
        assert_eq!(cancel("three").await.status, StatusCode::UNAUTHORIZED);
        assert_eq!(cancel("one").await.status, StatusCode::OK);
        let rest = answer.collect().await.unwrap().to_bytes();
        text.push_str(std::str::from_utf8(&rest).unwrap());
        assert_eq!(text.matches("\"finish_reason\":\"length\"").count(), 2, "{text}");
        assert!(text.ends_with("data: [DONE]\n\n"));
        server.idle().await;
        let gone = cancel("one").await;
        assert_eq!((gone.status, gone.error().1), (StatusCode::NOT_FOUND, json!("request_not_found")));
    }
}
