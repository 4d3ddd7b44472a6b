//! One world: an engine stepped by hand, its clients, and the checks after every step.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use engine::{Engine, EngineError, EngineHandle, FinishReason, Progress, Stats, SubmitError};
use model::{BackendError, Batch, ModelRunner, RunnerLimits, SampleRow, StepOutput};

use crate::client::Client;
use crate::oracle::run_alone;
use crate::rng::Rng;
use crate::scenario::{Scenario, draw_grammar};

/// Steps after which a world that has not ended is taken to be stuck.
const MAX_STEPS: u64 = 50_000;

pub(crate) struct World {
    rng: Rng,
    scenario: Scenario,
    now_us: Arc<AtomicU64>,
    clients: Arc<Mutex<Vec<Client>>>,
    num_tokens_run: Arc<AtomicU64>,
    handle: EngineHandle,
    engine: Engine,
    num_drawn: usize,
    /// The most choices that one request brought to an empty queue.
    max_burst: usize,
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let scenario = Scenario::draw(&mut rng);
        let now_us = Arc::new(AtomicU64::new(0));
        let clients = Arc::default();
        let num_tokens_run = Arc::default();
        let runner = Meddler {
            runner: Box::new(scenario.runner.clone()),
            rng: Rng::new(rng.next()),
            leave_percent: scenario.leave_percent,
            max_num_tokens: scenario.config.max_num_batched_tokens,
            max_num_seqs: scenario.config.max_num_seqs,
            clients: Arc::clone(&clients),
            now_us: Arc::clone(&now_us),
            num_tokens_run: Arc::clone(&num_tokens_run),
        };
        let hand = Arc::clone(&now_us);
        let clock = Arc::new(move || Duration::from_micros(hand.load(Relaxed)));
        let (handle, engine) = Engine::new(Box::new(runner), scenario.config, clock);
        Self { rng, scenario, now_us, clients, num_tokens_run, handle, engine, num_drawn: 0, max_burst: 0 }
    }

    /// Runs the world to its end, and returns what happened in it.
    pub(crate) fn run(mut self) -> Stats {
        let abort_at = self.rng.percent(10).then(|| self.rng.within(1..100) as u64);
        let drain_at = self.rng.percent(20).then(|| self.rng.within(1..100) as u64);
        let mut has_failed = false;
        for step in 0.. {
            assert!(step < MAX_STEPS, "the world does not end: {:?}", self.handle.stats());
            self.arrive();
            self.leave();
            if Some(step) == abort_at {
                self.handle.abort();
            }
            if Some(step) == drain_at {
                self.handle.drain();
            }
            let progress = self.engine.step();
            self.check_step();
            match progress {
                Ok(Progress::Stepped) => {}
                Ok(Progress::Idle) if self.num_drawn == self.scenario.num_requests => self.handle.drain(),
                Ok(Progress::Idle) => {}
                Ok(Progress::Ended) => break,
                Err(EngineError::Device(_)) => has_failed = true,
                Err(EngineError::Panicked(message)) => {
                    assert_eq!(message, "the fake model panics");
                    has_failed = true;
                }
            }
            if has_failed {
                break;
            }
        }
        self.check_end(has_failed)
    }

    /// Lets new requests arrive, now and then many at once.
    fn arrive(&mut self) {
        let burst = if self.rng.percent(8) { self.rng.within(1..10) } else { self.rng.within(0..2) };
        let burst = burst.min(self.scenario.num_requests - self.num_drawn);
        self.num_drawn += burst;
        (0..burst).for_each(|_| self.submit());
    }

    fn submit(&mut self) {
        let request = self.scenario.draw_request(&mut self.rng);
        let now = self.now();
        let grammar = draw_grammar(&mut self.rng);
        let shared = Arc::new(request.clone());
        let new_client = |choice| {
            let capacity = if self.rng.percent(6) { self.rng.within(0..6) } else { usize::MAX };
            Client::new(Arc::clone(&shared), choice, grammar, now, capacity)
        };
        let clients: Vec<Client> = (0..request.num_choices).map(new_client).collect();
        let choices = clients.iter().map(|client| client.choice(&self.now_us)).collect();
        let waiting = self.handle.stats().num_waiting;
        match self.handle.submit(request, choices) {
            Ok(()) => {
                if waiting == 0 {
                    self.max_burst = self.max_burst.max(clients.len());
                }
                self.clients.lock().unwrap().extend(clients);
            }
            Err(error) => {
                let is_expected = match error {
                    SubmitError::Invalid { field, .. } => field == "prompt" || field == "moe",
                    SubmitError::QueueFull { .. } => waiting > 0,
                    SubmitError::Draining => self.handle.stats().is_draining,
                    SubmitError::Stopped => false,
                };
                assert!(is_expected, "{error:?}");
                assert!(clients.iter().all(|client| client.state().events.is_empty()));
            }
        }
    }

    fn leave(&mut self) {
        if self.rng.percent(self.scenario.leave_percent) {
            leave_one(&mut self.rng, &self.clients.lock().unwrap());
        }
    }

    fn now(&self) -> Duration {
        Duration::from_micros(self.now_us.load(Relaxed))
    }

    fn check_step(&self) {
        self.engine.check_integrity();
        let clients = self.clients.lock().unwrap();
        for client in clients.iter().filter(|client| client.must_be_gone(self.now())) {
            assert!(client.state().is_dropped, "whoever left or is late is gone within the step");
        }
        let stats = self.handle.stats();
        let num_live = clients.iter().filter(|client| !client.state().is_dropped).count();
        assert_eq!(stats.num_waiting + stats.num_running, num_live);
        assert_eq!(stats.num_accepted, clients.len() as u64);
        assert_eq!(stats.num_accepted, stats.finished.iter().sum::<u64>() + num_live as u64);
        assert!(
            stats.num_free_blocks <= stats.num_blocks && stats.num_cached_blocks <= stats.num_free_blocks
        );
        let max_waiting = self.scenario.config.max_queued_requests.max(self.max_burst);
        assert!(stats.num_waiting <= max_waiting + self.scenario.config.max_num_seqs);
    }

    fn check_end(self, has_failed: bool) -> Stats {
        let stats = self.handle.stats();
        assert_eq!((stats.num_waiting, stats.num_running, stats.queued_tokens), (0, 0, 0));
        assert_eq!(stats.num_free_blocks, stats.num_blocks, "the cache is whole");
        assert_eq!(stats.is_stopped, has_failed);
        assert!(has_failed || stats.is_draining);

        let clients = self.clients.lock().unwrap();
        let mut finished = [0; FinishReason::COUNT];
        for client in clients.iter() {
            client.check(&run_alone(&self.scenario.runner, client));
            client.check_routing(&self.scenario.runner);
            finished[client.state().ends[0].index()] += 1;
        }
        self.check_secrecy(&clients);
        assert_eq!(stats.finished, finished);
        let num_offered: u64 = clients.iter().map(|client| client.state().num_tokens_offered).sum();
        assert_eq!(stats.generation_tokens, num_offered, "every token is counted, whatever the end");
        let RunnerLimits { num_layers, top_k, .. } = self.scenario.limits;
        let num_visits = self.num_tokens_run.load(Relaxed) * (num_layers * top_k) as u64;
        assert_eq!(stats.routing.experts.iter().map(|load| load.num_tokens).sum::<u64>(), num_visits);
        stats
    }
}

impl World {
    /// Whoever found tokens in the cache knew somebody who had put them there: a choice of the same request,
    /// or with a prefix cache one of the same salt, if neither is steered.
    fn check_secrecy(&self, clients: &[Client]) {
        let texts: Vec<Vec<u32>> = clients.iter().map(Client::text).collect();
        for client in clients {
            let cached = &client.request.prompt[..client.num_cached_tokens()];
            let may_share = |other: &Client| match self.scenario.config.enable_prefix_cache {
                true if client.request.steering.is_none() && other.request.steering.is_none() => {
                    other.request.cache_salt == client.request.cache_salt
                }
                _ => Arc::ptr_eq(&other.request, &client.request),
            };
            let is_source = |(other, text): (&Client, &Vec<u32>)| {
                !other.is(client) && may_share(other) && text.starts_with(cached)
            };
            assert!(cached.is_empty() || clients.iter().zip(&texts).any(is_source), "{cached:?}");
        }
    }
}

fn leave_one(rng: &mut Rng, clients: &[Client]) {
    let live: Vec<&Client> = clients.iter().filter(|client| !client.state().is_dropped).collect();
    if !live.is_empty() {
        rng.pick(&live).state().has_left = true;
    }
}

/// The fake model, while whose steps time passes and clients leave.
struct Meddler {
    runner: Box<dyn ModelRunner>,
    rng: Rng,
    leave_percent: u64,
    max_num_tokens: usize,
    max_num_seqs: usize,
    clients: Arc<Mutex<Vec<Client>>>,
    now_us: Arc<AtomicU64>,
    num_tokens_run: Arc<AtomicU64>,
}

impl ModelRunner for Meddler {
    fn limits(&self) -> &RunnerLimits {
        self.runner.limits()
    }

    fn execute(&mut self, batch: &Batch, rows: &[SampleRow<'_>]) -> Result<StepOutput, BackendError> {
        assert!(batch.num_tokens() <= self.max_num_tokens && batch.num_seqs() <= self.max_num_seqs);
        let output = self.runner.execute(batch, rows)?;
        self.num_tokens_run.fetch_add(batch.num_tokens() as u64, Relaxed);
        self.now_us.fetch_add(self.rng.within(0..20_000) as u64, Relaxed);
        if self.rng.percent(self.leave_percent) {
            leave_one(&mut self.rng, &self.clients.lock().unwrap());
        }
        Ok(output)
    }
}
