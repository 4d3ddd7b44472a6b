//! Who runs in the next step, and with how many tokens: continuous batching under one token budget.
//!
//! A step is spent in three passes, each in order of priority and arrival:
//!
//! ```text
//! 1. running sequences that lack one token      each gets it, and a block when its last is full;
//!                                               when none is free, the last in line is preempted
//! 2. running sequences that lack more           chunks of prompts, as far as the budget goes
//! 3. waiting sequences                          admitted while seats, budget and blocks last
//! ```
//!
//! A sequence is admitted when the cache has room for all its tokens, which it then holds, and one more
//! block per running sequence, so that an admission does not cause a preemption a moment later. A preempted
//! sequence gives its blocks back and waits in its old place in line; what it had computed is computed
//! again, or found in the prefix cache. Choices of one request share their prompt through that same cache:
//! the first computes it while the others wait.
//!
//! The scheduler is a state machine: time is passed in, and nothing here waits or draws a number; only the making of
//! masks reads a clock. It does not run the model, and it trusts requests: they were checked at submission.

use std::collections::BTreeMap;
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use model::{Batch, RunnerLimits, SampleRow, StepOutput};

use crate::block_hash::{BlockHasher, Scope};
use crate::block_manager::BlockManager;
use crate::config::{Clock, EngineConfig};
use crate::mask_turns::MaskTurns;
use crate::request::FinishReason;
use crate::sequence::{Sequence, SequenceKey, Times};
use crate::stats::SharedStats;
use crate::submission::{Submission, cache_capacity};

/// What one step computes.
pub(crate) struct StepPlan<'a> {
    /// The tokens, and where they go in the cache; empty if there is nothing to do.
    pub(crate) batch: &'a Batch,
    /// What to do with each row of logits.
    pub(crate) rows: Vec<SampleRow<'a>>,
}

/// All sequences that wait or run, and the blocks they hold.
pub(crate) struct Scheduler {
    limits: RunnerLimits,
    max_num_seqs: usize,
    max_num_batched_tokens: usize,
    enable_prefix_cache: bool,
    waiting: BTreeMap<SequenceKey, Box<Sequence>>,
    /// Sorted by key.
    #[expect(clippy::vec_box, reason = "sequences are large, and move within and between the two lines")]
    running: Vec<Box<Sequence>>,
    blocks: BlockManager,
    hasher: BlockHasher,
    num_arrivals: u64,
    mask_turns: MaskTurns,
    stats: Arc<SharedStats>,
    /// The step in progress; kept for its allocations.
    batch: Batch,
    /// Submissions one of whose choices computes blocks that the others wait for.
    prefilling: Vec<u64>,
}

/// What is left to give in a step.
struct Room {
    num_tokens: usize,
    num_logits: usize,
    /// Tokens given so far.
    num_given: usize,
    /// Most experts that a token of the step visits in a layer, and most rows of experts that a layer computes: all
    /// tokens count as if they visited as many.
    experts_per_token: usize,
    max_expert_rows: usize,
}

impl Room {
    /// Tokens that are left if some visit so many experts.
    fn tokens_left(&self, experts_per_token: usize) -> usize {
        let rows = self.max_expert_rows / self.experts_per_token.max(experts_per_token);
        self.num_tokens.min(rows.saturating_sub(self.num_given))
    }

    /// Most of the `num_lacking` tokens of `sequence` that this step can compute.
    fn chunk(&self, sequence: &Sequence, num_lacking: usize) -> usize {
        let chunk = num_lacking.min(self.tokens_left(sequence.experts_per_token()));
        if sequence.is_scoring() {
            chunk.min(self.num_logits)
        } else if self.num_logits == 0 || sequence.is_mask_due() {
            // The last token would need a row of logits, and what may follow it.
            chunk.min(num_lacking - 1)
        } else {
            chunk
        }
    }

    fn give(&mut self, sequence: &mut Sequence, num_tokens: usize) {
        sequence.num_scheduled_tokens = num_tokens;
        self.num_tokens -= num_tokens;
        self.num_given += num_tokens;
        if num_tokens > 0 {
            self.experts_per_token = self.experts_per_token.max(sequence.experts_per_token());
        }
        self.num_logits -= sequence.logits_positions().count();
    }
}

impl Scheduler {
    /// Makes a scheduler without sequences.
    ///
    /// # Panics
    /// If the limits leave no room for a single token, or their positions and slots do not fit in 32 bits.
    pub(crate) fn new(limits: RunnerLimits, config: &EngineConfig, stats: Arc<SharedStats>) -> Self {
        assert!(limits.num_blocks > 1 && limits.block_size > 0 && limits.max_model_len > 0);
        assert!(limits.num_blocks.checked_mul(limits.block_size).is_some_and(|n| u32::try_from(n).is_ok()));
        assert!(u32::try_from(limits.max_model_len).is_ok() && u32::try_from(limits.vocab_size).is_ok());
        let max_num_batched_tokens = config.max_num_batched_tokens.min(limits.max_num_batched_tokens);
        // With at most one sequence per token and per row of logits, every running sequence can move in
        // every step, and a prompt cannot be starved by those that are further on.
        let max_num_seqs = config.max_num_seqs.min(limits.max_num_seqs);
        let max_num_seqs = max_num_seqs.min(max_num_batched_tokens).min(limits.max_num_logits);
        assert!(max_num_seqs > 0, "a step has room for a sequence");
        Self {
            max_num_seqs,
            max_num_batched_tokens,
            enable_prefix_cache: config.enable_prefix_cache,
            waiting: BTreeMap::new(),
            running: Vec::new(),
            blocks: BlockManager::new(to_u32(limits.num_blocks), config.enable_prefix_cache),
            hasher: BlockHasher::new(),
            num_arrivals: 0,
            mask_turns: MaskTurns::default(),
            stats,
            batch: Batch::new(),
            prefilling: Vec::new(),
            limits,
        }
    }

    /// Whether nothing waits or runs.
    pub(crate) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Puts an accepted request's choices in line.
    pub(crate) fn submit(&mut self, submission: Submission) {
        let arrival = self.num_arrivals;
        self.num_arrivals += 1;
        let times = Times { submitted_at: submission.submitted_at, deadline: submission.deadline() };
        let request = Arc::new(submission.request);
        let root = if self.enable_prefix_cache && request.steering.is_none() {
            Some(self.hasher.root(Scope::Salt(request.cache_salt.as_deref())))
        } else {
            (request.num_choices > 1).then(|| self.hasher.root(Scope::Submission(arrival)))
        };
        // The last token generated need not enter the cache.
        let max_len = (request.prompt.len().saturating_add(request.max_tokens as usize))
            .min(self.limits.max_model_len)
            .min(cache_capacity(&self.limits) + 1);
        for (index, choice) in (0..).zip(submission.choices) {
            let key = SequenceKey { priority: request.priority, arrival, choice: index };
            let sequence =
                Sequence::new(key, Arc::clone(&request), choice, times, max_len, root, self.limits.route());
            self.waiting.insert(key, Box::new(sequence));
        }
    }

    /// Makes masks for the next step, as many as there is time for.
    pub(crate) fn make_masks(&mut self, clock: &Clock) {
        let sequences = self.running.iter_mut().chain(self.waiting.values_mut());
        self.mask_turns.take(sequences.map(|sequence| &mut **sequence), clock);
    }

    /// Whether masks are still to be made.
    pub(crate) fn is_mask_due(&self) -> bool {
        self.running.iter().chain(self.waiting.values()).any(|sequence| sequence.is_mask_due())
    }

    /// Ends what the clients gave up, and plans the next step.
    pub(crate) fn schedule(&mut self, now: Duration) -> StepPlan<'_> {
        self.end_given_up(now);
        let running = self.running.iter().map(|sequence| sequence.experts_per_token());
        let mut room = Room {
            num_tokens: self.max_num_batched_tokens,
            num_logits: self.limits.max_num_logits,
            num_given: 0,
            experts_per_token: running.fold(self.limits.top_k, usize::max),
            max_expert_rows: self.limits.max_expert_rows(),
        };
        let has_preempted = self.schedule_single_tokens(&mut room);
        self.schedule_chunks(&mut room);
        if !has_preempted {
            self.admit_waiting(&mut room, now);
        }
        self.build_batch();
        self.publish_blocks();
        let mut rows = Vec::with_capacity(self.batch.logits_indices.len());
        rows.extend(self.running.iter().flat_map(|sequence| sequence.sample_rows()));
        StepPlan { batch: &self.batch, rows }
    }

    /// Takes in what the step gave, and ends what is finished, given up or late.
    ///
    /// # Panics
    /// If there is not one result per row of the plan.
    pub(crate) fn update(&mut self, output: StepOutput, now: Duration) {
        self.stats.routing.add(&output.expert_loads);
        let mut first_token = 0;
        for sequence in &mut self.running {
            sequence.record(&output.choices, first_token);
            first_token += sequence.num_scheduled_tokens;
        }
        let mut results = output.sampled.into_iter();
        let mut index = 0;
        while index < self.running.len() {
            let finished = self.advance(index, &mut results);
            match self.running[index].departure().or(finished) {
                Some(reason) => self.end_running(index, reason),
                None => index += 1,
            }
        }
        assert!(results.next().is_none(), "one result per row");
        self.stats.num_steps.fetch_add(1, Relaxed);
        self.end_given_up(now);
    }

    /// Ends everything for one reason.
    pub(crate) fn end_all(&mut self, reason: FinishReason) {
        while !self.running.is_empty() {
            self.end_running(self.running.len() - 1, reason);
        }
        while let Some((&key, _)) = self.waiting.first_key_value() {
            self.end_waiting(key, reason);
        }
    }

    fn end_given_up(&mut self, now: Duration) {
        let reason = |sequence: &Sequence| {
            sequence.departure().or_else(|| sequence.lateness(now)).or_else(|| sequence.dead_end())
        };
        for index in (0..self.running.len()).rev() {
            if let Some(reason) = reason(&self.running[index]) {
                self.end_running(index, reason);
            }
        }
        let waiting = self.waiting.iter();
        let ended = waiting.filter_map(|(&key, sequence)| reason(sequence).map(|reason| (key, reason)));
        for (key, reason) in ended.collect::<Vec<_>>() {
            self.end_waiting(key, reason);
        }
    }

    fn end_running(&mut self, index: usize, reason: FinishReason) {
        let mut sequence = self.running.remove(index);
        self.blocks.release(&mut sequence.block_table);
        self.stats.num_running.fetch_sub(1, Relaxed);
        self.end(sequence, reason);
    }

    fn end_waiting(&mut self, key: SequenceKey, reason: FinishReason) {
        if let Some(sequence) = self.waiting.remove(&key) {
            self.stats.leave_waiting(sequence.len());
            self.end(sequence, reason);
        }
    }

    fn end(&mut self, sequence: Box<Sequence>, reason: FinishReason) {
        self.publish_blocks();
        self.stats.finish(reason);
        sequence.finish(reason);
    }

    /// Gives every running sequence that lacks one token, and can take the next, that token; returns whether any was
    /// preempted.
    fn schedule_single_tokens(&mut self, room: &mut Room) -> bool {
        let mut has_preempted = false;
        let mut index = 0;
        while index < self.running.len() {
            if num_lacking(&self.running[index]) > 1 || self.running[index].is_mask_due() {
                index += 1;
                continue;
            }
            if self.hold_blocks(index) {
                room.give(&mut self.running[index], 1);
                index += 1;
            } else {
                // Whoever is last in line comes after this sequence, or is this one: never one that has
                // been given its token.
                self.preempt_last();
                has_preempted = true;
            }
        }
        has_preempted
    }

    /// Lets a running sequence hold blocks for all its tokens; returns whether there were enough.
    fn hold_blocks(&mut self, index: usize) -> bool {
        let sequence = &mut self.running[index];
        while sequence.block_table.len() < sequence.len().div_ceil(self.limits.block_size) {
            let Some(block) = self.blocks.allocate() else { return false };
            sequence.block_table.push(block);
        }
        true
    }

    fn preempt_last(&mut self) {
        let Some(mut sequence) = self.running.pop() else { return };
        self.blocks.release(&mut sequence.block_table);
        sequence.num_computed_tokens = 0;
        self.stats.num_preemptions.fetch_add(1, Relaxed);
        self.stats.num_running.fetch_sub(1, Relaxed);
        self.stats.enter_waiting(sequence.len());
        self.waiting.insert(sequence.key, sequence);
    }

    /// Spends the budget on running sequences that lack more than one token. They hold their blocks.
    fn schedule_chunks(&mut self, room: &mut Room) {
        self.prefilling.clear();
        for sequence in &mut self.running {
            if num_lacking(sequence) > 1 {
                let chunk = room.chunk(sequence, num_lacking(sequence));
                room.give(sequence, chunk);
            }
            if sequence.is_filling_shared_blocks(self.limits.block_size) {
                self.prefilling.push(sequence.key.arrival);
            }
        }
    }

    /// Spends what is left of the budget on waiting sequences. The first that does not fit ends it, so that
    /// nobody is overtaken for ever; only those that wait for a sibling are passed over.
    fn admit_waiting(&mut self, room: &mut Room, now: Duration) {
        let mut passed_over = None;
        while self.running.len() < self.max_num_seqs && room.num_tokens > 0 {
            let after = passed_over.map_or(Unbounded, Excluded);
            let Some((&key, _)) = self.waiting.range((after, Unbounded)).next() else { return };
            if self.prefilling.contains(&key.arrival) {
                passed_over = Some(key);
            } else if !self.admit(key, room, now) {
                return;
            }
        }
    }

    /// Lets a waiting sequence run, if there is room for it.
    fn admit(&mut self, key: SequenceKey, room: &mut Room, now: Duration) -> bool {
        let block_size = self.limits.block_size;
        let Some(sequence) = self.waiting.get_mut(&key) else { return false };
        let max_cached_blocks = sequence.max_cached_tokens() / block_size;
        let hashes = sequence.block_hashes(0..max_cached_blocks, block_size, &self.hasher);
        let cached: Vec<u32> = self.blocks.find_prefix(hashes).collect();
        let num_cached_tokens = cached.len() * block_size;

        let num_blocks = sequence.len().div_ceil(block_size);
        let num_held_by_others = cached.iter().filter(|&&block| !self.blocks.is_free(block)).count();
        let headroom = self.running.len();
        let chunk = room.chunk(sequence, sequence.len() - num_cached_tokens);
        if num_blocks - num_held_by_others + headroom > self.blocks.num_free() || chunk == 0 {
            return false;
        }

        let Some(mut sequence) = self.waiting.remove(&key) else { return false };
        self.stats.leave_waiting(sequence.len());
        self.stats.num_running.fetch_add(1, Relaxed);
        self.start(&mut sequence, num_cached_tokens, now);
        cached.iter().for_each(|&block| self.blocks.share(block));
        sequence.block_table = cached;
        sequence.num_computed_tokens = num_cached_tokens;
        if sequence.is_filling_shared_blocks(block_size) {
            self.prefilling.push(key.arrival);
        }
        room.give(&mut sequence, chunk);
        let index = self.running.partition_point(|other| other.key < key);
        self.running.insert(index, sequence);
        assert!(self.hold_blocks(index), "free blocks were counted");
        true
    }

    /// Tells the reader, and counts the prompt, the first time that a sequence runs.
    fn start(&self, sequence: &mut Sequence, num_cached_tokens: usize, now: Duration) {
        let is_first = sequence.start(to_u32(num_cached_tokens), now);
        if !is_first || sequence.key.choice > 0 {
            return;
        }
        self.stats.prompt_tokens.fetch_add(sequence.prompt_len() as u64, Relaxed);
        if self.enable_prefix_cache && !sequence.is_scoring() {
            self.stats.prefix_cache_queries.fetch_add(sequence.prompt_len() as u64, Relaxed);
            self.stats.prefix_cache_hits.fetch_add(num_cached_tokens as u64, Relaxed);
        }
    }

    fn build_batch(&mut self) {
        self.batch.clear();
        let block_size = to_u32(self.limits.block_size);
        for sequence in self.running.iter().filter(|sequence| sequence.num_scheduled_tokens > 0) {
            sequence.push_to(&mut self.batch, block_size);
        }
    }

    /// Takes in the results of one running sequence, and names the blocks that they filled.
    fn advance(
        &mut self,
        index: usize,
        results: &mut impl Iterator<Item = Result<model::Sampled, model::NonFiniteLogits>>,
    ) -> Option<FinishReason> {
        let sequence = &mut self.running[index];
        let block_size = self.limits.block_size;
        let (old_len, old_blocks) = (sequence.len(), sequence.num_computed_tokens / block_size);
        let finished = sequence.advance(results);
        if finished == Some(FinishReason::Error) {
            return finished;
        }
        self.stats.generation_tokens.fetch_add((sequence.len() - old_len) as u64, Relaxed);
        let filled = old_blocks..sequence.num_computed_tokens / block_size;
        let hashes = sequence.block_hashes(filled.clone(), block_size, &self.hasher).to_vec();
        for (&block, hash) in sequence.block_table[filled].iter().zip(hashes) {
            self.blocks.name(block, hash);
        }
        finished
    }

    fn publish_blocks(&self) {
        self.stats.num_free_blocks.store(self.blocks.num_free(), Relaxed);
        self.stats.num_cached_blocks.store(self.blocks.num_cached(), Relaxed);
    }

    /// Checks what must hold between steps: blocks are counted, only computed full blocks are shared, and
    /// everyone is in line.
    ///
    /// # Panics
    /// If something does not hold.
    pub(crate) fn check_integrity(&self) {
        let tables = self.running.iter().map(|sequence| sequence.block_table.as_slice());
        self.blocks.check_integrity(tables);
        assert!(self.running.is_sorted_by(|a, b| a.key < b.key));
        assert!(self.running.len() <= self.max_num_seqs);
        let mut waiting = self.waiting.values();
        assert!(waiting.all(|sequence| sequence.block_table.is_empty() && sequence.num_computed_tokens == 0));
        for sequence in &self.running {
            let num_full = sequence.num_computed_tokens / self.limits.block_size;
            assert!(sequence.num_computed_tokens < sequence.len(), "a running sequence lacks a token");
            assert_eq!(sequence.num_scheduled_tokens, 0, "no step is in progress");
            let mut writable = sequence.block_table[num_full..].iter();
            assert!(writable.all(|&block| self.blocks.num_owners(block) == 1), "one writer per block");
        }
        let num_waiting_tokens: usize = self.waiting.values().map(|sequence| sequence.len()).sum();
        assert_eq!(self.stats.num_running.load(Relaxed), self.running.len());
        assert!(self.stats.num_waiting.load(Relaxed) >= self.waiting.len());
        assert!(self.stats.queued_tokens.load(Relaxed) >= num_waiting_tokens);
    }
}

/// Tokens known and not yet computed.
fn num_lacking(sequence: &Sequence) -> usize {
    sequence.len() - sequence.num_computed_tokens
}

fn to_u32(n: usize) -> u32 {
    u32::try_from(n).expect("sizes were checked to fit in 32 bits at the start")
}

#[cfg(test)]
mod tests;
