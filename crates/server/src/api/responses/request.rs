//! What `POST /v1/responses` takes, translated into a chat's fields.
//!
//! Fields that mean the same there keep their values and are checked there; an error about one comes back under
//! the name that it has here. What only Responses have is taken here.

use serde_json::{Map, Value, json};

use super::items;
use crate::api::chat::ChatRequest;
use crate::api::fields::{Fields, missing, wrong_value};
use crate::api::params::indexed;
use crate::auth::Caller;
use crate::config::limits;
use crate::error::{ApiError, quoted};
use crate::state::AppState;

/// Fields that chat has under the same name: OpenAI's, and those that come with this server.
pub(crate) const SHARED: [&str; 29] = [
    "model",
    "temperature",
    "top_p",
    "top_logprobs",
    "parallel_tool_calls",
    "metadata",
    "user",
    "safety_identifier",
    "prompt_cache_key",
    "service_tier",
    "stream",
    "sse_ping_interval",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "priority",
    "deadline_ms",
    "cache_salt",
    "tool_choice",
    "tools",
    "max_output_tokens",
];
/// What `include` may name: the one that there is, and one that asks for something that never is.
pub(crate) const INCLUDABLE: [&str; 2] = [LOGPROBS, "reasoning.encrypted_content"];
const LOGPROBS: &str = "message.output_text.logprobs";

/// A response as it was asked for.
pub(crate) struct ResponseRequest {
    pub(crate) chat: ChatRequest,
    /// The fields of the response object that repeat the request.
    pub(crate) object: Map<String, Value>,
    /// All items to answer, those of earlier responses included.
    pub(crate) input: Vec<Value>,
    /// Whether the response can be gone back to.
    pub(crate) is_stored: bool,
}

impl ResponseRequest {
    pub(crate) fn take(mut fields: Fields, state: &AppState, caller: Caller) -> Result<Self, ApiError> {
        let max_bytes = state.config.max_prompt_bytes;
        let previous = fields.string("previous_response_id", limits::MAX_LABEL_BYTES)?;
        let instructions = fields.string("instructions", max_bytes)?;
        let own_input = items::take(&mut fields, max_bytes)?;
        let is_stored = fields.boolean("store")?.unwrap_or(true);
        let with_logprobs = take_include(&mut fields)?;
        check_unsupported(&mut fields)?;
        let mut chat = Map::new();
        let format = take_text(&mut fields, &mut chat)?;
        take_shared(&mut fields, &mut chat, with_logprobs)?;
        fields.finish()?;

        let mut object = echo(&chat);
        object.insert("previous_response_id".into(), json!(previous));
        object.insert("instructions".into(), json!(instructions));
        object.insert("store".into(), json!(is_stored));
        object.insert("text".into(), json!({"format": format, "verbosity": "medium"}));
        let mut input = match &previous {
            Some(id) => earlier_items(state, id, caller)?,
            None => Vec::new(),
        };
        input.extend(own_input);
        if input.len() > limits::MAX_MESSAGES {
            let expected = format!("with the items before it, it has more than {}", limits::MAX_MESSAGES);
            return Err(wrong_value("input", &expected));
        }
        chat.insert("messages".into(), items::messages(instructions.as_deref(), &input).into());
        let chat = Fields::translated(into_chats(chat)?);
        let chat = ChatRequest::take(chat, state).map_err(|error| error.renamed(own_name))?;
        Ok(Self { chat, object, input, is_stored })
    }
}

/// The items of an earlier response and what it answered.
fn earlier_items(state: &AppState, id: &str, caller: Caller) -> Result<Vec<Value>, ApiError> {
    let previous =
        state.responses.get(id, caller).ok_or_else(|| ApiError::previous_response_not_found(id))?;
    let mut items: Vec<Value> = serde_json::from_str(&previous.input).map_err(|_| ApiError::internal())?;
    let response: Value = serde_json::from_str(&previous.response).map_err(|_| ApiError::internal())?;
    items.extend(response["output"].as_array().into_iter().flatten().cloned());
    Ok(items)
}

fn take_include(fields: &mut Fields) -> Result<bool, ApiError> {
    let mut with_logprobs = false;
    for (path, name) in indexed("include", fields.list("include", limits::MAX_TOOLS)?.unwrap_or_default()) {
        if !INCLUDABLE.iter().any(|includable| name == *includable) {
            return Err(wrong_value(&path, &format!("only '{LOGPROBS}' can be included")));
        }
        with_logprobs |= name == LOGPROBS;
    }
    Ok(with_logprobs)
}

/// Fields that may say that nothing is wanted which there is not.
fn check_unsupported(fields: &mut Fields) -> Result<(), ApiError> {
    if fields.boolean("background")? == Some(true) {
        return Err(wrong_value(
            "background",
            "this server answers at once; leave it out or set it to false",
        ));
    }
    if let Some(mut reasoning) = fields.object("reasoning")? {
        let path = reasoning.path("effort");
        let effort = reasoning.string("effort", limits::MAX_LABEL_BYTES)?;
        if effort.is_some_and(|effort| effort != "none") {
            return Err(wrong_value(&path, "this model does not reason; only 'none' is supported"));
        }
        reasoning.finish()?;
    }
    match fields.string("truncation", limits::MAX_LABEL_BYTES)?.as_deref() {
        None | Some("disabled") => Ok(()),
        Some(other) => {
            Err(wrong_value("truncation", &format!("only 'disabled' is supported, not {}", quoted(other))))
        }
    }
}

/// `text`: its format as a chat has it; returns it as it came.
fn take_text(fields: &mut Fields, chat: &mut Map<String, Value>) -> Result<Value, ApiError> {
    let plain = || json!({"type": "text"});
    let Some(mut text) = fields.object("text")? else { return Ok(plain()) };
    chat.extend(text.take("verbosity").map(|verbosity| ("verbosity".to_owned(), verbosity)));
    let format = text.take("format");
    text.finish()?;
    let Some(format) = format else { return Ok(plain()) };
    let translated = match format.clone() {
        Value::Object(mut flat) if flat.get("type").is_some_and(|kind| kind == "json_schema") => {
            flat.shift_remove("type");
            json!({"type": "json_schema", "json_schema": flat})
        }
        other => other,
    };
    chat.insert("response_format".to_owned(), translated);
    Ok(format)
}

fn take_shared(
    fields: &mut Fields,
    chat: &mut Map<String, Value>,
    with_logprobs: bool,
) -> Result<(), ApiError> {
    for name in SHARED {
        chat.extend(fields.take(name).map(|value| (name.to_owned(), value)));
    }
    if with_logprobs || chat.contains_key("top_logprobs") {
        chat.insert("logprobs".to_owned(), json!(true));
    }
    Ok(())
}

/// What a response object repeats, with OpenAI's defaults.
fn echo(chat: &Map<String, Value>) -> Map<String, Value> {
    let mut object = Map::new();
    for (name, default) in [
        ("temperature", json!(1.0)),
        ("top_p", json!(1.0)),
        ("top_logprobs", json!(0)),
        ("parallel_tool_calls", json!(true)),
        ("metadata", json!({})),
        ("user", Value::Null),
        ("safety_identifier", Value::Null),
        ("prompt_cache_key", Value::Null),
        ("tool_choice", json!("auto")),
        ("tools", json!([])),
        ("max_output_tokens", Value::Null),
        ("background", json!(false)),
        ("truncation", json!("disabled")),
        ("reasoning", json!({"effort": null, "summary": null})),
        ("service_tier", json!("default")),
    ] {
        let is_given = SHARED.contains(&name) && name != "service_tier";
        object.insert(name.to_owned(), chat.get(name).filter(|_| is_given).cloned().unwrap_or(default));
    }
    object
}

/// Fields whose values are spelled otherwise in a chat.
fn into_chats(mut chat: Map<String, Value>) -> Result<Map<String, Value>, ApiError> {
    if let Some(max_tokens) = chat.shift_remove("max_output_tokens") {
        chat.insert("max_completion_tokens".to_owned(), max_tokens);
    }
    if let Some(Value::Array(tools)) = chat.get_mut("tools") {
        for (index, tool) in tools.iter_mut().enumerate() {
            nest_tool(&format!("tools[{index}]"), tool)?;
        }
    }
    if let Some(Value::Object(choice)) = chat.get_mut("tool_choice")
        && let Some(name) = choice.shift_remove("name")
    {
        choice.insert("function".to_owned(), json!({"name": name}));
    }
    Ok(chat)
}

/// A function as a chat has it. Hosted tools are named in the refusal, because clients of OpenAI's know them.
fn nest_tool(path: &str, tool: &mut Value) -> Result<(), ApiError> {
    let Value::Object(flat) = tool else { return Ok(()) };
    let kind_path = format!("{path}.type");
    match flat.shift_remove("type") {
        None => return Err(missing(kind_path)),
        Some(kind) if kind == "function" => {}
        Some(kind) => {
            let kind = quoted(kind.as_str().unwrap_or("?"));
            let expected = format!("only 'function' is supported; this server has no {kind}");
            return Err(wrong_value(&kind_path, &expected));
        }
    }
    if flat.get("strict") == Some(&json!(false)) {
        flat.shift_remove("strict");
    }
    *tool = json!({"type": "function", "function": std::mem::take(flat)});
    Ok(())
}

/// The name here of a chat's field.
pub(crate) fn own_name(chats: &str) -> String {
    let is_under = |name: &str| chats == name || chats.starts_with(&format!("{name}["));
    match chats {
        "max_completion_tokens" | "max_tokens" => "max_output_tokens".to_owned(),
        "logprobs" => "include".to_owned(),
        "verbosity" => "text.verbosity".to_owned(),
        _ if is_under("messages") => "input".to_owned(),
        format if format.starts_with("response_format") => {
            format.replace("response_format", "text.format").replace(".json_schema", "")
        }
        tool if tool.starts_with("tool") => tool.replace(".function", ""),
        other => other.to_owned(),
    }
}
