//! Output items: a message, and a call of a function for each that the model wants made.

use serde::Serialize;
use serde_json::{Value, json};

use crate::api::chat::{TokenLogprob, described};
use crate::choice_text::{Delta, Ending};
use crate::logprobs::{TokenNames, TokenScore};
use crate::random;
use crate::tool_calls::ToolCall;

/// Makes the output of one response, under ids that do not change.
pub(super) struct Output {
    pub(super) message_id: String,
    has_logprobs: bool,
}

impl Output {
    pub(super) fn new(has_logprobs: bool) -> Self {
        Self { message_id: random::id("msg_"), has_logprobs }
    }

    /// All items of a whole answer. One that only calls functions has no message.
    pub(super) fn items(&self, answer: Delta) -> Vec<Value> {
        let status = status(answer.ending);
        let has_message = !answer.text.is_empty() || answer.tool_calls.is_empty();
        let message = has_message.then(|| {
            let part = self.part(answer.text, answer.scores);
            self.message(status, &[part])
        });
        let num_calls = answer.tool_calls.len();
        // Only the last call can have been cut.
        let call = |(index, call): (usize, &ToolCall)| {
            let status = if index + 1 == num_calls { status } else { "completed" };
            function_call(call, &random::id("fc_"), status)
        };
        message.into_iter().chain(answer.tool_calls.iter().enumerate().map(call)).collect()
    }

    pub(super) fn message(&self, status: &str, content: &[Value]) -> Value {
        json!({"id": self.message_id, "type": "message", "role": "assistant", "status": status, "content": content})
    }

    pub(super) fn part(&self, text: String, scores: Vec<TokenScore>) -> Value {
        json!({"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs(scores)})
    }

    pub(super) fn logprobs(&self, scores: Vec<TokenScore>) -> impl Serialize {
        let scores = if self.has_logprobs { scores } else { Vec::new() };
        scores.into_iter().map(|score| described(score, TokenNames::Texts)).collect::<Vec<TokenLogprob>>()
    }
}

/// The status of a message, and of its response, by how it ended.
pub(super) fn status(ending: Option<Ending>) -> &'static str {
    if ending == Some(Ending::Length) { "incomplete" } else { "completed" }
}

pub(super) fn function_call(call: &ToolCall, id: &str, status: &str) -> Value {
    json!({"id": id, "type": "function_call", "status": status, "call_id": call.id, "name": call.name,
           "arguments": call.arguments})
}
