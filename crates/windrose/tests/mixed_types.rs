//! A GGUF file whose matrices have several types, as most have: each is kept in a format that keeps it, and an image of
//! such weights brings them back. The oracle is the reference backend, which decodes the file and rounds nothing.

use std::io::Cursor;
use std::path::Path;

use backend::{Backend, Batch, Reference};
use cpu::{Cpu, CpuOptions, ImageUse, WeightFormat, WeightFormats};
use model::{MixtralRunner, ModelConfig, ModelFiles, RunnerOptions, WeightSource};

const FILE: &str = "../../tests/fixtures/gguf/mixed-types.gguf";
const TOKENS: u32 = 64;
const BLOCK_SIZE: usize = 16;

/// Logits of every token of one sequence.
fn logits<B: Backend>(backend: B) -> Vec<f32> {
    let files = ModelFiles::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join(FILE)).unwrap();
    let config = ModelConfig::load(&files).unwrap();
    let options = RunnerOptions {
        max_model_len: TOKENS as usize,
        max_num_batched_tokens: TOKENS as usize,
        // As many logits may be wanted.
        max_num_seqs: TOKENS as usize,
        block_size: BLOCK_SIZE,
        num_blocks: 1 + TOKENS as usize / BLOCK_SIZE,
    };
    let mut runner =
        MixtralRunner::load(backend, &files, &config, WeightSource::Checkpoint, options, &mut |_| {})
            .unwrap();
    let mut batch = Batch::new();
    let tokens: Vec<u32> = (0..TOKENS).map(|token| token * 2 + 1).collect();
    batch.push_sequence(&tokens, 0, &[1, 2, 3, 4], BLOCK_SIZE as u32);
    batch.logits_indices = (0..TOKENS).collect();
    runner.logits(&batch).unwrap()
}

fn on_cpu(weights: impl Into<WeightFormats>) -> Cpu {
    Cpu::new(CpuOptions { num_threads: Some(2), weights: weights.into(), ..CpuOptions::default() })
}

/// The median of the differences, of which a few are large, where another expert was chosen.
fn difference(got: &[f32], expected: &[f32]) -> f32 {
    let mut differences: Vec<f32> = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).collect();
    differences.sort_by(f32::total_cmp);
    differences[differences.len() / 2]
}

#[test]
fn finer_matrices_of_a_file_are_kept() {
    let expected = logits(Reference::new());
    let as_stored = difference(&logits(on_cpu(WeightFormats::AsStored)), &expected);
    let all_in_q4 = difference(&logits(on_cpu(WeightFormat::Q4)), &expected);
    println!("as stored {as_stored:.5}, all in q4 {all_in_q4:.5}");
    assert!(5.0 * as_stored < all_in_q4);
}

#[test]
fn an_image_brings_back_matrices_of_several_formats() {
    let mut made = on_cpu(WeightFormats::AsStored);
    let matrices = made.record();
    let expected = logits(made);
    let mut image = Cursor::new(Vec::new());
    cpu::write_image(&mut image, WeightFormats::AsStored, [1, 2], matrices.try_iter()).unwrap();

    let mut mapped = on_cpu(WeightFormats::AsStored);
    mapped.use_image(image.into_inner().into(), [1, 2], ImageUse::InPlace).unwrap();
    let made_anew = mapped.record();
    assert_eq!(logits(mapped), expected);
    assert_eq!(made_anew.try_iter().count(), 0, "all of them were in the image");
}
