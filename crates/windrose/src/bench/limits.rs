//! What this machine can do at best, measured in the same run as what is compared with it.

use anyhow::Result;
use cpu::{Cpu, MemoryProbe};
use cuda::Cuda;
use serde::Serialize;

use crate::memory;

/// Bytes read to measure the memory: far more than caches hold.
const READ_BYTES: u64 = 1 << 30;
/// The share of the available memory that they may take.
const MEMORY_SHARE: u64 = 8;
/// Attempts, of which the best is the limit: whatever disturbs one makes it slower, never faster.
const ATTEMPTS: usize = 3;

/// The two limits of a machine.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Limits {
    /// Bytes that all threads read from memory per second.
    pub(super) read_bytes_per_s: f64,
    /// Operations per second of bf16 dot products in registers; not measured on a GPU.
    pub(super) dot_flop_per_s: Option<f64>,
}

/// What is measured, apart from the model's own backend, which belongs to its runner.
pub(super) enum Machine {
    /// A team of as many threads as the model's; it sleeps while that one works.
    Cpu(Box<Cpu>),
    Gpu(Box<Cuda>),
}

impl Machine {
    /// Measures while nothing else runs.
    ///
    /// # Errors
    /// If there is no memory to read, or the device failed.
    pub(super) fn limits(&mut self) -> Result<Limits> {
        match self {
            Self::Cpu(cpu) => {
                let num_bytes = READ_BYTES.min(memory::available_bytes() / MEMORY_SHARE);
                let memory = MemoryProbe::new(num_bytes as usize)?;
                let read_bytes_per_s = best(|| cpu.read_bandwidth(&memory));
                Ok(Limits { read_bytes_per_s, dot_flop_per_s: Some(best(|| cpu.dot_peak())) })
            }
            Self::Gpu(cuda) => {
                let num_bytes = READ_BYTES.min(cuda.free_bytes()? / MEMORY_SHARE);
                let read_bytes_per_s = cuda.read_bandwidth(num_bytes as usize)?;
                Ok(Limits { read_bytes_per_s, dot_flop_per_s: None })
            }
        }
    }
}

impl Limits {
    /// The better of both in each.
    pub(super) fn max(self, other: Self) -> Self {
        Self {
            read_bytes_per_s: self.read_bytes_per_s.max(other.read_bytes_per_s),
            dot_flop_per_s: self.dot_flop_per_s.zip(other.dot_flop_per_s).map(|(a, b)| a.max(b)),
        }
    }
}

fn best(mut measure: impl FnMut() -> f64) -> f64 {
    (0..ATTEMPTS).map(|_| measure()).fold(0.0, f64::max)
}
