//! Every verb against the reference, and recorded steps against launched ones, on the GPU there is or on the fake driver
//! of `kernels/emulator`: `LD_LIBRARY_PATH=$PWD/target/emulator cargo test --release -p windrose-cuda`.

use backend::conformance::{Quantisation, check_all, check_all_quantised};
use backend::sampling::mix64;
use backend::{
    AttentionShape, Backend, Batch, DType, ExpertsView, MatrixUse, Reference, RopeTable, RouteShape,
    WeightData, WeightType, WeightView,
};
use cuda::{Cuda, CudaOptions, DeviceInfo, KvFormat, WeightFormat, probe_or_skip};

#[test]
fn every_verb_equals_the_reference_and_no_row_depends_on_its_batch() {
    if let Some(info) = probe_or_skip() {
        check_all(|| Cuda::new(info.clone(), CudaOptions::default()).expect("the device opens"));
    }
}

#[test]
fn every_verb_in_fp8_is_as_near_as_three_bits_of_mantissa_are() {
    let Some(info) = probe_or_skip() else { return };
    let options =
        CudaOptions { weights: WeightFormat::E4m3, kv_cache: KvFormat::E4m3, ..CudaOptions::default() };
    if !info.capability.has_e4m3() {
        for options in [
            CudaOptions { weights: WeightFormat::Bf16, ..options.clone() },
            CudaOptions { kv_cache: KvFormat::Bf16, ..options },
        ] {
            let refused = Cuda::new(info.clone(), options).err().expect("fp8 is refused").to_string();
            assert!(refused.contains(&info.name) && refused.contains("fp8"), "{refused}");
        }
        println!("skipped: {} does not have fp8", info.name);
        return;
    }
    let quantisation = Quantisation { products: E4M3_DEVIATION, attention: E4M3_CACHE_DEVIATION };
    check_all_quantised(|| Cuda::new(info.clone(), options.clone()).expect("the device opens"), quantisation);
}

/// Both operands are off by 2.6% on average, so is a sum by 3.7% of the root mean square; the worst of some thousand
/// sums by four times as much, and where gate is multiplied with up, each with such an error and with tails of its own,
/// by several times that. What is wrong is off by more than all of it; what is exact has its own test.
const E4M3_DEVIATION: f32 = 0.75;

/// An element is off by half a step at most, 3.6% of the largest in its row, and by a sixteenth of itself; results of a
/// few values have a third of that largest as their root mean square. The worst of the suite is off by between 8% and 12%
/// of it. What is exact has its own test.
const E4M3_CACHE_DEVIATION: f32 = 0.15;

/// Rows of whole numbers up to 14 times `unit`, a power of two, with a 14 in each: their scales are powers of two, and
/// e4m3 has all of them.
fn whole_numbers(seed: u64, rows: usize, cols: usize, unit: f32) -> Vec<f32> {
    let whole = |index: usize| match index % cols {
        5 => 14.0,
        _ => (mix64(seed << 32 | index as u64) % 29) as f32 - 14.0,
    };
    (0..rows * cols).map(|index| whole(index) * unit).collect()
}

fn stored(rows: usize, values: &[f32]) -> WeightView {
    let data: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let data = WeightData::Stored(data.into());
    WeightView { rows, cols: values.len() / rows, dtype: WeightType::F32, data }
}

#[test]
fn fp8_products_are_exact_on_numbers_that_it_has() {
    let Some(info) = probe_or_skip().filter(|info| info.capability.has_e4m3()) else { return };
    let mut cuda =
        Cuda::new(info, CudaOptions { weights: WeightFormat::E4m3, ..CudaOptions::default() }).unwrap();
    for (rows, cols, features) in [(1, 64, 40), (3, 200, 130), (70, 96, 17), (300, 130, 70)] {
        let (x, weight) = (whole_numbers(1, rows, cols, 1.0), whole_numbers(2, features, cols, 1.0));
        let [got, expected] = [
            linear(&mut cuda, &x, &stored(features, &weight)),
            linear(&mut Reference::new(), &x, &stored(features, &weight)),
        ];
        assert_eq!(got, expected, "[{rows}, {cols}] by {features}");
    }
    for (tokens, hidden, ffn) in [(1, 64, 24), (20, 96, 40), (150, 40, 17)] {
        let x = whole_numbers(1, tokens, hidden, 1.0 / 16.0);
        let gate = (2..5).map(|seed| stored(ffn, &whole_numbers(seed, ffn, hidden, 1.0 / 64.0))).collect();
        let up = (5..8).map(|seed| stored(ffn, &whole_numbers(seed, ffn, hidden, 1.0 / 64.0))).collect();
        let down = (8..11).map(|seed| stored(hidden, &whole_numbers(seed, hidden, ffn, 1.0))).collect();
        let experts = ExpertsView { gate, up, down };
        let router = stored(3, &whole_numbers(11, 3, hidden, 1.0));
        let got = gate_up(&mut cuda, &x, &router, &experts);
        for (got, expected) in got.iter().zip(gate_up(&mut Reference::new(), &x, &router, &experts)) {
            assert!(
                (got - expected).abs() <= expected.abs() / 128.0 + 1e-6,
                "{tokens} tokens: {got} for {expected}"
            );
        }
    }
}

fn linear<B: Backend>(backend: &mut B, x: &[f32], weight: &WeightView) -> Vec<f32> {
    let rows = x.len() / weight.cols;
    let matrix = backend.matrix(std::slice::from_ref(weight), MatrixUse::Product).unwrap();
    let mut from = backend.tensor(rows, weight.cols, DType::Bf16).unwrap();
    let mut to = backend.tensor(rows, weight.rows, DType::F32).unwrap();
    backend.upload(&mut from, x);
    backend.linear(&from, &matrix, &mut to, rows);
    backend.download(&to, rows)
}

/// The activations of two experts of three for each row of `x`.
fn gate_up<B: Backend>(backend: &mut B, x: &[f32], router: &WeightView, experts: &ExpertsView) -> Vec<f32> {
    let (hidden, ffn) = (router.cols, experts.gate[0].rows);
    let tokens = x.len() / hidden;
    let mut from = backend.tensor(tokens, hidden, DType::Bf16).unwrap();
    let mut act = backend.tensor(2 * tokens, ffn, DType::Bf16).unwrap();
    backend.upload(&mut from, x);
    let router = backend.matrix(std::slice::from_ref(router), MatrixUse::Exact).unwrap();
    let mut routing = backend.routing(tokens, RouteShape { num_experts: 3, top_k: 2 }).unwrap();
    let experts = backend.experts(experts).unwrap();
    let mut batch = Batch::new();
    batch.push_sequence(&vec![0; tokens], 0, &vec![1; tokens.div_ceil(BLOCK_SIZE as usize)], BLOCK_SIZE);
    backend.begin_step(&batch).unwrap();
    backend.route(&from, Some(&router), &mut routing, 0, tokens);
    backend.experts_gate_up(&from, &experts, &routing, &mut act);
    backend.download(&act, 2 * tokens)
}

const SHAPE: AttentionShape =
    AttentionShape { num_heads: 4, num_kv_heads: 2, head_dim: 16, sliding_window: None };
/// Queries, keys and values of a token.
const QKV_FEATURES: usize = 64 + 2 * 32;
const BLOCK_SIZE: u32 = 16;
/// Keys of a chunk of attention.
const CHUNK_KEYS: u32 = 256;
const STEPS_PER_SHAPE: u32 = 6;

/// Attention of one token after the other, from a context of one chunk to one of two, which is another shape; every
/// step has another position and other blocks.
fn decode(info: &DeviceInfo, options: CudaOptions) -> (Vec<Vec<f32>>, u64) {
    let mut cuda = Cuda::new(info.clone(), options).unwrap();
    let mut qkv = cuda.tensor(1, QKV_FEATURES, DType::F32).unwrap();
    let mut queries = cuda.tensor(1, 64, DType::Bf16).unwrap();
    let mut attended = cuda.tensor(1, 64, DType::Bf16).unwrap();
    let rope = cuda.rope(&RopeTable::new(1e4, 16, 1024)).unwrap();
    let mut kv = cuda.kv_cache(SHAPE, 80, BLOCK_SIZE as usize).unwrap();
    let results = (0..2 * STEPS_PER_SHAPE).map(|step| {
        let mut batch = Batch::new();
        let blocks: Vec<u32> = (1..80).map(|block| (block + step) % 80).collect();
        let num_computed = CHUNK_KEYS - STEPS_PER_SHAPE + step;
        batch.push_sequence(&[0], num_computed, &blocks[..20], BLOCK_SIZE);
        batch.logits_indices = vec![0];
        let shape = cuda.begin_step(&batch).unwrap();
        let qkv_row: Vec<f32> =
            (0..QKV_FEATURES as u32).map(|i| ((i * 7 + step * 13) % 31) as f32 / 31.0 - 0.5).collect();
        cuda.upload(&mut qkv, &qkv_row);
        cuda.run(shape, |cuda, _| {
            cuda.rope_store_kv(&qkv, &rope, &mut queries, &mut kv);
            cuda.attention(&queries, &kv, &mut attended);
        });
        cuda.finish_step().unwrap();
        cuda.download(&attended, 1)
    });
    let results = results.collect();
    (results, cuda.num_replays())
}

#[test]
fn a_recorded_step_does_what_its_launches_do() {
    let Some(info) = probe_or_skip() else { return };
    let (launched, none) = decode(&info, CudaOptions { graphs: false, ..CudaOptions::default() });
    let (recorded, num_replays) = decode(&info, CudaOptions::default());
    let (in_turn, _) = decode(&info, CudaOptions { dependent_launches: false, ..CudaOptions::default() });
    assert_eq!(none, 0);
    // The first step of either shape is launched.
    assert_eq!(num_replays, u64::from(2 * STEPS_PER_SHAPE - 2));
    assert_eq!(recorded, launched);
    assert_eq!(recorded, in_turn);
}

#[test]
fn a_recorded_step_over_an_fp8_cache_does_what_its_launches_do() {
    let Some(info) = probe_or_skip().filter(|info| info.capability.has_e4m3()) else { return };
    let options = CudaOptions { kv_cache: KvFormat::E4m3, ..CudaOptions::default() };
    let (launched, _) = decode(&info, CudaOptions { graphs: false, ..options.clone() });
    let (recorded, num_replays) = decode(&info, options);
    assert_eq!(num_replays, u64::from(2 * STEPS_PER_SHAPE - 2));
    assert_eq!(recorded, launched);
}

/// Attention of sequences of these lengths, their tokens one step; keys are not turned.
fn attend<B: Backend>(backend: &mut B, shape: AttentionShape, lens: &[usize], qkv: &[f32]) -> Vec<f32> {
    let (num_tokens, half_dim) = (lens.iter().sum(), shape.head_dim / 2);
    let max_len = lens.iter().max().unwrap();
    let unturned =
        RopeTable { half_dim, cos: vec![1.0; max_len * half_dim], sin: vec![0.0; max_len * half_dim] };
    let rope = backend.rope(&unturned).unwrap();
    let mut kv = backend.kv_cache(shape, 64, BLOCK_SIZE as usize).unwrap();
    let mut from = backend.tensor(num_tokens, shape.qkv_features(), DType::F32).unwrap();
    let mut queries = backend.tensor(num_tokens, shape.q_features(), DType::Bf16).unwrap();
    let mut attended = backend.tensor(num_tokens, shape.q_features(), DType::Bf16).unwrap();
    backend.upload(&mut from, qkv);
    let (mut batch, mut block) = (Batch::new(), 0);
    for &len in lens {
        let blocks: Vec<u32> = (block..block + len.div_ceil(BLOCK_SIZE as usize) as u32).collect();
        block += blocks.len() as u32;
        batch.push_sequence(&vec![0; len], 0, &blocks, BLOCK_SIZE);
    }
    let step = backend.begin_step(&batch).unwrap();
    backend.run(step, |backend, _| {
        backend.rope_store_kv(&from, &rope, &mut queries, &mut kv);
        backend.attention(&queries, &kv, &mut attended);
    });
    backend.finish_step().unwrap();
    backend.download(&attended, num_tokens)
}

const ATTENDED_LENS: [usize; 4] = [1, 3, 40, 300];

/// Every head width, as prompts of one query head a kv head and as few rows.
fn attended_shapes() -> impl Iterator<Item = AttentionShape> {
    let shape =
        |(head_dim, num_heads)| AttentionShape { num_heads, num_kv_heads: 2, head_dim, sliding_window: None };
    [(12, 2), (16, 8), (32, 4), (64, 2), (128, 8)].into_iter().map(shape)
}

#[test]
fn a_gpu_attends_to_an_fp8_cache_as_exactly_as_ever_where_it_has_the_numbers() {
    let Some(info) = probe_or_skip().filter(|info| info.capability.has_e4m3()) else { return };
    for shape in attended_shapes() {
        let num_tokens: usize = ATTENDED_LENS.iter().sum();
        // Every number of e4m3 comes up: whole numbers times two to some power, and a 448 in each row of the cache.
        let element = |index: usize| {
            let bits = mix64(index as u64);
            let number = ((bits % 31) as f32 - 15.0) * 2f32.powi((bits >> 32) as i32 % 14 - 9);
            let scale = 2f32.powi((index / shape.head_dim % 5) as i32 - 9);
            match (index % shape.head_dim, index % shape.qkv_features() < shape.q_features()) {
                (_, true) => number / 4096.0,
                (3, false) => 448.0 * scale,
                (_, false) if number.abs() <= 448.0 => e4m3(number) * scale,
                (_, false) => 0.0,
            }
        };
        let qkv: Vec<f32> = (0..num_tokens * shape.qkv_features()).map(element).collect();
        let options = CudaOptions { kv_cache: KvFormat::E4m3, ..CudaOptions::default() };
        let mut cuda = Cuda::new(info.clone(), options).unwrap();
        let got = attend(&mut cuda, shape, &ATTENDED_LENS, &qkv);
        let expected = attend(&mut Reference::new(), shape, &ATTENDED_LENS, &qkv);
        let rms = (expected.iter().map(|x| x * x).sum::<f32>() / expected.len() as f32).sqrt();
        for (index, (got, expected)) in got.iter().zip(&expected).enumerate() {
            let tolerance = expected.abs() / 128.0 + 2e-5 * rms;
            assert!((got - expected).abs() <= tolerance, "{shape:?}, {index}: {got} for {expected}");
        }
    }
}

/// The nearest number that has three bits of mantissa, or that is a multiple of 2^-9.
fn e4m3(x: f32) -> f32 {
    let step = 2f32.powi((x.abs().log2().floor() as i32).max(-6) - 3);
    if x == 0.0 { 0.0 } else { (x / step).round_ties_even() * step }
}

#[test]
fn a_gpu_makes_of_what_is_not_a_number_in_an_fp8_cache_none_either() {
    let Some(info) = probe_or_skip().filter(|info| info.capability.has_e4m3()) else { return };
    let shape = AttentionShape { num_heads: 2, num_kv_heads: 2, head_dim: 16, sliding_window: None };
    let options = CudaOptions { kv_cache: KvFormat::E4m3, ..CudaOptions::default() };
    // The first feature of a key and of a value of token 1.
    for (feature, bad) in [(32, f32::NAN), (32, f32::INFINITY), (64, f32::NAN), (64, f32::NEG_INFINITY)] {
        let mut qkv = vec![-0.5; 3 * shape.qkv_features()];
        qkv[shape.qkv_features() + feature] = bad;
        let mut cuda = Cuda::new(info.clone(), options.clone()).unwrap();
        let got = attend(&mut cuda, shape, &[2, 1], &qkv);
        let is_nan =
            |token: usize, head: usize| got[32 * token + 16 * head..][..16].iter().all(|x| x.is_nan());
        assert!(is_nan(1, 0) && !is_nan(1, 1) && !is_nan(2, 0), "{bad} at {feature}: {got:?}");
    }
    // Rows of zeros have a scale too.
    let mut cuda = Cuda::new(info, options).unwrap();
    assert!(attend(&mut cuda, shape, &[2], &vec![0.0; 2 * shape.qkv_features()]).iter().all(|&x| x == 0.0));
}
