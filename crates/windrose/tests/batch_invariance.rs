//! A sequence's tokens, log-probabilities and routing do not depend on its company, bit for bit: alone = batched =
//! chunked = prefix hit = preempted, whether its routing is steered or its neighbours' is, on every instruction set of the CPU backend, on a GPU if there is one, and on the reference.
//!
//! Every case runs a real model through the real engine twice: each request alone in a large pool without a prefix
//! cache, then all together in a pool so small that sequences are preempted and prompts are cut into chunks.

use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use backend::sampling::mix64;
use backend::{Backend, Reference};
use cpu::{Cpu, CpuOptions, Isa, KvFormat, WeightFormat};
use cuda::{Cuda, CudaOptions, KvFormat as GpuKvFormat, WeightFormat as GpuWeights};
use engine::{
    Choice, Engine, EngineConfig, Event, EventSink, FinishReason, RecordRouting, Request, SinkClosed,
};
use model::{
    LayerSteering, MixtralRunner, ModelConfig, ModelFiles, RouteShape, RoutingRecord, RunnerOptions,
    SampleParams, Steering, WeightSource,
};

const MODELS: [&str; 3] = ["mixtral-8x2-gqa", "mixtral-16x3-sharded", "mistral-dense-window"];
const BLOCK_SIZE: usize = 4;
const MAX_MODEL_LEN: usize = 128;

struct ChannelSink(Sender<Event>);

impl EventSink for ChannelSink {
    fn send(&mut self, event: Event) -> Result<(), SinkClosed> {
        self.0.send(event).map_err(|_| SinkClosed)
    }

    fn is_closed(&self) -> bool {
        false
    }
}

/// What a client sees of a choice.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    /// Tokens with the bits of their log-probabilities.
    tokens: Vec<(u32, u32)>,
    /// Where they went, with the bits of the gate weights, if that was asked for.
    routing: RoutingRecord,
}

fn collect(events: Receiver<Event>) -> Outcome {
    let mut outcome = Outcome::default();
    for event in events {
        match event {
            Event::Token(sampled) => {
                let logprob = sampled.logprob.expect("asked for").logprob;
                outcome.tokens.push((sampled.token, logprob.to_bits()));
            }
            Event::Routing(record) if outcome.routing.num_tokens() == 0 => outcome.routing = record,
            Event::Routing(record) => outcome.routing.append(&record),
            Event::Finished(reason) => assert!(matches!(reason, FinishReason::Stop | FinishReason::Length)),
            Event::Started { .. } | Event::Progress { .. } | Event::PromptLogprobs(_) => {}
        }
    }
    outcome
}

/// One of several ways to steer routers, for layers of this shape.
fn steering(route: RouteShape, num_layers: usize, seed: u64) -> Arc<Steering> {
    let plain = LayerSteering::new(route.top_k);
    let layer = match seed % 5 {
        0 => LayerSteering { top_k: 1, ..plain.clone() },
        1 => LayerSteering { top_k: 4, temperature: 2.0, ..plain.clone() },
        2 => LayerSteering { random_seed: Some(seed), ..plain.clone() },
        3 => LayerSteering { banned: 0b1001, forced: 0b10, ..plain.clone() },
        _ => plain.clone(),
    };
    Arc::new(Steering::new(route, (0..num_layers).map(|_| layer.clone()).collect(), None))
}

/// Requests that share prefixes, mix greedy with drawn tokens and plain with steered routing, and differ in length.
fn requests(vocab: u32, config: &ModelConfig, seed: u64) -> Vec<Request> {
    let token = |key: u64| 3 + mix64(key) as u32 % (vocab - 3);
    let request = |index: u64| {
        let shared = (0..14).map(|i| token(seed ^ i));
        let own = (0..1 + mix64(seed + index) % 30).map(|i| token(index * 1000 + i));
        let greedy = index.is_multiple_of(2);
        Request {
            id: format!("request-{index}"),
            prompt: if index.is_multiple_of(3) { own.collect() } else { shared.chain(own).collect() },
            num_choices: 1 + (index % 4 == 1) as u32,
            sampling: SampleParams {
                temperature: if greedy { 0.0 } else { 1.0 },
                top_p: 0.95,
                seed: index,
                ..SampleParams::default()
            },
            max_tokens: 12 + (index * 7 % 24) as u32,
            min_tokens: 0,
            eos_token_ids: vec![2],
            ignore_eos: true,
            stop_token_ids: Vec::new(),
            num_logprobs: Some(0),
            num_prompt_logprobs: None,
            reports_progress: false,
            priority: 0,
            deadline: None,
            cache_salt: None,
            record_routing: (index % 3 != 1)
                .then(|| RecordRouting { layers: vec![0, 1], prompt: index.is_multiple_of(4) }),
            steering: (config.route.num_experts > 1 && index % 3 == 2)
                .then(|| steering(config.route, config.num_layers, seed + index)),
        }
    };
    (0..12).map(request).collect()
}

/// Runs requests on a fresh engine, all submitted at once; also returns preemptions and prefix hits.
fn run<B: Backend>(
    backend: B,
    files: &ModelFiles,
    requests: &[Request],
    num_blocks: usize,
    prefix_cache: bool,
) -> (Vec<Outcome>, u64, u64) {
    let config = ModelConfig::load(files).unwrap();
    let options = RunnerOptions {
        max_model_len: MAX_MODEL_LEN,
        max_num_batched_tokens: 24,
        max_num_seqs: 8,
        block_size: BLOCK_SIZE,
        num_blocks,
    };
    let runner =
        MixtralRunner::load(backend, files, &config, WeightSource::Checkpoint, options, &mut |_| {}).unwrap();
    let engine_config = EngineConfig {
        max_num_seqs: 8,
        max_num_batched_tokens: 24,
        enable_prefix_cache: prefix_cache,
        ..EngineConfig::default()
    };
    static START: OnceLock<Instant> = OnceLock::new();
    let clock = Arc::new(|| START.get_or_init(Instant::now).elapsed());
    let (handle, thread) = Engine::spawn(Box::new(runner), engine_config, clock);
    let mut receivers = Vec::new();
    for request in requests {
        let (senders, choices): (Vec<_>, Vec<_>) = (0..request.num_choices).map(|_| channel()).unzip();
        let sinks = senders.into_iter().map(|sender| Choice::free(Box::new(ChannelSink(sender))));
        handle.submit(request.clone(), sinks.collect()).unwrap();
        receivers.extend(choices);
    }
    let outcomes = receivers.into_iter().map(collect).collect();
    let stats = handle.stats();
    handle.drain();
    thread.join().expect("the engine ends cleanly");
    (outcomes, stats.num_preemptions, stats.prefix_cache_hits)
}

fn check<B: Backend>(new: impl Fn() -> B) {
    for name in MODELS {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
        let files = ModelFiles::open(&fixtures.join(name)).unwrap();
        let config = ModelConfig::load(&files).unwrap();
        for seed in 0..4 {
            let requests = requests(128, &config, seed);
            let alone: Vec<Outcome> = requests
                .iter()
                .flat_map(|request| run(new(), &files, std::slice::from_ref(request), 200, false).0)
                .collect();
            let (together, num_preemptions, prefix_hits) = run(new(), &files, &requests, 34, true);
            let case = format!("{name} on {}, seed {seed}", new().describe());
            assert_eq!(together, alone, "{case}");
            assert!(num_preemptions > 0, "{case}: the pool was meant to be too small");
            assert!(prefix_hits > 0, "{case}: prompts were meant to share prefixes");
        }
    }
}

#[test]
fn every_instruction_set_of_the_cpu_is_batch_invariant() {
    for isa in Isa::ALL {
        if !isa.is_available() {
            println!("skipped {isa:?}: this machine does not have it");
            continue;
        }
        for (weights, kv_cache) in WeightFormat::ALL.into_iter().zip(KvFormat::ALL.into_iter().cycle()) {
            check(|| {
                Cpu::new(CpuOptions {
                    num_threads: Some(2),
                    isa: Some(isa),
                    weights: weights.into(),
                    kv_cache,
                })
            });
        }
    }
}

/// Records what random routers choose, and repeats it without them.
fn check_replay<B: Backend>(new: impl Fn() -> B) {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
    let files = ModelFiles::open(&fixtures.join(MODELS[0])).unwrap();
    let config = ModelConfig::load(&files).unwrap();
    let plain = vec![LayerSteering::new(config.route.top_k); config.num_layers];
    let random: Vec<LayerSteering> =
        plain.iter().map(|layer| LayerSteering { random_seed: Some(5), ..layer.clone() }).collect();
    let steer = |layers, replay| Some(Arc::new(Steering::new(config.route, layers, replay)));
    let mut request = requests(128, &config, 0).swap_remove(3);
    let of =
        |request: &Request| run(new(), &files, std::slice::from_ref(request), 200, true).0.swap_remove(0);

    request.record_routing = Some(RecordRouting { layers: vec![0, 1], prompt: true });
    request.steering = None;
    let unsteered = of(&request);
    request.steering = steer(random, None);
    let recorded = of(&request);
    assert_ne!(recorded.tokens, unsteered.tokens, "random routers were meant to change the text");
    request.steering = steer(plain, Some(Arc::new(recorded.routing.clone())));
    assert_eq!(of(&request), recorded, "a record repeated on {}", new().describe());
}

#[test]
fn a_recorded_routing_reproduces_the_same_tokens_bit_for_bit() {
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let options = CpuOptions { num_threads: Some(2), isa: Some(isa), ..CpuOptions::default() };
        check_replay(|| Cpu::new(options));
    }
    check_replay(Reference::new);
    if let Some(info) = cuda::probe_or_skip() {
        check_replay(|| Cuda::new(info.clone(), CudaOptions::default()).expect("the device opens"));
    }
}

#[test]
fn the_reference_is_batch_invariant() {
    check(Reference::new);
}

#[test]
fn the_gpu_is_batch_invariant() {
    if let Some(info) = cuda::probe_or_skip() {
        for (weights, kv_cache, graphs) in [
            (GpuWeights::Bf16, GpuKvFormat::Bf16, false),
            (GpuWeights::Bf16, GpuKvFormat::Bf16, true),
            (GpuWeights::E4m3, GpuKvFormat::E4m3, true),
        ] {
            if weights == GpuWeights::E4m3 && !info.capability.has_e4m3() {
                println!("skipped: {} does not multiply fp8", info.name);
                continue;
            }
            let options = CudaOptions { weights, kv_cache, graphs, ..CudaOptions::default() };
            check(|| Cuda::new(info.clone(), options.clone()).expect("the device opens"));
        }
    }
}
