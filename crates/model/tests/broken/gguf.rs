//! Broken GGUF files end in one readable error that names the file and what is wrong, never in a panic, and never in
//! memory for what a number claims and the file does not have.
//!
//! Small files are written here from scratch, with one thing wrong in each; real ones are cut and damaged.

use std::path::Path;

use backend::Reference;
use backend::sampling::mix64;
use model::{Gguf, MixtralRunner, ModelError, WeightSource};

use crate::support::{self, Scratch, fixture};

/// Numbers of value types.
const U8: u32 = 0;
const U32: u32 = 4;
const F32: u32 = 6;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

fn sound(name: &str) -> Vec<u8> {
    std::fs::read(fixture("gguf").join(name)).unwrap()
}

fn load(path: &Path) -> Result<MixtralRunner<Reference>, ModelError> {
    support::load(path, WeightSource::Checkpoint)
}

#[track_caller]
fn check(bytes: &[u8], expected_words: &[&str]) {
    let scratch = Scratch::new();
    let Err(error) = load(&scratch.write("model.gguf", bytes)) else {
        panic!("a broken file was loaded: {expected_words:?}")
    };
    let error = error.to_string();
    for words in expected_words.iter().chain(&["model.gguf"]) {
        assert!(error.contains(words), "{words:?} is not in: {error}");
    }
}

/// A file in the making.
#[derive(Clone)]
struct Writer {
    keys: Vec<(String, Vec<u8>)>,
    tensors: Vec<Vec<u8>>,
    data: Vec<u8>,
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A value of a type, encoded.
fn value(kind: u32, bytes: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], bytes].concat()
}

impl Writer {
    /// A tiny dense model's keys, and no tensor.
    fn new() -> Self {
        let mut writer = Self { keys: Vec::new(), tensors: Vec::new(), data: Vec::new() };
        writer.key("general.architecture", value(STRING, &string("llama")));
        for (key, size) in [
            ("context_length", 64u32),
            ("embedding_length", 8),
            ("block_count", 1),
            ("feed_forward_length", 4),
            ("attention.head_count", 2),
            ("vocab_size", 3),
        ] {
            writer.key(&format!("llama.{key}"), value(U32, &size.to_le_bytes()));
        }
        let eps = value(F32, &1e-5f32.to_le_bytes());
        writer.key("llama.attention.layer_norm_rms_epsilon", eps);
        writer
    }

    /// Sets a key.
    fn key(&mut self, key: &str, value: Vec<u8>) {
        self.keys.retain(|(other, _)| other != key);
        self.keys.push((key.to_owned(), value));
    }

    fn with(mut self, key: &str, value: Vec<u8>) -> Self {
        self.key(key, value);
        self
    }

    fn with_size(self, key: &str, size: u32) -> Self {
        self.with(key, value(U32, &size.to_le_bytes()))
    }

    /// Adds a tensor's description, and data up to its end if that is small.
    fn tensor(mut self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
        let dims_bytes: Vec<u8> = dims.iter().flat_map(|dim| dim.to_le_bytes()).collect();
        let entry = [
            &string(name)[..],
            &(dims.len() as u32).to_le_bytes(),
            &dims_bytes,
            &kind.to_le_bytes(),
            &offset.to_le_bytes(),
        ];
        self.tensors.push(entry.concat());
        self.data.resize(4096, 0);
        self
    }

    fn finish(&self) -> Vec<u8> {
        let counts = [self.tensors.len() as u64, self.keys.len() as u64];
        let mut bytes = [&b"GGUF"[..], &3u32.to_le_bytes()].concat();
        bytes.extend(counts.iter().flat_map(|count| count.to_le_bytes()));
        for (key, value) in &self.keys {
            bytes.extend(string(key));
            bytes.extend(value);
        }
        bytes.extend(self.tensors.concat());
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend(&self.data);
        bytes
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let sound = sound("llama-dense-f16.gguf");
    let scratch = Scratch::new();
    let header_len = Gguf::open(&scratch.write("model.gguf", &sound)).unwrap().header().len();
    for len in 0..=header_len {
        let error = load(&scratch.write("model.gguf", &sound[..len])).err();
        let error = error.unwrap_or_else(|| panic!("loaded {len} bytes of {}", sound.len())).to_string();
        assert!(error.contains("model.gguf") && error.contains("truncated"), "{len} bytes: {error}");
    }
    check(&sound[..10], &["sound GGUF", "truncated", "number of tensors"]);
    check(&sound[..sound.len() - 4096], &["tensor", "truncated"]);
}

#[test]
fn false_heads_are_refused() {
    let head = |version: u32, num_tensors: u64, num_keys: u64| {
        let counts = [num_tensors.to_le_bytes(), num_keys.to_le_bytes()].concat();
        [&b"GGUF"[..], &version.to_le_bytes(), &counts].concat()
    };
    check(b"not a model of this kind", &["does not begin with \"GGUF\""]);
    check(&head(1, 0, 0), &["version is 1", "2 or 3"]);
    check(&head(3u32.swap_bytes(), 0, 0), &["big-endian"]);
    check(&head(3, 0, u64::MAX), &["a key", "truncated"]);
    check(&head(3, u64::MAX, 0), &["a tensor's name", "truncated"]);
    check(&head(3, 0, 0), &["general.architecture"]);
}

#[test]
fn absurd_values_are_refused_by_key() {
    let long = |kind: u32, len: u64| value(ARRAY, &[&kind.to_le_bytes()[..], &len.to_le_bytes()].concat());
    let with = |bytes: Vec<u8>| Writer::new().with("a.key", bytes).finish();
    check(&with(value(STRING, &u64::MAX.to_le_bytes())), &["a.key", "truncated"]);
    check(&with(value(77, &[])), &["a.key", "type 77"]);
    for kind in [U8, F32, STRING, ARRAY] {
        check(&with(long(kind, u64::MAX)), &["a.key"]);
        check(&with(long(kind, 1 << 40)), &["a.key"]);
    }
    check(&with(long(99, 1)), &["a.key", "type 99"]);
    let nested = (0..6).fold(long(U8, 0), |inner, _| {
        value(ARRAY, &[&ARRAY.to_le_bytes()[..], &1u64.to_le_bytes(), &inner[4..]].concat())
    });
    check(&with(nested), &["a.key", "deeper"]);

    let mut twice = Writer::new();
    twice.keys.push(twice.keys[0].clone());
    check(&twice.finish(), &["general.architecture", "twice"]);
    let key_bomb = [&b"GGUF"[..], &3u32.to_le_bytes(), &0u64.to_le_bytes(), &1u64.to_le_bytes()].concat();
    check(&[key_bomb, (1u64 << 62).to_le_bytes().to_vec()].concat(), &["a key", "truncated"]);
}

#[test]
fn unsupported_mathematics_is_refused_by_name() {
    let text = |text: &str| value(STRING, &string(text));
    let check_key = |key: &str, value: Vec<u8>, words: &[&str]| {
        check(&Writer::new().with(key, value).finish(), words);
    };
    check_key("general.architecture", text("qwen2"), &["qwen2", "Mixtral"]);
    check_key("llama.rope.scaling.type", text("yarn"), &["rope scaling", "yarn"]);
    check_key("llama.rope.scaling.factor", value(F32, &4f32.to_le_bytes()), &["rope.scaling.factor is 4"]);
    check_key("llama.expert_gating_func", value(U32, &2u32.to_le_bytes()), &["expert_gating_func is 2"]);
    check_key("llama.attention.novelty", text("?"), &["llama.attention.novelty", "not known"]);
    check_key("llama.block_count", text("many"), &["llama.block_count", "\"many\"", "whole number"]);
    check_key("llama.attention.head_count", value(U32, &0u32.to_le_bytes()), &["num_attention_heads is 0"]);
    check_key("llama.attention.key_length", value(U32, &5u32.to_le_bytes()), &["head_dim is 5", "even"]);
    check_key("llama.rope.dimension_count", value(U32, &2u32.to_le_bytes()), &["dimension_count is 2", "4"]);
    check_key("llama.expert_count", value(U32, &8u32.to_le_bytes()), &["llama.expert_used_count is missing"]);
    let scaled = Writer::new().tensor("rope_freqs.weight", &[2], 0, 0);
    check(&scaled.finish(), &["rope_freqs.weight", "unscaled"]);
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let with =
        |name: &str, dims: &[u64], kind, offset| Writer::new().tensor(name, dims, kind, offset).finish();
    check(&with("t", &[], 0, 0), &["tensor t", "0 dimensions"]);
    check(&with("t", &[1; 5], 0, 0), &["tensor t", "5 dimensions"]);
    check(&with("t", &[8, 0], 0, 0), &["tensor t", "[8, 0]"]);
    check(&with("t", &[1 << 40, 1 << 40], 0, 0), &["tensor t", "no file can hold"]);
    check(&with("t", &[1 << 61, 2], 0, 0), &["tensor t", "no file can hold"]);
    check(&with("t", &[1 << 30], 0, 0), &["tensor t", "truncated"]);
    check(&with("t", &[8], 0, u64::MAX - 31), &["tensor t", "truncated"]);
    check(&with("t", &[8], 0, 8), &["tensor t", "multiple of the alignment 32"]);
    check(&with("t", &[48], 8, 0), &["tensor t", "48 elements", "blocks of 32"]);
    check(&with("t", &[256], 11, 0), &["tensor t", "Q3_K", "Q4_K_M"]);
    check(&with("t", &[256], 4711, 0), &["tensor t", "4711 (unknown)"]);
    check(&with("t", &[8], 0, 0), &["token_embd.weight", "missing"]);
    check(&with("token_embd.weight", &[4, 3], 0, 0), &["token_embd.weight", "[3, 8]", "[3, 4]"]);

    let overlapping = Writer::new().tensor("a", &[16], 0, 0).tensor("b", &[16], 0, 32);
    check(&overlapping.finish(), &["tensor b", "overlaps", "a"]);
    let twice = Writer::new().tensor("a", &[8], 0, 0).tensor("a", &[8], 0, 32);
    check(&twice.finish(), &["tensor a", "twice"]);
    let unaligned = Writer::new().with_size("general.alignment", 24);
    check(&unaligned.finish(), &["general.alignment is 24", "power of two"]);
    let experts = Writer::new().with_size("llama.expert_count", 2).with_size("llama.expert_used_count", 1);
    let three = experts.tensor("blk.0.ffn_up_exps.weight", &[8, 4, 3], 0, 0);
    check(&three.finish(), &["ffn_up_exps", "[2, rows, cols]", "[3, 4, 8]"]);
}

#[test]
fn a_tensor_that_nothing_asked_for_is_refused() {
    let sound = sound("llama-dense-f16.gguf");
    let replace = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = sound.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        [&sound[..at], to.as_bytes(), &sound[at + from.len()..]].concat()
    };
    check(&replace("blk.1.attn_q.weight", "blk.1.attn_z.weight"), &["blk.1.attn_q.weight", "missing"]);
    check(&replace("blk.0.ffn_norm.weight", "blk.0.ffn_nrom.weight"), &["blk.0.ffn_norm.weight", "missing"]);
    // A layer of which the configuration knows nothing.
    let key = sound.windows(17).position(|window| window == b"llama.block_count").unwrap();
    let mut fewer = sound.clone();
    fewer[key + 17 + 4] = 1;
    check(&fewer, &["blk.1.", "unexpected", "1 layers"]);
}

#[test]
fn sets_of_files_are_checked() {
    let name = |number: u32| format!("model-{number:05}-of-00003.gguf");
    let shard = |number: u32| sound(&format!("mixtral-16x3-sharded-{number:05}-of-00003.gguf"));
    let set = || {
        let scratch = Scratch::new();
        let paths = [1, 2, 3].map(|number| scratch.write(&name(number), &shard(number)));
        (scratch, paths)
    };
    let refused = |path: &Path| load(path).err().expect("a broken set must be refused").to_string();
    let (_scratch, [first, second, _]) = set();
    assert!(load(&first).is_ok() && load(&second).is_ok(), "any file names the set");

    let (_scratch, [first, second, _]) = set();
    std::fs::remove_file(&second).unwrap();
    let error = refused(&first);
    assert!(error.contains(&name(2)), "{error}");

    let (scratch, [first, ..]) = set();
    scratch.write(&name(2), &shard(3));
    let error = refused(&first);
    assert!(error.contains(&name(2)) && error.contains("split.no"), "{error}");
    scratch.write(&name(2), &sound("llama-dense-f16.gguf"));
    let error = refused(&first);
    assert!(error.contains(&name(2)) && error.contains("split.no"), "{error}");

    let renamed = scratch.write("renamed.gguf", &shard(1));
    let error = refused(&renamed);
    assert!(error.contains("-00001-of-00003.gguf"), "{error}");
}

#[test]
fn random_damage_never_panics() {
    let sound = sound("mixtral-4x1-mha-f32.gguf");
    let scratch = Scratch::new();
    let (mut loaded, mut refused) = (0, 0);
    for seed in 0..400u64 {
        let mut bytes = sound.clone();
        for i in 0..1 + seed % 3 {
            let at = mix64(seed * 7 + i) as usize % 4000;
            bytes[at] = mix64(seed * 11 + i) as u8;
        }
        match load(&scratch.write("model.gguf", &bytes)) {
            Ok(_) => loaded += 1,
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 200, "{loaded} of 400 damaged files were loaded");
}
