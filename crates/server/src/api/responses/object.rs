//! The response object, in each of its states.

use serde_json::{Map, Value, json};

use super::output::status;
use crate::answer::Meta;
use crate::choice_text::Ending;
use crate::error::ApiError;
use crate::generation::Usage;
use crate::state::unix_now;

/// What does not change from its first event to its last.
pub(super) struct ResponseObject {
    fields: Map<String, Value>,
}

impl ResponseObject {
    /// `fields` repeat the request.
    pub(super) fn new(mut fields: Map<String, Value>, meta: &Meta) -> Self {
        for (name, value) in [
            ("id", json!(meta.id())),
            ("object", json!("response")),
            ("created_at", json!(meta.created)),
            ("model", json!(&*meta.model)),
            ("error", Value::Null),
            ("incomplete_details", Value::Null),
            ("usage", Value::Null),
        ] {
            fields.insert(name.to_owned(), value);
        }
        Self { fields }
    }

    pub(super) fn id(&self) -> &str {
        self.fields["id"].as_str().unwrap_or_default()
    }

    pub(super) fn in_progress(&self) -> Value {
        self.with([("status", json!("in_progress")), ("output", json!([]))])
    }

    /// Cut is incomplete, whatever cut it: OpenAI's clients know one reason for it.
    pub(super) fn ended(&self, ending: Option<Ending>, output: Vec<Value>, usage: Usage) -> Value {
        let status = status(ending);
        let details =
            if status == "incomplete" { json!({"reason": "max_output_tokens"}) } else { Value::Null };
        self.with([
            ("status", json!(status)),
            ("completed_at", if details.is_null() { json!(unix_now()) } else { Value::Null }),
            ("incomplete_details", details),
            ("output", Value::Array(output)),
            ("usage", worded(usage)),
        ])
    }

    pub(super) fn failed(&self, error: &ApiError, output: Vec<Value>, usage: Usage) -> Value {
        let error = json!({"code": "server_error", "message": error.body.message});
        let output = Value::Array(output);
        self.with([
            ("status", json!("failed")),
            ("error", error),
            ("output", output),
            ("usage", worded(usage)),
        ])
    }

    fn with<const N: usize>(&self, changes: [(&str, Value); N]) -> Value {
        let mut object = self.fields.clone();
        object.extend(changes.map(|(name, value)| (name.to_owned(), value)));
        Value::Object(object)
    }
}

fn worded(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens(), "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    })
}
