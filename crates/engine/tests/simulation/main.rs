//! Thousands of small worlds, each drawn from one seed: a model, a configuration, clients that come in
//! bursts, leave, stall and run late, a device that fails, and at the end a drain or an abort.
//!
//! The engine is stepped by hand on a virtual clock. After every step its books are checked, and whoever
//! left or was late must be gone. At the end every accepted choice has ended exactly once, the cache is
//! whole, and each choice's tokens and log-probabilities are those of [`oracle`], which runs the request
//! alone, without an engine.
//!
//! A failure prints its seed; `WINDROSE_SIMULATION_SEED=7` runs that world alone, and
//! `WINDROSE_SIMULATION_COUNT=100000` runs more of them.

mod client;
mod grammar;
mod oracle;
mod rng;
mod scenario;
mod world;

use engine::{FinishReason, Stats};

use world::World;

const DEFAULT_COUNT: u64 = 10_000;

#[test]
fn every_schedule_gives_every_sequence_the_tokens_it_gets_alone() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect(name));
    if let Some(seed) = number("WINDROSE_SIMULATION_SEED") {
        println!("{:#?}", run(seed));
        return;
    }
    let count = number("WINDROSE_SIMULATION_COUNT").unwrap_or(DEFAULT_COUNT);
    let mut totals = Totals::default();
    (0..count).for_each(|seed| totals.add(&run(seed)));
    println!("{count} worlds: {totals:?}");
    totals.assert_everything_happened();
}

fn run(seed: u64) -> Stats {
    let _names_seed = NamesSeed(seed);
    World::new(seed).run()
}

/// Says which world a panic comes from.
struct NamesSeed(u64);

impl Drop for NamesSeed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("reproduce with WINDROSE_SIMULATION_SEED={}", self.0);
        }
    }
}

/// What happened in all worlds: a simulation in which nothing happens proves nothing.
#[derive(Debug, Default)]
struct Totals {
    num_steps: u64,
    num_preemptions: u64,
    prefix_cache_hits: u64,
    generation_tokens: u64,
    finished: [u64; FinishReason::COUNT],
}

impl Totals {
    fn add(&mut self, stats: &Stats) {
        self.num_steps += stats.num_steps;
        self.num_preemptions += stats.num_preemptions;
        self.prefix_cache_hits += stats.prefix_cache_hits;
        self.generation_tokens += stats.generation_tokens;
        self.finished.iter_mut().zip(stats.finished).for_each(|(total, count)| *total += count);
    }

    fn assert_everything_happened(&self) {
        let counts = [self.num_steps, self.num_preemptions, self.prefix_cache_hits, self.generation_tokens];
        assert!(counts.iter().chain(&self.finished).all(|&count| count > 0), "{self:?}");
    }
}
