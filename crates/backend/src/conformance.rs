//! What every backend must pass: each verb against the [`Reference`] on seeded random inputs, at the edges
//! where kernels break (ragged tiles, experts with no token or with all of them, block borders, windows), and
//! the promise that a row's result does not depend on its batch, bit for bit.
//!
//! A backend's own test calls [`check_all`]. A failure panics with the verb, the case and the first bad value.

mod steering;

use bytes::Bytes;
use half::bf16;

use crate::sampling::{NonFiniteLogits, SampleParams, SampleRow, Sampled, TokenLogprob, mix64};
use crate::{
    AttentionShape, Backend, Batch, DType, ExpertsView, MatrixUse, Reference, RopeTable, RouteShape, Routing,
    WeightData, WeightType, WeightView,
};

/// Largest error of an f32 reduction, as a share of the root mean square of its results.
const F32_TOLERANCE: f32 = 2e-5;
/// The same for a result rounded to bf16: half a unit in the last place, and as much again because a sum
/// that falls near the middle of two neighbours may round either way.
const BF16_TOLERANCE: f32 = 1.0 / 128.0;

/// Runs the whole suite on backends made by `new`.
///
/// # Panics
/// If a verb deviates from the reference or a row from itself in another batch.
pub fn check_all<B: Backend>(new: impl Fn() -> B) {
    check_all_quantised(new, Quantisation::default());
}

/// How far what a backend quantises may deviate beyond the usual tolerance, as shares of the root mean square of the
/// results.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quantisation {
    /// Products with the weights of [`MatrixUse::Product`] and of experts.
    pub products: f32,
    /// Attention over the cached keys and values.
    pub attention: f32,
}

/// The same for a backend that quantises; everything else is as exact as ever.
///
/// # Panics
/// As [`check_all`].
pub fn check_all_quantised<B: Backend>(new: impl Fn() -> B, quantisation: Quantisation) {
    check_elementwise(&mut new());
    check_linear(&mut new(), quantisation.products);
    check_linear_rows_are_independent(&mut new());
    check_embed_and_gather(&mut new());
    check_route(&mut new());
    check_experts(&mut new(), quantisation.products);
    steering::check_steering(&mut new(), quantisation.products);
    check_attention(&mut new(), quantisation.attention);
    check_attention_is_independent_of_chunking(&mut new());
    check_sample(&mut new());
}

/// Seeded test values.
struct Values(u64);

impl Values {
    fn next(&mut self) -> f32 {
        self.0 += 1;
        // Two uniforms make a hump around zero; the exact distribution does not matter.
        let bits = mix64(self.0);
        ((bits >> 40) as f32 + ((bits >> 16) & 0xff_ffff) as f32) / (1u32 << 24) as f32 - 1.0
    }

    fn take(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next()).collect()
    }

    fn weight(&mut self, rows: usize, cols: usize) -> WeightView {
        stored(rows, cols, &self.take(rows * cols))
    }
}

fn stored(rows: usize, cols: usize, values: &[f32]) -> WeightView {
    let bytes: Vec<u8> = values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
    WeightView { rows, cols, dtype: WeightType::Bf16, data: WeightData::Stored(Bytes::from(bytes)) }
}

#[track_caller]
fn assert_close(what: &str, got: &[f32], expected: &[f32], dtype: DType) {
    assert_deviation(what, got, expected, dtype, 0.0);
}

/// As [`assert_close`] for what may deviate by `quantisation` beside its rounding.
#[track_caller]
fn assert_deviation(what: &str, got: &[f32], expected: &[f32], dtype: DType, quantisation: f32) {
    assert_eq!(got.len(), expected.len(), "{what}: number of values");
    let mean_square = expected.iter().map(|x| x * x).sum::<f32>() / expected.len().max(1) as f32;
    let rms = mean_square.sqrt();
    for (index, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let tolerance = match dtype {
            DType::F32 => F32_TOLERANCE * rms.max(expected.abs()),
            DType::Bf16 => BF16_TOLERANCE * expected.abs() + F32_TOLERANCE * rms,
        } + quantisation * rms.max(expected.abs());
        assert!(
            (got - expected).abs() <= tolerance,
            "{what}: value {index} is {got}, expected {expected} ± {tolerance}"
        );
    }
}

/// A tensor of the backend filled with `values`.
fn filled<B: Backend>(backend: &mut B, features: usize, dtype: DType, values: &[f32]) -> B::Tensor {
    let mut tensor = backend.tensor(values.len() / features, features, dtype).expect("a small tensor");
    backend.upload(&mut tensor, values);
    tensor
}

/// A batch of fresh one-chunk sequences whose blocks follow one another from block 1.
fn fresh_batch(lens: &[usize], block_size: usize, vocab: u32) -> Batch {
    let mut batch = Batch::new();
    let mut next_block = 1;
    for (seq_index, &len) in lens.iter().enumerate() {
        let num_blocks = len.div_ceil(block_size) as u32;
        let table: Vec<u32> = (next_block..next_block + num_blocks).collect();
        next_block += num_blocks;
        let tokens: Vec<u32> =
            (0..len).map(|i| mix64((seq_index * 1000 + i) as u64) as u32 % vocab).collect();
        batch.push_sequence(&tokens, 0, &table, block_size as u32);
    }
    batch
}

fn run_step<B: Backend>(backend: &mut B, batch: &Batch, mut verbs: impl FnMut(&mut B)) {
    let shape = backend.begin_step(batch).expect("begin_step");
    backend.run(shape, |backend, _| verbs(backend));
    backend.finish_step().expect("finish_step");
}

fn check_elementwise<B: Backend>(backend: &mut B) {
    for (rows, features) in [(1, 8), (3, 64), (5, 33), (17, 192)] {
        let mut values = Values(1);
        let x = values.take(rows * features);
        let y = values.take(rows * features);
        let weight = values.weight(1, features);
        let [sum, normed] = add_rms_norm(backend, &x, &y, &weight);
        let [expected_sum, expected_normed] = add_rms_norm(&mut Reference::new(), &x, &y, &weight);
        let case = format!("[{rows}, {features}]");
        assert_eq!(sum, expected_sum, "add {case}");
        assert_close(&format!("add_rms_norm {case}"), &normed, &expected_normed, DType::Bf16);
    }
}

/// The updated residual and its norm.
fn add_rms_norm<B: Backend>(backend: &mut B, x: &[f32], y: &[f32], weight: &WeightView) -> [Vec<f32>; 2] {
    let features = weight.cols;
    let rows = x.len() / features;
    let mut residual = filled(backend, features, DType::F32, x);
    let delta = filled(backend, features, DType::F32, y);
    let mut fused = backend.tensor(rows, features, DType::Bf16).unwrap();
    let mut plain = backend.tensor(rows, features, DType::Bf16).unwrap();
    let weight = backend.vector(weight).unwrap();
    run_step(backend, &fresh_batch(&vec![1; rows], 4, 8), |backend| {
        backend.add_rms_norm(&mut residual, &delta, &weight, 1e-5, &mut fused, rows);
        backend.rms_norm(&residual, &weight, 1e-5, &mut plain, rows);
    });
    let fused = backend.download(&fused, rows);
    assert_eq!(fused, backend.download(&plain, rows), "add_rms_norm is add, then rms_norm");
    [backend.download(&residual, rows), fused]
}

fn linear<B: Backend>(backend: &mut B, x: &[f32], parts: &[WeightView], dtype: DType) -> Vec<f32> {
    let features = parts[0].cols;
    let rows = x.len() / features;
    let matrix = backend.matrix(parts, MatrixUse::Product).unwrap();
    let x = filled(backend, features, DType::Bf16, x);
    let mut out = backend.tensor(rows, parts.iter().map(|part| part.rows).sum(), dtype).unwrap();
    run_step(backend, &fresh_batch(&vec![1; rows], 4, 8), |backend| {
        backend.linear(&x, &matrix, &mut out, rows)
    });
    backend.download(&out, rows)
}

fn check_linear<B: Backend>(backend: &mut B, quantisation: f32) {
    for features in [1, 7, 16, 31, 32, 33, 64, 192, 257] {
        for (rows, out_features) in [(1, 1), (2, 5), (3, 16), (4, 33), (7, 64), (13, 129)] {
            for dtype in [DType::F32, DType::Bf16] {
                let mut values = Values((features * rows) as u64);
                let x = values.take(rows * features);
                let parts = [values.weight(out_features, features), values.weight(3, features)];
                let got = linear(backend, &x, &parts, dtype);
                let expected = linear(&mut Reference::new(), &x, &parts, dtype);
                let case =
                    format!("linear [{rows}, {features}] x [{out_features} + 3, {features}] {dtype:?}");
                assert_deviation(&case, &got, &expected, dtype, quantisation);
            }
        }
    }
}

fn check_linear_rows_are_independent<B: Backend>(backend: &mut B) {
    let (rows, features, out_features) = (19, 160, 70);
    let mut values = Values(3);
    let x = values.take(rows * features);
    let weight = [values.weight(out_features, features)];
    let together = linear(backend, &x, &weight, DType::F32);
    for row in 0..rows {
        let alone = linear(backend, &x[row * features..][..features], &weight, DType::F32);
        assert_eq!(
            alone,
            together[row * out_features..][..out_features],
            "linear: row {row} alone and in a batch"
        );
    }
}

fn check_embed_and_gather<B: Backend>(backend: &mut B) {
    let (vocab, features) = (23, 40);
    let table = Values(4).weight(vocab, features);
    let mut batch = fresh_batch(&[5, 1, 7], 4, vocab as u32);
    for logits_indices in [vec![4, 5, 12], vec![]] {
        batch.logits_indices = logits_indices;
        let got = embed_and_gather(backend, &batch, &table);
        assert_eq!(got, embed_and_gather(&mut Reference::new(), &batch, &table), "embed, gather_rows");
    }
}

/// The embedded tokens; the wanted rows of them; the wanted rows of a bf16 tensor with the same values.
fn embed_and_gather<B: Backend>(backend: &mut B, batch: &Batch, table: &WeightView) -> [Vec<f32>; 3] {
    let (num_tokens, num_logits) = (batch.num_tokens(), batch.logits_indices.len());
    let matrix = backend.matrix(std::slice::from_ref(table), MatrixUse::Lookup).unwrap();
    let mut embedded = backend.tensor(num_tokens, table.cols, DType::F32).unwrap();
    let mut gathered = backend.tensor(num_logits, table.cols, DType::F32).unwrap();
    let mut gathered_bf16 = backend.tensor(num_logits, table.cols, DType::Bf16).unwrap();
    run_step(backend, batch, |backend| backend.embed(&matrix, &mut embedded));
    let embedded_values = backend.download(&embedded, num_tokens);
    let embedded_bf16 = filled(backend, table.cols, DType::Bf16, &embedded_values);
    run_step(backend, batch, |backend| {
        backend.gather_rows(&embedded, &mut gathered);
        backend.gather_rows(&embedded_bf16, &mut gathered_bf16);
    });
    [embedded_values, backend.download(&gathered, num_logits), backend.download(&gathered_bf16, num_logits)]
}

/// Routes `x` `[tokens, hidden]`.
fn route<B: Backend>(
    backend: &mut B,
    x: &[f32],
    router: Option<&WeightView>,
    shape: RouteShape,
    hidden: usize,
) -> Routing {
    let tokens = x.len() / hidden;
    let x = filled(backend, hidden, DType::Bf16, x);
    let router = router.map(|router| backend.matrix(std::slice::from_ref(router), MatrixUse::Exact).unwrap());
    let mut routing = backend.routing(tokens, shape).unwrap();
    run_step(backend, &fresh_batch(&vec![1; tokens], 4, 8), |backend| {
        backend.route(&x, router.as_ref(), &mut routing, 0, tokens);
    });
    backend.read_routing(&routing)
}

fn check_route<B: Backend>(backend: &mut B) {
    let hidden = 48;
    for (tokens, num_experts, top_k) in [(1, 8, 2), (33, 8, 2), (9, 4, 1), (12, 16, 3), (5, 2, 2), (40, 5, 5)]
    {
        let mut values = Values((tokens + num_experts) as u64);
        let x = values.take(tokens * hidden);
        let router = values.weight(num_experts, hidden);
        let shape = RouteShape { num_experts, top_k };
        let got = route(backend, &x, Some(&router), shape, hidden);
        let expected = route(&mut Reference::new(), &x, Some(&router), shape, hidden);
        let case = format!("route {tokens} tokens, {top_k} of {num_experts}");
        assert_eq!(got.topk_ids, expected.topk_ids, "{case}");
        assert_eq!(got.expert_offsets, expected.expert_offsets, "{case}");
        assert_eq!(got.permutation, expected.permutation, "{case}");
        assert_close(&case, &got.topk_weights, &expected.topk_weights, DType::F32);
    }

    let x = Values(5).take(6 * hidden);
    let tied = stored(4, hidden, &vec![0.5; 4 * hidden]);
    let got = route(backend, &x, Some(&tied), RouteShape { num_experts: 4, top_k: 2 }, hidden);
    assert_eq!(got.topk_ids, [0, 1].repeat(6), "route: ties go to the lower ids");
    assert_eq!(got.expert_offsets, [0, 6, 12, 12, 12], "route: experts without tokens");

    let dense = route(backend, &x, None, RouteShape { num_experts: 1, top_k: 1 }, hidden);
    assert_eq!((dense.topk_ids, dense.topk_weights), (vec![0; 6], vec![1.0; 6]), "route without a router");
}

struct ExpertsCase {
    hidden: usize,
    ffn: usize,
    shape: RouteShape,
    x: Vec<f32>,
    router: WeightView,
    experts: ExpertsView,
}

impl ExpertsCase {
    fn new(tokens: usize, hidden: usize, ffn: usize, shape: RouteShape) -> Self {
        let mut values = Values((tokens * hidden + ffn) as u64);
        let mut matrices = |rows, cols| (0..shape.num_experts).map(|_| values.weight(rows, cols)).collect();
        let experts = ExpertsView {
            gate: matrices(ffn, hidden),
            up: matrices(ffn, hidden),
            down: matrices(hidden, ffn),
        };
        let x = values.take(tokens * hidden);
        Self { hidden, ffn, shape, x, router: values.weight(shape.num_experts, hidden), experts }
    }

    /// The activations `[tokens × top_k, ffn]` and the layer's output `[tokens, hidden]` for rows of `x`.
    fn run<B: Backend>(&self, backend: &mut B, x: &[f32]) -> [Vec<f32>; 2] {
        let tokens = x.len() / self.hidden;
        self.run_some(backend, x, tokens)
    }

    /// The same for the first `rows` rows of `x`, in a step of as many tokens as `x` has rows.
    fn run_some<B: Backend>(&self, backend: &mut B, x: &[f32], rows: usize) -> [Vec<f32>; 2] {
        let tokens = x.len() / self.hidden;
        let x = filled(backend, self.hidden, DType::Bf16, x);
        let router = backend.matrix(std::slice::from_ref(&self.router), MatrixUse::Exact).unwrap();
        let experts = backend.experts(&self.experts).unwrap();
        let mut routing = backend.routing(tokens, self.shape).unwrap();
        let assignments = rows * self.shape.top_k;
        let mut act = backend.tensor(tokens * self.shape.top_k, self.ffn, DType::Bf16).unwrap();
        let mut out = backend.tensor(tokens, self.hidden, DType::F32).unwrap();
        run_step(backend, &fresh_batch(&vec![1; tokens], 4, 8), |backend| {
            backend.route(&x, Some(&router), &mut routing, 0, rows);
            backend.experts_gate_up(&x, &experts, &routing, &mut act);
            backend.experts_down(&act, &experts, &routing, &mut out);
        });
        [backend.download(&act, assignments), backend.download(&out, rows)]
    }
}

fn check_experts<B: Backend>(backend: &mut B, quantisation: f32) {
    let shape = |num_experts, top_k| RouteShape { num_experts, top_k };
    let cases = [
        (1, 32, 64, shape(8, 2)),
        (2, 40, 24, shape(4, 1)),
        (29, 64, 48, shape(8, 2)),
        (11, 33, 17, shape(16, 3)),
        (6, 24, 40, shape(1, 1)),
        (170, 40, 24, shape(3, 2)),
    ];
    for (tokens, hidden, ffn, shape) in cases {
        let case = ExpertsCase::new(tokens, hidden, ffn, shape);
        let [act, out] = case.run(backend, &case.x);
        let [expected_act, expected_out] = case.run(&mut Reference::new(), &case.x);
        let name = format!("{tokens} tokens, hidden {hidden}, ffn {ffn}, {shape:?}");
        assert_deviation(&format!("experts_gate_up {name}"), &act, &expected_act, DType::Bf16, quantisation);
        // The activations' own rounding passes through the product, so the bound is that of bf16.
        let rms = (expected_out.iter().map(|x| x * x).sum::<f32>() / expected_out.len() as f32).sqrt();
        let worst = out.iter().zip(&expected_out).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let tolerance = (BF16_TOLERANCE + quantisation) * rms;
        assert!(worst <= tolerance, "experts_down {name}: {worst} off at root mean square {rms}");

        for rows in [0, tokens / 2] {
            let [_, some] = case.run_some(backend, &case.x, rows);
            assert_eq!(some, out[..rows * hidden], "experts {name}: the first {rows} rows alone");
        }
        for token in 0..tokens {
            let [_, alone] = case.run(backend, &case.x[token * hidden..][..hidden]);
            assert_eq!(
                alone,
                out[token * hidden..][..hidden],
                "experts {name}: token {token} alone and in a batch"
            );
        }
    }
}

struct AttentionCase {
    shape: AttentionShape,
    block_size: usize,
    rope: RopeTable,
    /// Tokens of the longest sequence.
    len: usize,
}

impl AttentionCase {
    fn new(heads: [usize; 2], head_dim: usize, sliding_window: Option<u32>, block_size: usize) -> Self {
        let shape = AttentionShape { num_heads: heads[0], num_kv_heads: heads[1], head_dim, sliding_window };
        Self { shape, block_size, rope: RopeTable::new(1e4, head_dim, 2048), len: 150 }
    }

    /// Runs batches one after another over one cache; the attention output of all of them, concatenated.
    fn run<B: Backend>(&self, backend: &mut B, steps: &[(Batch, Vec<f32>)]) -> Vec<f32> {
        let rope = backend.rope(&self.rope).unwrap();
        let mut kv = backend.kv_cache(self.shape, 64, self.block_size).unwrap();
        let mut outputs = Vec::new();
        for (batch, qkv) in steps {
            let tokens = batch.num_tokens();
            let qkv = filled(backend, self.shape.qkv_features(), DType::F32, qkv);
            let mut q = backend.tensor(tokens, self.shape.q_features(), DType::Bf16).unwrap();
            let mut out = backend.tensor(tokens, self.shape.q_features(), DType::Bf16).unwrap();
            run_step(backend, batch, |backend| {
                backend.rope_store_kv(&qkv, &rope, &mut q, &mut kv);
                backend.attention(&q, &kv, &mut out);
            });
            outputs.extend(backend.download(&out, tokens));
        }
        outputs
    }
}

fn attention_cases() -> Vec<AttentionCase> {
    vec![
        AttentionCase::new([4, 2], 16, None, 4),
        AttentionCase::new([6, 6], 8, None, 16),
        AttentionCase::new([8, 1], 32, None, 8),
        AttentionCase::new([4, 2], 64, Some(5), 4),
        AttentionCase::new([2, 1], 12, Some(1), 3),
        AttentionCase { len: 1300, ..AttentionCase::new([4, 1], 12, None, 32) },
        AttentionCase { len: 1300, ..AttentionCase::new([2, 2], 16, Some(700), 32) },
        AttentionCase { len: 400, ..AttentionCase::new([4, 1], 128, None, 16) },
        AttentionCase { len: 700, ..AttentionCase::new([6, 2], 64, Some(300), 16) },
    ]
}

fn check_attention<B: Backend>(backend: &mut B, quantisation: f32) {
    for case in attention_cases() {
        // A long context averages values to small results, and errors shrink less: those of what is quantised, and of
        // weights that are multiplied with 16 bits.
        let long = 5.0 * quantisation + F32_TOLERANCE;
        for (lens, quantisation) in [(&[1, 17, 4, 33][..], quantisation), (&[case.len], long)] {
            let batch = fresh_batch(lens, case.block_size, 8);
            let qkv = Values(6).take(batch.num_tokens() * case.shape.qkv_features());
            let steps = [(batch, qkv)];
            let got = case.run(backend, &steps);
            let expected = case.run(&mut Reference::new(), &steps);
            let what = format!("attention {:?} over {lens:?}", case.shape);
            assert_deviation(&what, &got, &expected, DType::Bf16, quantisation);
        }
    }
}

fn check_attention_is_independent_of_chunking<B: Backend>(backend: &mut B) {
    for case in attention_cases() {
        let (len, width) = (case.len, case.shape.qkv_features());
        let qkv = Values(7).take(len * width);
        let num_blocks = len.div_ceil(case.block_size) as u32;
        // Scattered blocks: the cache's layout must not matter either.
        let table: Vec<u32> = (0..num_blocks).map(|i| (i * 37) % 53 + 1).collect();
        let chunk = |range: std::ops::Range<usize>, table: &[u32]| {
            let mut batch = Batch::new();
            batch.push_sequence(&vec![1; range.len()], range.start as u32, table, case.block_size as u32);
            (batch, qkv[range.start * width..range.end * width].to_vec())
        };
        let straight: Vec<u32> = (1..=num_blocks).collect();
        let whole = case.run(backend, &[chunk(0..len, &straight)]);
        let steps = [0..1, 1..70, 70..len - 1, len - 1..len].map(|range| chunk(range, &table));
        assert_eq!(case.run(backend, &steps), whole, "attention {:?}: chunked and whole", case.shape);
    }
}

/// Tokens are the reference's; log-probabilities are within the rounding of a sum of exponentials.
fn check_sample<B: Backend>(backend: &mut B) {
    for vocab in [1, 7, 300, 5000] {
        let mut logits = Values(8).take(NUM_SAMPLED * vocab);
        // Many tokens that are as likely as others, some of them the likeliest.
        logits.iter_mut().skip(1).step_by(2).for_each(|logit| *logit = (*logit * 8.0).round() / 4.0);
        let params: Vec<_> =
            (0..NUM_SAMPLED as u64).map(|index| sample_params(index, vocab as u32)).collect();
        let tokens: Vec<u32> = (0..60).map(|i| i * i % vocab as u32).collect();
        let masks: Vec<Vec<u32>> = (0..NUM_SAMPLED).map(|index| mask(index, vocab)).collect();
        let rows: Vec<_> = params
            .iter()
            .enumerate()
            .map(|(index, params)| SampleRow {
                params,
                prompt: &tokens[..index],
                output: &tokens[index..2 * index],
                banned: if index % 5 == 1 { &tokens[1..3] } else { &[] },
                allowed: (index % 3 != 1).then(|| masks[index].as_slice()),
                forced: (index % 7 == 6).then(|| tokens[index]),
                num_logprobs: [None, Some(0), Some(3)][index % 3],
            })
            .collect();
        let got = sample(backend, &logits, vocab, &rows);
        let expected = sample(&mut Reference::new(), &logits, vocab, &rows);
        for (index, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert!(
                same_sample(got, expected),
                "sample {vocab}, {:?}: {got:?} for {expected:?}",
                rows[index]
            );
        }
    }
    let broken =
        [1.0, f32::NAN, f32::INFINITY, 1.0, f32::NEG_INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY, 2.0];
    let params = SampleParams::default();
    let row = SampleRow::new(&params);
    let got = sample(backend, &broken, 2, &[row; 4]);
    assert_eq!(got.iter().map(Result::is_ok).collect::<Vec<_>>(), [false, false, false, true], "{got:?}");
}

/// Rows that are sampled together.
const NUM_SAMPLED: usize = 24;

/// The tokens that a row may take: few or most of them, none of the last, and now and then none at all.
fn mask(index: usize, vocab: usize) -> Vec<u32> {
    let word = |i: u64| {
        let (a, b) = (mix64(i ^ (index as u64) << 32), mix64(!i ^ (index as u64) << 32));
        if index.is_multiple_of(2) { (a & b & a >> 32) as u32 } else { (a | b) as u32 }
    };
    let num_words = vocab.div_ceil(u32::BITS as usize).saturating_sub(index / 8);
    (0..num_words as u64).map(word).collect()
}

/// Every filter, alone and with others.
fn sample_params(index: u64, vocab: u32) -> SampleParams {
    let on = |bit: u64| index >> bit & 1 == 1;
    SampleParams {
        temperature: if index % 8 == 7 { 0.0 } else { 0.4 + index as f32 / 10.0 },
        top_k: if on(0) { 1 + 3 * index as u32 } else { 0 },
        top_p: if on(1) { 0.3 + 0.02 * index as f32 } else { 1.0 },
        min_p: if on(2) { 0.05 } else { 0.0 },
        repetition_penalty: if on(3) { 1.3 } else { 1.0 },
        presence_penalty: if on(4) { 0.4 } else { 0.0 },
        frequency_penalty: if on(4) { 0.3 } else { 0.0 },
        logit_bias: if on(3) { vec![(index as u32 % vocab, 1.5)] } else { Vec::new() },
        seed: mix64(index),
    }
}

type SampleResult = Result<Sampled, NonFiniteLogits>;

fn same_sample(got: &SampleResult, expected: &SampleResult) -> bool {
    let (got, expected) = match (got, expected) {
        (Ok(got), Ok(expected)) => (got, expected),
        (got, expected) => return got == expected,
    };
    let all = |sampled: &Sampled| -> Vec<TokenLogprob> {
        sampled.logprob.iter().chain(&sampled.top_logprobs).copied().collect()
    };
    let same = |(a, b): (&TokenLogprob, &TokenLogprob)| {
        (a.token, a.rank) == (b.token, b.rank) && (a.logprob - b.logprob).abs() <= 1e-5
    };
    let (reported, wanted) = (all(got), all(expected));
    got.token == expected.token && reported.len() == wanted.len() && reported.iter().zip(&wanted).all(same)
}

fn sample<B: Backend>(
    backend: &mut B,
    logits: &[f32],
    vocab: usize,
    rows: &[SampleRow<'_>],
) -> Vec<SampleResult> {
    let tensor = filled(backend, vocab, DType::F32, logits);
    let mut batch = fresh_batch(&vec![1; rows.len()], 4, 32);
    batch.logits_indices = (0..rows.len() as u32).collect();
    backend.begin_step(&batch).unwrap();
    backend.sample(&tensor, rows);
    let sampled = backend.finish_step().unwrap();
    let left = backend.download(&tensor, rows.len());
    assert!(left.iter().zip(logits).all(|(a, b)| a.to_bits() == b.to_bits()), "sampling keeps the logits");
    sampled
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_conforms_to_itself_and_is_batch_invariant() {
        check_all(Reference::new);
    }

    #[test]
    fn the_reference_multiplies_as_f64_does() {
        let x = [0.5, -1.25, 3.0];
        let weight = stored(2, 3, &[1.0, 2.0, 0.5, -1.0, 0.25, 4.0]);
        let got = linear(&mut Reference::new(), &x, &[weight], DType::F32);
        assert_eq!(got, [0.5 - 2.5 + 1.5, -0.5 - 0.3125 + 12.0]);
    }
}
