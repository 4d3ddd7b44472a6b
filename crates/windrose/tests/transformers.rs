//! Our backends against what `transformers` computed: greedy tokens equal, logits within bf16 rounding.
//!
//! `tests/fixtures/record.py` made the fixtures and says how; nothing here needs Python.

use std::path::{Path, PathBuf};

use backend::{Backend, Batch, Reference, SampleParams, SampleRow};
use cpu::{Cpu, CpuOptions, Isa};
use cuda::{Cuda, CudaOptions};
use model::{MixtralRunner, ModelConfig, ModelFiles, ModelRunner, RunnerOptions, WeightSource};
use safetensors::SafeTensors;

/// How far logits may be off.
#[derive(Clone, Copy)]
struct Tolerance {
    /// As a share of a row's standard deviation.
    deviations: f32,
    /// Positions that may be further off, of all that are compared.
    num_outliers: usize,
}

/// We round what feeds a matrix product to bf16 (relative error 2⁻⁹ each) and `transformers` in f32 does not; two layers
/// of such roundings stay below this.
const TINY_TOLERANCE: Tolerance = Tolerance { deviations: 0.04, num_outliers: 0 };
/// The demo model has four layers, and none of its paths is without a token that may rightly go to another of two
/// experts as good as equal; positions that attend to one may be off by more. Their greedy tokens are compared all the
/// same.
const DEMO_TOLERANCE: Tolerance = Tolerance { deviations: 0.25, num_outliers: 2 };
/// A position whose own experts were chosen by less than this many standard deviations of the router's logits may
/// rightly go to others; its logits are not compared, its token still is.
const MIN_ROUTER_GAP: f32 = 0.01;
const NUM_PROMPTS: usize = 8;
const NUM_GREEDY: usize = 64;
const LOGITS_EVERY: usize = 8;
const BLOCK_SIZE: u32 = 16;

const TINY_MODELS: [&str; 8] = [
    "mixtral-8x2-gqa",
    "mixtral-4x1-mha-f32",
    "mixtral-16x3-sharded",
    "mixtral-8x2-tied",
    "mixtral-8x2-window",
    "mixtral-8x2-fused",
    "mistral-dense-window",
    "llama-dense-f16",
];

/// The same models in GGUF: interleaved heads, stacked experts or one tensor for each (4x1), one file or several
/// (16x3), heads of another size than the rest suggests (fused), types other than those of the safetensors (4x1).
const GGUF_MODELS: [(&str, &str); 7] = [
    ("mixtral-8x2-gqa", "mixtral-8x2-gqa.gguf"),
    ("mixtral-4x1-mha-f32", "mixtral-4x1-mha-f32.gguf"),
    ("mixtral-16x3-sharded", "mixtral-16x3-sharded-00001-of-00003.gguf"),
    ("mixtral-8x2-tied", "mixtral-8x2-tied.gguf"),
    ("mixtral-8x2-fused", "mixtral-8x2-fused.gguf"),
    ("mistral-dense-window", "mistral-dense-window.gguf"),
    ("llama-dense-f16", "llama-dense-f16.gguf"),
];

/// One recorded prompt.
struct Expected {
    prompt: Vec<u32>,
    greedy: Vec<u32>,
    /// Rows of logits before generated tokens 0, 8, 16 ...
    logits: Vec<Vec<f32>>,
    /// How clearly the experts at those positions were chosen.
    router_gaps: Vec<f32>,
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
}

fn read_expected(name: &str) -> Vec<Expected> {
    let bytes = std::fs::read(fixture(name).join("expected.safetensors")).expect("a recorded fixture");
    let tensors = SafeTensors::deserialize(&bytes).expect("a sound fixture");
    let words =
        |name: String| -> Vec<[u8; 4]> { tensors.tensor(&name).unwrap().data().as_chunks().0.to_vec() };
    let tokens = |name: String| words(name).into_iter().map(u32::from_le_bytes).collect::<Vec<_>>();
    let floats = |name: String| words(name).into_iter().map(f32::from_le_bytes).collect::<Vec<_>>();
    let read = |index: usize| {
        let logits = floats(format!("{index}.logits"));
        let vocab = logits.len() / (NUM_GREEDY / LOGITS_EVERY);
        Expected {
            prompt: tokens(format!("{index}.prompt")),
            greedy: tokens(format!("{index}.greedy")),
            logits: logits.chunks_exact(vocab).map(<[f32]>::to_vec).collect(),
            router_gaps: floats(format!("{index}.router_gaps")),
        }
    };
    (0..NUM_PROMPTS).map(read).collect()
}

fn load<B: Backend>(backend: B, files: &ModelFiles) -> MixtralRunner<B> {
    let config = ModelConfig::load(files).unwrap();
    let options = RunnerOptions {
        max_model_len: 512,
        max_num_batched_tokens: 512,
        max_num_seqs: NUM_GREEDY,
        block_size: BLOCK_SIZE as usize,
        num_blocks: 33,
    };
    MixtralRunner::load(backend, files, &config, WeightSource::Checkpoint, options, &mut |_| {}).unwrap()
}

/// The blocks of the one sequence these tests run.
fn block_table() -> Vec<u32> {
    (1..33).collect()
}

fn argmax(row: &[f32]) -> u32 {
    (0..row.len()).reduce(|best, i| if row[i] > row[best] { i } else { best }).unwrap() as u32
}

/// Feeds the prompt and its greedy continuation at once and compares every token; returns the errors of the logits
/// at the recorded positions whose experts were chosen clearly.
fn check_logits<B: Backend>(name: &str, runner: &mut MixtralRunner<B>, expected: &Expected) -> Vec<f32> {
    let tokens: Vec<u32> =
        expected.prompt.iter().chain(&expected.greedy[..NUM_GREEDY - 1]).copied().collect();
    let mut batch = Batch::new();
    batch.push_sequence(&tokens, 0, &block_table(), BLOCK_SIZE);
    batch.logits_indices = (expected.prompt.len() as u32 - 1..tokens.len() as u32).collect();
    let logits = runner.logits(&batch).unwrap();
    let rows: Vec<&[f32]> = logits.chunks_exact(logits.len() / NUM_GREEDY).collect();

    let greedy: Vec<u32> = rows.iter().map(|row| argmax(row)).collect();
    assert_eq!(greedy, expected.greedy, "{name}: greedy tokens, all at once");
    batch.logits_indices.drain(..NUM_GREEDY - 1);
    let alone = runner.logits(&batch).unwrap();
    assert_eq!(&alone, rows[NUM_GREEDY - 1], "{name}: a row's logits do not depend on whose else are wanted");
    let pairs = rows.iter().step_by(LOGITS_EVERY).zip(&expected.logits).zip(&expected.router_gaps);
    let clear = pairs.filter(|&(_, &gap)| gap >= MIN_ROUTER_GAP);
    clear.map(|((got, expected), _)| relative_error(got, expected)).collect()
}

/// The largest difference, in standard deviations of the expected row.
fn relative_error(got: &[f32], expected: &[f32]) -> f32 {
    let mean = expected.iter().sum::<f32>() / expected.len() as f32;
    let variance = expected.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / expected.len() as f32;
    let worst = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    worst / variance.sqrt()
}

/// Generates token by token after a prompt in two chunks.
fn check_generation<B: Backend>(name: &str, runner: &mut MixtralRunner<B>, expected: &Expected) {
    let params = SampleParams::greedy();
    let row = SampleRow::new(&params);
    let (first, second) = expected.prompt.split_at(expected.prompt.len() / 2);
    let mut step = |tokens: &[u32], num_computed: usize| {
        let mut batch = Batch::new();
        batch.push_sequence(tokens, num_computed as u32, &block_table(), BLOCK_SIZE);
        batch.logits_indices = vec![tokens.len() as u32 - 1];
        let output = runner.execute(&batch, &[row]).unwrap();
        output.sampled[0].as_ref().unwrap().token
    };
    step(first, 0);
    let mut generated = vec![step(second, first.len())];
    while generated.len() < NUM_GREEDY {
        let num_computed = expected.prompt.len() + generated.len() - 1;
        generated.push(step(&generated[generated.len() - 1..], num_computed));
    }
    assert_eq!(generated, expected.greedy, "{name}: greedy tokens, one by one");
}

fn check<B: Backend>(name: &str, backend: B, files: &ModelFiles, tolerance: Tolerance) {
    let described = format!("{name} on {}", backend.describe());
    let mut runner = load(backend, files);
    let mut errors = Vec::new();
    for expected in read_expected(name) {
        errors.extend(check_logits(&described, &mut runner, &expected));
        check_generation(&described, &mut runner, &expected);
    }
    let num_recorded = NUM_PROMPTS * NUM_GREEDY / LOGITS_EVERY;
    errors.sort_by(|a, b| b.total_cmp(a));
    println!(
        "{described}: logits at most {:.4} deviations off at {} of {num_recorded} positions",
        errors[0],
        errors.len()
    );
    assert!(errors.len() * 4 >= num_recorded * 3, "{described}: most positions were to be compared");
    let worst = errors[tolerance.num_outliers];
    assert!(worst <= tolerance.deviations, "{described}: logits are {worst} standard deviations off");
}

fn cpu_backends() -> Vec<Cpu> {
    let available = Isa::ALL.into_iter().filter(|isa| isa.is_available());
    available
        .map(|isa| Cpu::new(CpuOptions { num_threads: Some(2), isa: Some(isa), ..CpuOptions::default() }))
        .collect()
}

#[test]
fn tiny_models_of_every_shape_match_on_the_reference() {
    for name in TINY_MODELS {
        check(name, Reference::new(), &ModelFiles::open(&fixture(name)).unwrap(), TINY_TOLERANCE);
    }
}

#[test]
fn tiny_models_of_every_shape_match_on_the_cpu() {
    for name in TINY_MODELS {
        for backend in cpu_backends() {
            check(name, backend, &ModelFiles::open(&fixture(name)).unwrap(), TINY_TOLERANCE);
        }
    }
}

#[test]
fn tiny_models_of_every_shape_match_on_the_gpu() {
    if let Some(info) = cuda::probe_or_skip() {
        for name in TINY_MODELS {
            let backend = Cuda::new(info.clone(), CudaOptions::default()).expect("the device opens");
            check(name, backend, &ModelFiles::open(&fixture(name)).unwrap(), TINY_TOLERANCE);
        }
    }
}

#[test]
fn tiny_models_in_gguf_match_on_both() {
    for (name, file) in GGUF_MODELS {
        let files = ModelFiles::open(&fixture("gguf").join(file)).unwrap();
        check(name, Reference::new(), &files, TINY_TOLERANCE);
        check(
            name,
            Cpu::new(CpuOptions { num_threads: Some(2), ..CpuOptions::default() }),
            &files,
            TINY_TOLERANCE,
        );
    }
}

/// A configuration differs only in what GGUF does not have: several end tokens, or a window that nobody uses.
#[test]
fn gguf_describes_the_same_models() {
    for (name, file) in GGUF_MODELS {
        let ours = ModelConfig::load(&ModelFiles::open(&fixture("gguf").join(file)).unwrap()).unwrap();
        let expected = ModelConfig::load(&ModelFiles::open(&fixture(name)).unwrap()).unwrap();
        assert_eq!(ModelConfig { eos_token_ids: expected.eos_token_ids.clone(), ..ours }, expected, "{name}");
    }
}

#[test]
fn the_demo_model_matches_on_the_gpu() {
    if let Some(info) = cuda::probe_or_skip() {
        let backend = Cuda::new(info, CudaOptions::default()).expect("the device opens");
        check("demo", backend, &ModelFiles::Embedded(demo::files()), DEMO_TOLERANCE);
    }
}

#[test]
fn the_demo_model_matches_on_both() {
    let files = ModelFiles::Embedded(demo::files());
    check("demo", Reference::new(), &files, DEMO_TOLERANCE);
    for backend in cpu_backends() {
        check("demo", backend, &files, DEMO_TOLERANCE);
    }
}
