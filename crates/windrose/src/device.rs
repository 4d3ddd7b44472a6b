//! Which device runs the model, and why: a GPU where there is one that can, the processor elsewhere.

use std::path::PathBuf;

use anyhow::{Result, anyhow, bail};
use cpu::Isa;
use cuda::{CudaOptions, DeviceInfo};
use model::{ModelConfig, ModelSummary, RunnerOptions};
use tracing::info;

use crate::inspect::bytes;
use crate::memory;
use crate::settings::Settings;

/// The share of the available memory that an automatically sized cache takes at most on the processor, whose memory
/// belongs to others too.
const AUTOMATIC_CACHE_SHARE: u64 = 4;
/// Bits of a weight on a GPU.
const GPU_WEIGHT_BITS: f64 = 16.0;

/// What runs the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Device {
    Cpu,
    Cuda(DeviceInfo),
}

impl Device {
    /// The device that the settings name; for "auto" a GPU that can do all that they ask, else the processor.
    pub(crate) fn choose(settings: &Settings, summary: &ModelSummary) -> Result<Self> {
        match settings.device.as_str() {
            "cpu" => Ok(Self::Cpu),
            "cuda" => {
                let info = usable_gpu(settings, summary);
                info.map(Self::Cuda).map_err(|reason| anyhow!("device is \"cuda\", but {reason}"))
            }
            "auto" => Ok(match usable_gpu(settings, summary) {
                Ok(info) => Self::Cuda(info),
                Err(reason) => {
                    info!("running on the processor: {reason}");
                    Self::Cpu
                }
            }),
            other => bail!("device is \"{other}\", expected \"auto\", \"cpu\" or \"cuda\""),
        }
    }

    /// What its kernels are called, which decides bits.
    pub(crate) fn kernels(&self) -> String {
        match self {
            Self::Cpu => Isa::detect().name().to_owned(),
            Self::Cuda(info) => info.capability.target(),
        }
    }

    /// Memory for a model and its cache.
    pub(crate) fn available_bytes(&self) -> u64 {
        match self {
            Self::Cpu => memory::available_bytes(),
            Self::Cuda(info) => info.memory_bytes,
        }
    }
}

/// What the settings say of a GPU.
pub(crate) fn cuda_options(settings: &Settings) -> CudaOptions {
    CudaOptions { graphs: settings.cuda_graphs, kernel_cache: kernel_cache(settings) }
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
    free_bytes: u64,
    config: &ModelConfig,
    options: &RunnerOptions,
) -> Result<u64> {
    let utilization = settings.gpu_memory_utilization;
    if !(0.1..=1.0).contains(&utilization) {
        bail!("gpu_memory_utilization is {utilization}, expected 0.1 to 1.0");
    }
    let budget = free_bytes.min((info.memory_bytes as f64 * utilization) as u64);
    let weights = ModelSummary::new(config).weight_bytes(GPU_WEIGHT_BITS);
    let max_tokens = options.max_num_batched_tokens;
    let scratch = cuda::Cuda::scratch_bytes(max_tokens, config.hidden_size, config.route);
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

/// A GPU that can do all that the settings ask, or why there is none.
pub(crate) fn usable_gpu(settings: &Settings, summary: &ModelSummary) -> Result<DeviceInfo, String> {
    let info = cuda::probe().map_err(|reason| reason.to_string())?;
    for (key, format) in [("weights", &settings.weights), ("kv_cache", &settings.kv_cache)] {
        if !matches!(format.as_str(), "auto" | "bf16") {
            return Err(format!("{key} is \"{format}\", and on a GPU it can only be \"bf16\""));
        }
    }
    let needed = summary.weight_bytes(GPU_WEIGHT_BITS);
    if needed > info.memory_bytes {
        let (needed, memory) = (bytes(needed), bytes(info.memory_bytes));
        return Err(format!("the weights take {needed} and {} has {memory}", info.name));
    }
    Ok(info)
}
