//! What the memory can deliver: the yardstick of decoding, which reads every active weight once per step.

use std::time::Instant;

use crate::Cpu;
use crate::isa::Kernel;
use crate::simd::Simd;

/// Bytes that one task reads, the order of what a task of a matrix product reads.
const TASK_BYTES: usize = 1 << 18;
/// Words that are folded side by side, enough for several vector registers.
const LANES: usize = 32;

impl Cpu {
    /// Reads `data` once with all threads of the team; bytes per second.
    ///
    /// Only data much larger than the caches, and not all zeros, measures the memory.
    pub fn read_bandwidth(&mut self, data: &[u8]) -> f64 {
        let isa = self.isa;
        let start = Instant::now();
        self.team.run(data.len().div_ceil(TASK_BYTES), |task| {
            let first = task * TASK_BYTES;
            isa.run(Read { data: &data[first..data.len().min(first + TASK_BYTES)] });
        });
        data.len() as f64 / start.elapsed().as_secs_f64()
    }
}

struct Read<'a> {
    data: &'a [u8],
}

impl Kernel for Read<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let mut lanes = [0u64; LANES];
        for chunk in self.data.as_chunks::<{ 8 * LANES }>().0 {
            for (lane, word) in lanes.iter_mut().zip(chunk.as_chunks().0) {
                *lane ^= u64::from_ne_bytes(*word);
            }
        }
        std::hint::black_box(lanes);
    }
}
