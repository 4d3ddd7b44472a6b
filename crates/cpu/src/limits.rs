//! What the machine can deliver: the memory's read bandwidth is the yardstick of decoding, which reads every active
//! weight once per step; its dot products per second are the yardstick of prefill.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use backend::BackendError;
use half::bf16;

use crate::Cpu;
use crate::isa::Kernel;
use crate::simd::{LANE_ROWS, PAIR, Pair, QUAD, RowPairs, Simd, TILE_TOKENS, TileUse, Tiles};
use crate::tensor::Buffer;

/// Bytes that one task reads, the order of what a task of a matrix product reads.
const TASK_BYTES: usize = 1 << 18;
/// Sums that are read into side by side.
const READ_CHAINS: usize = 4;

/// Steps that each accumulator of one task takes: some tens of microseconds.
const DOT_STEPS: usize = 1 << 14;
/// Tasks for each thread, so that one that the system slows down takes fewer.
const DOT_TASKS_PER_THREAD: usize = 64;

/// Memory to be read, of the kind in which weights are kept: large pages where the system has them.
pub struct MemoryProbe(Buffer<u8>);

impl MemoryProbe {
    /// Fills so many bytes; only many more than the caches hold measure the memory.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if there is no room.
    pub fn new(num_bytes: usize) -> Result<Self, BackendError> {
        let mut data = Buffer::zeroed("memory to be read", num_bytes)?;
        data.prefer_huge_pages();
        // Zeros might be one page of the system's, mapped many times.
        data.fill(0x5a);
        Ok(Self(data))
    }
}

impl Cpu {
    /// Reads memory once with all threads of the team; bytes per second.
    pub fn read_bandwidth(&mut self, MemoryProbe(data): &MemoryProbe) -> f64 {
        let isa = self.isa;
        let start = Instant::now();
        self.team.run(data.len().div_ceil(TASK_BYTES), |task| {
            let first = task * TASK_BYTES;
            isa.run(Read { data: &data[first..data.len().min(first + TASK_BYTES)] });
        });
        data.len() as f64 / start.elapsed().as_secs_f64()
    }

    /// Computes dot products in registers with all threads of the team, of bf16 values or, if weights are quantised, of
    /// 8-bit integers; operations per second, where a multiplication and its addition are two.
    ///
    /// Nothing is loaded, unpacked or scaled, so it bounds every matrix product on this instruction set. It takes
    /// milliseconds; the best of several calls is the limit of a machine whose clock changes or that is shared.
    pub fn dot_peak(&mut self) -> f64 {
        let (isa, integers) = (self.isa, self.weights.is_quantised());
        let num_tasks = DOT_TASKS_PER_THREAD * self.team.num_threads();
        let operations = AtomicU64::new(0);
        let start = Instant::now();
        self.team.run(num_tasks, |_| isa.run(Dot { integers, operations: &operations }));
        operations.into_inner() as f64 / start.elapsed().as_secs_f64()
    }
}

struct Read<'a> {
    data: &'a [u8],
}

impl Kernel for Read<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mut sums = [simd.ints(0); READ_CHAINS];
        for quads in self.data.as_chunks().0.as_chunks::<READ_CHAINS>().0 {
            for (sum, quads) in sums.iter_mut().zip(quads) {
                *sum = simd.dot_quads(*sum, simd.bytes(quads), 0x0101_0101);
            }
        }
        black_box(sums);
    }
}

struct Dot<'a> {
    integers: bool,
    /// Gets what was computed added.
    operations: &'a AtomicU64,
}

impl Kernel for Dot<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let purpose = if self.integers { TileUse::Quads } else { TileUse::Pairs };
        if let Some(tiles) = simd.tiles(purpose, TILE_TOKENS) {
            let operations: usize = (0..DOT_STEPS).map(|_| tiles.multiply()).sum();
            self.operations.fetch_add(operations as u64, Ordering::Relaxed);
            return;
        }
        // Enough chains to hide the latency of two dependent multiply-adds on all ports, and few enough for the
        // registers: an instruction set with larger tiles has more of both.
        let operations = match (self.integers, S::PAIR_TOKENS) {
            (false, 8) => walk_pairs::<S, 16>(simd),
            (false, _) => walk_pairs::<S, 5>(simd),
            (true, 8) => walk_quads::<S, 16>(simd),
            (true, _) if S::QUAD_HALVES == 1 => walk_quads::<S, 6>(simd),
            (true, _) => walk_quads::<S, 5>(simd),
        };
        self.operations.fetch_add(operations as u64, Ordering::Relaxed);
    }
}

/// Walks `CHAINS` sums of rows side by side; operations.
#[inline(always)]
fn walk_pairs<S: Simd, const CHAINS: usize>(simd: S) -> usize {
    let (w, x) = black_box((RowPairs::default(), Pair::default()));
    let mut sums = [simd.zero(); CHAINS];
    for (chain, sum) in sums.iter_mut().enumerate() {
        // Equal chains would be computed once: each starts with a value of its own.
        let start = [bf16::from_f32(chain as f32); PAIR];
        *sum = simd.dot_pairs(*sum, simd.pairs(&[start; LANE_ROWS]), [bf16::ONE; PAIR]);
    }
    let w = simd.pairs(&w);
    for _ in 0..DOT_STEPS {
        for sum in &mut sums {
            *sum = simd.dot_pairs(*sum, w, x);
        }
    }
    black_box(sums);
    2 * LANE_ROWS * PAIR * CHAINS * DOT_STEPS
}

/// As [`walk_pairs`], with quads of bytes, the sums being those of as many tokens.
#[inline(always)]
fn walk_quads<S: Simd, const CHAINS: usize>(simd: S) -> usize {
    let (w, x) = (simd.bytes(&black_box([129; LANE_ROWS * QUAD])), black_box(0x0101_0101));
    let mut sums: [[S::Ints; 1]; CHAINS] = std::array::from_fn(|chain| [simd.ints(chain as i32)]);
    for _ in 0..DOT_STEPS / 2 {
        simd.dot_two_quads(
            &mut sums,
            [[w; 2]],
            #[inline(always)]
            |_| [x; 2],
        );
    }
    black_box(sums);
    2 * LANE_ROWS * QUAD * CHAINS * DOT_STEPS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CpuOptions, WeightFormat};

    /// Too fast would mean that the optimiser found a way around the work.
    #[test]
    fn limits_are_those_of_a_machine_that_can_exist() {
        let options = |weights: WeightFormat| CpuOptions {
            num_threads: Some(1),
            weights: weights.into(),
            ..CpuOptions::default()
        };
        for weights in WeightFormat::ALL {
            let per_s = Cpu::new(options(weights)).dot_peak();
            assert!((1e8..2e13).contains(&per_s), "{per_s} operations per second on one thread, {weights:?}");
        }
        let mut cpu = Cpu::new(options(WeightFormat::Bf16));
        let bytes_per_s = cpu.read_bandwidth(&MemoryProbe::new(1 << 24).unwrap());
        assert!((1e7..5e12).contains(&bytes_per_s), "{bytes_per_s} bytes per second on one thread");
    }
}
