//! Broken checkpoints end in one readable error that names the file and the tensor, never in a panic.
//!
//! Every case starts from a sound fixture, breaks one thing and loads it on the reference backend.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use backend::sampling::mix64;
use backend::{Batch, Reference};
use model::{MixtralRunner, ModelError, ModelFiles, WeightSource};
use serde_json::{Value, json};

use crate::support::{Scratch, fixture, load};

/// A private copy of a fixture.
struct Copy(Scratch);

impl Copy {
    fn of(name: &str) -> Self {
        let scratch = Scratch::new();
        for entry in std::fs::read_dir(fixture(name)).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, scratch.path(path.file_name().unwrap().to_str().unwrap())).unwrap();
        }
        Self(scratch)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path(name)
    }

    fn load(&self) -> Result<MixtralRunner<Reference>, ModelError> {
        load(&self.path(""), WeightSource::Checkpoint)
    }

    fn edit_config(&self, edit: impl FnOnce(&mut Value)) {
        let mut config = serde_json::from_slice(&std::fs::read(self.path("config.json")).unwrap()).unwrap();
        edit(&mut config);
        std::fs::write(self.path("config.json"), config.to_string()).unwrap();
    }

    /// Rewrites the header of `model.safetensors`; the data stays.
    fn edit_header(&self, edit: impl FnOnce(&mut BTreeMap<String, Value>)) {
        let bytes = std::fs::read(self.path("model.safetensors")).unwrap();
        let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header = serde_json::from_slice(&bytes[8..8 + header_len]).unwrap();
        edit(&mut header);
        let mut text = serde_json::to_vec(&header).unwrap();
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut out = (text.len() as u64).to_le_bytes().to_vec();
        out.extend(text);
        out.extend(&bytes[8 + header_len..]);
        std::fs::write(self.path("model.safetensors"), out).unwrap();
    }
}

#[track_caller]
fn check(copy: &Copy, expected_words: &[&str]) {
    let Err(error) = copy.load() else { panic!("a broken checkpoint was loaded: {expected_words:?}") };
    let error = error.to_string();
    for words in expected_words {
        assert!(error.contains(words), "{words:?} is not in: {error}");
    }
}

fn tensor_case(edit: impl FnOnce(&mut BTreeMap<String, Value>), expected_words: &[&str]) {
    let copy = Copy::of("mixtral-8x2-gqa");
    copy.edit_header(edit);
    check(&copy, expected_words);
}

const W1: &str = "model.layers.1.block_sparse_moe.experts.3.w1.weight";

#[test]
fn tensors_that_do_not_fit_are_named_with_what_was_expected_and_found() {
    // Renaming keeps the offsets sound, so the file passes and the name is missed.
    tensor_case(
        |header| {
            let tensor = header.remove(W1).unwrap();
            header.insert("somewhere.else".to_owned(), tensor);
        },
        &["model.safetensors", W1, "missing"],
    );
    tensor_case(
        |header| header.get_mut(W1).unwrap()["shape"] = json!([32, 48]),
        &[W1, "[48, 32]", "[32, 48]"],
    );
    tensor_case(
        |header| header.get_mut(W1).unwrap()["dtype"] = json!("I16"),
        &[W1, "BF16, F16 or F32", "I16"],
    );
}

#[test]
fn unsound_files_are_named() {
    // Two tensors over the same bytes.
    tensor_case(
        |header| {
            let offsets = header["model.norm.weight"]["data_offsets"].clone();
            header
                .insert("twin".to_owned(), json!({"dtype": "BF16", "shape": [32], "data_offsets": offsets}));
        },
        &["model.safetensors", "sound"],
    );
    tensor_case(|header| header.get_mut(W1).unwrap()["data_offsets"] = json!([0, 1u64 << 60]), &["sound"]);
    tensor_case(|header| header.get_mut(W1).unwrap()["shape"] = json!([1u64 << 40, 1u64 << 40]), &["sound"]);
    tensor_case(|header| header.get_mut(W1).unwrap()["dtype"] = json!("F7"), &["sound"]);
}

#[test]
fn truncated_files_and_header_bombs_are_refused() {
    for len in [0, 4, 8, 100, 5000, 184_000] {
        let copy = Copy::of("mixtral-8x2-gqa");
        let bytes = std::fs::read(copy.path("model.safetensors")).unwrap();
        std::fs::write(copy.path("model.safetensors"), &bytes[..len]).unwrap();
        check(&copy, &["model.safetensors", "sound"]);
    }
    let copy = Copy::of("mixtral-8x2-gqa");
    let mut bomb = u64::MAX.to_le_bytes().to_vec();
    bomb.extend([b'{'; 64]);
    std::fs::write(copy.path("model.safetensors"), bomb).unwrap();
    check(&copy, &["model.safetensors", "sound"]);
}

#[test]
fn a_tensor_that_nothing_asked_for_is_refused() {
    let copy = Copy::of("mixtral-8x2-gqa");
    copy.edit_config(|config| config["num_hidden_layers"] = json!(1));
    check(&copy, &["model.layers.1.", "unexpected", "1 layers"]);
    let copy = Copy::of("llama-dense-f16");
    copy.edit_config(|config| config["architectures"] = json!(["MixtralForCausalLM"]));
    check(&copy, &["block_sparse_moe", "missing"]);
}

#[test]
fn shards_are_checked() {
    let index = "model.safetensors.index.json";
    let edit_index = |copy: &Copy, edit: &dyn Fn(&mut Value)| {
        let mut value = serde_json::from_slice(&std::fs::read(copy.path(index)).unwrap()).unwrap();
        edit(&mut value);
        std::fs::write(copy.path(index), value.to_string()).unwrap();
    };
    let copy = Copy::of("mixtral-16x3-sharded");
    assert!(copy.load().is_ok());
    edit_index(&copy, &|value| value["weight_map"]["model.norm.weight"] = json!("../../etc/passwd"));
    check(&copy, &[index, "etc/passwd", "own directory"]);

    let copy = Copy::of("mixtral-16x3-sharded");
    edit_index(&copy, &|value| value["weight_map"]["model.norm.weight"] = json!("model-00099.safetensors"));
    check(&copy, &["model-00099.safetensors"]);

    let copy = Copy::of("mixtral-16x3-sharded");
    std::fs::write(copy.path(index), "{}").unwrap();
    check(&copy, &[index, "weight_map"]);
}

#[test]
fn missing_files_say_what_to_do() {
    let copy = Copy::of("mixtral-8x2-gqa");
    std::fs::remove_file(copy.path("model.safetensors")).unwrap();
    check(&copy, &["--dummy-weights"]);
    std::fs::write(copy.path("pytorch_model.bin"), "pickle").unwrap();
    check(&copy, &["pytorch_model.bin", "safetensors"]);
    std::fs::remove_file(copy.path("config.json")).unwrap();
    check(&copy, &["no config.json"]);
    let nowhere = ModelFiles::open(Path::new("/nonexistent/model")).unwrap_err().to_string();
    assert!(nowhere.contains("/nonexistent/model"), "{nowhere}");
}

#[test]
fn random_damage_never_panics() {
    let sound = std::fs::read(fixture("mixtral-8x2-gqa").join("model.safetensors")).unwrap();
    let header_end = 8 + u64::from_le_bytes(sound[..8].try_into().unwrap()) as usize;
    let copy = Copy::of("mixtral-8x2-gqa");
    let (mut loaded, mut refused) = (0, 0);
    for seed in 0..400u64 {
        let mut bytes = sound.clone();
        for i in 0..1 + seed % 3 {
            let at = mix64(seed * 7 + i) as usize % header_end;
            bytes[at] = mix64(seed * 11 + i) as u8;
        }
        std::fs::write(copy.path("model.safetensors"), bytes).unwrap();
        match copy.load() {
            Ok(_) => loaded += 1,
            Err(_) => refused += 1,
        }
    }
    // Damage may fall on padding or metadata; most of it must be noticed.
    assert!(refused > 300, "{loaded} of 400 damaged files were loaded");
}

#[test]
fn dummy_weights_need_only_the_configuration_and_depend_on_the_seed() {
    let copy = Copy::of("mixtral-8x2-gqa");
    std::fs::remove_file(copy.path("model.safetensors")).unwrap();
    let logits = |seed| {
        let mut runner = load(&copy.path(""), WeightSource::Dummy { seed }).unwrap();
        let mut batch = Batch::new();
        batch.push_sequence(&[5, 6, 7], 0, &[1], 4);
        batch.logits_indices = vec![2];
        runner.logits(&batch).unwrap()
    };
    assert_eq!(logits(1), logits(1));
    assert_ne!(logits(1), logits(2));
    assert!(logits(1).iter().all(|x| x.is_finite()));
}
