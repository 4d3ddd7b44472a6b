//! The messages of a conversation, from OpenAI's form to the one that chat templates read.
//!
//! Templates were written against `transformers`: content is one string (text parts are joined by line
//! ends, as vLLM does), `developer` is `system`, and the arguments of earlier tool calls are objects.

use serde_json::{Map, Value, json};

use super::fields::{Fields, list_at, missing, string_at, wrong_type, wrong_value};
use super::params::indexed;
use crate::config::limits;
use crate::error::{ApiError, quoted};

/// Takes `messages`, each checked, in the form that chat templates read.
pub(crate) fn take(fields: &mut Fields, max_bytes: usize) -> Result<Vec<Value>, ApiError> {
    let path = fields.path("messages");
    let messages = fields.list("messages", limits::MAX_MESSAGES)?.ok_or_else(|| missing(&path))?;
    if messages.is_empty() {
        return Err(wrong_value(&path, "expected at least one message"));
    }
    let message = |(path, value)| Fields::of(value, path).and_then(|fields| message(fields, max_bytes));
    indexed(&path, messages).into_iter().map(message).collect()
}

fn message(mut fields: Fields, max_bytes: usize) -> Result<Value, ApiError> {
    let role_path = fields.path("role");
    let role = fields.string("role", limits::MAX_LABEL_BYTES)?.ok_or_else(|| missing(&role_path))?;
    let role = match role.as_str() {
        "developer" => "system",
        "system" | "user" | "assistant" | "tool" => &role,
        other => {
            let expected = "expected 'system', 'developer', 'user', 'assistant' or 'tool', but got";
            return Err(wrong_value(&role_path, &format!("{expected} {}", quoted(other))));
        }
    };
    let mut message = Map::from_iter([("role".to_owned(), json!(role))]);
    let content_path = fields.path("content");
    let content =
        fields.take("content").map(|content| text(&content_path, content, max_bytes)).transpose()?;
    let tool_calls = if role == "assistant" { take_tool_calls(&mut fields, max_bytes)? } else { None };
    if content.is_none() && tool_calls.is_none() {
        return Err(missing(content_path));
    }
    message.insert("content".to_owned(), json!(content));
    if let Some(tool_calls) = tool_calls {
        message.insert("tool_calls".to_owned(), tool_calls);
    }
    if role == "tool" {
        let path = fields.path("tool_call_id");
        let id = fields.string("tool_call_id", limits::MAX_LABEL_BYTES)?.ok_or_else(|| missing(path))?;
        message.insert("tool_call_id".to_owned(), json!(id));
    }
    if let Some(name) = fields.string("name", limits::MAX_LABEL_BYTES)? {
        message.insert("name".to_owned(), json!(name));
    }
    fields.finish()?;
    Ok(Value::Object(message))
}

/// Content as one string.
fn text(path: &str, content: Value, max_bytes: usize) -> Result<String, ApiError> {
    match content {
        text @ Value::String(_) => string_at(path, text, max_bytes),
        Value::Array(parts) => {
            let parts = list_at(path, Value::Array(parts), limits::MAX_MESSAGES)?;
            let texts: Result<Vec<String>, ApiError> = indexed(path, parts)
                .into_iter()
                .map(|(path, part)| Fields::of(part, path).and_then(|fields| text_part(fields, max_bytes)))
                .collect();
            Ok(texts?.join("\n"))
        }
        other => Err(wrong_type(path, "a string or an array of text parts", &other)),
    }
}

fn text_part(mut fields: Fields, max_bytes: usize) -> Result<String, ApiError> {
    let (type_path, text_path) = (fields.path("type"), fields.path("text"));
    let kind = fields.string("type", limits::MAX_LABEL_BYTES)?.ok_or_else(|| missing(&type_path))?;
    if kind != "text" {
        return Err(wrong_value(&type_path, &format!("this model reads only 'text', not {}", quoted(&kind))));
    }
    let text = fields.string("text", max_bytes)?.ok_or_else(|| missing(text_path))?;
    fields.finish()?;
    Ok(text)
}

fn take_tool_calls(fields: &mut Fields, max_bytes: usize) -> Result<Option<Value>, ApiError> {
    let path = fields.path("tool_calls");
    let Some(calls) = fields.list("tool_calls", limits::MAX_TOOLS)? else { return Ok(None) };
    let call = |(path, call)| Fields::of(call, path).and_then(|fields| tool_call(fields, max_bytes));
    let calls: Result<Vec<Value>, ApiError> = indexed(&path, calls).into_iter().map(call).collect();
    Ok(Some(calls?).filter(|calls| !calls.is_empty()).map(Value::Array))
}

fn tool_call(mut fields: Fields, max_bytes: usize) -> Result<Value, ApiError> {
    let (id_path, function_path) = (fields.path("id"), fields.path("function"));
    let id = fields.string("id", limits::MAX_LABEL_BYTES)?.ok_or_else(|| missing(id_path))?;
    take_function_type(&mut fields)?;
    let mut function = fields.object("function")?.ok_or_else(|| missing(function_path))?;
    fields.finish()?;
    let (name_path, arguments_path) = (function.path("name"), function.path("arguments"));
    let name = function.string("name", limits::MAX_LABEL_BYTES)?.ok_or_else(|| missing(name_path))?;
    let arguments = function.string("arguments", max_bytes)?.ok_or_else(|| missing(&arguments_path))?;
    function.finish()?;
    let arguments: Value = serde_json::from_str(if arguments.trim().is_empty() { "{}" } else { &arguments })
        .map_err(|error| wrong_value(&arguments_path, &format!("expected a JSON object, but {error}")))?;
    if !arguments.is_object() {
        return Err(wrong_value(&arguments_path, "expected a JSON object"));
    }
    Ok(json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}))
}

/// `type` of a tool or of a call, which can only be `function`.
pub(crate) fn take_function_type(fields: &mut Fields) -> Result<(), ApiError> {
    let path = fields.path("type");
    match fields.string("type", limits::MAX_LABEL_BYTES)?.as_deref() {
        None => Err(missing(path)),
        Some("function") => Ok(()),
        Some(other) => Err(wrong_value(&path, &format!("expected 'function', but got {}", quoted(other)))),
    }
}
