//! Where broken models are made, and what loads them.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use backend::Reference;
use model::{MixtralRunner, ModelConfig, ModelError, ModelFiles, RunnerOptions, WeightSource};

pub(crate) const OPTIONS: RunnerOptions = RunnerOptions {
    max_model_len: 64,
    max_num_batched_tokens: 16,
    max_num_seqs: 4,
    block_size: 4,
    num_blocks: 17,
};

pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
}

/// Loads a model on the reference backend.
pub(crate) fn load(path: &Path, source: WeightSource) -> Result<MixtralRunner<Reference>, ModelError> {
    let files = ModelFiles::open(path)?;
    let config = ModelConfig::load(&files)?;
    MixtralRunner::load(Reference::new(), &files, &config, source, OPTIONS, &mut |_| {})
}

/// A directory for files, removed when dropped.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let unique =
            format!("windrose-broken-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let directory = std::env::temp_dir().join(unique);
        std::fs::create_dir_all(&directory).unwrap();
        Self(directory)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
