//! The engine on its own thread, under clients on theirs: many at once, some of which leave.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use engine::{
    Choice, Clock, Engine, EngineConfig, EngineError, EngineHandle, EngineThread, Event, EventSink,
    FakeRunner, FinishReason, Request, SinkClosed, SubmitError,
};
use model::{RunnerLimits, SampleParams};

const LIMITS: RunnerLimits = RunnerLimits {
    vocab_size: 64,
    max_model_len: 200,
    num_layers: 2,
    num_experts: 8,
    top_k: 2,
    block_size: 4,
    num_blocks: 65,
    max_num_batched_tokens: 64,
    max_num_seqs: 8,
    max_num_logits: 8,
};

/// A bounded channel that also knows when nobody reads it.
struct ChannelSink {
    events: SyncSender<Event>,
    reader: Weak<()>,
}

impl EventSink for ChannelSink {
    fn send(&mut self, event: Event) -> Result<(), SinkClosed> {
        self.events.try_send(event).map_err(|_| SinkClosed)
    }

    fn is_closed(&self) -> bool {
        self.reader.strong_count() == 0
    }
}

struct Reader {
    events: Receiver<Event>,
    _alive: Arc<()>,
}

impl Reader {
    /// Reads to the end.
    fn finish(self) -> (Vec<u32>, Option<FinishReason>) {
        let mut tokens = Vec::new();
        for event in self.events {
            match event {
                Event::Token(sampled) => tokens.push(sampled.token),
                Event::Finished(reason) => return (tokens, Some(reason)),
                _ => {}
            }
        }
        (tokens, None)
    }
}

fn spawn(runner: FakeRunner) -> (EngineHandle, EngineThread) {
    let start = Instant::now();
    let clock: Clock = Arc::new(move || start.elapsed());
    let config = EngineConfig { max_queued_requests: 16, ..EngineConfig::default() };
    Engine::spawn(Box::new(runner), config, clock)
}

fn request(seed: u64, max_tokens: u32) -> Request {
    Request {
        id: seed.to_string(),
        prompt: (0..seed % 23 + 1).map(|i| (i % 3) as u32).collect(),
        num_choices: 1,
        sampling: SampleParams { seed, ..SampleParams::default() },
        max_tokens,
        min_tokens: 0,
        eos_token_ids: vec![1],
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

fn submit(handle: &EngineHandle, request: Request) -> Result<Reader, SubmitError> {
    let (sender, events) = sync_channel(256);
    let alive = Arc::new(());
    let sink = ChannelSink { events: sender, reader: Arc::downgrade(&alive) };
    handle.submit(request, vec![Choice::free(Box::new(sink))])?;
    Ok(Reader { events, _alive: alive })
}

/// Submits until the queue has room.
fn submit_patiently(handle: &EngineHandle, request: &Request) -> Reader {
    loop {
        match submit(handle, request.clone()) {
            Ok(reader) => return reader,
            Err(SubmitError::QueueFull { retry_after }) => {
                assert!((1..=60).contains(&retry_after.as_secs()));
                std::thread::yield_now();
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn clients_on_many_threads_get_their_tokens_while_others_leave() {
    let (handle, thread) = spawn(FakeRunner::new(LIMITS));
    let run_client = |client: u64| {
        for round in 0..100 {
            let request = request(client * 1000 + round, 20);
            let first = submit_patiently(&handle, &request);
            let second = submit_patiently(&handle, &request);
            drop(submit_patiently(&handle, &request));
            let (tokens, reason) = first.finish();
            assert!(matches!(reason, Some(FinishReason::Stop | FinishReason::Length)), "{reason:?}");
            assert_eq!((tokens, reason), second.finish());
        }
    };
    std::thread::scope(|scope| (0..4).for_each(|client| drop(scope.spawn(move || run_client(client)))));
    handle.drain();
    thread.join().unwrap();

    let stats = handle.stats();
    assert!(stats.is_stopped && stats.is_draining);
    assert_eq!((stats.num_accepted, stats.finished.iter().sum()), (1200, 1200u64));
    assert_eq!((stats.num_waiting, stats.num_running, stats.queued_tokens), (0, 0, 0));
    assert_eq!(stats.num_free_blocks, stats.num_blocks);
}

#[test]
fn a_client_that_leaves_frees_its_blocks_while_another_goes_on() {
    let (handle, thread) = spawn(FakeRunner::new(LIMITS).with_step_time(Duration::from_millis(1)));
    let leaves = submit(&handle, request(22, 150)).unwrap();
    let stays = submit(&handle, Request { eos_token_ids: vec![], ..request(22, 150) }).unwrap();
    assert!(matches!(leaves.events.recv(), Ok(Event::Started { .. })));
    drop(leaves);
    let (tokens, reason) = stays.finish();
    assert_eq!((tokens.len(), reason), (150, Some(FinishReason::Length)));
    drop(handle);
    thread.join().unwrap();
}

#[test]
fn an_aborted_engine_ends_at_once_and_a_failed_one_says_why() {
    let (handle, thread) = spawn(FakeRunner::new(LIMITS).with_step_time(Duration::from_millis(1)));
    let reader = submit(&handle, Request { eos_token_ids: vec![], ..request(1, 199) }).unwrap();
    handle.abort();
    assert_eq!(reader.finish().1, Some(FinishReason::Shutdown));
    thread.join().unwrap();

    let (handle, thread) = spawn(FakeRunner::new(LIMITS).with_device_failure_at(1));
    let reader = submit(&handle, request(1, 9)).unwrap();
    assert_eq!(reader.finish().1, Some(FinishReason::Error));
    assert!(matches!(thread.join(), Err(EngineError::Device(_))));
    assert!(handle.stats().is_stopped);
    assert_eq!(submit(&handle, request(1, 9)).err(), Some(SubmitError::Stopped));
}

#[test]
fn dropping_the_last_handle_ends_an_idle_engine() {
    let (handle, thread) = spawn(FakeRunner::new(LIMITS));
    let clone = handle.clone();
    drop(handle);
    let reader = submit(&clone, request(5, 3)).unwrap();
    drop(clone);
    assert!(reader.finish().1.is_some());
    thread.join().unwrap();
}
