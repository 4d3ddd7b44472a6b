//! The promise of batch invariance, bit for bit, on a whole layer: however a sequence's tokens are cut into
//! chunks, batched with others, placed in the cache, taken from another sequence's prefix, or computed again
//! after a preemption, and on any number of threads, each position's output is the one it has alone. In every format
//! of weights and of the cache.

use std::collections::HashMap;

use backend::sampling::mix64;
use backend::{
    AttentionShape, Backend, Batch, DType, ExpertsView, MatrixUse, RopeTable, RouteShape, WeightData,
    WeightType, WeightView,
};
use cpu::{Cpu, CpuOptions, Isa, KvFormat, WeightFormat};
use proptest::prelude::*;

const VOCAB: usize = 97;
const MAX_TOKENS: usize = 256;
const NUM_BLOCKS: usize = 4096;

#[derive(Debug, Clone)]
struct Shape {
    hidden: usize,
    ffn: usize,
    route: RouteShape,
    attention: AttentionShape,
    block_size: usize,
}

/// One layer between an embedding and its output `[tokens, hidden]`.
struct Layer {
    cpu: Cpu,
    shape: Shape,
    table: <Cpu as Backend>::Matrix,
    qkv: <Cpu as Backend>::Matrix,
    output: <Cpu as Backend>::Matrix,
    router: <Cpu as Backend>::Matrix,
    experts: <Cpu as Backend>::Experts,
    norm: <Cpu as Backend>::Vector,
    rope: <Cpu as Backend>::Rope,
    kv: <Cpu as Backend>::KvCache,
    routing: <Cpu as Backend>::Routing,
    residual: <Cpu as Backend>::Tensor,
    delta: <Cpu as Backend>::Tensor,
    normed: <Cpu as Backend>::Tensor,
    qkv_out: <Cpu as Backend>::Tensor,
    q: <Cpu as Backend>::Tensor,
    attended: <Cpu as Backend>::Tensor,
    act: <Cpu as Backend>::Tensor,
}

impl Layer {
    fn new(shape: &Shape, seed: u64, options: CpuOptions) -> Self {
        let mut cpu = Cpu::new(options);
        let (hidden, ffn, attention) = (shape.hidden, shape.ffn, shape.attention);
        let mut seeds = seed..;
        let mut view = |rows, cols: usize| {
            let seed = seeds.next().unwrap();
            let data = WeightData::Dummy { seed, mean: 0.0, std: 1.0 / (cols as f32).sqrt() };
            WeightView { rows, cols, dtype: WeightType::Bf16, data }
        };
        let table = cpu.matrix(&[view(VOCAB, hidden)], MatrixUse::Lookup).unwrap();
        let kv_features = attention.kv_features();
        let qkv =
            [view(attention.q_features(), hidden), view(kv_features, hidden), view(kv_features, hidden)];
        let output = view(hidden, attention.q_features());
        let router = view(shape.route.num_experts, hidden);
        let mut matrices = |rows, cols| (0..shape.route.num_experts).map(|_| view(rows, cols)).collect();
        let experts = ExpertsView {
            gate: matrices(ffn, hidden),
            up: matrices(ffn, hidden),
            down: matrices(hidden, ffn),
        };
        let norm = view(1, hidden);
        let assignments = MAX_TOKENS * shape.route.top_k;
        Self {
            table,
            qkv: cpu.matrix(&qkv, MatrixUse::Product).unwrap(),
            output: cpu.matrix(&[output], MatrixUse::Product).unwrap(),
            router: cpu.matrix(&[router], MatrixUse::Exact).unwrap(),
            experts: cpu.experts(&experts).unwrap(),
            norm: cpu.vector(&norm).unwrap(),
            rope: cpu.rope(&RopeTable::new(1e4, attention.head_dim, 1024)).unwrap(),
            kv: cpu.kv_cache(attention, NUM_BLOCKS, shape.block_size).unwrap(),
            routing: cpu.routing(MAX_TOKENS, shape.route).unwrap(),
            residual: cpu.tensor(MAX_TOKENS, hidden, DType::F32).unwrap(),
            delta: cpu.tensor(MAX_TOKENS, hidden, DType::F32).unwrap(),
            normed: cpu.tensor(MAX_TOKENS, hidden, DType::Bf16).unwrap(),
            qkv_out: cpu.tensor(MAX_TOKENS, attention.qkv_features(), DType::F32).unwrap(),
            q: cpu.tensor(MAX_TOKENS, attention.q_features(), DType::Bf16).unwrap(),
            attended: cpu.tensor(MAX_TOKENS, attention.q_features(), DType::Bf16).unwrap(),
            act: cpu.tensor(assignments, ffn, DType::Bf16).unwrap(),
            shape: shape.clone(),
            cpu,
        }
    }

    /// The bits of the output of every token of the batch.
    fn step(&mut self, batch: &Batch) -> Vec<Vec<u32>> {
        batch.assert_valid(self.shape.block_size as u32, NUM_BLOCKS as u32);
        let rows = batch.num_tokens();
        let cpu = &mut self.cpu;
        cpu.begin_step(batch).unwrap();
        cpu.embed(&self.table, &mut self.residual);
        cpu.rms_norm(&self.residual, &self.norm, 1e-5, &mut self.normed, rows);
        cpu.linear(&self.normed, &self.qkv, &mut self.qkv_out, rows);
        cpu.rope_store_kv(&self.qkv_out, &self.rope, &mut self.q, &mut self.kv);
        cpu.attention(&self.q, &self.kv, &mut self.attended);
        cpu.linear(&self.attended, &self.output, &mut self.delta, rows);
        cpu.add_rms_norm(&mut self.residual, &self.delta, &self.norm, 1e-5, &mut self.normed, rows);
        cpu.route(&self.normed, Some(&self.router), &mut self.routing, 0, rows);
        cpu.experts_gate_up(&self.normed, &self.experts, &self.routing, &mut self.act);
        cpu.experts_down(&self.act, &self.experts, &self.routing, &mut self.delta);
        cpu.add(&mut self.residual, &self.delta, rows);
        cpu.finish_step().unwrap();
        let output = cpu.download(&self.residual, rows);
        assert!(output.iter().all(|x| x.is_finite()));
        output.chunks(self.shape.hidden).map(|row| row.iter().map(|x| x.to_bits()).collect()).collect()
    }
}

/// Draws of one schedule.
struct Draws(u64);

impl Draws {
    fn below(&mut self, n: usize) -> usize {
        self.0 += 1;
        (mix64(self.0) % n as u64) as usize
    }
}

/// A sequence on its way through a random schedule.
struct Sequence {
    tokens: Vec<u32>,
    num_computed_tokens: usize,
    block_table: Vec<u32>,
}

/// A random schedule over fresh, scattered blocks.
struct Schedule {
    draws: Draws,
    block_size: usize,
    next_block: usize,
}

impl Schedule {
    /// The next block in an order that jumps about but never repeats.
    fn block(&mut self) -> u32 {
        self.next_block += 1;
        assert!(self.next_block < NUM_BLOCKS);
        (self.next_block * 1_327 % NUM_BLOCKS) as u32
    }

    fn fill_table(&mut self, sequence: &mut Sequence) {
        while sequence.block_table.len() * self.block_size < sequence.tokens.len() {
            let block = self.block();
            sequence.block_table.push(block);
        }
    }

    /// Starts a sequence over, in other blocks, as after a preemption.
    fn restart(&mut self, sequence: &mut Sequence) {
        sequence.num_computed_tokens = 0;
        sequence.block_table.clear();
        self.fill_table(sequence);
    }

    /// Starts a sequence whose leading full blocks are those of a computed one.
    fn share_prefix(&mut self, computed: &Sequence, tail: &[u32]) -> Sequence {
        let shared = self.draws.below(computed.num_computed_tokens / self.block_size + 1);
        let num_computed_tokens = shared * self.block_size;
        let tokens = [&computed.tokens[..num_computed_tokens], tail].concat();
        let mut sequence =
            Sequence { tokens, num_computed_tokens, block_table: computed.block_table[..shared].to_vec() };
        self.fill_table(&mut sequence);
        sequence
    }

    /// Advances a random set of sequences by random chunks; the sequence and position of each token.
    fn batch(&mut self, sequences: &mut [Sequence]) -> (Batch, Vec<(usize, usize)>) {
        let mut batch = Batch::new();
        let mut rows = Vec::new();
        for (index, sequence) in sequences.iter_mut().enumerate() {
            let left = sequence.tokens.len() - sequence.num_computed_tokens;
            let room = MAX_TOKENS - batch.num_tokens();
            if left.min(room) == 0 || self.draws.below(4) == 0 {
                continue;
            }
            let decode = self.draws.below(2) == 0;
            let chunk = if decode { 1 } else { 1 + self.draws.below(left.min(room)) };
            let start = sequence.num_computed_tokens;
            let tokens = &sequence.tokens[start..start + chunk];
            batch.push_sequence(tokens, start as u32, &sequence.block_table, self.block_size as u32);
            rows.extend((start..start + chunk).map(|position| (index, position)));
            sequence.num_computed_tokens += chunk;
        }
        (batch, rows)
    }
}

/// Runs a random schedule on three threads against every sequence alone, in one piece, on one thread.
fn check(shape: &Shape, lens: &[usize], seed: u64, isa: Isa, weights: WeightFormat, kv_cache: KvFormat) {
    let options = |num_threads| CpuOptions {
        num_threads: Some(num_threads),
        isa: Some(isa),
        weights: weights.into(),
        kv_cache,
    };
    let mut alone = Layer::new(shape, seed, options(1));
    let mut layer = Layer::new(shape, seed, options(3));
    let mut schedule = Schedule { draws: Draws(seed), block_size: shape.block_size, next_block: 0 };
    let mut sequences = Vec::new();
    for &len in lens {
        let tokens = (0..len).map(|_| schedule.draws.below(VOCAB) as u32).collect();
        let mut sequence = Sequence { tokens, num_computed_tokens: 0, block_table: Vec::new() };
        schedule.restart(&mut sequence);
        sequences.push(sequence);
    }

    let mut expected: HashMap<Vec<u32>, Vec<Vec<u32>>> = HashMap::new();
    let mut may_share = true;
    while sequences.iter().any(|sequence| sequence.num_computed_tokens < sequence.tokens.len()) {
        let (batch, rows) = schedule.batch(&mut sequences);
        if rows.is_empty() {
            continue;
        }
        let outputs = layer.step(&batch);
        for ((index, position), output) in rows.into_iter().zip(outputs) {
            let tokens = &sequences[index].tokens;
            let whole = expected.entry(tokens.clone()).or_insert_with(|| run_alone(&mut alone, tokens));
            assert!(
                whole[position] == output,
                "{} {} {} seed {seed}: sequence {index}, position {position}",
                isa.name(),
                weights.name(),
                kv_cache.name()
            );
        }
        if schedule.draws.below(8) == 0 {
            let preempted = schedule.draws.below(sequences.len());
            schedule.restart(&mut sequences[preempted]);
        }
        if may_share && schedule.draws.below(4) == 0 {
            may_share = false;
            let tail: Vec<u32> = (0..5).map(|_| schedule.draws.below(VOCAB) as u32).collect();
            let sequence = schedule.share_prefix(&sequences[0], &tail);
            sequences.push(sequence);
        }
    }
}

fn run_alone(layer: &mut Layer, tokens: &[u32]) -> Vec<Vec<u32>> {
    let blocks: Vec<u32> = (1..=tokens.len().div_ceil(layer.shape.block_size) as u32).collect();
    let mut batch = Batch::new();
    batch.push_sequence(tokens, 0, &blocks, layer.shape.block_size as u32);
    layer.step(&batch)
}

prop_compose! {
    fn shapes()(
        hidden in prop::sample::select(vec![32usize, 72, 100, 608]),
        ffn in prop::sample::select(vec![24usize, 96, 1100]),
        (num_experts, top_k) in prop::sample::select(vec![(8, 2), (4, 1), (3, 3)]),
        (num_heads, num_kv_heads, head_dim) in
            prop::sample::select(vec![(4, 2, 16), (9, 1, 24), (8, 2, 40), (3, 3, 64)]),
        sliding_window in prop::sample::select(vec![None, Some(7), Some(40)]),
        block_size in prop::sample::select(vec![4usize, 5, 16]),
    ) -> Shape {
        Shape {
            hidden,
            ffn,
            route: RouteShape { num_experts, top_k },
            attention: AttentionShape { num_heads, num_kv_heads, head_dim, sliding_window },
            block_size,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_position_has_the_same_bits_in_every_schedule(
        shape in shapes(),
        lens in prop::collection::vec(1usize..110, 1..6),
        seed in any::<u64>(),
    ) {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            for (weights, kv_cache) in WeightFormat::ALL.into_iter().zip(KvFormat::ALL.into_iter().cycle()) {
                check(&shape, &lens, seed >> 1, isa, weights, kv_cache);
            }
        }
    }
}
