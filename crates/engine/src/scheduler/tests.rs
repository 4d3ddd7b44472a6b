//! The scheduler's decisions one by one; that they never change a token is the simulation's business.

use super::*;
use crate::fake::FakeRunner;
use crate::request::{Choice, Event, Request};
use crate::testing::{Reader, limits, request, sink};
use model::ModelRunner;

struct Bench {
    scheduler: Scheduler,
    runner: FakeRunner,
    stats: Arc<SharedStats>,
    now: Duration,
}

impl Bench {
    fn new(limits: RunnerLimits) -> Self {
        Self::with_config(limits, EngineConfig::default())
    }

    fn with_config(limits: RunnerLimits, config: EngineConfig) -> Self {
        let stats = Arc::new(SharedStats::new(&limits));
        let scheduler = Scheduler::new(limits, &config, Arc::clone(&stats));
        Self { scheduler, runner: FakeRunner::new(limits), stats, now: Duration::ZERO }
    }

    fn submit(&mut self, request: Request) -> Vec<Reader> {
        let (sinks, readers): (Vec<_>, Vec<_>) = (0..request.num_choices).map(|_| sink()).unzip();
        let choices: Vec<Choice> = sinks.into_iter().map(Choice::free).collect();
        self.stats.accept(choices.len(), request.prompt.len() * choices.len());
        self.scheduler.submit(Submission { request, choices, submitted_at: self.now });
        readers
    }

    /// Runs a step, and returns how many tokens each sequence in it computed.
    fn step(&mut self) -> Vec<usize> {
        let plan = self.scheduler.schedule(self.now);
        if plan.batch.num_tokens() == 0 {
            return Vec::new();
        }
        let lens = (0..plan.batch.num_seqs()).map(|index| plan.batch.query_range(index).len()).collect();
        let output = self.runner.execute(plan.batch, &plan.rows).unwrap();
        self.scheduler.update(output, self.now);
        self.scheduler.check_integrity();
        lens
    }

    fn steps(&mut self, count: usize) -> Vec<Vec<usize>> {
        (0..count).map(|_| self.step()).collect()
    }
}

fn prompt(len: u32) -> Vec<u32> {
    (0..len).map(|i| i * 7 % 64).collect()
}

fn num_cached(reader: &Reader) -> Option<u32> {
    reader.events().into_iter().find_map(|event| match event {
        Event::Started { num_cached_tokens, .. } => Some(num_cached_tokens),
        _ => None,
    })
}

fn end(reader: &Reader) -> Option<FinishReason> {
    match reader.events().pop() {
        Some(Event::Finished(reason)) => Some(reason),
        _ => None,
    }
}

#[test]
fn the_budget_goes_to_single_tokens_first_and_what_is_left_to_prompts_in_order() {
    let mut bench = Bench::new(limits());
    let _first = bench.submit(request(&prompt(3), 10));
    assert_eq!(bench.step(), [3]);
    let _second = bench.submit(request(&prompt(20), 10));
    let _third = bench.submit(request(&prompt(4), 10));
    assert_eq!(bench.steps(3), [vec![1, 15], vec![1, 5, 4], vec![1, 1, 1]]);
}

#[test]
fn a_long_prompt_of_high_priority_does_not_stop_those_who_generate() {
    let mut bench = Bench::new(limits());
    let _first = bench.submit(request(&prompt(3), 10));
    bench.step();
    let _urgent = bench.submit(Request { priority: -1, ..request(&prompt(30), 10) });
    assert_eq!(bench.steps(3), [vec![15, 1], vec![15, 1], vec![1, 1]]);
}

#[test]
fn seats_go_by_priority_and_then_by_arrival() {
    let mut bench = Bench::new(RunnerLimits { max_num_seqs: 1, ..limits() });
    let readers: Vec<_> = [(0, 2), (1, 3), (-1, 4), (0, 1)]
        .map(|(priority, len)| bench.submit(Request { priority, ..request(&prompt(len), 1) }))
        .into();
    assert_eq!(bench.steps(4), [[4], [2], [1], [3]]);
    assert!(readers.iter().flatten().all(|reader| end(reader) == Some(FinishReason::Length)));
}

#[track_caller]
fn check_second_prompt(first: Request, second: Request, expected_cached: u32) {
    let mut bench = Bench::new(limits());
    let _first = bench.submit(first);
    while !bench.step().is_empty() {}
    let second_len = second.prompt.len();
    let readers = bench.submit(second);
    let lens = bench.step();
    assert_eq!(num_cached(&readers[0]), Some(expected_cached));
    assert_eq!(lens, [second_len - expected_cached as usize]);
}

#[test]
fn a_prompt_takes_its_full_blocks_from_the_cache_and_computes_at_least_its_last_token() {
    let salted = |salt: &str, len| Request { cache_salt: Some(salt.to_owned()), ..request(&prompt(len), 1) };
    check_second_prompt(request(&prompt(11), 1), request(&prompt(11), 1), 8);
    check_second_prompt(request(&prompt(12), 1), request(&prompt(12), 1), 8);
    check_second_prompt(request(&prompt(13), 1), request(&prompt(13), 1), 12);
    check_second_prompt(request(&prompt(3), 1), request(&prompt(3), 1), 0);
    check_second_prompt(request(&prompt(9), 1), request(&prompt(6), 1), 4);
    check_second_prompt(salted("a", 9), salted("a", 9), 8);
    check_second_prompt(salted("a", 9), salted("b", 9), 0);
    check_second_prompt(salted("a", 9), request(&prompt(9), 1), 0);
}

#[test]
fn scored_prompts_are_computed_whole_but_cached_for_others() {
    let scored = |len| Request { num_prompt_logprobs: Some(1), ..request(&prompt(len), 1) };
    check_second_prompt(request(&prompt(8), 1), scored(8), 0);
    check_second_prompt(scored(13), request(&prompt(13), 1), 12);
}

#[test]
fn scored_prompts_leave_rows_of_logits_to_others() {
    let mut bench = Bench::new(RunnerLimits { max_num_logits: 8, ..limits() });
    let first = bench.submit(request(&prompt(3), 10));
    bench.step();
    let scored = Request { num_prompt_logprobs: Some(0), ..request(&prompt(12), 0) };
    let scored = bench.submit(scored);
    assert_eq!(bench.steps(3), [vec![1, 7], vec![1, 5], vec![1]]);
    let events = scored[0].events();
    let [_, Event::PromptLogprobs(scores), Event::Finished(FinishReason::Length)] = events.as_slice() else {
        panic!("{events:?}");
    };
    let scores: Vec<_> = scores.iter().map(|score| score.as_ref().map(|s| s.logprob.token)).collect();
    let expected: Vec<_> = prompt(12).into_iter().map(Some).collect();
    assert_eq!((scores[0], &scores[1..]), (None, &expected[1..]));
    assert_eq!(first[0].events().len(), 5);
}

#[test]
fn progress_is_reported_step_by_step_to_whom_asked() {
    let mut bench = Bench::new(RunnerLimits { max_num_batched_tokens: 5, ..limits() });
    let asked = Request { reports_progress: true, num_choices: 2, ..request(&prompt(12), 2) };
    let readers = bench.submit(asked);
    bench.steps(6);
    let progress = |reader: &Reader| -> Vec<u32> {
        let events = reader.events().into_iter();
        events
            .filter_map(|event| match event {
                Event::Progress { num_computed_tokens } => Some(num_computed_tokens),
                _ => None,
            })
            .collect()
    };
    assert_eq!((progress(&readers[0]), progress(&readers[1])), (vec![0, 5, 10, 12], vec![]));
}

#[track_caller]
fn check_choices(enable_prefix_cache: bool) {
    let config = EngineConfig { enable_prefix_cache, ..EngineConfig::default() };
    let mut bench = Bench::with_config(limits(), config);
    let readers = bench.submit(Request { num_choices: 3, ..request(&prompt(10), 9) });
    assert_eq!(bench.steps(3), [vec![10], vec![1, 2, 2], vec![1, 1, 1]]);
    assert_eq!(readers.iter().map(num_cached).collect::<Vec<_>>(), [Some(0), Some(8), Some(8)]);
    assert_eq!(bench.stats.snapshot().num_free_blocks, 15 - 2 - 3, "two blocks shared, one for each");
    while !bench.step().is_empty() {}
    let stats = bench.stats.snapshot();
    assert_eq!((stats.num_free_blocks, stats.prompt_tokens), (15, 10));
    assert_eq!(stats.num_cached_blocks > 0, enable_prefix_cache);
    assert_eq!(stats.prefix_cache_queries > 0, enable_prefix_cache);
}

#[test]
fn choices_share_the_full_blocks_of_their_prompt_with_and_without_a_prefix_cache() {
    check_choices(true);
    check_choices(false);
}

#[test]
fn when_blocks_run_out_the_last_in_line_gives_its_blocks_up_and_comes_back() {
    // Six blocks of four; two sequences that need four each.
    let mut bench = Bench::new(RunnerLimits { num_blocks: 7, ..limits() });
    let first = bench.submit(request(&prompt(8), 8));
    let second = bench.submit(request(&prompt(7), 8));
    let lens = bench.steps(5);
    assert_eq!(lens, [[8, 7], [1, 1], [1, 1], [1, 1], [1, 1]]);
    assert_eq!(bench.stats.snapshot().num_preemptions, 0);
    let _third = bench.submit(request(&[60; 4], 1));
    assert_eq!(bench.step(), [1], "the first needs a fourth block");
    let stats = bench.stats.snapshot();
    assert_eq!((stats.num_preemptions, stats.num_waiting, stats.num_running), (1, 2, 1));
    assert_eq!(bench.step(), [1], "the third would fit, but the second comes first");
    while !bench.step().is_empty() {}
    for readers in [first, second] {
        assert_eq!(end(&readers[0]), Some(FinishReason::Length));
    }
}

#[test]
fn a_sequence_that_fills_the_whole_cache_ends_with_length() {
    let mut bench = Bench::new(RunnerLimits { num_blocks: 4, ..limits() });
    let readers = bench.submit(request(&prompt(5), 40));
    while !bench.step().is_empty() {}
    let events = readers[0].events();
    let num_tokens = events.iter().filter(|event| matches!(event, Event::Token(_))).count();
    assert_eq!(num_tokens, 3 * 4 + 1 - 5, "the last token need not be in the cache");
    assert_eq!(events.last(), Some(&Event::Finished(FinishReason::Length)));
}

#[test]
fn min_tokens_bans_every_end_until_then() {
    let mut bench = Bench::new(limits());
    bench.runner = FakeRunner::new(limits()).with_eos(5, 1.0);
    let stopping = |min_tokens| Request { min_tokens, eos_token_ids: vec![5], ..request(&prompt(5), 9) };
    let readers = [bench.submit(stopping(0)), bench.submit(stopping(3))];
    let ignoring = bench.submit(Request { ignore_eos: true, ..stopping(0) });
    while !bench.step().is_empty() {}
    let num_events = |readers: &[Reader]| readers[0].events().len();
    assert_eq!(num_events(&readers[0]), 1 + 1 + 1);
    assert_eq!(num_events(&readers[1]), 1 + 4 + 1);
    assert_eq!(num_events(&ignoring), 1 + 9 + 1);
}

#[test]
fn whoever_leaves_or_is_late_is_gone_before_the_next_step_whether_it_runs_or_waits() {
    let mut bench = Bench::new(RunnerLimits { max_num_seqs: 2, ..limits() });
    let timed =
        |deadline| Request { deadline: Some(Duration::from_secs(deadline)), ..request(&prompt(4), 40) };
    let [leaves, is_late] = [bench.submit(request(&prompt(3), 40)), bench.submit(timed(5))];
    let [waits, waits_long] = [bench.submit(request(&prompt(4), 40)), bench.submit(timed(6))];
    assert_eq!(bench.step(), [3, 4]);
    drop((leaves, waits));
    bench.now = Duration::from_secs(5);
    assert_eq!(bench.step(), [4]);
    assert_eq!(end(&is_late[0]), Some(FinishReason::Deadline));
    bench.now = Duration::from_secs(6);
    assert!(bench.step().is_empty());
    assert_eq!(end(&waits_long[0]), Some(FinishReason::Deadline));
    let stats = bench.stats.snapshot();
    assert_eq!(stats.finished[FinishReason::Cancelled.index()], 2);
    assert_eq!(stats.num_free_blocks, stats.num_blocks);
}

#[test]
fn logits_that_are_not_finite_end_their_own_sequences_only() {
    let mut bench = Bench::new(limits());
    bench.runner = FakeRunner::new(limits()).with_non_finite_logits_at(2);
    let broken = bench.submit(request(&prompt(5), 9));
    bench.step();
    let unharmed = bench.submit(request(&prompt(40), 2));
    while !bench.step().is_empty() {}
    assert_eq!(end(&broken[0]), Some(FinishReason::Error));
    assert_eq!(end(&unharmed[0]), Some(FinishReason::Length));
}
