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
    vec![
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
            "max_completion_tokens": 30,
            "stream": true,
            "stream_options": {"include_usage": true, "continuous_usage_stats": true},
        }),
    ]
}

pub(super) fn completion() -> Vec<Value> {
    vec![
        json!({"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0.5, "seed": 7, "stop": ["."]}),
        json!({"prompt": [[1, 300], [1, 301]], "max_tokens": 2, "stream": true, "stream_options": {"include_usage": true}}),
    ]
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
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": true},
            "metadata": {"user_id": "ada"},
            "thinking": {"type": "disabled"},
        }),
    ]
}

pub(super) fn tokenize() -> Vec<Value> {
    vec![json!({"prompt": "Hello", "add_special_tokens": false}), chat_tokens()]
}

fn chat_tokens() -> Value {
    let mut body = chat().swap_remove(1);
    let Value::Object(fields) = &mut body else { return body };
    fields.retain(|name, _| name == "messages" || name.starts_with("tool"));
    body
}

pub(super) fn detokenize() -> Vec<Value> {
    vec![json!({"tokens": [300, 301]})]
}
