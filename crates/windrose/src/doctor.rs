//! `windrose doctor`: what this machine has, what would run the model on it, and why nothing better does.

use std::fmt::{Display, Write};
use std::fs;
use std::path::Path;

use anyhow::Result;
use cpu::Isa;
use cuda::{DeviceInfo, KernelOrigin};
use model::ModelSummary;

use crate::device::{Device, kernel_cache, usable_gpu};
use crate::inspect::bytes;
use crate::load::Model;
use crate::memory;
use crate::settings::Settings;

/// Prints the page; what keeps the settings from running is its last line, and the error.
pub(crate) fn run(settings: &Settings) -> Result<()> {
    print!("{}", machine(settings));
    let model = Model::find(settings)?;
    let summary = ModelSummary::new(&model.config);
    let mut page = String::new();
    let weights = bytes(summary.weight_bytes(model.device.weight_bits()));
    row(&mut page, "model", format!("{}, {weights} of {} weights", model.name, model.device.weights()));
    let token = bytes(model.token_bytes());
    row(&mut page, "cache per token", format!("{token} in {}", model.device.kv_cache().name()));
    let runs_on = match (&model.device, usable_gpu(settings, &summary)) {
        (Device::Cuda { info, .. }, _) => info.name.clone(),
        (Device::Cpu(_), Err(reason)) => format!("the processor: {reason}"),
        (Device::Cpu(_), Ok(_)) => "the processor, as the settings say".to_owned(),
    };
    row(&mut page, "runs on", runs_on);
    print!("{page}");
    Ok(())
}

fn machine(settings: &Settings) -> String {
    let mut page = String::new();
    row(&mut page, "windrose", env!("CARGO_PKG_VERSION"));
    let isas = Isa::ALL.into_iter().filter(|isa| isa.is_available()).map(Isa::name).collect::<Vec<_>>();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    row(&mut page, "processor", format!("{threads} threads; kernels {}", isas.join(", ")));
    row(&mut page, "memory", format!("{} available", bytes(memory::available_bytes())));
    match cuda::driver_version() {
        Ok((major, minor)) => row(&mut page, "NVIDIA driver", format!("for CUDA {major}.{minor}")),
        Err(reason) => row(&mut page, "NVIDIA driver", reason),
    }
    for (ordinal, device) in cuda::devices().unwrap_or_default().into_iter().enumerate() {
        row(&mut page, &format!("GPU {ordinal}"), device.map_or_else(|reason| reason.to_string(), gpu));
    }
    let targets = cuda::embedded_targets();
    let targets = if targets.is_empty() { "none".to_owned() } else { targets.join(", ") };
    row(&mut page, "kernels in the binary", targets);
    let nvrtc = cuda::nvrtc_version();
    let nvrtc = nvrtc.map_or("not found".to_owned(), |(major, minor)| format!("{major}.{minor}"));
    row(&mut page, "NVRTC", nvrtc);
    let cache = kernel_cache(settings);
    row(&mut page, "kernel cache", cache.map_or("off".to_owned(), |directory| cache_page(&directory)));
    page
}

fn row(page: &mut String, label: &str, value: impl Display) {
    writeln!(page, "  {label:<22}{value}").expect("writing to a string");
}

fn gpu(info: DeviceInfo) -> String {
    let DeviceInfo { name, capability, memory_bytes, kernels, .. } = info;
    let origin = match kernels {
        KernelOrigin::Embedded => "in the binary".to_owned(),
        KernelOrigin::Nvrtc { major, minor } => format!("from NVRTC {major}.{minor}"),
    };
    let (generation, target) = (format!("{}.{}", capability.major, capability.minor), capability.target());
    format!("{name}, {}, compute capability {generation}; kernels for {target} {origin}", bytes(memory_bytes))
}

fn cache_page(directory: &Path) -> String {
    let files = fs::read_dir(directory).into_iter().flatten().flatten();
    let num_files =
        files.filter(|file| file.path().extension().is_some_and(|found| found == "cubin")).count();
    format!("{}, {num_files} files", directory.display())
}
