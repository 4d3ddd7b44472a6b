//! Input items: taken, checked and put in one form, which is stored; and from that form to a chat's messages.
//!
//! ```text
//! "hi"                                             message   role, content parts
//! {"role": ..., "content": ...}                ─►  function_call           call_id, name, arguments
//! {"type": "message" | "function_call" | ...}      function_call_output    call_id, output
//! ```
//!
//! An answer with calls is one message of a chat and several items here, so neighbours are joined. What a model
//! cannot read (images, files, reasoning, hosted tools' calls) is refused.

use serde_json::{Value, json};

use crate::api::fields::{Fields, list_at, missing, string_at, wrong_type, wrong_value};
use crate::api::params::{indexed, required};
use crate::config::limits;
use crate::error::{ApiError, quoted};
use crate::random;

/// Takes `input`.
pub(super) fn take(fields: &mut Fields, max_bytes: usize) -> Result<Vec<Value>, ApiError> {
    let items = match required(fields, "input")? {
        text @ Value::String(_) => {
            let text = string_at("input", text, max_bytes)?;
            return Ok(vec![message("user", vec![part("user", text)])]);
        }
        items @ Value::Array(_) => list_at("input", items, limits::MAX_MESSAGES)?,
        other => return Err(wrong_type("input", "a string or an array of items", &other)),
    };
    if items.is_empty() {
        return Err(wrong_value("input", "expected at least one item"));
    }
    let item = |(path, item)| Fields::of(item, path).and_then(|fields| take_item(fields, max_bytes));
    indexed("input", items).into_iter().map(item).collect()
}

fn take_item(mut item: Fields, max_bytes: usize) -> Result<Value, ApiError> {
    // Items of an answer come back with these, which say nothing to the model.
    item.string("id", limits::MAX_LABEL_BYTES)?;
    item.string("status", limits::MAX_LABEL_BYTES)?;
    let kind_path = item.path("type");
    let kind = item.string("type", limits::MAX_LABEL_BYTES)?;
    let taken = match kind.as_deref().unwrap_or("message") {
        "message" => take_message(&mut item, max_bytes)?,
        "function_call" => take_call(&mut item, max_bytes)?,
        "function_call_output" => {
            let call_id = label(&mut item, "call_id")?;
            let path = item.path("output");
            let output = required(&mut item, "output")?;
            let output = take_parts(&path, output, max_bytes)?.join("\n");
            json!({"id": random::id("fco_"), "type": "function_call_output", "call_id": call_id, "output": output,
                   "status": "completed"})
        }
        other => {
            let expected = "expected 'message', 'function_call' or 'function_call_output', but got";
            return Err(wrong_value(&kind_path, &format!("{expected} {}", quoted(other))));
        }
    };
    item.finish()?;
    Ok(taken)
}

fn take_message(item: &mut Fields, max_bytes: usize) -> Result<Value, ApiError> {
    let role_path = item.path("role");
    let role = label(item, "role")?;
    if !["user", "assistant", "system", "developer"].contains(&role.as_str()) {
        let expected = "expected 'user', 'assistant', 'system' or 'developer', but got";
        return Err(wrong_value(&role_path, &format!("{expected} {}", quoted(&role))));
    }
    let path = item.path("content");
    let content = required(item, "content")?;
    let parts = take_parts(&path, content, max_bytes)?;
    Ok(message(&role, parts.into_iter().map(|text| part(&role, text)).collect()))
}

/// Text, or parts with text.
fn take_parts(path: &str, content: Value, max_bytes: usize) -> Result<Vec<String>, ApiError> {
    match content {
        text @ Value::String(_) => Ok(vec![string_at(path, text, max_bytes)?]),
        parts @ Value::Array(_) => {
            let parts = indexed(path, list_at(path, parts, limits::MAX_MESSAGES)?).into_iter();
            parts.map(|(path, part)| take_part(Fields::of(part, path)?, max_bytes)).collect()
        }
        other => Err(wrong_type(path, "a string or an array of parts", &other)),
    }
}

fn take_part(mut part: Fields, max_bytes: usize) -> Result<String, ApiError> {
    let kind_path = part.path("type");
    let kind = label(&mut part, "type")?;
    if !["input_text", "output_text", "text"].contains(&kind.as_str()) {
        let expected = format!("this model reads only text, not {}", quoted(&kind));
        return Err(wrong_value(&kind_path, &expected));
    }
    let path = part.path("text");
    let text = part.string("text", max_bytes)?.ok_or_else(|| missing(path))?;
    // An answer's parts come back with these.
    part.list("annotations", limits::MAX_MESSAGES)?;
    part.take("logprobs");
    part.finish()?;
    Ok(text)
}

fn take_call(item: &mut Fields, max_bytes: usize) -> Result<Value, ApiError> {
    let (call_id, name) = (label(item, "call_id")?, label(item, "name")?);
    let path = item.path("arguments");
    let arguments = item.string("arguments", max_bytes)?.ok_or_else(|| missing(&path))?;
    let is_object = |text: &str| serde_json::from_str::<Value>(text).is_ok_and(|value| value.is_object());
    if !arguments.trim().is_empty() && !is_object(&arguments) {
        return Err(wrong_value(&path, "expected a JSON object"));
    }
    Ok(json!({"id": random::id("fc_"), "type": "function_call", "call_id": call_id, "name": name,
              "arguments": arguments, "status": "completed"}))
}

fn label(item: &mut Fields, name: &str) -> Result<String, ApiError> {
    let path = item.path(name);
    item.string(name, limits::MAX_LABEL_BYTES)?.ok_or_else(|| missing(path))
}

fn message(role: &str, content: Vec<Value>) -> Value {
    json!({"id": random::id("msg_"), "type": "message", "role": role, "status": "completed", "content": content})
}

fn part(role: &str, text: String) -> Value {
    match role {
        "assistant" => json!({"type": "output_text", "text": text, "annotations": []}),
        _ => json!({"type": "input_text", "text": text}),
    }
}

/// A chat's messages, of items as [`take`] and answers have them.
pub(super) fn messages(instructions: Option<&str>, items: &[Value]) -> Vec<Value> {
    let system = instructions.map(|text| json!({"role": "system", "content": text}));
    let mut messages: Vec<Value> = system.into_iter().collect();
    for item in items {
        match item["type"].as_str().unwrap_or_default() {
            "function_call" => push_call(&mut messages, item),
            "function_call_output" => messages
                .push(json!({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})),
            _ => {
                let parts = item["content"].as_array().into_iter().flatten();
                let parts = parts.map(|part| json!({"type": "text", "text": part["text"]}));
                messages.push(json!({"role": item["role"], "content": parts.collect::<Vec<_>>()}));
            }
        }
    }
    messages
}

/// A call belongs to the message of the same answer, or to the calls beside it.
fn push_call(messages: &mut Vec<Value>, item: &Value) {
    let call = json!({
        "id": item["call_id"],
        "type": "function",
        "function": {"name": item["name"], "arguments": item["arguments"]},
    });
    let last = messages.last_mut().filter(|message| message["role"] == "assistant");
    let Some(Value::Object(answer)) = last else {
        messages.push(json!({"role": "assistant", "content": null, "tool_calls": [call]}));
        return;
    };
    match answer.get_mut("tool_calls") {
        Some(Value::Array(calls)) => calls.push(call),
        _ => {
            answer.insert("tool_calls".to_owned(), json!([call]));
        }
    }
}
