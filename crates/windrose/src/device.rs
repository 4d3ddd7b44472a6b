//! Which device runs the model, in which formats, and why: a GPU where there is one that can, the processor elsewhere.

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail, ensure};
use cpu::{CpuOptions, Isa, KvFormat, WeightFormat, WeightFormats};
use cuda::{Cuda, CudaOptions, DeviceInfo, KvFormat as GpuKvFormat, WeightFormat as GpuWeights};
use model::{ModelConfig, ModelFiles, ModelSummary, RunnerOptions, WeightType};
use tracing::info;

use crate::inspect::bytes;
use crate::memory;
use crate::settings::Settings;

/// The share of the available memory that an automatically sized cache takes at most on the processor, whose memory
/// belongs to others too.
const AUTOMATIC_CACHE_SHARE: u64 = 4;

/// What runs the model, and in which formats.
#[derive(Debug, Clone)]
pub(crate) enum Device {
    Cpu(CpuFormats),
    Cuda { info: DeviceInfo, formats: GpuFormats },
}

/// What the processor keeps weights, and keys and values, in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CpuFormats {
    pub(crate) weights: WeightFormats,
    /// Bits of a weight on average, nearly: what is stacked with a finer matrix takes as many as that.
    weight_bits: f64,
    pub(crate) kv_cache: KvFormat,
}

/// The same of a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GpuFormats {
    pub(crate) weights: GpuWeights,
    pub(crate) kv_cache: GpuKvFormat,
}

impl Device {
    /// The device that the settings name; for "auto" a GPU that can do all that they ask, else the processor.
    pub(crate) fn choose(settings: &Settings, files: &ModelFiles, config: &ModelConfig) -> Result<Self> {
        let summary = ModelSummary::new(config);
        let gpu = || usable_gpu(settings, &summary).map(|(info, formats)| Self::Cuda { info, formats });
        match settings.device.as_str() {
            "cpu" => Ok(Self::Cpu(CpuFormats::choose(settings, files, &summary)?)),
            "cuda" => gpu().map_err(|reason| anyhow!("device is \"cuda\", but {reason}")),
            "auto" => gpu().or_else(|reason| {
                ensure!(settings.weights != "fp8", "weights is \"fp8\", which needs a GPU, but {reason}");
                info!("running on the processor: {reason}");
                Ok(Self::Cpu(CpuFormats::choose(settings, files, &summary)?))
            }),
            other => bail!("device is \"{other}\", expected \"auto\", \"cpu\" or \"cuda\""),
        }
    }

    /// What its kernels are called, which decides bits.
    pub(crate) fn kernels(&self) -> String {
        match self {
            Self::Cpu(_) => Isa::detect().name().to_owned(),
            Self::Cuda { info, .. } => info.capability.target(),
        }
    }

    /// What the format of its weights is called, mostly as in the settings.
    pub(crate) fn weights(&self) -> &'static str {
        match self {
            Self::Cpu(formats) => formats.weights.name(),
            Self::Cuda { formats, .. } => formats.weights.name(),
        }
    }

    /// Bits that a weight takes on it.
    pub(crate) fn weight_bits(&self) -> f64 {
        match self {
            Self::Cpu(formats) => formats.weight_bits,
            Self::Cuda { formats, .. } => formats.weights.bits(),
        }
    }

    /// The format of its keys and values, as the settings call it: a GPU's of 8 bits takes as much room.
    pub(crate) fn kv_cache(&self) -> KvFormat {
        match self {
            Self::Cpu(formats) => formats.kv_cache,
            Self::Cuda { formats, .. } => match formats.kv_cache {
                GpuKvFormat::Bf16 => KvFormat::Bf16,
                GpuKvFormat::E4m3 => KvFormat::Q8,
            },
        }
    }

    /// Sequences and tokens of a step, if the settings leave that open: what keeps it busy for some tens of
    /// milliseconds, and weights in use.
    pub(crate) fn batch_sizes(&self) -> (usize, usize) {
        match self {
            Self::Cpu(_) => (64, 512),
            Self::Cuda { .. } => (256, 4096),
        }
    }

    /// Memory for a model and its cache.
    pub(crate) fn available_bytes(&self) -> u64 {
        match self {
            Self::Cpu(_) => memory::available_bytes(),
            Self::Cuda { info, .. } => info.memory_bytes,
        }
    }
}

impl CpuFormats {
    fn choose(settings: &Settings, files: &ModelFiles, summary: &ModelSummary) -> Result<Self> {
        let (weights, kv_cache) = (&settings.weights, &settings.kv_cache);
        let named = WeightFormat::ALL.into_iter().find(|format| format.name() == weights);
        let (weights, weight_bits) = match named {
            Some(format) => (format.into(), format.bits()),
            None if weights == "auto" => automatic_formats(files, summary, memory::available_bytes()),
            None => bail!(
                "weights is \"{weights}\", expected \"auto\", \"bf16\", \"q8\" or \"q4\", or \"fp8\" on a GPU"
            ),
        };
        let kv_cache = named_kv_format(kv_cache).with_context(|| unknown_kv_format(kv_cache))?;
        Ok(Self { weights, weight_bits, kv_cache })
    }
}

fn named_kv_format(name: &str) -> Option<KvFormat> {
    KvFormat::ALL.into_iter().find(|format| format.name() == name)
}

fn unknown_kv_format(name: &str) -> String {
    format!("kv_cache is \"{name}\", expected \"bf16\" or \"q8\"")
}

/// What the settings say of the processor.
pub(crate) fn cpu_options(settings: &Settings, formats: CpuFormats) -> CpuOptions {
    let num_threads = (settings.threads > 0).then_some(settings.threads);
    CpuOptions { num_threads, isa: None, weights: formats.weights, kv_cache: formats.kv_cache }
}

/// What the settings say of a GPU.
pub(crate) fn cuda_options(settings: &Settings, formats: GpuFormats) -> CudaOptions {
    CudaOptions {
        weights: formats.weights,
        kv_cache: formats.kv_cache,
        graphs: settings.cuda_graphs,
        dependent_launches: settings.cuda_dependent_launches,
        kernel_cache: kernel_cache(settings),
    }
}

/// The directory of compiled kernels, if they are kept.
pub(crate) fn kernel_cache(settings: &Settings) -> Option<PathBuf> {
    match settings.kernel_cache_dir.as_str() {
        "off" => None,
        "" => user_cache().map(|cache| cache.join("windrose/kernels")),
        directory => Some(directory.into()),
    }
}

/// Where the owner of the process keeps what can be made again; nowhere for one without a home.
fn user_cache() -> Option<PathBuf> {
    let directory = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    directory("XDG_CACHE_HOME").or_else(|| Some(directory("HOME")?.join(".cache")))
}

/// What an automatically sized cache may take on the processor.
pub(crate) fn cpu_cache_bytes() -> u64 {
    memory::available_bytes() / AUTOMATIC_CACHE_SHARE
}

/// What is left for the cache on a GPU with `free_bytes` of memory free, beside weights and workspace.
pub(crate) fn gpu_cache_bytes(
    settings: &Settings,
    info: &DeviceInfo,
    weights: GpuWeights,
    free_bytes: u64,
    config: &ModelConfig,
    options: &RunnerOptions,
) -> Result<u64> {
    let utilization = settings.gpu_memory_utilization;
    if !(0.1..=1.0).contains(&utilization) {
        bail!("gpu_memory_utilization is {utilization}, expected 0.1 to 1.0");
    }
    let budget = free_bytes.min((info.memory_bytes as f64 * utilization) as u64);
    let scratch = Cuda::scratch_bytes(
        weights,
        options.max_num_batched_tokens,
        config.hidden_size,
        config.ffn_size,
        config.route,
    );
    let weights = ModelSummary::new(config).weight_bytes(weights.bits());
    let workspace = options.workspace_bytes(config) + scratch;
    info!(
        budget = bytes(budget),
        weights = bytes(weights),
        workspace = bytes(workspace),
        "{} has {} free",
        info.name,
        bytes(free_bytes)
    );
    budget.checked_sub(weights + workspace).ok_or_else(|| {
        anyhow!(
            "weights ({}) and workspace ({}) do not fit in {} of {}: raise gpu_memory_utilization, end what else uses \
             the GPU, or run on device \"cpu\"",
            bytes(weights),
            bytes(workspace),
            bytes(budget),
            info.name
        )
    })
}

/// The most precise formats in which the weights fit, but none that is wasted on what is stored, or the smallest if none
/// fits; and the bits that a weight takes in them on average, nearly.
fn automatic_formats(
    files: &ModelFiles,
    summary: &ModelSummary,
    available_bytes: u64,
) -> (WeightFormats, f64) {
    let stored = match files {
        ModelFiles::Gguf(gguf) => gguf.product_types(),
        ModelFiles::Directory(_) | ModelFiles::Embedded(_) => HashMap::from([(WeightType::Bf16, 1)]),
    };
    let mut as_stored =
        stored.iter().map(|(&stored, &weights)| (WeightFormat::keeping(stored), weights as f64));
    // A file without matrices is refused when they are looked for.
    let num_weights = as_stored.clone().map(|(_, weights)| weights).sum::<f64>().max(1.0);
    let bits = as_stored.clone().map(|(format, weights)| format.bits() * weights).sum::<f64>() / num_weights;
    let fits = |bits| summary.weight_bytes(bits) <= available_bytes;
    if fits(bits) {
        let (first, _) = as_stored.next().unwrap_or_default();
        let is_one = as_stored.all(|(format, _)| format == first);
        return (if is_one { first.into() } else { WeightFormats::AsStored }, bits);
    }
    let mut smaller = WeightFormat::ALL.into_iter().filter(|format| format.bits() < bits);
    let format = smaller.find(|format| fits(format.bits())).unwrap_or(WeightFormat::Q4);
    (format.into(), format.bits())
}

/// A GPU that can do all that the settings ask, or why there is none.
pub(crate) fn usable_gpu(
    settings: &Settings,
    summary: &ModelSummary,
) -> Result<(DeviceInfo, GpuFormats), String> {
    let info = cuda::probe().map_err(|reason| reason.to_string())?;
    let kv_cache = match named_kv_format(&settings.kv_cache) {
        Some(KvFormat::Bf16) => GpuKvFormat::Bf16,
        Some(KvFormat::Q8) if info.capability.has_e4m3() => GpuKvFormat::E4m3,
        Some(KvFormat::Q8) => {
            return Err(format!(
                "kv_cache is \"q8\", which on a GPU is fp8, and {} is older than that: it has \"bf16\"",
                info.name
            ));
        }
        None => return Err(unknown_kv_format(&settings.kv_cache)),
    };
    let formats = match settings.weights.as_str() {
        "auto" => &[GpuWeights::Bf16, GpuWeights::E4m3][..],
        "bf16" => &[GpuWeights::Bf16],
        "fp8" => &[GpuWeights::E4m3],
        other => return Err(format!("weights is \"{other}\", and a GPU has \"bf16\" and \"fp8\"")),
    };
    let mut formats =
        formats.iter().filter(|&&format| format == GpuWeights::Bf16 || info.capability.has_e4m3());
    let least_bytes = formats.clone().map(|format| summary.weight_bytes(format.bits())).min();
    let Some(least_bytes) = least_bytes else {
        return Err(format!("weights is \"fp8\", which {} does not multiply", info.name));
    };
    match formats.find(|format| summary.weight_bytes(format.bits()) <= info.memory_bytes) {
        Some(&weights) => Ok((info, GpuFormats { weights, kv_cache })),
        None => {
            let memory = bytes(info.memory_bytes);
            Err(format!("the weights take {} and {} has {memory}", bytes(least_bytes), info.name))
        }
    }
}
