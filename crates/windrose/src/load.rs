//! From settings to a model that is ready to run: finds the files, sizes the cache, chooses the backend, loads.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use backend::Backend;
use cpu::{Cpu, CpuOptions, KvFormat, WeightFormat};
use cuda::Cuda;
use model::{
    MixtralRunner, ModelConfig, ModelFiles, ModelRunner, ModelSummary, RunnerOptions, WeightSource,
    WeightType,
};
use tracing::info;

use crate::device::{self, Device};
use crate::inspect::bytes;
use crate::memory;
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
    /// What will run it.
    pub(crate) device: Device,
    /// The format in which its weights will be kept.
    pub(crate) weights: WeightFormat,
    /// The format of its keys and values.
    pub(crate) kv_cache: KvFormat,
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
        let device = Device::choose(settings, &ModelSummary::new(&config))?;
        let (weights, kv_cache) = match &device {
            Device::Cpu => (weight_format(settings, &files, &config)?, kv_format(settings)?),
            Device::Cuda(_) => (WeightFormat::Bf16, KvFormat::Bf16),
        };
        Ok(Self { name, files, config, device, weights, kv_cache })
    }

    /// Loads the weights onto the device.
    pub(crate) fn load(&self, settings: &Settings) -> Result<Box<dyn ModelRunner>> {
        let options = self.runner_options(settings)?;
        match &self.device {
            Device::Cpu => self.load_on_cpu(settings, options),
            Device::Cuda(info) => {
                let backend = Cuda::new(info.clone(), device::cuda_options(settings))?;
                let free = backend.free_bytes()?;
                let granted = || device::gpu_cache_bytes(settings, info, free, &self.config, &options);
                let num_blocks = 1 + self.num_cache_blocks(settings, &options, granted)?;
                self.load_on(backend, settings, RunnerOptions { num_blocks, ..options })
            }
        }
    }

    fn load_on_cpu(&self, settings: &Settings, options: RunnerOptions) -> Result<Box<dyn ModelRunner>> {
        let num_blocks = 1 + self.num_cache_blocks(settings, &options, || Ok(device::cpu_cache_bytes()))?;
        let options = RunnerOptions { num_blocks, ..options };
        let mut backend = Cpu::new(self.cpu_options(settings));
        let file = PackedFile::of(self, settings)?;
        let to_be_written = match file {
            Some(file) if !file.use_in(&mut backend) => Some((file, backend.record())),
            _ => None,
        };
        let runner = self.load_on(backend, settings, options)?;
        if let Some((file, matrices)) = to_be_written {
            file.write(matrices.try_iter());
        }
        Ok(runner)
    }

    fn load_on<B: Backend>(
        &self,
        backend: B,
        settings: &Settings,
        options: RunnerOptions,
    ) -> Result<Box<dyn ModelRunner>> {
        let source = match settings.dummy_seed()? {
            Some(seed) => WeightSource::Dummy { seed },
            None => WeightSource::Checkpoint,
        };
        let summary = ModelSummary::new(&self.config);
        info!(
            model = self.name,
            weights = bytes(summary.weight_bytes(self.weights.bits())),
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
        Ok(Box::new(runner))
    }

    /// How the CPU backend runs it.
    pub(crate) fn cpu_options(&self, settings: &Settings) -> CpuOptions {
        let num_threads = (settings.threads > 0).then_some(settings.threads);
        CpuOptions { num_threads, isa: None, weights: self.weights, kv_cache: self.kv_cache }
    }

    /// What a token takes in the cache.
    pub(crate) fn token_bytes(&self) -> u64 {
        token_bytes(&ModelSummary::new(&self.config), &self.config, self.kv_cache)
    }

    /// The runner's limits, without a cache.
    fn runner_options(&self, settings: &Settings) -> Result<RunnerOptions> {
        let trained_len = self.config.max_position_embeddings;
        let max_model_len = if settings.max_model_len == 0 { trained_len } else { settings.max_model_len };
        ensure!(
            max_model_len <= trained_len,
            "max_model_len is {max_model_len}, and this model was trained for {trained_len} positions"
        );
        for (key, value) in [
            ("block_size", settings.block_size),
            ("max_num_seqs", settings.max_num_seqs),
            ("max_num_batched_tokens", settings.max_num_batched_tokens),
        ] {
            ensure!((1..=1 << 20).contains(&value), "{key} is {value}, expected 1 to {}", 1 << 20);
        }
        ensure!(
            settings.max_num_batched_tokens >= settings.max_num_seqs,
            "max_num_batched_tokens ({}) must be at least max_num_seqs ({}), for one token of each",
            settings.max_num_batched_tokens,
            settings.max_num_seqs
        );
        Ok(RunnerOptions {
            max_model_len,
            max_num_batched_tokens: settings.max_num_batched_tokens,
            max_num_seqs: settings.max_num_seqs,
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

fn kv_format(settings: &Settings) -> Result<KvFormat> {
    let named = KvFormat::ALL.into_iter().find(|format| format.name() == settings.kv_cache);
    named.with_context(|| format!("kv_cache is \"{}\", expected \"bf16\" or \"q8\"", settings.kv_cache))
}

fn weight_format(settings: &Settings, files: &ModelFiles, config: &ModelConfig) -> Result<WeightFormat> {
    if settings.weights == "auto" {
        return Ok(automatic_format(files, &ModelSummary::new(config), memory::available_bytes()));
    }
    let named = WeightFormat::ALL.into_iter().find(|format| format.name() == settings.weights);
    named.with_context(|| {
        format!("weights is \"{}\", expected \"auto\", \"bf16\", \"q8\" or \"q4\"", settings.weights)
    })
}

/// The most precise format in which the weights fit, but none that is wasted on what is stored; the smallest if none
/// fits.
fn automatic_format(files: &ModelFiles, summary: &ModelSummary, available_bytes: u64) -> WeightFormat {
    let stored = match files {
        ModelFiles::Gguf(gguf) => gguf.main_type(),
        ModelFiles::Directory(_) | ModelFiles::Embedded(_) => WeightType::Bf16,
    };
    let precise = match stored {
        WeightType::Bf16 | WeightType::F16 | WeightType::F32 => WeightFormat::Bf16,
        WeightType::Q8_0 | WeightType::Q4K | WeightType::Q5K | WeightType::Q6K => WeightFormat::Q8,
        // A group of 32 with one scale, as ours: it keeps its values.
        WeightType::Q4_0 => WeightFormat::Q4,
    };
    let fits = |format: &WeightFormat| summary.weight_bytes(format.bits()) <= available_bytes;
    let mut candidates = WeightFormat::ALL.into_iter().skip_while(|&format| format != precise);
    candidates.find(fits).unwrap_or(WeightFormat::Q4)
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
