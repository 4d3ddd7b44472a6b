//! The tools that a chat offers, and whether the model may call them.
//!
//! Tools go to the chat template as the client wrote them. The model calls them when it likes (`auto`);
//! forcing a call needs constrained output, so `required` and named choices are refused, and so is `strict`.

use serde_json::Value;

use super::fields::{Fields, missing, wrong_value};
use super::messages::take_function_type;
use super::params::indexed;
use crate::config::limits;
use crate::error::ApiError;
use crate::text::model::TextModel;

/// What a chat says about tools.
#[derive(Debug, Default)]
pub(crate) struct Tools {
    /// For the template; empty if none are offered.
    pub(crate) offered: Vec<Value>,
    /// Keeps only the first call of an answer.
    pub(crate) single_call: bool,
}

/// Takes `tools`, `tool_choice` and `parallel_tool_calls`.
pub(crate) fn take(fields: &mut Fields, text: &TextModel) -> Result<Tools, ApiError> {
    let offered = fields.list("tools", limits::MAX_TOOLS)?.unwrap_or_default();
    for (path, tool) in indexed("tools", offered.clone()) {
        check_tool(Fields::of(tool, path)?)?;
    }
    let may_call = match fields.take("tool_choice") {
        None => true,
        Some(Value::String(choice)) if choice == "auto" => true,
        Some(Value::String(choice)) if choice == "none" => false,
        Some(_) => return Err(wrong_value("tool_choice", "only 'none' and 'auto' are supported")),
    };
    let single_call = !fields.boolean("parallel_tool_calls")?.unwrap_or(true);
    if !offered.is_empty() && text.tool_calls_token.is_none() {
        return Err(wrong_value("tools", "this model has no token for tool calls"));
    }
    Ok(Tools { offered: if may_call { offered } else { Vec::new() }, single_call })
}

fn check_tool(mut tool: Fields) -> Result<(), ApiError> {
    take_function_type(&mut tool)?;
    let path = tool.path("function");
    let mut function = tool.object("function")?.ok_or_else(|| missing(path))?;
    tool.finish()?;
    let (name_path, strict_path) = (function.path("name"), function.path("strict"));
    let name = function.string("name", 64)?.ok_or_else(|| missing(&name_path))?;
    let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    if name.is_empty() || !name.bytes().all(is_letter) {
        return Err(wrong_value(&name_path, "expected letters, digits, '_' and '-'"));
    }
    function.string("description", usize::MAX)?;
    function.object("parameters")?;
    if function.boolean("strict")? == Some(true) {
        return Err(wrong_value(&strict_path, "strict arguments are not supported"));
    }
    function.finish()
}
