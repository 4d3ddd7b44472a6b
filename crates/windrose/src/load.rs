//! From settings to a model that is ready to run: finds the files, sizes the cache, chooses the backend, loads.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use backend::Backend;
use cpu::{Cpu, KvFormat};
use cuda::Cuda;
use model::{MixtralRunner, ModelConfig, ModelFiles, ModelRunner, ModelSummary, RunnerOptions, WeightSource};
use tracing::info;

use crate::device::{self, Device};
use crate::inspect::bytes;
use crate::packed_file::PackedFile;
use crate::progress::Progress;
use crate::settings::Settings;

/// The demo model's name for clients.
const DEMO_NAME: &str = "windrose-demo";

/// A model's files and what they describe.
pub(crate) struct Model {
    pub(crate) name: String,
    pub(crate) files: ModelFiles,
    pub(crate) config: ModelConfig,
    /// What will run it, and in which formats.
    pub(crate) device: Device,
}

/// A model that is ready to run.
pub(crate) struct Loaded {
    pub(crate) runner: Box<dyn ModelRunner>,
    /// Bits that its weights took, which may be fewer than their format has at most.
    pub(crate) weight_bits: f64,
}

impl Model {
    /// Finds the model that the settings name and reads its configuration.
    pub(crate) fn find(settings: &Settings) -> Result<Self> {
        let path = Path::new(&settings.model);
        let (files, default_name) = if settings.model.is_empty() {
            (ModelFiles::Embedded(demo::files()), DEMO_NAME.to_owned())
        } else {
            let files = ModelFiles::open(path)?;
            let name = default_name(path, &files);
            (files, name)
        };
        let config = ModelConfig::load(&files)?;
        let named = !settings.served_model_name.is_empty();
        let name = if named { settings.served_model_name.clone() } else { default_name };
        let device = Device::choose(settings, &files, &config)?;
        Ok(Self { name, files, config, device })
    }

    /// Loads the weights onto the device.
    pub(crate) fn load(&self, settings: &Settings) -> Result<Loaded> {
        let options = self.runner_options(settings)?;
        match &self.device {
            Device::Cpu(formats) => {
                self.load_on_cpu(settings, Cpu::new(device::cpu_options(settings, *formats)), options)
            }
            Device::Cuda { info, formats } => {
                let backend = Cuda::new(info.clone(), device::cuda_options(settings, *formats))?;
                let free = backend.free_bytes()?;
                let granted =
                    || device::gpu_cache_bytes(settings, info, formats.weights, free, &self.config, &options);
                let num_blocks = 1 + self.num_cache_blocks(settings, &options, granted)?;
                self.load_on(backend, settings, RunnerOptions { num_blocks, ..options })
            }
        }
    }

    fn load_on_cpu(&self, settings: &Settings, mut backend: Cpu, options: RunnerOptions) -> Result<Loaded> {
        let num_blocks = 1 + self.num_cache_blocks(settings, &options, || Ok(device::cpu_cache_bytes()))?;
        let options = RunnerOptions { num_blocks, ..options };
        let file = PackedFile::of(self, settings)?;
        let to_be_written = match file {
            Some(file) if !file.use_in(&mut backend) => Some((file, backend.record())),
            _ => None,
        };
        let loaded = self.load_on(backend, settings, options)?;
        if let Some((file, matrices)) = to_be_written {
            file.write(matrices.try_iter());
        }
        Ok(loaded)
    }

    fn load_on<B: Backend>(&self, backend: B, settings: &Settings, options: RunnerOptions) -> Result<Loaded> {
        let source = match settings.dummy_seed()? {
            Some(seed) => WeightSource::Dummy { seed },
            None => WeightSource::Checkpoint,
        };
        let summary = ModelSummary::new(&self.config);
        info!(
            model = self.name,
            weights = bytes(summary.weight_bytes(self.device.weight_bits())),
            cache = bytes(self.token_bytes() * (options.num_blocks * options.block_size) as u64),
            cache_tokens = (options.num_blocks - 1) * options.block_size,
            max_model_len = options.max_model_len,
            "loading"
        );
        let start = Instant::now();
        let mut progress = Progress::new("loading layers", self.config.num_layers);
        let runner = MixtralRunner::load(backend, &self.files, &self.config, source, options, &mut |n| {
            progress.advance_to(n)
        })?;
        info!(
            seconds = format!("{:.3}", start.elapsed().as_secs_f64()),
            backend = runner.describe_backend(),
            "loaded"
        );
        Ok(Loaded { weight_bits: runner.weight_bits(), runner: Box::new(runner) })
    }

    /// What a token takes in the cache.
    pub(crate) fn token_bytes(&self) -> u64 {
        token_bytes(&ModelSummary::new(&self.config), &self.config, self.device.kv_cache())
    }

    /// The runner's limits, without a cache.
    pub(crate) fn runner_options(&self, settings: &Settings) -> Result<RunnerOptions> {
        let trained_len = self.config.max_position_embeddings;
        let max_model_len = if settings.max_model_len == 0 { trained_len } else { settings.max_model_len };
        ensure!(
            max_model_len <= trained_len,
            "max_model_len is {max_model_len}, and this model was trained for {trained_len} positions"
        );
        let chosen = |setting, automatic| if setting == 0 { automatic } else { setting };
        let (automatic_seqs, automatic_tokens) = self.device.batch_sizes();
        let max_num_seqs = chosen(settings.max_num_seqs, automatic_seqs);
        let max_num_batched_tokens =
            chosen(settings.max_num_batched_tokens, automatic_tokens.max(max_num_seqs));
        for (key, value) in [
            ("block_size", settings.block_size),
            ("max_num_seqs", max_num_seqs),
            ("max_num_batched_tokens", max_num_batched_tokens),
        ] {
            ensure!((1..=1 << 20).contains(&value), "{key} is {value}, expected 1 to {}", 1 << 20);
        }
        ensure!(
            max_num_batched_tokens >= max_num_seqs,
            "max_num_batched_tokens ({max_num_batched_tokens}) must be at least max_num_seqs ({max_num_seqs}), for one \
             token of each"
        );
        Ok(RunnerOptions {
            max_model_len,
            max_num_batched_tokens,
            max_num_seqs,
            block_size: settings.block_size,
            num_blocks: 0,
        })
    }

    /// Blocks beside the padding block; `automatic_bytes` is what they may take if no setting says so.
    fn num_cache_blocks(
        &self,
        settings: &Settings,
        options: &RunnerOptions,
        automatic_bytes: impl FnOnce() -> Result<u64>,
    ) -> Result<usize> {
        let block_bytes = self.token_bytes() * options.block_size as u64;
        let blocks_per_sequence = options.max_model_len.div_ceil(options.block_size);
        let wanted = blocks_per_sequence * options.max_num_seqs;
        let granted_bytes = match settings.kv_cache_mib {
            0 => automatic_bytes()?,
            mib => (mib as u64) << 20,
        };
        let granted = usize::try_from(granted_bytes / block_bytes).context("kv_cache_mib is too large")?;
        let num_blocks = if settings.kv_cache_mib == 0 { wanted.min(granted) } else { granted };
        ensure!(
            num_blocks > 0,
            "{} of cache hold not even one block of {} tokens, which takes {}; raise kv_cache_mib",
            bytes(granted_bytes),
            options.block_size,
            bytes(block_bytes)
        );
        Ok(num_blocks)
    }
}

/// What a token takes in the cache.
pub(crate) fn token_bytes(summary: &ModelSummary, config: &ModelConfig, format: KvFormat) -> u64 {
    summary.kv_heads_per_token * format.head_bytes(config.attention.head_dim) as u64
}

/// The name of a model's directory or GGUF file.
fn default_name(path: &Path, files: &ModelFiles) -> String {
    if let ModelFiles::Gguf(gguf) = files {
        return gguf.name().to_owned();
    }
    let directory = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    directory.file_name().map_or("model".into(), |name| name.to_string_lossy().into_owned())
}
