//! `system_fingerprint`: a short name for everything that decides an answer's bits, so that a client can see when
//! equal requests may answer differently.

use anyhow::Result;
use cpu::Isa;
use model::{ModelFiles, mix64};

use crate::load::Model;
use crate::settings::Settings;

/// Text files of a model that decide what is computed.
const TEXT_FILES: [&str; 5] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];
/// Places of a weight file that are looked at, and bytes at each: enough to tell two fine-tunes apart, and next to
/// no reading.
const NUM_SAMPLES: usize = 64;
const SAMPLE_BYTES: usize = 64;

/// Hashes the program's version, the instruction set, what the model's text files or its GGUF file's header say, and a
/// sample of its weights.
pub(crate) fn of(model: &Model, settings: &Settings) -> Result<String> {
    let mut hash = Hash(0);
    hash.add(env!("CARGO_PKG_VERSION").as_bytes());
    hash.add(format!("{:?} {}", Isa::detect(), settings.dummy_weights).as_bytes());
    for name in TEXT_FILES {
        hash.add(&model.files.read(name)?.unwrap_or_default());
    }
    let suffix = match &model.files {
        ModelFiles::Gguf(gguf) => {
            hash.add(gguf.header());
            ".gguf"
        }
        ModelFiles::Directory(_) | ModelFiles::Embedded(_) => ".safetensors",
    };
    for name in model.files.names_ending_in(suffix) {
        let bytes = model.files.map(&name)?;
        hash.add(&bytes.len().to_le_bytes());
        for sample in 0..NUM_SAMPLES {
            let start = bytes.len().saturating_sub(SAMPLE_BYTES) / NUM_SAMPLES * sample;
            hash.add(&bytes[start..(start + SAMPLE_BYTES).min(bytes.len())]);
        }
    }
    Ok(format!("fp_{:012x}", hash.0 >> 16))
}

/// A running hash; equal inputs only, no adversary.
struct Hash(u64);

impl Hash {
    fn add(&mut self, bytes: &[u8]) {
        self.0 = mix64(self.0 ^ bytes.len() as u64);
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.0 = mix64(self.0 ^ u64::from_le_bytes(word));
        }
    }
}
