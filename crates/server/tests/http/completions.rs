//! Completions: kinds of prompts, echo, log-probabilities, the best of many.

use serde_json::{Value, json};

use crate::support::{content, ids, say, scripted, server, with};

#[tokio::test]
async fn prompts_of_every_kind_are_answered_in_order() {
    let server = server(scripted(say("x y")));
    let (a, b) = (ids("one"), ids("two three"));
    for (prompt, num_prompts, tokens) in [
        (json!("one"), 1, a.len() + 1),
        (json!(["one", "two three"]), 2, a.len() + b.len() + 2),
        (json!(a), 1, a.len()),
        (json!([a, b]), 2, a.len() + b.len()),
        (json!([a, "two three"]), 2, a.len() + b.len() + 1),
    ] {
        let answer = server.complete(json!({"prompt": prompt, "n": 2})).await.json();
        let choices = answer["choices"].as_array().unwrap();
        let indices: Vec<u64> = choices.iter().map(|choice| choice["index"].as_u64().unwrap()).collect();
        assert_eq!(indices, (0..num_prompts * 2).collect::<Vec<u64>>(), "{prompt}");
        assert_eq!((&answer["object"], &choices[0]["text"]), (&json!("text_completion"), &json!(" x y")));
        assert_eq!(answer["usage"]["prompt_tokens"], tokens, "{prompt}");
        assert_eq!(answer["usage"]["completion_tokens"], num_prompts * 2 * say("x y").len() as u64);
    }
}

#[tokio::test]
async fn sixteen_tokens_are_generated_unless_told_otherwise() {
    let server = server(scripted(ids(&"a ".repeat(40))));
    let answer = server.complete(json!({})).await.json();
    assert_eq!(
        (&answer["usage"]["completion_tokens"], &answer["choices"][0]["finish_reason"]),
        (&json!(16), &json!("length"))
    );
    let answer = server.complete(json!({"max_tokens": 0})).await.json();
    assert_eq!(
        (&answer["usage"]["completion_tokens"], &answer["choices"][0]["text"]),
        (&json!(0), &json!(""))
    );
}

#[tokio::test]
async fn a_stream_says_the_same_as_a_whole_answer() {
    let server = server(scripted(say("été € 你好")));
    let body = json!({"prompt": ["one", "two"], "n": 2, "logprobs": 1, "echo": false});
    let whole = server.complete(body.clone()).await.json();
    let chunks = server.complete(with(body, json!({"stream": true}))).await.chunks();
    for index in 0..4 {
        assert_eq!(content(&chunks, index), whole["choices"][index]["text"], "{index}");
        let of_choice = |chunk: &&Value| chunk["choices"][0]["index"] == index;
        let tokens = chunks
            .iter()
            .filter(of_choice)
            .filter_map(|chunk| chunk["choices"][0]["logprobs"]["text_offset"].as_array());
        let offsets: Vec<Value> = tokens.flatten().cloned().collect();
        assert_eq!(whole["choices"][index]["logprobs"]["text_offset"], Value::Array(offsets));
    }
}

#[tokio::test]
async fn echo_repeats_the_prompt_with_its_scores() {
    let server = server(scripted(say("x y")));
    let prompt = "Café one two";
    let echoed = server.complete(json!({"prompt": prompt, "echo": true})).await.json();
    assert_eq!(echoed["choices"][0]["text"], format!("{prompt} x y"));
    let echoed = server.complete(json!({"prompt": ids(prompt), "echo": true, "stream": true})).await.chunks();
    assert_eq!(content(&echoed, 0), format!("{prompt} x y"));

    let body = json!({"prompt": prompt, "echo": true, "logprobs": 2, "max_tokens": 0});
    let scored = server.complete(body.clone()).await.json();
    let logprobs = scored["choices"][0]["logprobs"].clone();
    let lens = ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
        .map(|name| logprobs[name].as_array().unwrap().len());
    assert_eq!(lens, [ids(prompt).len() + 1; 4]);
    assert_eq!((&logprobs["tokens"][0], &logprobs["token_logprobs"][0]), (&json!("<s>"), &Value::Null));
    assert!(logprobs["token_logprobs"][1].is_number() && logprobs["top_logprobs"][1].is_object());
    assert_eq!(scored["choices"][0]["text"], prompt);
    let streamed = server.complete(with(body, json!({"stream": true}))).await.chunks();
    assert_eq!(streamed[0]["choices"][0]["logprobs"], logprobs);
    assert_eq!(content(&streamed, 0), prompt);
}

#[tokio::test]
async fn offsets_count_characters_of_the_shown_text() {
    let server = server(scripted(say("été x")));
    let answer = server.complete(json!({"prompt": "né", "echo": true, "logprobs": 0})).await.json();
    let (text, logprobs) =
        (answer["choices"][0]["text"].as_str().unwrap(), &answer["choices"][0]["logprobs"]);
    let chars: Vec<char> = text.chars().collect();
    for (token, offset) in
        logprobs["tokens"].as_array().unwrap().iter().zip(logprobs["text_offset"].as_array().unwrap())
    {
        let (token, offset) = (token.as_str().unwrap(), offset.as_u64().unwrap() as usize);
        let found: String = chars[offset..].iter().take(token.chars().count()).collect();
        assert!(
            found == token || token == "<s>" || token.starts_with("bytes:"),
            "{token:?} is not at {offset} of {text:?}"
        );
    }
}

#[tokio::test]
async fn the_best_of_many_is_returned_and_all_are_counted() {
    let server = server(scripted(Vec::new()));
    let body =
        json!({"best_of": 4, "n": 1, "max_tokens": 5, "temperature": 2, "seed": 1, "ignore_eos": true});
    let best = server.complete(body.clone()).await.json();
    assert_eq!(best["choices"].as_array().unwrap().len(), 1);
    assert_eq!(best["choices"][0]["logprobs"], Value::Null);
    assert_eq!(best["usage"]["completion_tokens"], 20);
    let all = server.complete(with(body, json!({"n": 4, "logprobs": 0}))).await.json();
    let mean = |choice: &Value| {
        let logprobs: Vec<f64> = choice["logprobs"]["token_logprobs"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(Value::as_f64)
            .collect();
        logprobs.iter().sum::<f64>() / logprobs.len() as f64
    };
    let likeliest =
        all["choices"].as_array().unwrap().iter().max_by(|a, b| mean(a).total_cmp(&mean(b))).unwrap();
    assert_eq!(best["choices"][0]["text"], likeliest["text"]);
}

#[tokio::test]
async fn seeds_repeat_an_answer_and_other_seeds_do_not() {
    let server = server(scripted(Vec::new()));
    let text = |seed: i64| {
        let body = json!({"seed": seed, "temperature": 1, "max_tokens": 12, "ignore_eos": true});
        async { server.complete(body).await.json()["choices"][0]["text"].clone() }
    };
    assert_eq!(text(7).await, text(7).await);
    assert_ne!(text(7).await, text(-8).await);
}
