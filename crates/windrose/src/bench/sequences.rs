//! Sequences that are prefilled and decoded on Seam A, without an engine: batches are built by hand, and only the
//! runner's steps are timed.
//!
//! A sequence keeps its place in the cache. Prefill writes its context there; decoding starts from that context every
//! time, with another first token, and overwrites what was decoded before.

use std::ops::AddAssign;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use model::{Batch, ModelRunner, SampleParams, SampleRow, mix64};

use super::cost::Cost;
use super::plan::Plan;

/// Prompt tokens that visit most experts once, so that the first measurement does not pay for page faults.
const WARM_UP_TOKENS: usize = 64;

/// A loaded model and the sequences in its cache.
pub(super) struct Sequences {
    runner: Box<dyn ModelRunner>,
    cost: Cost,
    sequences: Vec<Sequence>,
    batch: Batch,
    seed: u64,
    num_drawn: u64,
}

struct Sequence {
    block_table: Vec<u32>,
    /// Unsoftened draws with a seed of its own, so that sequences do not fall into the same words.
    params: SampleParams,
    /// The tokens decoded so far; the first is not the model's.
    output: Vec<u32>,
}

/// What was done, and how long it took.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Work {
    pub(super) seconds: f64,
    /// Those that the device computed, where it has a clock of its own; else all.
    pub(super) device_seconds: f64,
    pub(super) num_steps: usize,
    pub(super) num_tokens: usize,
    /// Bytes of weights, keys and values that had to be read, once per step.
    pub(super) read_bytes: u64,
    pub(super) operations: u64,
}

impl AddAssign for Work {
    fn add_assign(&mut self, other: Self) {
        self.seconds += other.seconds;
        self.device_seconds += other.device_seconds;
        self.num_steps += other.num_steps;
        self.num_tokens += other.num_tokens;
        self.read_bytes += other.read_bytes;
        self.operations += other.operations;
    }
}

impl Sequences {
    /// Gives every sequence of the plan its blocks.
    ///
    /// # Errors
    /// If the cache is too small for them.
    pub(super) fn new(runner: Box<dyn ModelRunner>, cost: Cost, plan: &Plan) -> Result<Self> {
        let limits = runner.limits();
        let (num_seqs, blocks_per_sequence) =
            (plan.max_num_seqs(), plan.max_len().div_ceil(limits.block_size));
        let num_wanted = num_seqs * blocks_per_sequence;
        ensure!(
            num_wanted < limits.num_blocks,
            "{num_seqs} sequences of {} tokens need {num_wanted} blocks of cache, and there are {}; raise \
             --kv-cache-mib, or measure fewer or shorter ones",
            plan.max_len(),
            limits.num_blocks - 1
        );
        let sequence = |index: usize| Sequence {
            // Neighbouring blocks belong to different sequences, as they come to in a server. Block 0 is padding.
            block_table: (0..blocks_per_sequence)
                .map(|block| (1 + block * num_seqs + index) as u32)
                .collect(),
            params: SampleParams { seed: mix64(plan.seed ^ index as u64), ..SampleParams::default() },
            output: Vec::new(),
        };
        let sequences = (0..num_seqs).map(sequence).collect();
        Ok(Self { runner, cost, sequences, batch: Batch::new(), seed: plan.seed, num_drawn: 0 })
    }

    /// Tokens that the cache has room for.
    pub(super) fn cache_tokens(&self) -> usize {
        let limits = self.runner.limits();
        limits.num_blocks * limits.block_size
    }

    /// Touches the weights once.
    pub(super) fn warm_up(&mut self) -> Result<()> {
        let limits = self.runner.limits();
        let len = WARM_UP_TOKENS.min(limits.max_model_len).min(limits.max_num_batched_tokens);
        self.prefill(0, len).map(drop)
    }

    /// Computes a new random prompt of one sequence, in as many steps as the token budget asks for.
    pub(super) fn prefill(&mut self, sequence: usize, prompt_len: usize) -> Result<Work> {
        let prompt: Vec<u32> = (0..prompt_len).map(|_| self.draw()).collect();
        self.sequences[sequence].output.clear();
        let limits = *self.runner.limits();
        let (mut work, mut num_computed) = (Work::default(), 0);
        for chunk in prompt.chunks(limits.max_num_batched_tokens) {
            self.batch.clear();
            let block_table = &self.sequences[sequence].block_table;
            self.batch.push_sequence(chunk, num_computed as u32, block_table, limits.block_size as u32);
            num_computed += chunk.len();
            let is_last = num_computed == prompt_len;
            if is_last {
                self.batch.logits_indices.push(chunk.len() as u32 - 1);
            }
            let sampled = sequence..sequence + usize::from(is_last);
            work += self.step(sampled)?;
        }
        Ok(work)
    }

    /// Decodes `output_len` tokens of each of the first `num_seqs` sequences, from `context_len` tokens that were
    /// prefilled.
    pub(super) fn decode(&mut self, num_seqs: usize, context_len: usize, output_len: usize) -> Result<Work> {
        for index in 0..num_seqs {
            let first = self.draw();
            self.sequences[index].output = vec![first];
        }
        let block_size = self.runner.limits().block_size as u32;
        let mut work = Work::default();
        for num_decoded in 0..output_len {
            self.batch.clear();
            let num_computed = (context_len + num_decoded) as u32;
            for Sequence { block_table, output, .. } in &self.sequences[..num_seqs] {
                self.batch.push_sequence(&output[num_decoded..], num_computed, block_table, block_size);
            }
            self.batch.logits_indices.extend(0..num_seqs as u32);
            work += self.step(0..num_seqs)?;
        }
        Ok(work)
    }

    /// Runs the batch and appends a token to each of the `sampled` sequences.
    fn step(&mut self, sampled: std::ops::Range<usize>) -> Result<Work> {
        let sequences = &mut self.sequences[sampled];
        let rows: Vec<SampleRow<'_>> = sequences.iter().map(Sequence::row).collect();
        let start = Instant::now();
        let output = self.runner.execute(&self.batch, &rows).context("the device failed")?;
        let seconds = start.elapsed().as_secs_f64();
        for (sequence, sampled) in sequences.iter_mut().zip(output.sampled) {
            sequence.output.push(sampled?.token);
        }
        let (num_tokens, num_logits) = (self.batch.num_tokens(), self.batch.logits_indices.len());
        Ok(Work {
            seconds,
            device_seconds: output.device_seconds.unwrap_or(seconds),
            num_steps: 1,
            num_tokens,
            read_bytes: self.cost.read_bytes(&self.batch, &output.expert_loads),
            operations: self.cost.operations(num_tokens, num_logits),
        })
    }

    /// A random token, another one at every call.
    fn draw(&mut self) -> u32 {
        self.num_drawn += 1;
        (mix64(mix64(self.seed) ^ self.num_drawn) % self.runner.limits().vocab_size as u64) as u32
    }
}

impl Sequence {
    fn row(&self) -> SampleRow<'_> {
        SampleRow { output: &self.output, ..SampleRow::new(&self.params) }
    }
}
