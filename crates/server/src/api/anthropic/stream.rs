//! A message as Anthropic's events.
//!
//! ```text
//! message_start, ping
//!   content_block_start, content_block_delta*, content_block_stop      text, then each call
//! message_delta, message_stop | error
//! ```

use serde_json::{Value, json};

use super::error;
use super::message::{MessageObject, stop, tool_use, worded};
use crate::choice_text::Delta;
use crate::error::ApiError;
use crate::generation::Generation;
use crate::narration::{Events, Narrator};
use crate::tool_calls::ToolCall;

/// Tells one message.
pub(super) struct MessageNarrator {
    message: MessageObject,
    /// How it ended.
    end: Delta,
    num_blocks: usize,
    open: Option<Block>,
}

/// The block that deltas go to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Block {
    Text,
    ToolUse,
}

impl MessageNarrator {
    pub(super) fn new(message: MessageObject) -> Self {
        Self { message, end: Delta::default(), num_blocks: 0, open: None }
    }

    fn start_block(&mut self, kind: Block, block: Value, events: &mut Events) {
        self.stop_block(events);
        self.open = Some(kind);
        let start = json!({"type": "content_block_start", "index": self.num_blocks, "content_block": block});
        push(start, events);
    }

    fn add(&self, delta: Value, events: &mut Events) {
        push(json!({"type": "content_block_delta", "index": self.num_blocks, "delta": delta}), events);
    }

    fn stop_block(&mut self, events: &mut Events) {
        if self.open.take().is_some() {
            push(json!({"type": "content_block_stop", "index": self.num_blocks}), events);
            self.num_blocks += 1;
        }
    }
}

impl Narrator for MessageNarrator {
    fn open(&mut self, generation: &Generation, events: &mut Events) {
        push(json!({"type": "message_start", "message": self.message.begun(generation.usage())}), events);
        push(json!({"type": "ping"}), events);
    }

    fn tell(&mut self, _index: usize, delta: Delta, _generation: &Generation, events: &mut Events) {
        if !delta.text.is_empty() {
            if self.open != Some(Block::Text) {
                self.start_block(Block::Text, json!({"type": "text", "text": ""}), events);
            }
            self.add(json!({"type": "text_delta", "text": delta.text}), events);
        }
        for part in &delta.tool_calls {
            if !part.id.is_empty() {
                self.start_block(Block::ToolUse, tool_use(part, json!({})), events);
            }
            self.add(json!({"type": "input_json_delta", "partial_json": part.arguments}), events);
        }
        ToolCall::append(&mut self.end.tool_calls, delta.tool_calls);
        self.end.ending = delta.ending.or(self.end.ending);
        self.end.stop_sequence = delta.stop_sequence.or(self.end.stop_sequence.take());
    }

    fn close(&mut self, generation: &Generation, events: &mut Events) {
        self.stop_block(events);
        let usage = worded(generation.usage());
        push(json!({"type": "message_delta", "delta": stop(&self.end), "usage": usage}), events);
        push(json!({"type": "message_stop"}), events);
    }

    fn fail(&mut self, error: &ApiError, _generation: &Generation, events: &mut Events) {
        push(error::event(error), events);
    }
}

/// Appends an event under the name of its type.
fn push(event: Value, events: &mut Events) {
    events.push_named(event["type"].as_str().unwrap_or_default(), &event);
}
