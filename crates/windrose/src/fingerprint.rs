//! `system_fingerprint`: a short name for everything that decides an answer's bits, so that a client can see when
//! equal requests may answer differently.

use anyhow::Result;
use cpu::ImageKey;
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
const NUM_SAMPLES: usize = 256;
const SAMPLE_BYTES: usize = 64;

/// Hashes the program's version, the kernels, what the model's text files or its GGUF file's header say, and
/// the format and a sample of its weights.
pub(crate) fn of(model: &Model, settings: &Settings) -> Result<String> {
    let mut hash = Hash(0);
    hash.add(env!("CARGO_PKG_VERSION").as_bytes());
    hash.add(
        format!(
            "{} {} {} {}",
            model.device.kernels(),
            settings.dummy_weights,
            model.device.weights(),
            model.device.kv_cache().name()
        )
        .as_bytes(),
    );
    for name in TEXT_FILES {
        hash.add(&model.files.read(name)?.unwrap_or_default());
    }
    hash.add_weights(&model.files)?;
    Ok(format!("fp_{:012x}", hash.0 >> 16))
}

/// Identifies a model's weights: its configuration, or its GGUF file's header, and a sample of its weight files.
pub(crate) fn of_weights(files: &ModelFiles) -> Result<ImageKey> {
    let config = files.read("config.json")?.unwrap_or_default();
    let mut key = [Hash(0), Hash(1)];
    for hash in &mut key {
        hash.add(&config);
        hash.add_weights(files)?;
    }
    Ok(key.map(|hash| hash.0))
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

    fn add_weights(&mut self, files: &ModelFiles) -> Result<()> {
        let suffix = match files {
            ModelFiles::Gguf(gguf) => {
                self.add(gguf.header());
                ".gguf"
            }
            ModelFiles::Directory(_) | ModelFiles::Embedded(_) => ".safetensors",
        };
        for name in files.names_ending_in(suffix) {
            let bytes = files.map(&name)?;
            self.add(&bytes.len().to_le_bytes());
            for sample in 0..NUM_SAMPLES {
                let start = bytes.len().saturating_sub(SAMPLE_BYTES) / NUM_SAMPLES * sample;
                self.add(&bytes[start..(start + SAMPLE_BYTES).min(bytes.len())]);
            }
        }
        Ok(())
    }
}
