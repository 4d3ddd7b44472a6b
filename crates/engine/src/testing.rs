//! What this crate's unit tests begin with: a small model, a plain request, and a sink that remembers.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Weak};
use std::time::Duration;

use model::{RunnerLimits, SampleParams};

use crate::config::Clock;
use crate::request::{Event, EventSink, Request, SinkClosed};

/// A model of 64 tokens with a cache of 15 blocks of 4.
pub(crate) fn limits() -> RunnerLimits {
    RunnerLimits {
        vocab_size: 64,
        max_model_len: 60,
        num_layers: 2,
        num_experts: 8,
        top_k: 2,
        block_size: 4,
        num_blocks: 16,
        max_num_batched_tokens: 16,
        max_num_seqs: 8,
        max_num_logits: 8,
    }
}

/// A greedy request without extras.
pub(crate) fn request(prompt: &[u32], max_tokens: u32) -> Request {
    Request {
        id: "test".to_owned(),
        prompt: prompt.to_vec(),
        num_choices: 1,
        sampling: SampleParams::greedy(),
        max_tokens,
        min_tokens: 0,
        eos_token_ids: Vec::new(),
        ignore_eos: false,
        stop_token_ids: Vec::new(),
        num_logprobs: None,
        num_prompt_logprobs: None,
        reports_progress: false,
        priority: 0,
        deadline: None,
        cache_salt: None,
        record_routing: None,
        steering: None,
    }
}

/// A sink and its reader; dropping the reader closes it.
pub(crate) fn sink() -> (Box<dyn EventSink>, Reader) {
    let (sender, receiver) = channel();
    let is_read = Arc::new(());
    (
        Box::new(ChannelSink { sender, is_read: Arc::downgrade(&is_read) }),
        Reader { receiver, _is_read: is_read },
    )
}

/// A clock that stands still until it is set, in milliseconds.
pub(crate) fn clock() -> (Clock, Arc<AtomicU64>) {
    let now_ms = Arc::new(AtomicU64::new(0));
    let hand = Arc::clone(&now_ms);
    (Arc::new(move || Duration::from_millis(hand.load(Relaxed))), now_ms)
}

pub(crate) struct Reader {
    receiver: Receiver<Event>,
    _is_read: Arc<()>,
}

impl Reader {
    /// All events since the last call.
    pub(crate) fn events(&self) -> Vec<Event> {
        self.receiver.try_iter().collect()
    }
}

struct ChannelSink {
    sender: Sender<Event>,
    is_read: Weak<()>,
}

impl EventSink for ChannelSink {
    fn send(&mut self, event: Event) -> Result<(), SinkClosed> {
        self.sender.send(event).map_err(|_| SinkClosed)
    }

    fn is_closed(&self) -> bool {
        self.is_read.strong_count() == 0
    }
}
