//! Bodies that are accepted as they are. Together they have every field that is described, and every form of it.

use serde_json::{Value, json};

pub(super) fn chat() -> Vec<Value> {
    let function = json!({
        "name": "get_weather",
        "description": "Current weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": false,
    });
    let called = json!({"name": "get_weather", "arguments": "{\"city\": \"Oslo\"}"});
    let plain = vec![
        json!({"messages": [{"role": "user", "content": "What is the capital of France?"}]}),
        json!({
            "messages": [
                {"role": "user", "name": "ada", "content": [{"type": "text", "text": "What is the weather in Oslo?"}]},
                {"role": "assistant", "tool_calls": [{"id": "abcdefghi", "type": "function", "function": called}]},
                {"role": "tool", "tool_call_id": "abcdefghi", "content": "7 degrees"},
            ],
            "tools": [{"type": "function", "function": function}],
            "tool_choice": "auto",
            "response_format": {"type": "text"},
            "routing": true,
            "max_completion_tokens": 30,
            "stream": true,
            "stream_options": {"include_usage": true, "continuous_usage_stats": true},
        }),
    ];
    let chosen = tool_choices().into_iter().map(|choice| {
        let mut body = plain[1].clone();
        body["tool_choice"] = choice;
        body
    });
    let chosen: Vec<Value> = chosen.collect();
    let outputs = json!({"json": {"type": "object", "properties": {"city": {"type": "string"}}}});
    let bound = json!({"messages": plain[0]["messages"], "max_tokens": 30, "structured_outputs": outputs});
    plain.into_iter().chain(chosen).chain([bound]).chain(steered(&bound_chat())).collect()
}

/// What is no plain word.
fn tool_choices() -> [Value; 2] {
    let named = json!({"type": "function", "function": {"name": "get_weather"}});
    [named.clone(), json!({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named]}})]
}

/// A chat whose answer is bound.
fn bound_chat() -> Value {
    let schema = json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]});
    json!({
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 30,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "description": "A city", "strict": true, "schema": schema},
        },
    })
}

/// The same body with each form of steering.
fn steered(body: &Value) -> Vec<Value> {
    let replay = json!({"start": 0, "layers": [1], "experts": [[[2, 5]]], "weights": [[[0.75, 0.25]]]});
    let packed = json!({
        "shape": [1, 1, 1], "layers": [0], "encoding": "base64", "experts": "AgA=", "weights": "AACAPw==",
    });
    let overrides = json!({
        "layers": [0], "top_k": 3, "ban": [0], "force": [1], "temperature": 2.0, "random": {"seed": 1},
    });
    let moe =
        [json!({"replay": replay}), json!({"replay": packed, "random": {"seed": 1}}), json!([overrides])];
    let record = json!({"layers": [0], "prompt": true, "encoding": "base64"});
    let steered = |moe| {
        let mut body = body.clone();
        (body["routing"], body["moe"]) = (record.clone(), moe);
        body
    };
    moe.into_iter().map(steered).collect()
}

pub(super) fn analysis() -> Vec<Value> {
    let text = json!({"name": "story", "text": "Once upon a time"});
    let mut chats = conversations();
    chats.iter_mut().for_each(|chat| chat["name"] = json!("chat"));
    let ablation = |body: Value| json!({"name": "other", "moe": body["moe"]});
    let ablations: Vec<Value> = steered(&json!({})).into_iter().map(ablation).collect();
    let texts: Vec<Value> = [text].into_iter().chain(chats).collect();
    let mut bodies = conversations();
    bodies.extend([
        json!({"text": "Once upon a time", "layers": [0], "tokens": true}),
        json!({"texts": texts, "ablations": ablations}),
    ]);
    bodies
}

pub(super) fn completion() -> Vec<Value> {
    let mut bodies = steered(&json!({"prompt": "Once", "max_tokens": 8, "regex": "[a-z]{1,4}"}));
    bodies.extend([
        json!({"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0.5, "seed": 7, "stop": ["."]}),
        json!({"prompt": "Once", "max_tokens": 8, "structured_outputs": {"choice": ["upon", "more"]}}),
        json!({"prompt": [[1, 300], [1, 301]], "max_tokens": 2, "stream": true, "stream_options": {"include_usage": true}}),
    ]);
    bodies
}

pub(super) fn response() -> Vec<Value> {
    let part = json!({"type": "output_text", "text": "Paris.", "annotations": [], "logprobs": []});
    vec![
        json!({"input": "What is the capital of France?", "instructions": "Be brief."}),
        json!({
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "What is the capital of France?"}]},
                {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [part]},
                {"role": "user", "content": "And the weather there?"},
                {"type": "function_call", "call_id": "abcdefghi", "name": "get_weather", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "abcdefghi", "output": [{"type": "input_text", "text": "7"}]},
            ],
            "tools": [{"type": "function", "name": "get_weather", "parameters": {"type": "object"}}],
            "include": ["message.output_text.logprobs"],
            "text": {"format": {"type": "text"}, "verbosity": "medium"},
            "reasoning": {"effort": "none"},
            "max_output_tokens": 30,
            "stream": true,
        }),
    ]
}

pub(super) fn message() -> Vec<Value> {
    let with_budget = |mut body: Value| {
        body["max_tokens"] = json!(30);
        body
    };
    message_count().into_iter().map(with_budget).collect()
}

pub(super) fn message_count() -> Vec<Value> {
    let cached = json!({"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}});
    let result = json!({
        "type": "tool_result",
        "tool_use_id": "abcdefghi",
        "content": [{"type": "text", "text": "7 degrees"}],
        "is_error": false,
    });
    vec![
        json!({"messages": [{"role": "user", "content": "What is the capital of France?"}]}),
        json!({
            "system": [cached],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "What is the weather in Oslo?"}]},
                {"role": "assistant", "content": [
                    {"type": "tool_use", "id": "abcdefghi", "name": "get_weather", "input": {"city": "Oslo"}},
                ]},
                {"role": "user", "content": [result]},
            ],
            "tools": [{"name": "get_weather", "description": "d", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": true},
            "metadata": {"user_id": "ada"},
            "thinking": {"type": "disabled"},
        }),
    ]
}

pub(super) fn tokenize() -> Vec<Value> {
    let mut bodies = conversations();
    bodies.push(json!({"prompt": "Hello", "add_special_tokens": false}));
    bodies
}

/// Messages and tools alone.
fn conversations() -> Vec<Value> {
    let mut bodies: Vec<Value> = chat().into_iter().filter(|body| body.get("tools").is_some()).collect();
    for fields in bodies.iter_mut().filter_map(Value::as_object_mut) {
        fields.retain(|name, _| name == "messages" || name.starts_with("tool"));
    }
    bodies
}

pub(super) fn detokenize() -> Vec<Value> {
    vec![json!({"tokens": [300, 301]})]
}
