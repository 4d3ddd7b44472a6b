//! The message that answers, in Anthropic's words.

use serde_json::{Value, json};

use crate::answer::Meta;
use crate::choice_text::{Delta, Ending};
use crate::generation::Usage;
use crate::tool_calls::ToolCall;

/// What does not change from its first event to its last.
pub(super) struct MessageObject {
    id: String,
    model: String,
}

impl MessageObject {
    pub(super) fn new(meta: &Meta) -> Self {
        Self { id: meta.id().to_owned(), model: meta.model.to_string() }
    }

    pub(super) fn begun(&self, usage: Usage) -> Value {
        self.worded(Vec::new(), json!({"stop_reason": null, "stop_sequence": null}), usage)
    }

    pub(super) fn ended(&self, answer: Delta, usage: Usage) -> Value {
        let stop = stop(&answer);
        let text = Some(answer.text).filter(|text| !text.is_empty());
        let text = text.map(|text| json!({"type": "text", "text": text}));
        let calls = answer.tool_calls.iter().map(|call| tool_use(call, input(call)));
        self.worded(text.into_iter().chain(calls).collect(), stop, usage)
    }

    fn worded(&self, content: Vec<Value>, mut stop: Value, usage: Usage) -> Value {
        json!({
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": stop["stop_reason"].take(),
            "stop_sequence": stop["stop_sequence"].take(),
            "usage": worded(usage),
        })
    }
}

/// Why a message ended. One that was cut, by whatever, is out of tokens: there is no other word for it.
pub(super) fn stop(answer: &Delta) -> Value {
    let reason = match answer.ending {
        Some(Ending::Length) => "max_tokens",
        // A call of the one tool that was asked for ends like a text in OpenAI's words, and not in these.
        _ if !answer.tool_calls.is_empty() => "tool_use",
        _ if answer.stop_sequence.is_some() => "stop_sequence",
        _ => "end_turn",
    };
    json!({"stop_reason": reason, "stop_sequence": answer.stop_sequence})
}

pub(super) fn tool_use(call: &ToolCall, input: Value) -> Value {
    json!({"type": "tool_use", "id": call.id, "name": call.name, "input": input})
}

fn input(call: &ToolCall) -> Value {
    serde_json::from_str(&call.arguments).unwrap_or_else(|_| json!({}))
}

/// What came from the cache is not among the input tokens there.
pub(super) fn worded(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens.saturating_sub(usage.cached_tokens()),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens(),
        "output_tokens": usage.completion_tokens,
    })
}
