//! The loop around the scheduler, and the thread around the loop.
//!
//! [`Engine`] owns the model, the scheduler and all sequences. One [`Engine::step`] takes in what was
//! submitted, schedules, runs the model and hands out the results; [`Engine::spawn`] gives the engine a
//! thread that steps while there is work and sleeps while there is none. Tests step it themselves.
//!
//! A model that fails or panics ends the engine, and with it every sequence: the cache cannot be trusted any
//! more. Starting again is the business of whoever started it first.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::JoinHandle;
use std::time::Duration;

use model::{BackendError, ModelRunner, StepOutput};
use thiserror::Error;

use crate::config::{Clock, EngineConfig};
use crate::handle::EngineHandle;
use crate::queue::{Phase, Queue};
use crate::request::FinishReason;
use crate::scheduler::{Scheduler, StepPlan};
use crate::stats::{SharedStats, Throughput};
use crate::submission::Submission;

/// Why an engine ended before it was asked to.
#[derive(Debug, Error)]
pub enum EngineError {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] BackendError),
    /// The model or the engine has a bug.
    #[error("the engine panicked: {0}")]
    Panicked(String),
}

/// What a step came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The model ran, or what it needs was prepared; there may be more to do.
    Stepped,
    /// There is nothing to do until something is submitted.
    Idle,
    /// There is nothing to do, and nothing will be submitted any more.
    Ended,
}

/// An engine at rest, for whoever steps it. Dropping it ends what it has with [`FinishReason::Shutdown`].
pub struct Engine {
    runner: Box<dyn ModelRunner>,
    scheduler: Scheduler,
    queue: Arc<Queue>,
    stats: Arc<SharedStats>,
    clock: Clock,
    throughput: Throughput,
    /// Submissions taken from the queue; kept for its allocation.
    inbox: Vec<Submission>,
}

impl Engine {
    /// Makes an engine without a thread.
    ///
    /// # Panics
    /// If the runner's limits or the configuration leave no room for a single token.
    pub fn new(runner: Box<dyn ModelRunner>, config: EngineConfig, clock: Clock) -> (EngineHandle, Self) {
        let limits = *runner.limits();
        let stats = Arc::new(SharedStats::new(&limits));
        stats.heartbeat(clock());
        let queue = Arc::new(Queue::new(config, Arc::clone(&stats)));
        let scheduler = Scheduler::new(limits, &config, Arc::clone(&stats));
        let handle =
            EngineHandle::new(Arc::clone(&queue), Arc::clone(&stats), limits, config, Arc::clone(&clock));
        let throughput = Throughput::default();
        (handle, Self { runner, scheduler, queue, stats, clock, throughput, inbox: Vec::new() })
    }

    /// Starts an engine on a thread of its own. It ends after [`EngineHandle::drain`] or
    /// [`EngineHandle::abort`], when the last handle is dropped, or when the model fails.
    ///
    /// # Panics
    /// As [`Engine::new`]; or if the operating system gives no thread.
    pub fn spawn(
        runner: Box<dyn ModelRunner>,
        config: EngineConfig,
        clock: Clock,
    ) -> (EngineHandle, EngineThread) {
        let (handle, engine) = Self::new(runner, config, clock);
        let thread = std::thread::Builder::new().name("windrose-engine".to_owned());
        let thread = thread.spawn(move || engine.run()).expect("the operating system gives a thread");
        (handle, EngineThread { thread })
    }

    /// Steps until nothing is left to do and nothing more can come.
    fn run(mut self) -> Result<(), EngineError> {
        loop {
            match self.step() {
                Ok(Progress::Stepped) => {}
                Ok(Progress::Idle) => self.queue.wait(),
                Ok(Progress::Ended) => return Ok(()),
                Err(error) => {
                    tracing::error!(%error, "the engine has stopped");
                    return Err(error);
                }
            }
        }
    }

    /// Takes in what was submitted and runs one step; never waits for anything but the model.
    ///
    /// # Errors
    /// If the model failed. Every sequence has then ended with [`FinishReason::Error`], and the engine is
    /// good for nothing any more.
    pub fn step(&mut self) -> Result<Progress, EngineError> {
        let phase = self.take_in();
        if phase == Phase::Aborting {
            self.scheduler.end_all(FinishReason::Shutdown);
        }
        self.scheduler.make_masks(&self.clock);
        let started_at = (self.clock)();
        let plan = self.scheduler.schedule(started_at);
        let num_tokens = plan.batch.num_tokens();
        if num_tokens == 0 {
            if self.scheduler.is_mask_due() {
                self.stats.heartbeat(started_at);
                return Ok(Progress::Stepped);
            }
            assert!(self.scheduler.is_idle(), "whenever something waits or runs, something moves");
            return Ok(if phase == Phase::Open { Progress::Idle } else { Progress::Ended });
        }
        self.stats.heartbeat(started_at);
        let output = match execute(self.runner.as_mut(), &plan) {
            Ok(output) => output,
            Err(error) => {
                self.fail();
                return Err(error);
            }
        };
        let ended_at = (self.clock)();
        self.stats.heartbeat(ended_at);
        let took = ended_at.saturating_sub(started_at);
        self.stats.computed(output.device_seconds.map_or(took, Duration::from_secs_f64));
        self.stats.set_tokens_per_second(self.throughput.record(num_tokens, took));
        self.scheduler.update(output, ended_at);
        Ok(Progress::Stepped)
    }

    /// Checks what must hold between steps: every block is free or held by those whom it counts as owners,
    /// only computed full blocks are shared, everyone is in line.
    ///
    /// # Panics
    /// If something does not hold.
    pub fn check_integrity(&self) {
        self.scheduler.check_integrity();
    }

    fn take_in(&mut self) -> Phase {
        let phase = self.queue.take(&mut self.inbox);
        self.inbox.drain(..).for_each(|submission| self.scheduler.submit(submission));
        phase
    }

    fn fail(&mut self) {
        self.queue.advance(Phase::Stopped);
        self.stats.is_stopped.store(true, Relaxed);
        self.take_in();
        self.scheduler.end_all(FinishReason::Error);
    }
}

/// Runs the model, and turns its panic into an error.
fn execute(runner: &mut dyn ModelRunner, plan: &StepPlan<'_>) -> Result<StepOutput, EngineError> {
    // After a panic the runner is never used again, so nobody sees what it left half done.
    match catch_unwind(AssertUnwindSafe(|| runner.execute(plan.batch, &plan.rows))) {
        Ok(result) => Ok(result?),
        Err(panic) => Err(EngineError::Panicked(panic_message(panic))),
    }
}

fn panic_message(panic: Box<dyn Any + Send>) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without a message").to_owned()
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Open means that the engine ended by itself or its owner let go of it; else the phase stays.
        self.queue.close();
        self.stats.is_stopped.store(true, Relaxed);
        if !std::thread::panicking() {
            self.take_in();
            self.scheduler.end_all(FinishReason::Shutdown);
        }
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("stats", &self.stats.snapshot()).finish_non_exhaustive()
    }
}

/// The thread of a spawned engine. Dropping it lets the engine go on by itself.
#[derive(Debug)]
pub struct EngineThread {
    thread: JoinHandle<Result<(), EngineError>>,
}

impl EngineThread {
    /// Whether the engine has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits until the engine has ended.
    ///
    /// # Errors
    /// If it ended before it was asked to.
    pub fn join(self) -> Result<(), EngineError> {
        self.thread.join().unwrap_or_else(|panic| Err(EngineError::Panicked(panic_message(panic))))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;
    use std::time::Duration;

    use model::RunnerLimits;

    use super::*;
    use crate::constraint::Constraint;
    use crate::fake::FakeRunner;
    use crate::mask_turns::TIME_PER_STEP;
    use crate::request::{Choice, Event, Request};
    use crate::submission::SubmitError;
    use crate::testing::{Reader, clock, limits, request, sink};

    fn engine(runner: FakeRunner) -> (EngineHandle, Engine, Arc<AtomicU64>) {
        let (clock, now_ms) = clock();
        let (handle, engine) = Engine::new(Box::new(runner), EngineConfig::default(), clock);
        (handle, engine, now_ms)
    }

    fn submit(handle: &EngineHandle, request: Request) -> Result<Reader, SubmitError> {
        let (sink, reader) = sink();
        handle.submit(request, vec![Choice::free(sink)]).map(|()| reader)
    }

    fn last(reader: &Reader) -> Option<Event> {
        reader.events().pop()
    }

    #[track_caller]
    fn check_failure(runner: FakeRunner, expected: &str) {
        let (handle, mut engine, _) = engine(runner);
        let runs = submit(&handle, request(&[1, 2], 9)).unwrap();
        assert_eq!(engine.step().unwrap(), Progress::Stepped);
        let waits = submit(&handle, request(&[1; 50], 9)).unwrap();
        assert_eq!(engine.step().unwrap_err().to_string(), expected);
        for reader in [runs, waits] {
            assert_eq!(last(&reader), Some(Event::Finished(FinishReason::Error)));
        }
        let stats = handle.stats();
        assert!(stats.is_stopped && !stats.is_draining);
        assert_eq!((stats.num_free_blocks, stats.finished.iter().sum()), (15, stats.num_accepted));
        assert_eq!(submit(&handle, request(&[1], 1)).err(), Some(SubmitError::Stopped));
        assert_eq!(engine.step().unwrap(), Progress::Ended);
    }

    #[test]
    fn a_model_that_fails_or_panics_ends_every_sequence_and_the_engine() {
        let device = FakeRunner::new(limits()).with_device_failure_at(2);
        check_failure(device, "the device failed: the fake device fails");
        let panic = FakeRunner::new(limits()).with_panic_at(2);
        check_failure(panic, "the engine panicked: the fake model panics");
    }

    /// Allows everything, and takes its time to find that out.
    struct Slow {
        mask: [u32; 2],
        is_due: bool,
        mask_ms: u64,
        now_ms: Arc<AtomicU64>,
    }

    impl Constraint for Slow {
        fn allowed(&self) -> Option<&[u32]> {
            Some(&self.mask)
        }

        fn accept(&mut self, _: u32) {
            self.is_due = true;
        }

        fn is_due(&self) -> bool {
            self.is_due
        }

        fn prepare(&mut self) {
            self.is_due = false;
            self.now_ms.fetch_add(self.mask_ms, Relaxed);
        }

        fn is_complete(&self) -> bool {
            false
        }
    }

    #[test]
    fn slow_masks_hold_up_a_step_by_little_and_other_sequences_by_no_step() {
        const MASK_MS: u64 = 10;
        let runner = FakeRunner::new(RunnerLimits { num_blocks: 256, ..limits() });
        let (handle, mut engine, now_ms) = engine(runner);
        let submit = |mask_ms: Option<u64>| {
            let (sink, reader) = sink();
            let slow = |mask_ms| Slow { mask: [!0; 2], is_due: false, mask_ms, now_ms: Arc::clone(&now_ms) };
            let constraint = mask_ms.map(|mask_ms| Box::new(slow(mask_ms)) as Box<dyn Constraint>);
            handle.submit(request(&[1], 50), vec![Choice { sink, constraint }]).unwrap();
            reader
        };
        let num_tokens = |reader: &Reader| {
            reader.events().into_iter().filter(|event| matches!(event, Event::Token(_))).count()
        };
        let quick = [submit(Some(0)), submit(None)];
        (0..2).for_each(|_| assert_eq!(engine.step().unwrap(), Progress::Stepped));
        assert!(quick.iter().all(|reader| num_tokens(reader) == 2));
        let slow: Vec<Reader> = (0..6).map(|_| submit(Some(MASK_MS))).collect();
        for step in 0..37 {
            let started_ms = now_ms.load(Relaxed);
            engine.step().unwrap();
            let took = Duration::from_millis(now_ms.load(Relaxed) - started_ms);
            assert!(took < TIME_PER_STEP + Duration::from_millis(MASK_MS), "step {step}: {took:?}");
            assert!(quick.iter().all(|reader| num_tokens(reader) == 1), "step {step}");
        }
        // The first token needs no turn, and then there is one in each step.
        assert!(slow.iter().all(|reader| num_tokens(reader) == 1 + 36 / slow.len()));
    }

    #[test]
    fn a_draining_engine_finishes_what_it_has_and_an_aborted_one_does_not() {
        for is_aborted in [false, true] {
            let (handle, mut engine, _) = engine(FakeRunner::new(limits()));
            let reader = submit(&handle, request(&[1, 2], 3)).unwrap();
            engine.step().unwrap();
            if is_aborted {
                handle.abort()
            } else {
                handle.drain()
            }
            assert_eq!(submit(&handle, request(&[1], 1)).err(), Some(SubmitError::Draining));
            while engine.step().unwrap() != Progress::Ended {}
            let expected = if is_aborted { FinishReason::Shutdown } else { FinishReason::Length };
            assert_eq!(last(&reader), Some(Event::Finished(expected)));
        }
    }

    #[test]
    fn an_engine_that_is_dropped_ends_what_it_has() {
        let (handle, mut engine, _) = engine(FakeRunner::new(limits()));
        let runs = submit(&handle, request(&[1, 2], 3)).unwrap();
        engine.step().unwrap();
        let waits = submit(&handle, request(&[1, 2], 3)).unwrap();
        drop(engine);
        for reader in [runs, waits] {
            assert_eq!(last(&reader), Some(Event::Finished(FinishReason::Shutdown)));
        }
        assert!(handle.stats().is_stopped);
        assert_eq!(submit(&handle, request(&[1], 1)).err(), Some(SubmitError::Stopped));
    }

    #[test]
    fn a_watchdogs_patience_begins_when_work_arrives_and_not_when_the_last_was_done() {
        let (handle, mut engine, now_ms) = engine(FakeRunner::new(limits()));
        let mut check = |at_ms: u64, action: &mut dyn FnMut(&mut Engine), expected_ms: u64| {
            now_ms.store(at_ms, Relaxed);
            action(&mut engine);
            assert_eq!(handle.stats().last_step_at, Duration::from_millis(expected_ms));
        };
        let mut readers = Vec::new();
        check(1000, &mut |engine| assert_eq!(engine.step().unwrap(), Progress::Idle), 0);
        check(2000, &mut |_| readers.push(submit(&handle, request(&[1, 2], 2)).unwrap()), 2000);
        check(3000, &mut |_| readers.push(submit(&handle, request(&[1, 2], 2)).unwrap()), 2000);
        check(4000, &mut |engine| assert_eq!(engine.step().unwrap(), Progress::Stepped), 4000);
    }

    #[test]
    fn a_device_was_busy_for_as_long_as_its_own_clock_says() {
        let runner = FakeRunner::new(limits()).with_device_time(Duration::from_millis(250));
        let (handle, mut engine, now_ms) = engine(runner);
        let _reader = submit(&handle, request(&[1, 2], 9)).unwrap();
        for _ in 0..3 {
            now_ms.fetch_add(1000, Relaxed);
            engine.step().unwrap();
        }
        assert_eq!(handle.stats().computed_for, Duration::from_millis(750));
    }

    #[test]
    fn a_cache_that_is_too_large_to_count_is_refused_at_the_start() {
        let limits = RunnerLimits { block_size: 1 << 20, num_blocks: 1 << 20, ..limits() };
        let make = || Scheduler::new(limits, &EngineConfig::default(), Arc::new(SharedStats::default()));
        assert!(catch_unwind(make).is_err());
    }
}
