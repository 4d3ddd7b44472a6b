//! Every verb against the reference, and recorded steps against launched ones, on the GPU there is or on the fake driver
//! of `kernels/emulator`: `LD_LIBRARY_PATH=$PWD/target/emulator cargo test --release -p windrose-cuda`.

use backend::conformance::check_all;
use backend::{AttentionShape, Backend, Batch, DType, RopeTable};
use cuda::{Cuda, CudaOptions, DeviceInfo, probe_or_skip};

#[test]
fn every_verb_equals_the_reference_and_no_row_depends_on_its_batch() {
    if let Some(info) = probe_or_skip() {
        check_all(|| Cuda::new(info.clone(), CudaOptions::default()).expect("the device opens"));
    }
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
    let (launched, none) = decode(&info, CudaOptions { graphs: false, kernel_cache: None });
    let (recorded, num_replays) = decode(&info, CudaOptions::default());
    assert_eq!(none, 0);
    // The first step of either shape is launched.
    assert_eq!(num_replays, u64::from(2 * STEPS_PER_SHAPE - 2));
    assert_eq!(recorded, launched);
}
