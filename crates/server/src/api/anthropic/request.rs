//! What `POST /v1/messages` takes, translated into a chat's fields.
//!
//! ```text
//! system                              ─► a system message
//! user: text, tool_result             ─► tool messages, then a user message
//! assistant: text, tool_use           ─► an assistant message with calls
//! ```

use serde_json::{Map, Value, json};

use crate::api::chat::ChatRequest;
use crate::api::fields::{Fields, list_at, missing, string_at, wrong_type, wrong_value};
use crate::api::params::{indexed, required};
use crate::config::limits;
use crate::error::{ApiError, quoted};
use crate::state::AppState;

/// Fields that chat has under the same name.
pub(crate) const SHARED: [&str; 11] = [
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stream",
    "sse_ping_interval",
    "priority",
    "deadline_ms",
    "cache_salt",
];

/// Whether a request says how long its answer may be.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Budget {
    Required,
    Absent,
}

/// Takes a request as the chat that it means.
pub(super) fn take(mut fields: Fields, state: &AppState, budget: Budget) -> Result<ChatRequest, ApiError> {
    let max_bytes = state.config.max_prompt_bytes;
    let mut chat = Map::new();
    for name in SHARED {
        chat.extend(fields.take(name).map(|value| (name.to_owned(), value)));
    }
    if budget == Budget::Required {
        chat.insert("max_completion_tokens".into(), required(&mut fields, "max_tokens")?);
    }
    chat.extend(fields.take("stop_sequences").map(|stops| ("stop".to_owned(), stops)));
    check_labels(&mut fields)?;
    let mut messages = Vec::new();
    if let Some(system) = fields.take("system") {
        let content = texts("system", system, max_bytes)?;
        messages.push(json!({"role": "system", "content": content}));
    }
    let path = fields.path("messages");
    let given = fields.list("messages", limits::MAX_MESSAGES)?.ok_or_else(|| missing(path))?;
    for (path, message) in indexed("messages", given) {
        take_message(Fields::of(message, path)?, max_bytes, &mut messages)?;
    }
    chat.insert("messages".into(), Value::Array(messages));
    take_tools(&mut fields, &mut chat)?;
    fields.finish()?;
    let chat = Fields::translated(chat);
    ChatRequest::take(chat, state).map_err(|error| error.renamed(own_name))
}

/// Fields that change nothing, or say that nothing is wanted which there is not.
fn check_labels(fields: &mut Fields) -> Result<(), ApiError> {
    if let Some(mut metadata) = fields.object("metadata")? {
        metadata.string("user_id", limits::MAX_LABEL_BYTES)?;
        metadata.finish()?;
    }
    let tier = fields.string("service_tier", limits::MAX_LABEL_BYTES)?;
    if tier.is_some_and(|tier| tier != "auto" && tier != "standard_only") {
        return Err(wrong_value("service_tier", "expected 'auto' or 'standard_only'"));
    }
    if let Some(mut thinking) = fields.object("thinking")? {
        let path = thinking.path("type");
        if thinking.string("type", limits::MAX_LABEL_BYTES)?.as_deref() != Some("disabled") {
            return Err(wrong_value(&path, "this model does not think aloud; only 'disabled' is supported"));
        }
        thinking.finish()?;
    }
    Ok(())
}

fn take_message(mut fields: Fields, max_bytes: usize, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    let (role_path, path) = (fields.path("role"), fields.path("content"));
    let role = required(&mut fields, "role")?;
    if role != "user" && role != "assistant" {
        let role = quoted(role.as_str().unwrap_or("?"));
        return Err(wrong_value(&role_path, &format!("expected 'user' or 'assistant', but got {role}")));
    }
    let content = required(&mut fields, "content")?;
    fields.finish()?;
    let blocks = match content {
        Value::Array(blocks) => list_at(&path, Value::Array(blocks), limits::MAX_MESSAGES)?,
        text @ Value::String(_) => {
            let text = string_at(&path, text, max_bytes)?;
            messages.push(json!({"role": role, "content": text}));
            return Ok(());
        }
        other => return Err(wrong_type(&path, "a string or an array of blocks", &other)),
    };
    let (mut parts, mut calls) = (Vec::new(), Vec::new());
    for (path, block) in indexed(&path, blocks) {
        let mut block = Fields::of(block, path)?;
        let kind_path = block.path("type");
        let kind = block.string("type", limits::MAX_LABEL_BYTES)?.ok_or_else(|| missing(&kind_path))?;
        match kind.as_str() {
            "text" => parts.push(json!({"type": "text", "text": take_text(&mut block, max_bytes)?})),
            "tool_use" if role == "assistant" => calls.push(take_call(&mut block)?),
            "tool_result" if role == "user" => messages.push(take_result(&mut block, max_bytes)?),
            other => {
                let expected = format!("this model cannot read {} of {role} messages", quoted(other));
                return Err(wrong_value(&kind_path, &expected));
            }
        }
        take_cache_control(&mut block)?;
        block.finish()?;
    }
    let mut message = json!({"role": role});
    if !parts.is_empty() {
        message["content"] = Value::Array(parts);
    }
    if !calls.is_empty() {
        message["tool_calls"] = Value::Array(calls);
    }
    // What a user says beside results of calls follows them; there need not be anything.
    if message.as_object().is_some_and(|message| message.len() > 1) {
        messages.push(message);
    }
    Ok(())
}

fn take_text(block: &mut Fields, max_bytes: usize) -> Result<String, ApiError> {
    let path = block.path("text");
    block.string("text", max_bytes)?.ok_or_else(|| missing(path))
}

fn take_call(block: &mut Fields) -> Result<Value, ApiError> {
    let (id, name) = (required(block, "id")?, required(block, "name")?);
    let path = block.path("input");
    let input = match required(block, "input")? {
        input @ Value::Object(_) => input.to_string(),
        other => return Err(wrong_type(&path, "an object", &other)),
    };
    Ok(json!({"id": id, "type": "function", "function": {"name": name, "arguments": input}}))
}

fn take_result(block: &mut Fields, max_bytes: usize) -> Result<Value, ApiError> {
    let id = required(block, "tool_use_id")?;
    let path = block.path("content");
    let content = match block.take("content") {
        Some(content) => texts(&path, content, max_bytes)?,
        None => String::new(),
    };
    // The model reads in the content itself what went wrong.
    block.boolean("is_error")?;
    Ok(json!({"role": "tool", "tool_call_id": id, "content": content}))
}

/// Text, or blocks of text.
fn texts(path: &str, content: Value, max_bytes: usize) -> Result<String, ApiError> {
    let blocks = match content {
        text @ Value::String(_) => return string_at(path, text, max_bytes),
        blocks @ Value::Array(_) => list_at(path, blocks, limits::MAX_MESSAGES)?,
        other => return Err(wrong_type(path, "a string or an array of text blocks", &other)),
    };
    let text = |(path, block): (String, Value)| {
        let mut block = Fields::of(block, path)?;
        let kind_path = block.path("type");
        if required(&mut block, "type")? != "text" {
            return Err(wrong_value(&kind_path, "this model reads only 'text' here"));
        }
        let text = take_text(&mut block, max_bytes)?;
        take_cache_control(&mut block)?;
        block.finish()?;
        Ok(text)
    };
    let texts: Result<Vec<String>, ApiError> = indexed(path, blocks).into_iter().map(text).collect();
    Ok(texts?.join("\n"))
}

/// Prefixes are cached for everyone without being asked.
fn take_cache_control(block: &mut Fields) -> Result<(), ApiError> {
    block.object("cache_control").map(|_| ())
}

fn take_tools(fields: &mut Fields, chat: &mut Map<String, Value>) -> Result<(), ApiError> {
    if let Some(tools) = fields.list("tools", limits::MAX_TOOLS)? {
        let tools: Result<Vec<Value>, ApiError> = indexed("tools", tools)
            .into_iter()
            .map(|(path, tool)| take_tool(Fields::of(tool, path)?))
            .collect();
        chat.insert("tools".into(), Value::Array(tools?));
    }
    let Some(mut choice) = fields.object("tool_choice")? else { return Ok(()) };
    let kind_path = choice.path("type");
    let translated = match required(&mut choice, "type")?.as_str() {
        Some("auto") => json!("auto"),
        Some("none") => json!("none"),
        Some("any") => json!("required"),
        Some("tool") => json!({"type": "function", "function": {"name": required(&mut choice, "name")?}}),
        _ => return Err(wrong_value(&kind_path, "expected 'auto', 'any', 'tool' or 'none'")),
    };
    chat.insert("tool_choice".into(), translated);
    if let Some(is_single) = choice.boolean("disable_parallel_tool_use")? {
        chat.insert("parallel_tool_calls".into(), json!(!is_single));
    }
    choice.finish()
}

fn take_tool(mut tool: Fields) -> Result<Value, ApiError> {
    let kind_path = tool.path("type");
    if tool.take("type").is_some_and(|kind| kind != "custom") {
        return Err(wrong_value(
            &kind_path,
            "this server has no tools of its own; only 'custom' is supported",
        ));
    }
    let mut function = Map::from_iter([("name".to_owned(), required(&mut tool, "name")?)]);
    function.insert("parameters".to_owned(), required(&mut tool, "input_schema")?);
    function.extend(tool.take("description").map(|text| ("description".to_owned(), text)));
    take_cache_control(&mut tool)?;
    tool.finish()?;
    Ok(json!({"type": "function", "function": function}))
}

/// The name here of a chat's field.
pub(super) fn own_name(chats: &str) -> String {
    match chats {
        "max_completion_tokens" => "max_tokens".to_owned(),
        "parallel_tool_calls" => "tool_choice.disable_parallel_tool_use".to_owned(),
        stop if stop == "stop" || stop.starts_with("stop[") => stop.replacen("stop", "stop_sequences", 1),
        // A system message and results of calls shift the others.
        messages if messages.starts_with("messages[") => "messages".to_owned(),
        tool if tool.starts_with("tool") => {
            tool.replace(".function.parameters", ".input_schema").replace(".function", "")
        }
        other => other.to_owned(),
    }
}
