//! A model for tests: no weights, microseconds per step, and just as easily led astray as a real one.
//!
//! It has a paged cache in which every slot remembers the token and the position written to it. A token's
//! logits are a hash of all tokens that are *read back through the block table*: one wrong block, stale slot
//! or false prefix hit, and the text changes. What can be seen to be wrong at once (a slot never written, two
//! sequences in one block, a limit exceeded) panics, as a real runner may.
//!
//! ```text
//! slot      8       9       10      11       block 2 of 4 tokens
//!           (7, 0)  (3, 1)  (9, 2)  (4, 3)   (token, position)
//! state     s0 ───► s1 ───► s2 ───► s3       s(p) = mix(s(p-1), token, position);  logits = hash(s3, id)
//! ```

use std::time::Duration;

use model::{
    BackendError, Batch, ExpertLoad, LayerChoices, ModelRunner, NonFiniteLogits, RunnerLimits, SampleRow,
    Sampled, StepOutput, mix64, sample_row,
};

/// Logit of a token that is meant to win; the others' are below [`FakeRunner::MAX_LOGIT`].
const CHOSEN_LOGIT: f32 = 40.0;

/// A deterministic stand-in for a model; see the head of its file.
#[derive(Debug, Clone)]
pub struct FakeRunner {
    limits: RunnerLimits,
    slots: Vec<Slot>,
    num_steps: u64,
    eos: Option<(u32, f64)>,
    script: Vec<u32>,
    step_time: Duration,
    device_seconds: Option<f64>,
    failure: Option<(u64, Failure)>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    token: u32,
    position: u32,
    /// The step that wrote it, counted from 1; 0 if none has.
    written_at: u64,
}

#[derive(Debug, Clone, Copy)]
enum Failure {
    Device,
    Panic,
    NonFiniteLogits,
}

impl FakeRunner {
    /// Logits lie in `0.0..MAX_LOGIT`.
    pub const MAX_LOGIT: f32 = 8.0;

    /// Makes a model of these sizes that never ends by itself, never fails and takes no time.
    pub fn new(limits: RunnerLimits) -> Self {
        Self {
            slots: vec![Slot::default(); limits.num_blocks * limits.block_size],
            limits,
            num_steps: 0,
            eos: None,
            script: Vec::new(),
            step_time: Duration::ZERO,
            device_seconds: None,
            failure: None,
        }
    }

    /// Makes `token` by far the likeliest with this probability, depending on the text so far.
    #[must_use]
    pub fn with_eos(mut self, token: u32, probability: f64) -> Self {
        self.eos = Some((token, probability));
        self
    }

    /// Makes the `i`-th generated token of every sequence `script[i]`, unless it is banned or biased away;
    /// after the script's end the text goes on as without one.
    #[must_use]
    pub fn with_script(mut self, script: Vec<u32>) -> Self {
        self.script = script;
        self
    }

    /// Makes every step sleep for so long.
    #[must_use]
    pub fn with_step_time(mut self, step_time: Duration) -> Self {
        self.step_time = step_time;
        self
    }

    /// Gives the model a device with a clock, by which every step takes so long, whatever it takes here.
    #[must_use]
    pub fn with_device_time(mut self, step_time: Duration) -> Self {
        self.device_seconds = Some(step_time.as_secs_f64());
        self
    }

    /// Lets the device fail in step `step`, counted from 1.
    #[must_use]
    pub fn with_device_failure_at(mut self, step: u64) -> Self {
        self.failure = Some((step, Failure::Device));
        self
    }

    /// Lets the model panic in step `step`, counted from 1.
    #[must_use]
    pub fn with_panic_at(mut self, step: u64) -> Self {
        self.failure = Some((step, Failure::Panic));
        self
    }

    /// Makes all logits of step `step`, counted from 1, NaN.
    #[must_use]
    pub fn with_non_finite_logits_at(mut self, step: u64) -> Self {
        self.failure = Some((step, Failure::NonFiniteLogits));
        self
    }

    /// What this model takes after `tokens`, without batch or cache: what every schedule must reproduce.
    ///
    /// # Errors
    /// Never; the type is the sampler's.
    pub fn sample_after(&self, tokens: &[u32], row: &SampleRow<'_>) -> Result<Sampled, NonFiniteLogits> {
        let state = (0..).zip(tokens).fold(0, |state, (position, &token)| next_state(state, token, position));
        sample_row(&self.logits(state, row.output.len()), row)
    }

    /// The logits `[vocab_size]` after a text with this state, of which `num_generated` tokens are output.
    fn logits(&self, state: u64, num_generated: usize) -> Vec<f32> {
        let logit = |token| unit(mix64(state ^ mix64(token))) as f32 * Self::MAX_LOGIT;
        let mut logits: Vec<f32> = (0..self.limits.vocab_size as u64).map(logit).collect();
        if let Some(&token) = self.script.get(num_generated) {
            logits[token as usize] = CHOSEN_LOGIT;
        } else if let Some((token, probability)) = self.eos {
            let is_end = unit(mix64(!state)) < probability;
            logits[token as usize] = if is_end { CHOSEN_LOGIT } else { 0.0 };
        }
        logits
    }

    /// Writes the batch's tokens to the cache.
    fn store(&mut self, batch: &Batch) {
        for ((&slot, &token), &position) in
            batch.slot_mapping.iter().zip(&batch.token_ids).zip(&batch.positions)
        {
            let slot = slot as usize;
            assert!(slot >= self.limits.block_size, "nobody writes to the padding block");
            assert!(self.slots[slot].written_at < self.num_steps, "slot {slot} is written twice in a step");
            assert!((token as usize) < self.limits.vocab_size, "token {token} is in the vocabulary");
            self.slots[slot] = Slot { token, position, written_at: self.num_steps };
        }
    }

    /// The state after each of `num_tokens` tokens, as the cache has them.
    fn states<'a>(&'a self, block_table: &'a [u32], num_tokens: u32) -> impl Iterator<Item = u64> + 'a {
        let block_size = self.limits.block_size;
        (0..num_tokens as usize).scan(0, move |state, index| {
            let slot = block_table[index / block_size] as usize * block_size + index % block_size;
            let Slot { token, position, written_at } = self.slots[slot];
            assert!(written_at > 0, "slot {slot} was written before it is read");
            *state = next_state(*state, token, position);
            Some(*state)
        })
    }

    fn sample(&self, batch: &Batch, rows: &[SampleRow<'_>]) -> Vec<Result<Sampled, NonFiniteLogits>> {
        let mut wanted = batch.logits_indices.iter().map(|&row| row as usize).zip(rows).peekable();
        let mut sampled = Vec::with_capacity(rows.len());
        for seq_index in 0..batch.num_seqs() {
            let query = batch.query_range(seq_index);
            let seq_len = batch.seq_lens[seq_index];
            let num_computed = seq_len as usize - query.len();
            let states = self.states(batch.block_table(seq_index), seq_len).skip(num_computed);
            for (row_index, state) in query.zip(states) {
                if let Some((_, row)) = wanted.next_if(|&(index, _)| index == row_index) {
                    sampled.push(sample_row(&self.logits(state, row.output.len()), row));
                }
            }
        }
        sampled
    }

    /// The experts of a token: `top_k` neighbours in each layer, whatever its steering.
    pub fn experts(&self, layer: usize, token: u32) -> impl Iterator<Item = usize> {
        let RunnerLimits { num_experts, top_k, .. } = self.limits;
        let first = mix64(u64::from(token) << 32 | layer as u64) as usize % num_experts;
        (0..top_k).map(move |rank| (first + rank) % num_experts)
    }

    /// `[num_layers, num_experts]`
    fn expert_loads(&self, batch: &Batch) -> Vec<ExpertLoad> {
        let RunnerLimits { num_layers, num_experts, top_k, .. } = self.limits;
        let mut loads = vec![ExpertLoad::default(); num_layers * num_experts];
        for (layer, loads) in loads.chunks_exact_mut(num_experts).enumerate() {
            for expert in batch.token_ids.iter().flat_map(|&token| self.experts(layer, token)) {
                loads[expert] += ExpertLoad { num_tokens: 1, gate_weight: 1.0 / top_k as f64, tile_rows: 1 };
            }
        }
        loads
    }

    /// The same choices one by one, if the batch asks for them.
    fn choices(&self, batch: &Batch) -> Vec<LayerChoices> {
        let layer = |layer| {
            let ids = batch.token_ids.iter().flat_map(|&token| self.experts(layer, token));
            let ids: Vec<u32> = ids.map(|expert| expert as u32).collect();
            let weights = vec![1.0 / self.limits.top_k as f32; ids.len()];
            LayerChoices { width: self.limits.top_k, ids, weights }
        };
        let num_layers = if batch.records_routing { self.limits.num_layers } else { 0 };
        (0..num_layers).map(layer).collect()
    }

    fn assert_within_limits(&self, batch: &Batch, rows: &[SampleRow<'_>]) {
        let limits = &self.limits;
        batch.assert_valid(limits.block_size as u32, limits.num_blocks as u32);
        assert!((1..=limits.max_num_batched_tokens).contains(&batch.num_tokens()));
        let experts_per_token = batch.steering.experts_per_token.max(limits.top_k);
        assert!(batch.num_tokens() * experts_per_token <= limits.max_expert_rows());
        assert!(batch.num_seqs() <= limits.max_num_seqs);
        assert!(rows.len() <= limits.max_num_logits);
        assert_eq!(rows.len(), batch.logits_indices.len());
        assert!(batch.seq_lens.iter().all(|&len| len as usize <= limits.max_model_len));
    }
}

impl ModelRunner for FakeRunner {
    fn limits(&self) -> &RunnerLimits {
        &self.limits
    }

    fn execute(&mut self, batch: &Batch, rows: &[SampleRow<'_>]) -> Result<StepOutput, BackendError> {
        self.num_steps += 1;
        std::thread::sleep(self.step_time);
        self.assert_within_limits(batch, rows);
        self.store(batch);
        let failure = self.failure.filter(|&(step, _)| step == self.num_steps).map(|(_, failure)| failure);
        let sampled = match failure {
            Some(Failure::Device) => return Err(BackendError::Device("the fake device fails".to_owned())),
            Some(Failure::Panic) => panic!("the fake model panics"),
            Some(Failure::NonFiniteLogits) => vec![Err(NonFiniteLogits); rows.len()],
            None => self.sample(batch, rows),
        };
        let (expert_loads, choices) = (self.expert_loads(batch), self.choices(batch));
        Ok(StepOutput { sampled, expert_loads, choices, device_seconds: self.device_seconds })
    }
}

fn next_state(state: u64, token: u32, position: u32) -> u64 {
    mix64(state.rotate_left(1) ^ mix64(u64::from(token) << 32 | u64::from(position)))
}

/// A number in `0.0..1.0` from 53 bits of a hash.
fn unit(hash: u64) -> f64 {
    (hash >> 11) as f64 / (1u64 << 53) as f64
}
