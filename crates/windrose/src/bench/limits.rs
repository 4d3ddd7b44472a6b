//! What this machine can do at best, measured in the same run as what is compared with it.

use anyhow::Result;
use cpu::{Cpu, MemoryProbe};
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
    /// Operations per second of bf16 dot products in registers.
    pub(super) dot_flop_per_s: f64,
}

impl Limits {
    /// Measures with the team of `cpu`, while nothing else runs.
    ///
    /// # Errors
    /// If there is no memory to read.
    pub(super) fn measure(cpu: &mut Cpu) -> Result<Self> {
        let memory = MemoryProbe::new(READ_BYTES.min(memory::available_bytes() / MEMORY_SHARE) as usize)?;
        let read_bytes_per_s = best(|| cpu.read_bandwidth(&memory));
        Ok(Self { read_bytes_per_s, dot_flop_per_s: best(|| cpu.dot_peak()) })
    }

    /// The better of both in each.
    pub(super) fn max(self, other: Self) -> Self {
        Self {
            read_bytes_per_s: self.read_bytes_per_s.max(other.read_bytes_per_s),
            dot_flop_per_s: self.dot_flop_per_s.max(other.dot_flop_per_s),
        }
    }
}

fn best(mut measure: impl FnMut() -> f64) -> f64 {
    (0..ATTEMPTS).map(|_| measure()).fold(0.0, f64::max)
}
