//! A response as events, each with a name and a number.
//!
//! ```text
//! created, in_progress
//!   output_item.added, content_part.added, output_text.delta*, output_text.done, content_part.done, output_item.done
//!   output_item.added, function_call_arguments.delta, function_call_arguments.done, output_item.done      per call
//! completed | incomplete | error, failed
//! ```

use serde_json::{Value, json};

use super::object::ResponseObject;
use super::output::{Output, function_call, status};
use super::stored::Shelf;
use crate::choice_text::{Delta, Ending};
use crate::error::ApiError;
use crate::generation::Generation;
use crate::narration::{Events, Narrator};
use crate::random;
use crate::tool_calls::ToolCall;

/// Tells one response.
pub(super) struct ResponseNarrator {
    object: ResponseObject,
    output: Output,
    shelf: Option<Shelf>,
    /// Text and scores so far.
    answer: Delta,
    ending: Option<Ending>,
    /// Items that are done.
    items: Vec<Value>,
    is_message_open: bool,
    open_call: Option<OpenCall>,
    sequence_number: u64,
}

/// A call whose arguments are being written.
struct OpenCall {
    /// Of the item.
    id: String,
    call: ToolCall,
}

impl ResponseNarrator {
    pub(super) fn new(object: ResponseObject, output: Output, shelf: Option<Shelf>) -> Self {
        Self {
            object,
            output,
            shelf,
            answer: Delta::default(),
            ending: None,
            items: Vec::new(),
            is_message_open: false,
            open_call: None,
            sequence_number: 0,
        }
    }

    fn push(&mut self, kind: &str, mut event: Value, events: &mut Events) {
        event["type"] = json!(kind);
        event["sequence_number"] = json!(self.sequence_number);
        self.sequence_number += 1;
        events.push_named(kind, &event);
    }

    /// Where in the response a part of it is, with more about it.
    fn place(&self, more: Value) -> Value {
        let mut place =
            json!({"item_id": self.output.message_id, "output_index": self.items.len(), "content_index": 0});
        if let (Value::Object(place), Value::Object(more)) = (&mut place, more) {
            place.extend(more);
        }
        place
    }

    fn open_message(&mut self, events: &mut Events) {
        if std::mem::replace(&mut self.is_message_open, true) {
            return;
        }
        let item = self.output.message("in_progress", &[]);
        self.push(
            "response.output_item.added",
            json!({"output_index": self.items.len(), "item": item}),
            events,
        );
        let part = self.output.part(String::new(), Vec::new());
        self.push("response.content_part.added", self.place(json!({"part": part})), events);
    }

    fn tell_text(&mut self, text: &str, delta: &Delta, events: &mut Events) {
        self.open_message(events);
        let logprobs = json!(self.output.logprobs(delta.scores.clone()));
        let event = self.place(json!({"delta": text, "logprobs": logprobs}));
        self.push("response.output_text.delta", event, events);
    }

    fn close_message(&mut self, status: &str, events: &mut Events) {
        if !std::mem::take(&mut self.is_message_open) {
            return;
        }
        let answer = std::mem::take(&mut self.answer);
        let part = self.output.part(answer.text, answer.scores);
        let text = self.place(json!({"text": part["text"], "logprobs": part["logprobs"]}));
        self.push("response.output_text.done", text, events);
        self.push("response.content_part.done", self.place(json!({"part": part})), events);
        self.finish_item(self.output.message(status, &[part]), events);
    }

    /// Goes on with the open call, or begins another.
    fn tell_call(&mut self, part: ToolCall, events: &mut Events) {
        if !part.id.is_empty() {
            self.close_call("completed", events);
            let begun = ToolCall { arguments: String::new(), ..part.clone() };
            let call = OpenCall { id: random::id("fc_"), call: begun };
            let item = function_call(&call.call, &call.id, "in_progress");
            let added = json!({"output_index": self.items.len(), "item": item});
            self.push("response.output_item.added", added, events);
            self.open_call = Some(call);
        }
        let output_index = self.items.len();
        let Some(open) = &mut self.open_call else { return };
        open.call.arguments.push_str(&part.arguments);
        let delta = json!({"item_id": open.id, "output_index": output_index, "delta": part.arguments});
        self.push("response.function_call_arguments.delta", delta, events);
    }

    fn close_call(&mut self, status: &str, events: &mut Events) {
        let Some(OpenCall { id, call }) = self.open_call.take() else { return };
        let done = json!({
            "item_id": id, "output_index": self.items.len(), "name": call.name, "arguments": call.arguments,
        });
        self.push("response.function_call_arguments.done", done, events);
        self.finish_item(function_call(&call, &id, status), events);
    }

    fn finish_item(&mut self, item: Value, events: &mut Events) {
        self.push(
            "response.output_item.done",
            json!({"output_index": self.items.len(), "item": item}),
            events,
        );
        self.items.push(item);
    }
}

impl Narrator for ResponseNarrator {
    fn open(&mut self, _generation: &Generation, events: &mut Events) {
        let response = self.object.in_progress();
        self.push("response.created", json!({"response": response}), events);
        self.push("response.in_progress", json!({"response": response}), events);
    }

    fn tell(&mut self, _index: usize, mut delta: Delta, _generation: &Generation, events: &mut Events) {
        if !delta.text.is_empty() || !delta.scores.is_empty() {
            self.tell_text(&delta.text, &delta, events);
        }
        let calls = std::mem::take(&mut delta.tool_calls);
        self.ending = delta.ending.or(self.ending);
        self.answer.append(delta);
        if !calls.is_empty() {
            self.close_message("completed", events);
        }
        calls.into_iter().for_each(|part| self.tell_call(part, events));
    }

    fn close(&mut self, generation: &Generation, events: &mut Events) {
        self.close_call(status(self.ending), events);
        if self.items.is_empty() {
            self.open_message(events);
        }
        self.close_message(status(self.ending), events);
        let response = self.object.ended(self.ending, std::mem::take(&mut self.items), generation.usage());
        if let Some(shelf) = self.shelf.take() {
            shelf.put(self.object.id(), &response);
        }
        self.push(&format!("response.{}", status(self.ending)), json!({"response": response}), events);
    }

    fn fail(&mut self, error: &ApiError, generation: &Generation, events: &mut Events) {
        self.close_message("incomplete", events);
        self.close_call("incomplete", events);
        let body = json!({"code": error.body.code, "message": error.body.message, "param": error.body.param});
        self.push("error", body, events);
        let response = self.object.failed(error, std::mem::take(&mut self.items), generation.usage());
        self.push("response.failed", json!({"response": response}), events);
    }
}
