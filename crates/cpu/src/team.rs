//! The thread team: persistent workers that, together with the caller, run the numbered tasks of one job at
//! a time.
//!
//! Tasks are taken from a shared counter, so a thread that the system slows down takes fewer of them: one by one, or
//! in runs of neighbours that become shorter as fewer are left (see Hummel, Schonberg and Flynn, "Factoring", 1992), so
//! that a thread reads memory on where it was. After a job workers spin for some tens of microseconds, because the next
//! verb usually follows at once, then park: an idle team costs nothing.
//!
//! ```text
//! caller   publish job ── take tasks ──────────── withdraw job ── wait until nobody is inside ──►
//! worker     spin/park ── enter ── take tasks ── leave ── spin, park
//! ```
//!
//! A worker that wakes too late finds the job withdrawn and is not waited for: on a busy machine a run takes
//! only as long as the threads that did get to it.

use std::any::Any;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::grid::Tiles;

/// How long a thread that waits spins before it parks: longer than the gap between two verbs.
const SPIN: Duration = Duration::from_micros(40);

/// Worker threads and what they share with the caller.
pub(crate) struct Team {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    /// The job that may be entered now.
    job: Mutex<Option<Job>>,
    /// Counts published jobs; what idle workers watch.
    generation: AtomicUsize,
    /// The next task of the job.
    next_task: AtomicUsize,
    /// Workers that have entered the job and not left it. Grows only while `job` is locked.
    inside: AtomicUsize,
    /// The first panic of a task.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    shutdown: AtomicBool,
}

#[derive(Clone)]
struct Job {
    /// Borrowed from the caller's stack, valid until the caller has seen `inside` at zero.
    task: &'static (dyn Fn(usize) + Sync),
    num_tasks: usize,
    handout: Handout,
    caller: Thread,
}

/// How many tasks a thread takes at a time.
#[derive(Clone, Copy)]
enum Handout {
    One,
    /// A run of neighbours, half of a thread's equal share of those that are left.
    Run {
        num_threads: usize,
    },
}

impl Handout {
    /// Tasks to take if so many are left.
    fn len(self, num_left: usize) -> usize {
        match self {
            Self::One => 1,
            Self::Run { num_threads } => (num_left / (2 * num_threads)).max(1),
        }
    }
}

impl Team {
    /// Starts a team of `num_threads` threads, the caller's included.
    pub(crate) fn new(num_threads: usize) -> Self {
        let shared = Arc::new(Shared {
            job: Mutex::new(None),
            generation: AtomicUsize::new(0),
            next_task: AtomicUsize::new(0),
            inside: AtomicUsize::new(0),
            panic: Mutex::new(None),
            shutdown: AtomicBool::new(false),
        });
        let spawn = |index| {
            let shared = Arc::clone(&shared);
            let worker = thread::Builder::new().name(format!("cpu-{index}"));
            worker.spawn(move || work(&shared)).expect("the system starts a thread")
        };
        let workers = (1..num_threads).map(spawn).collect();
        Self { shared, workers }
    }

    /// Number of threads, the caller's included.
    pub(crate) fn num_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Rows of a band, so that every thread gets several, but each band is worth waking a thread for.
    pub(crate) fn band_rows(&self, rows: usize, features: usize) -> usize {
        const MIN_ELEMENTS: usize = 1 << 14;
        rows.div_ceil(4 * self.num_threads()).max(MIN_ELEMENTS / features).max(1)
    }

    /// Calls `task` with every number below `num_tasks`, each once, on all threads; returns when all are done.
    ///
    /// # Panics
    /// With the first panic of a task; tasks not yet begun are then skipped.
    pub(crate) fn run(&mut self, num_tasks: usize, task: impl Fn(usize) + Sync) {
        self.run_by(Handout::One, num_tasks, task);
    }

    fn run_by(&mut self, handout: Handout, num_tasks: usize, task: impl Fn(usize) + Sync) {
        if num_tasks <= 1 || self.workers.is_empty() {
            (0..num_tasks).for_each(task);
            return;
        }
        let task: &(dyn Fn(usize) + Sync) = &task;
        // SAFETY: workers call `task` only between entering and leaving. From `withdraw` on none can enter, and
        // `wait_until_left` returns when all have left. Nothing between here and there can unwind: tasks
        // run inside `catch_unwind`. So no worker holds `task` when this function, or its caller, goes on.
        let task =
            unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(task) };
        let job = Job { task, num_tasks, handout, caller: thread::current() };
        self.publish(job.clone());
        self.shared.take_tasks(&job);
        self.withdraw();
        self.wait_until_left();
        if let Some(panic) = lock(&self.shared.panic).take() {
            resume_unwind(panic);
        }
    }

    /// Calls `task` with every tile, on all threads.
    pub(crate) fn for_each<T: Tiles>(&mut self, tiles: T, task: impl Fn(T::Tile) + Sync) {
        // SAFETY: `run` passes every number below `num_tiles()` once.
        self.run(tiles.num_tiles(), |index| task(unsafe { tiles.tile(index) }));
    }

    /// As [`Team::for_each`], with neighbours on one thread where that can be: for tasks that cost the same, and read
    /// memory where the one before stopped.
    pub(crate) fn for_each_in_runs<T: Tiles>(&mut self, tiles: T, task: impl Fn(T::Tile) + Sync) {
        let handout = Handout::Run { num_threads: self.num_threads() };
        // SAFETY: as in `for_each`.
        self.run_by(handout, tiles.num_tiles(), |index| task(unsafe { tiles.tile(index) }));
    }

    fn publish(&self, job: Job) {
        self.shared.next_task.store(0, Ordering::Relaxed);
        *lock(&self.shared.job) = Some(job);
        self.wake_workers();
    }

    fn withdraw(&self) {
        *lock(&self.shared.job) = None;
    }

    fn wait_until_left(&self) {
        // Acquire: what the workers wrote in their tasks is visible to the caller.
        wait_until(|| self.shared.inside.load(Ordering::Acquire) == 0);
    }

    fn wake_workers(&self) {
        self.shared.generation.fetch_add(1, Ordering::Release);
        self.workers.iter().for_each(|worker| worker.thread().unpark());
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.shutdown.store(true, Ordering::Relaxed);
        self.wake_workers();
        for worker in self.workers.drain(..) {
            worker.join().expect("workers catch their tasks' panics");
        }
    }
}

impl Shared {
    /// Enters the published job, if there is one.
    fn enter(&self) -> Option<Job> {
        let job = lock(&self.job);
        if job.is_some() {
            self.inside.fetch_add(1, Ordering::Relaxed);
        }
        job.clone()
    }

    /// Leaves a job and tells its caller if nobody is left inside.
    fn leave(&self, caller: Thread) {
        // Release: pairs with the caller's load in `wait_until_left`.
        if self.inside.fetch_sub(1, Ordering::Release) == 1 {
            caller.unpark();
        }
    }

    /// Takes tasks, unless none is left.
    fn next_run(&self, job: &Job) -> Option<Range<usize>> {
        let end_of = |start: usize| {
            let num_left = job.num_tasks.checked_sub(start).filter(|&num_left| num_left > 0)?;
            Some(start + job.handout.len(num_left))
        };
        let start = self.next_task.fetch_update(Ordering::Relaxed, Ordering::Relaxed, end_of).ok()?;
        Some(start..end_of(start)?)
    }

    /// Runs tasks until none is left.
    fn take_tasks(&self, job: &Job) {
        let tasks = || {
            while let Some(run) = self.next_run(job) {
                run.for_each(job.task);
            }
        };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(tasks)) {
            self.next_task.store(job.num_tasks, Ordering::Relaxed);
            let mut first = lock(&self.panic);
            match *first {
                None => *first = Some(panic),
                // Its destructor might panic, and here nothing may unwind.
                Some(_) => std::mem::forget(panic),
            }
        }
    }
}

/// A worker's life.
fn work(shared: &Shared) {
    let mut seen = 0;
    loop {
        wait_until(|| shared.generation.load(Ordering::Acquire) != seen);
        seen = shared.generation.load(Ordering::Acquire);
        if shared.shutdown.load(Ordering::Relaxed) {
            return;
        }
        if let Some(job) = shared.enter() {
            shared.take_tasks(&job);
            shared.leave(job.caller);
        }
    }
}

/// Spins, then parks, until `ready`; whoever makes it so unparks this thread afterwards.
fn wait_until(ready: impl Fn() -> bool) {
    const CHECKS_PER_CLOCK: usize = 32;
    let start = Instant::now();
    while start.elapsed() < SPIN {
        for _ in 0..CHECKS_PER_CLOCK {
            if ready() {
                return;
            }
            std::hint::spin_loop();
        }
    }
    while !ready() {
        thread::park();
    }
}

/// Locks a mutex; no panic can leave the few values guarded here half-written.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_per_run() {
        for num_threads in [1, 2, 3, 5] {
            let mut team = Team::new(num_threads);
            for num_tasks in (0..200).chain([5000]) {
                let counts: Vec<AtomicUsize> = (0..num_tasks).map(|_| AtomicUsize::new(0)).collect();
                team.run(num_tasks, |task| {
                    counts[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn runs_hand_out_every_task_once_and_end_in_single_ones() {
        for num_threads in [1, 2, 5] {
            let mut team = Team::new(num_threads);
            for num_tasks in (0..200).chain([5000]) {
                let mut counts = vec![0; num_tasks];
                team.for_each_in_runs(crate::grid::Grid::row_bands(&mut counts, 1, 1), |mut tile| {
                    tile.rows().for_each(|row| tile.row(row)[0] += 1);
                });
                assert!(counts.iter().all(|&count| count == 1));
            }
        }
        let lens = |num_left: usize| Handout::Run { num_threads: 2 }.len(num_left);
        assert_eq!([448, 336, 10, 7, 1].map(lens), [112, 84, 2, 1, 1]);
    }

    #[test]
    fn a_panicking_task_reaches_the_caller_and_the_team_survives() {
        for num_threads in [1, 3] {
            let mut team = Team::new(num_threads);
            for bad in [0, 7, 99] {
                let run = || team.run(100, |task| assert_ne!(task, bad, "task {bad} fails"));
                let panic = catch_unwind(AssertUnwindSafe(run)).expect_err("the panic propagates");
                let message = panic.downcast_ref::<String>().expect("a formatted message");
                assert!(message.contains(&format!("task {bad} fails")), "{message}");
            }
            let count = AtomicUsize::new(0);
            team.run(10, |_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.into_inner(), 10);
        }
    }

    #[test]
    fn writes_of_tasks_are_visible_to_the_caller() {
        let mut team = Team::new(3);
        let mut values = vec![0usize; 1000];
        for round in 0..200 {
            team.for_each(crate::grid::Grid::row_bands(&mut values, 1, 7), |mut tile| {
                tile.rows().for_each(|row| tile.row(row)[0] += row + round);
            });
        }
        let rounds: usize = (0..200).sum();
        assert!(values.iter().enumerate().all(|(row, &value)| value == 200 * row + rounds));
    }
}
