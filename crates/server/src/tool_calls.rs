//! Tool calls as Mistral's models write them: after the token `[TOOL_CALLS]`, a JSON list of
//! `{"name": ..., "arguments": {...}}`.

use serde_json::Value;

use crate::random;
use crate::text::python_json;

/// One call that the model wants made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ToolCall {
    /// A fresh name for the call, by which its result comes back.
    pub(crate) id: String,
    pub(crate) name: String,
    /// A JSON object, as text.
    pub(crate) arguments: String,
}

/// Reads the list; `None` if it is not one.
pub(crate) fn parse(written: &str) -> Option<Vec<ToolCall>> {
    let Value::Array(items) = serde_json::from_str(written.trim()).ok()? else { return None };
    let calls: Option<Vec<ToolCall>> = items.iter().map(call).collect();
    calls.filter(|calls| !calls.is_empty())
}

fn call(item: &Value) -> Option<ToolCall> {
    let name = item["name"].as_str()?.to_owned();
    let arguments = match item.get("arguments").or_else(|| item.get("parameters")) {
        None => "{}".to_owned(),
        Some(Value::String(arguments)) => arguments.clone(),
        Some(arguments @ Value::Object(_)) => python_json::to_string(arguments).ok()?,
        Some(_) => return None,
    };
    Some(ToolCall { id: random::call_id(), name, arguments })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_calls_are_read_and_anything_else_is_not() {
        let calls = parse(r#" [{"name": "f", "arguments": {"b": 1, "a": "é"}}, {"name": "g"}]"#).unwrap();
        let read: Vec<_> = calls.iter().map(|call| (call.name.as_str(), call.arguments.as_str())).collect();
        assert_eq!(read, [("f", r#"{"b": 1, "a": "é"}"#), ("g", "{}")]);
        assert_ne!(calls[0].id, calls[1].id);
        for other in ["", "[]", "{}", "[1]", r#"[{"arguments": {}}]"#, r#"[{"name": "f", "arguments": 1}]"#] {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
