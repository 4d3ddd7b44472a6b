//! One layer of Mixtral 8x7B's width: how close decoding comes to the memory's read bandwidth, which is measured in the
//! same run on memory of the same kind, and how many operations prefill does per second.
//!
//! `cargo bench -p windrose-cpu [-- ISA... FORMAT... decode|prefill]`. Weights and tokens are random and the tokens of a
//! step differ, so that they are routed as a real batch would be. A busy machine moves both sides of a ratio: trust ratios,
//! and of prefill the operations per second of processor time.

use std::time::Instant;

use backend::{
    AttentionShape, Backend, Batch, DType, ExpertsView, MatrixUse, RopeTable, RouteShape, WeightData,
    WeightType, WeightView, sampling::mix64,
};
use bytes::Bytes;
use cpu::{Cpu, CpuOptions, Isa, MemoryProbe, WeightFormat};

const HIDDEN: usize = 4096;
const FFN: usize = 14336;
const ROUTE: RouteShape = RouteShape { num_experts: 8, top_k: 2 };
const ATTENTION: AttentionShape =
    AttentionShape { num_heads: 32, num_kv_heads: 8, head_dim: 128, sliding_window: None };
const BLOCK_SIZE: usize = 16;
const NUM_BLOCKS: usize = 1024;
const MAX_TOKENS: usize = 512;
/// Tokens that a decoding sequence already has in the cache.
const CONTEXT: usize = 200;
const REPETITIONS: usize = 7;
/// Bytes read to measure the memory.
const READ_BYTES: usize = 1 << 30;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if !arguments.iter().any(|argument| argument == "--bench") {
        println!("skipped: `cargo test --benches` only checks that this compiles; run `cargo bench`");
        return;
    }
    let weights = random_weights();
    let memory = MemoryProbe::new(READ_BYTES).unwrap();
    let wanted = |isa: &Isa| arguments.iter().any(|argument| argument == isa.name());
    let mut isas: Vec<Isa> = Isa::ALL.into_iter().filter(wanted).collect();
    if isas.is_empty() {
        isas.push(Isa::detect());
    }
    let asked = |what: &str| arguments.iter().any(|argument| argument == what);
    let (decode, prefill) = (!asked("prefill") || asked("decode"), !asked("decode") || asked("prefill"));
    let named = |format: &WeightFormat| arguments.iter().any(|argument| argument == format.name());
    let formats =
        WeightFormat::ALL.into_iter().filter(|format| named(format) || !WeightFormat::ALL.iter().any(named));
    for isa in isas {
        let all = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if all > 1 { vec![1, all] } else { vec![1] };
        let options = threads.into_iter().flat_map(|num_threads| {
            formats.clone().map(move |weights| CpuOptions {
                num_threads: Some(num_threads),
                isa: Some(isa),
                weights: weights.into(),
                ..CpuOptions::default()
            })
        });
        for options in options {
            let mut layer = Layer::new(options, &weights);
            println!("{}", layer.cpu.describe());
            for num_tokens in [1, 2, 8, 16, 32].into_iter().filter(|_| decode) {
                layer.measure_decode(num_tokens, &memory);
            }
            if prefill {
                layer.measure_prefill(MAX_TOKENS);
            }
        }
    }
}

/// The bytes of all matrices of a layer, bf16 values of magnitude 1/128 to 1/64.
fn random_weights() -> Bytes {
    let elements = ATTENTION.qkv_features() * HIDDEN
        + HIDDEN * ATTENTION.q_features()
        + ROUTE.num_experts * HIDDEN
        + 3 * ROUTE.num_experts * HIDDEN * FFN;
    let four = |i: u64| (mix64(i) & 0x807f_807f_807f_807f | 0x3c00_3c00_3c00_3c00).to_le_bytes();
    let mut bytes = Vec::with_capacity(2 * elements);
    (0..elements as u64 / 4).for_each(|i| bytes.extend_from_slice(&four(i)));
    bytes.into()
}

/// A layer's weights and the tensors of its nine calls.
struct Layer {
    cpu: Cpu,
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
    fn new(options: CpuOptions, weights: &Bytes) -> Self {
        let mut cpu = Cpu::new(options);
        let mut rest = weights.clone();
        let mut view = |rows: usize, cols: usize| {
            let data = WeightData::Stored(rest.split_to(2 * rows * cols));
            WeightView { rows, cols, dtype: WeightType::Bf16, data }
        };
        let qkv = cpu.matrix(&[view(ATTENTION.qkv_features(), HIDDEN)], MatrixUse::Product).unwrap();
        let output = cpu.matrix(&[view(HIDDEN, ATTENTION.q_features())], MatrixUse::Product).unwrap();
        let router = cpu.matrix(&[view(ROUTE.num_experts, HIDDEN)], MatrixUse::Exact).unwrap();
        let mut matrices = |rows, cols| (0..ROUTE.num_experts).map(|_| view(rows, cols)).collect();
        let experts = ExpertsView {
            gate: matrices(FFN, HIDDEN),
            up: matrices(FFN, HIDDEN),
            down: matrices(HIDDEN, FFN),
        };
        let ones = WeightData::Dummy { seed: 0, mean: 1.0, std: 0.0 };
        let norm = WeightView { rows: 1, cols: HIDDEN, dtype: WeightType::Bf16, data: ones };
        let mut tensor = |features, dtype| cpu.tensor(MAX_TOKENS * ROUTE.top_k, features, dtype).unwrap();
        Self {
            residual: tensor(HIDDEN, DType::F32),
            delta: tensor(HIDDEN, DType::F32),
            normed: tensor(HIDDEN, DType::Bf16),
            qkv_out: tensor(ATTENTION.qkv_features(), DType::F32),
            q: tensor(ATTENTION.q_features(), DType::Bf16),
            attended: tensor(ATTENTION.q_features(), DType::Bf16),
            act: tensor(FFN, DType::Bf16),
            experts: cpu.experts(&experts).unwrap(),
            norm: cpu.vector(&norm).unwrap(),
            rope: cpu.rope(&RopeTable::new(1e6, ATTENTION.head_dim, 4096)).unwrap(),
            kv: cpu.kv_cache(ATTENTION, NUM_BLOCKS, BLOCK_SIZE).unwrap(),
            routing: cpu.routing(MAX_TOKENS, ROUTE).unwrap(),
            qkv,
            output,
            router,
            cpu,
        }
    }

    /// Runs a step of one layer on a fresh residual stream; seconds.
    fn step(&mut self, batch: &Batch) -> f64 {
        let rows = batch.num_tokens();
        let noise = |i| (mix64(i) >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        let values: Vec<f32> = (0..(rows * HIDDEN) as u64).map(noise).collect();
        self.cpu.upload(&mut self.residual, &values);
        let start = Instant::now();
        let cpu = &mut self.cpu;
        cpu.begin_step(batch).unwrap();
        cpu.rms_norm(&self.residual, &self.norm, 1e-5, &mut self.normed, rows);
        cpu.linear(&self.normed, &self.qkv, &mut self.qkv_out, rows);
        cpu.rope_store_kv(&self.qkv_out, &self.rope, &mut self.q, &mut self.kv);
        cpu.attention(&self.q, &self.kv, &mut self.attended);
        cpu.linear(&self.attended, &self.output, &mut self.delta, rows);
        cpu.add_rms_norm(&mut self.residual, &self.delta, &self.norm, 1e-5, &mut self.normed, rows);
        cpu.route(&self.normed, Some(&self.router), &mut self.routing, 0, rows);
        cpu.experts_gate_up(&self.normed, &self.experts, &self.routing, &mut self.act);
        cpu.experts_down(&self.act, &self.experts, &self.routing, &mut self.delta);
        cpu.finish_step().unwrap();
        let seconds = start.elapsed().as_secs_f64();
        assert!(cpu.download(&self.delta, rows).iter().all(|x| x.is_finite() && *x != 0.0));
        seconds
    }

    /// Bytes of weights that the last step read.
    fn weight_bytes(&mut self) -> f64 {
        let routing = self.cpu.read_routing(&self.routing);
        let touched = (0..ROUTE.num_experts).filter(|&e| !routing.expert_range(e).is_empty()).count();
        let attention = (ATTENTION.qkv_features() + ATTENTION.q_features()) * HIDDEN;
        let products = (attention + touched * 3 * HIDDEN * FFN) as f64;
        products * self.cpu.weight_bits() / 8.0 + (2 * ROUTE.num_experts * HIDDEN) as f64
    }

    fn measure_decode(&mut self, num_tokens: usize, memory: &MemoryProbe) {
        let mut batch = Batch::new();
        let blocks_per_sequence = CONTEXT / BLOCK_SIZE + 1;
        for seq_index in 0..num_tokens {
            let first = 1 + seq_index * blocks_per_sequence;
            let table: Vec<u32> = (first..first + blocks_per_sequence).map(|block| block as u32).collect();
            batch.push_sequence(&[0], CONTEXT as u32, &table, BLOCK_SIZE as u32);
        }
        let (mut seconds, mut bandwidths, mut shares) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..REPETITIONS {
            let bandwidth = self.cpu.read_bandwidth(memory);
            let step = self.step(&batch);
            shares.push(self.weight_bytes() / step / bandwidth);
            bandwidths.push(bandwidth);
            seconds.push(step);
        }
        let [seconds, bandwidth, share] = [seconds, bandwidths, shares].map(median);
        let bytes = self.weight_bytes();
        println!(
            "  decode {num_tokens:>3} tokens: {:>7.2} ms, {:>5.2} GB, {:>5.1} GB/s, {:>3.0}% of {:.1} GB/s read, {:>5.1} GFLOP/s",
            1e3 * seconds,
            bytes / 1e9,
            bytes / seconds / 1e9,
            100.0 * share,
            bandwidth / 1e9,
            flops(num_tokens) / seconds / 1e9,
        );
    }

    fn measure_prefill(&mut self, num_tokens: usize) {
        let mut batch = Batch::new();
        let table: Vec<u32> = (1..=num_tokens.div_ceil(BLOCK_SIZE) as u32).collect();
        batch.push_sequence(&vec![0; num_tokens], 0, &table, BLOCK_SIZE as u32);
        let before = processor_seconds();
        let seconds: Vec<f64> = (0..3).map(|_| self.step(&batch)).collect();
        let busy = (processor_seconds() - before) / seconds.len() as f64;
        let seconds = median(seconds);
        println!(
            "  prefill {num_tokens} tokens: {:.0} ms, {:.1} GFLOP/s, {:.1} GFLOP/s per busy core",
            1e3 * seconds,
            flops(num_tokens) / seconds / 1e9,
            flops(num_tokens) / busy / 1e9,
        );
    }
}

/// Processor time of this process's threads so far; not a number where the system does not tell it.
fn processor_seconds() -> f64 {
    let Ok(threads) = std::fs::read_dir("/proc/self/task") else { return f64::NAN };
    let nanoseconds = threads.flatten().map(|thread| {
        let stat = std::fs::read_to_string(thread.path().join("schedstat")).unwrap_or_default();
        stat.split_whitespace().next().and_then(|field| field.parse::<f64>().ok()).unwrap_or(f64::NAN)
    });
    nanoseconds.sum::<f64>() / 1e9
}

/// Operations of the matrix products; attention's are few beside them.
fn flops(num_tokens: usize) -> f64 {
    let attention = (ATTENTION.qkv_features() + ATTENTION.q_features()) * HIDDEN;
    2.0 * num_tokens as f64 * (attention + ROUTE.top_k * 3 * HIDDEN * FFN) as f64
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
