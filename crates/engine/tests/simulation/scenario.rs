//! What a world is made of, drawn small so that everything runs out: blocks, seats, budget, queue, context.

use std::sync::Arc;
use std::time::Duration;

use engine::{EngineConfig, FakeRunner, RecordRouting, Request};
use model::{LayerSteering, RunnerLimits, SampleParams, Steering};

use crate::grammar::Grammar;
use crate::rng::Rng;

pub(crate) const VOCAB_SIZE: usize = 24;
pub(crate) const EOS: u32 = 1;

/// The fixed parts of a world.
pub(crate) struct Scenario {
    pub(crate) limits: RunnerLimits,
    pub(crate) config: EngineConfig,
    pub(crate) runner: FakeRunner,
    pub(crate) num_requests: usize,
    /// Percent of the steps in which some client leaves.
    pub(crate) leave_percent: u64,
    /// Texts that prompts begin with.
    prefixes: Vec<Vec<u32>>,
}

impl Scenario {
    pub(crate) fn draw(rng: &mut Rng) -> Self {
        let limits = draw_limits(rng);
        let config = EngineConfig {
            max_num_seqs: rng.within(1..10),
            max_num_batched_tokens: rng.within(1..48),
            max_queued_requests: rng.within(1..16),
            max_queued_tokens: rng.within(10..300),
            enable_prefix_cache: rng.percent(80),
        };
        let eos_probability = rng.pick(&[0.0, 0.0, 0.02, 0.1]);
        let runner = FakeRunner::new(limits).with_eos(EOS, eos_probability);
        let failing_step = rng.within(1..80) as u64;
        let runner = match rng.within(0..30) {
            0 => runner.with_device_failure_at(failing_step),
            1 => runner.with_panic_at(failing_step),
            2 => runner.with_non_finite_logits_at(failing_step),
            _ => runner,
        };
        Self {
            limits,
            config,
            runner,
            num_requests: rng.within(1..24),
            leave_percent: rng.pick(&[0, 0, 1, 5, 40]),
            prefixes: (0..3).map(|_| rng.tokens(64, VOCAB_SIZE)).collect(),
        }
    }

    pub(crate) fn draw_request(&self, rng: &mut Rng) -> Request {
        // One in a while is too long, and must be refused.
        let max_prompt_len = self.limits.max_model_len.min(60) + 2;
        let shared_len = rng.within(0..max_prompt_len);
        let own_len = rng.within(0..8).min(max_prompt_len - shared_len);
        let mut prompt = rng.pick(&self.prefixes)[..shared_len].to_vec();
        prompt.extend(rng.tokens(own_len, VOCAB_SIZE));
        Request {
            id: String::new(),
            prompt,
            num_choices: if rng.percent(75) { 1 } else { rng.within(2..5) as u32 },
            sampling: draw_sampling(rng),
            max_tokens: rng.pick(&[0, 1, 2, 5, 10, 20, 40, u32::MAX]),
            min_tokens: rng.pick(&[0, 0, 0, 3, 8]),
            eos_token_ids: vec![EOS],
            ignore_eos: rng.percent(10),
            stop_token_ids: if rng.percent(30) { rng.tokens(2, VOCAB_SIZE) } else { Vec::new() },
            num_logprobs: if rng.percent(25) { Some(rng.within(0..4) as u32) } else { None },
            num_prompt_logprobs: if rng.percent(15) { Some(rng.within(0..3) as u32) } else { None },
            reports_progress: rng.percent(20),
            priority: rng.pick(&[0, 0, 0, 0, -1, 1]),
            deadline: rng.percent(10).then(|| Duration::from_millis(rng.within(0..400) as u64)),
            cache_salt: rng.pick(&[None, None, Some("a".to_owned()), Some("b".to_owned())]),
            record_routing: rng.percent(20).then(|| draw_recording(rng)),
            steering: rng.percent(15).then(|| self.draw_steering(rng)),
        }
    }

    /// One in a while asks for more experts than a step has room for, and must be refused.
    fn draw_steering(&self, rng: &mut Rng) -> Arc<Steering> {
        let layers = (0..self.limits.num_layers).map(|_| LayerSteering::new(rng.within(1..9))).collect();
        Arc::new(Steering::new(self.limits.route(), layers, None))
    }
}

fn draw_recording(rng: &mut Rng) -> RecordRouting {
    RecordRouting { layers: rng.pick(&[vec![0, 1], vec![1], vec![0]]), prompt: rng.percent(50) }
}

/// What bounds a request's choices, now and then.
pub(crate) fn draw_grammar(rng: &mut Rng) -> Option<Grammar> {
    let grammar = Grammar {
        seed: rng.next(),
        max_len: rng.pick(&[1, 4, 12, u32::MAX]),
        fails_at: rng.pick(&[u32::MAX, u32::MAX, u32::MAX, 0, 5]),
        // Some of them keep others of their step waiting.
        mask_us: rng.pick(&[0, 20, 2_000, 9_000]),
    };
    rng.percent(35).then_some(grammar)
}

fn draw_limits(rng: &mut Rng) -> RunnerLimits {
    let max_num_seqs = rng.within(1..10);
    RunnerLimits {
        vocab_size: VOCAB_SIZE,
        max_model_len: rng.within(4..120),
        num_layers: 2,
        num_experts: 8,
        top_k: 2,
        block_size: rng.pick(&[1, 2, 3, 4, 4, 5, 7, 8, 16]),
        num_blocks: rng.within(2..30),
        max_num_batched_tokens: rng.within(1..48),
        max_num_seqs,
        max_num_logits: max_num_seqs + rng.within(0..16),
    }
}

fn draw_sampling(rng: &mut Rng) -> SampleParams {
    SampleParams {
        temperature: rng.pick(&[0.0, 0.7, 1.5]),
        top_k: rng.pick(&[0, 0, 1, 5]),
        top_p: rng.pick(&[1.0, 1.0, 0.8]),
        min_p: rng.pick(&[0.0, 0.0, 0.1]),
        presence_penalty: rng.pick(&[0.0, 0.0, 1.5]),
        frequency_penalty: rng.pick(&[0.0, 0.0, 0.9]),
        repetition_penalty: rng.pick(&[1.0, 1.0, 1.4]),
        logit_bias: if rng.percent(10) { vec![(rng.within(0..VOCAB_SIZE) as u32, 3.0)] } else { Vec::new() },
        seed: rng.next(),
    }
}
