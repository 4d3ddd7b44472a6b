//! The tools that a chat offers, and whether the model may, must or must not call them.
//!
//! Tools go to the chat template as the client wrote them. A model that may call (`auto`) does so when it
//! likes; one that must (`required`, a named tool) begins with the token of calls. What it then calls is a tool that
//! was offered, with an object for arguments: clients look names up, and a model may have read others in the
//! conversation. Arguments follow the schema of their tool where a call is forced or the tool is `strict`; elsewhere
//! they are the model's own affair.

use serde_json::{Value, json};

use super::fields::{Fields, missing, string_at, wrong_type, wrong_value};
use super::messages::take_function_type;
use super::params::indexed;
use super::structured::check_name;
use crate::config::limits;
use crate::constraint::{Calls, Tool};
use crate::error::{ApiError, quoted};
use crate::text::model::TextModel;

/// What a chat says about tools.
#[derive(Debug, Default)]
pub(crate) struct Tools {
    /// For the template; empty if none are offered.
    pub(crate) offered: Vec<Value>,
    /// Keeps only the first call of an answer.
    pub(crate) single_call: bool,
    /// The tools that may be called.
    pub(crate) callable: Vec<Callable>,
    /// The answer must be a call.
    pub(crate) is_forced: bool,
    /// The answer must be a call of one tool that the client named.
    pub(crate) is_named: bool,
}

/// A tool that may be called.
#[derive(Debug, Clone)]
pub(crate) struct Callable {
    name: String,
    parameters: Option<Value>,
    /// Where the request has its parameters.
    pub(crate) parameters_path: String,
    is_strict: bool,
}

/// Takes `tools`, `tool_choice` and `parallel_tool_calls`.
pub(crate) fn take(fields: &mut Fields, text: &TextModel) -> Result<Tools, ApiError> {
    let [path, choice_path] = ["tools", "tool_choice"].map(|name| fields.path(name));
    let offered = fields.list("tools", limits::MAX_TOOLS)?.unwrap_or_default();
    let callable = |(path, tool)| Fields::of(tool, path).and_then(take_tool);
    let callable: Result<_, ApiError> = indexed(&path, offered.clone()).into_iter().map(callable).collect();
    let single_call = !fields.boolean("parallel_tool_calls")?.unwrap_or(true);
    let tools = Tools { offered, single_call, callable: callable?, ..Tools::default() };
    let tools = match fields.take("tool_choice") {
        None => tools,
        Some(Value::String(choice)) => choose_mode(tools, &choice_path, &choice)?,
        Some(choice @ Value::Object(_)) => choose(tools, Fields::of(choice, choice_path)?)?,
        Some(other) => return Err(wrong_type(&choice_path, "a string or an object", &other)),
    };
    if !tools.offered.is_empty() && text.tool_calls_token.is_none() {
        return Err(wrong_value(&path, "this model has no token for tool calls"));
    }
    Ok(tools)
}

fn take_tool(mut tool: Fields) -> Result<Callable, ApiError> {
    take_function_type(&mut tool)?;
    let path = tool.path("function");
    let mut function = tool.object("function")?.ok_or_else(|| missing(path))?;
    tool.finish()?;
    let [name_path, parameters_path] = ["name", "parameters"].map(|name| function.path(name));
    let name = function.string("name", limits::MAX_NAME_BYTES)?.ok_or_else(|| missing(&name_path))?;
    check_name(&name_path, &name)?;
    function.string("description", usize::MAX)?;
    let parameters = function.take("parameters");
    if let Some(parameters) = &parameters {
        if !parameters.is_object() {
            return Err(wrong_type(&parameters_path, "an object", parameters));
        }
        string_at(&parameters_path, parameters.to_string().into(), limits::MAX_GRAMMAR_BYTES)?;
    }
    let is_strict = function.boolean("strict")?.unwrap_or(false);
    function.finish()?;
    Ok(Callable { name, parameters, parameters_path, is_strict })
}

fn choose_mode(tools: Tools, path: &str, mode: &str) -> Result<Tools, ApiError> {
    match mode {
        "auto" => Ok(tools),
        "none" => Ok(Tools::default()),
        "required" if tools.callable.is_empty() => {
            Err(wrong_value(path, "a call is required, but 'tools' has none"))
        }
        "required" => Ok(Tools { is_forced: true, ..tools }),
        other => {
            let expected = "expected 'none', 'auto', 'required' or an object, but got";
            Err(wrong_value(path, &format!("{expected} {}", quoted(other))))
        }
    }
}

/// A named tool, or a mode for some of the tools.
fn choose(tools: Tools, mut choice: Fields) -> Result<Tools, ApiError> {
    let type_path = choice.path("type");
    let kind = choice.string("type", limits::MAX_LABEL_BYTES)?.ok_or_else(|| missing(&type_path))?;
    match kind.as_str() {
        "function" => {
            let callable = vec![take_name(&tools, choice)?];
            Ok(Tools { callable, is_forced: true, is_named: true, single_call: true, ..tools })
        }
        "allowed_tools" => {
            let path = choice.path("allowed_tools");
            let mut allowed = choice.object("allowed_tools")?.ok_or_else(|| missing(path))?;
            choice.finish()?;
            let [mode_path, tools_path] = ["mode", "tools"].map(|name| allowed.path(name));
            let mode = allowed.string("mode", limits::MAX_LABEL_BYTES)?.ok_or_else(|| missing(&mode_path))?;
            let names = allowed.list("tools", limits::MAX_TOOLS)?.ok_or_else(|| missing(&tools_path))?;
            allowed.finish()?;
            let callable = |(path, name)| {
                let mut name = Fields::of(name, path)?;
                take_function_type(&mut name)?;
                take_name(&tools, name)
            };
            let callable: Result<Vec<_>, ApiError> =
                indexed(&tools_path, names).into_iter().map(callable).collect();
            let callable = callable?;
            if callable.is_empty() || !["auto", "required"].contains(&mode.as_str()) {
                return Err(wrong_value(&mode_path, "expected 'auto' or 'required', and at least one tool"));
            }
            choose_mode(Tools { callable, ..tools }, &mode_path, &mode)
        }
        other => {
            let expected = "expected 'function' or 'allowed_tools', but got";
            Err(wrong_value(&type_path, &format!("{expected} {}", quoted(other))))
        }
    }
}

/// The tool that `{"function": {"name": ...}}` names.
fn take_name(tools: &Tools, mut choice: Fields) -> Result<Callable, ApiError> {
    let path = choice.path("function");
    let mut function = choice.object("function")?.ok_or_else(|| missing(path))?;
    choice.finish()?;
    let path = function.path("name");
    let name = function.string("name", limits::MAX_NAME_BYTES)?.ok_or_else(|| missing(&path))?;
    function.finish()?;
    let named = tools.callable.iter().find(|tool| tool.name == name);
    named.cloned().ok_or_else(|| wrong_value(&path, &format!("{} is not among 'tools'", quoted(&name))))
}

impl Tools {
    /// What calls are bound to; `None` if there is nothing to call.
    pub(crate) fn calls(&self) -> Option<Calls> {
        if self.callable.is_empty() {
            return None;
        }
        // A tool without parameters takes none.
        let no_parameters = || json!({"type": "object", "properties": {}, "additionalProperties": false});
        let tool = |tool: &Callable| Tool {
            name: tool.name.clone(),
            parameters: (self.is_forced || tool.is_strict)
                .then(|| tool.parameters.clone().unwrap_or_else(no_parameters)),
        };
        Some(Calls { tools: self.callable.iter().map(tool).collect(), is_single: self.single_call })
    }
}
