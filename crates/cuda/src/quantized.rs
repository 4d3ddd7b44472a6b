//! Activations in e4m3 on their way into a product with such weights, each row with a scale of its own.
//!
//! One scratch serves all products: they follow one another.

use backend::BackendError;

use crate::device::{Buffer, Device, Grid};
use crate::kernels::RowStrides;
use crate::tensor::stride_e4m3;

/// Most threads of a block, and elements that each of them loads at once.
const MAX_THREADS: usize = 1024;
const ELEMENTS_PER_LOAD: usize = 8;

/// The scratch, sized by what was reserved.
#[derive(Default)]
pub(crate) struct QuantizedRows {
    max_rows: usize,
    num_bytes: usize,
    buffers: Option<Buffers>,
}

struct Buffers {
    rows: Buffer,
    scales: Buffer,
}

/// Quantised rows, as a product takes them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Quantized {
    pub(crate) x: u64,
    pub(crate) scales: u64,
    /// Rows that there is memory for.
    pub(crate) max_rows: usize,
}

/// Rows of bf16.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source {
    pub(crate) x: u64,
    pub(crate) features: usize,
    pub(crate) stride: usize,
    /// Numbers of rows, and what they are divided by; rows as they are without them.
    pub(crate) indices: Option<(u64, usize)>,
}

impl QuantizedRows {
    /// Makes room for so many rows of so many features.
    pub(crate) fn reserve(
        &mut self,
        device: &mut Device,
        rows: usize,
        features: usize,
    ) -> Result<(), BackendError> {
        let num_bytes = rows * stride_e4m3(features);
        if rows <= self.max_rows && num_bytes <= self.num_bytes {
            return Ok(());
        }
        self.max_rows = self.max_rows.max(rows);
        self.num_bytes = self.num_bytes.max(num_bytes);
        self.buffers = Some(Buffers {
            rows: device.allocate("quantised activations", self.num_bytes)?,
            scales: device.allocate("scales of activations", self.max_rows * size_of::<f32>())?,
        });
        Ok(())
    }

    /// Launches the quantisation of `num_rows` rows, which are here until the next call.
    ///
    /// # Panics
    /// If no such room was reserved.
    pub(crate) fn launch(&self, device: &mut Device, source: Source, num_rows: usize) -> Quantized {
        let stride = stride_e4m3(source.features);
        assert!(num_rows <= self.max_rows && num_rows * stride <= self.num_bytes, "room was reserved");
        let buffers = self.buffers.as_ref().expect("room was reserved");
        let (x, scales) = (buffers.rows.address, buffers.scales.address);
        let (indices, divisor) =
            source.indices.map_or((0, 1), |(indices, divisor)| (indices, divisor as i32));
        let strides = RowStrides { x: source.stride as i32, out: stride as i32 };
        let grid = Grid::new(num_rows, num_threads(stride));
        device.launch("quantize_rows", grid, &[&source.x, &indices, &divisor, &x, &scales, &strides]);
        Quantized { x, scales, max_rows: self.num_bytes / stride }
    }
}

/// Threads for a row: one for each load, or as few as take the same number of turns.
fn num_threads(stride: usize) -> u32 {
    let num_loads = stride / ELEMENTS_PER_LOAD;
    let turns = num_loads.div_ceil(MAX_THREADS);
    num_loads.div_ceil(turns).next_multiple_of(32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_a_thread_for_each_load() {
        assert_eq!([128, 4096, 8192, 14336, 65536].map(num_threads), [32, 512, 1024, 896, 1024]);
    }
}
