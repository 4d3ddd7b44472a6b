//! Weights on their way to the device: rows go through two staging buffers in turn, so that the host's threads decode one
//! while the other travels, and a kernel puts them where the products want them. Dummy weights are made on the device.

use std::thread::available_parallelism;

use backend::{BackendError, MatrixUse, WeightData, WeightType, WeightView};
use half::bf16;

use crate::device::{Buffer, Device, Grid, PinnedBuffer};
use crate::kernels::{Argument, Placement};
use crate::tensor::{Matrix, stride, stride_e4m3};

/// Elements of a staging buffer: 16 MiB.
const STAGING_ELEMENTS: usize = 8 << 20;
const NUM_SLOTS: usize = 2;
/// Of all staging buffers on the device.
pub(crate) const STAGING_BYTES: usize = NUM_SLOTS * STAGING_ELEMENTS * size_of::<bf16>();
/// Rows of gate, then rows of up, that lie side by side.
const INTERLEAVE: usize = 8;
const PLACE_THREADS: u32 = 256;
/// Threads that decode; a few fill the bus.
const MAX_DECODERS: usize = 8;

/// How the weights of products are kept; lookups and the router stay bf16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightFormat {
    /// As published.
    Bf16,
    /// FP8 (E4M3), each row with a scale; activations are quantised likewise on their way into a product.
    E4m3,
}

impl WeightFormat {
    /// What the settings call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::E4m3 => "fp8",
        }
    }

    /// Bits of a weight, without the scales of rows.
    pub fn bits(self) -> f64 {
        match self {
            Self::Bf16 => 16.0,
            Self::E4m3 => 8.0,
        }
    }
}

/// The staging buffers.
pub(crate) struct Uploader {
    /// Of products.
    format: WeightFormat,
    slots: Vec<Slot>,
    next: usize,
}

struct Slot {
    host: PinnedBuffer,
    device: Buffer,
}

/// Where the rows of a view go.
#[derive(Debug, Clone, Copy)]
struct Place {
    first_row: usize,
    interleaved: bool,
}

impl Uploader {
    pub(crate) fn new(format: WeightFormat) -> Self {
        Self { format, slots: Vec::new(), next: 0 }
    }

    /// One matrix of several parts.
    pub(crate) fn matrix(
        &mut self,
        device: &mut Device,
        parts: &[WeightView],
        usage: MatrixUse,
    ) -> Result<Matrix, BackendError> {
        let format = if usage == MatrixUse::Product { self.format } else { WeightFormat::Bf16 };
        let cols = parts[0].cols;
        assert!(parts.iter().all(|part| part.cols == cols), "stacked matrices have one width");
        let rows = parts.iter().map(|part| part.rows).sum();
        let shape = MatrixShape { num_experts: 1, weight_rows: rows, cols, features: rows };
        let matrix = shape.allocate(device, "a matrix", format)?;
        let mut first_row = 0;
        for part in parts {
            self.place(device, part, &matrix, Place { first_row, interleaved: false })?;
            first_row += part.rows;
        }
        Ok(matrix)
    }

    /// Gate and up of all experts, interleaved.
    pub(crate) fn gate_up(
        &mut self,
        device: &mut Device,
        gate: &[WeightView],
        up: &[WeightView],
    ) -> Result<Matrix, BackendError> {
        let (ffn, hidden) = (gate[0].rows, gate[0].cols);
        let weight_rows = 2 * ffn.next_multiple_of(INTERLEAVE);
        let shape = MatrixShape { num_experts: gate.len(), weight_rows, cols: hidden, features: ffn };
        let matrix = shape.allocate(device, "the experts of a layer", self.format)?;
        for (expert, (gate, up)) in gate.iter().zip(up).enumerate() {
            for (first, view) in [(0, gate), (INTERLEAVE, up)] {
                assert_eq!((view.rows, view.cols), (ffn, hidden), "experts have one shape");
                let place = Place { first_row: expert * weight_rows + first, interleaved: true };
                self.place(device, view, &matrix, place)?;
            }
        }
        Ok(matrix)
    }

    /// One matrix of each expert.
    pub(crate) fn down(&mut self, device: &mut Device, down: &[WeightView]) -> Result<Matrix, BackendError> {
        let (rows, cols) = (down[0].rows, down[0].cols);
        let shape = MatrixShape { num_experts: down.len(), weight_rows: rows, cols, features: rows };
        let matrix = shape.allocate(device, "the experts of a layer", self.format)?;
        for (expert, view) in down.iter().enumerate() {
            assert_eq!((view.rows, view.cols), (rows, cols), "experts have one shape");
            self.place(device, view, &matrix, Place { first_row: expert * rows, interleaved: false })?;
        }
        Ok(matrix)
    }

    fn place(
        &mut self,
        device: &mut Device,
        view: &WeightView,
        matrix: &Matrix,
        place: Place,
    ) -> Result<(), BackendError> {
        let placement = Placement {
            cols: view.cols as i32,
            stride: matrix.stride as i32,
            first_row: place.first_row as i32,
            interleaved: i32::from(place.interleaved),
        };
        let address = matrix.buffer.address;
        let scales = matrix.scales.as_ref().map(|scales| scales.address);
        if let WeightData::Dummy { seed, mean, std } = view.data {
            let grid = Grid::new(view.rows, PLACE_THREADS);
            match &scales {
                None => device.launch("place_dummy", grid, &[&seed, &mean, &std, &address, &placement]),
                Some(scales) => {
                    let arguments: [&dyn Argument; 6] = [&seed, &mean, &std, &address, scales, &placement];
                    device.launch("place_dummy_e4m3", grid, &arguments);
                }
            }
            device.end_chain();
            return device.check();
        }
        let rows_per_slot = (STAGING_ELEMENTS / view.cols).max(1);
        for first in (0..view.rows).step_by(rows_per_slot) {
            let rows = rows_per_slot.min(view.rows - first);
            let from = self.send(device, view, first, rows)?;
            let (first, grid) = (first as i32, Grid::new(rows, PLACE_THREADS));
            match &scales {
                None => device.launch("place_rows", grid, &[&from, &first, &address, &placement]),
                Some(scales) => {
                    device.launch("place_rows_e4m3", grid, &[&from, &first, &address, scales, &placement]);
                }
            }
        }
        device.end_chain();
        device.check()
    }

    /// Decodes rows into the next slot and sends them; where they are on the device, until the slot's next turn.
    fn send(
        &mut self,
        device: &mut Device,
        view: &WeightView,
        first: usize,
        rows: usize,
    ) -> Result<u64, BackendError> {
        let num_bytes = STAGING_ELEMENTS.max(view.cols) * size_of::<bf16>();
        let index = self.next;
        self.next = (index + 1) % NUM_SLOTS;
        if self.slots.get(index).is_none_or(|slot| slot.device.num_bytes() < num_bytes) {
            let host = device.allocate_pinned(num_bytes)?;
            let slot = Slot { host, device: device.allocate("staging of weights", num_bytes)? };
            self.slots.truncate(index);
            self.slots.push(slot);
        }
        let slot = &mut self.slots[index];
        if let Some(bytes) = device.pinned_bytes(&mut slot.host) {
            let elements = bytemuck::cast_slice_mut(bytes);
            decode_rows(view, first, &mut elements[..rows * view.cols]);
        }
        device.write_pinned(&slot.device, &mut slot.host, rows * view.cols * size_of::<bf16>());
        Ok(slot.device.address)
    }
}

/// Decodes rows from `first` on, a share of them on each of a few threads: one alone is slower than the bus.
fn decode_rows(view: &WeightView, first: usize, out: &mut [bf16]) {
    let num_threads = available_parallelism().map_or(1, usize::from).min(MAX_DECODERS);
    let rows_per_thread = (out.len() / view.cols).div_ceil(num_threads);
    std::thread::scope(|scope| {
        let starts = (first..).step_by(rows_per_thread);
        for (start, rows) in starts.zip(out.chunks_mut(rows_per_thread * view.cols)) {
            scope.spawn(move || decode_share(view, start, rows));
        }
    });
}

fn decode_share(view: &WeightView, first: usize, out: &mut [bf16]) {
    if let (WeightData::Stored(bytes), WeightType::Bf16) = (&view.data, view.dtype) {
        let row_bytes = view.dtype.row_bytes(view.cols);
        assert_eq!(bytes.len(), view.rows * row_bytes);
        let out: &mut [u8] = bytemuck::cast_slice_mut(out);
        out.copy_from_slice(&bytes[first * row_bytes..][..out.len()]);
        return;
    }
    let mut decoded = vec![0.0; view.cols];
    for (row, out) in (first..).zip(out.chunks_mut(view.cols)) {
        view.row_to_f32(row, &mut decoded);
        out.iter_mut().zip(&decoded).for_each(|(out, &element)| *out = bf16::from_f32(element));
    }
}

/// The sizes of a [`Matrix`].
struct MatrixShape {
    num_experts: usize,
    weight_rows: usize,
    cols: usize,
    features: usize,
}

impl MatrixShape {
    fn allocate(self, device: &mut Device, what: &str, format: WeightFormat) -> Result<Matrix, BackendError> {
        let Self { num_experts, weight_rows, cols, features } = self;
        let num_rows = num_experts * weight_rows;
        let (stride, row_bytes, scales) = match format {
            WeightFormat::Bf16 => (stride(cols), stride(cols) * size_of::<bf16>(), None),
            WeightFormat::E4m3 => {
                let scales = device.allocate("scales of weights", num_rows * size_of::<f32>())?;
                (stride_e4m3(cols), stride_e4m3(cols), Some(scales))
            }
        };
        let buffer = device.allocate(what, num_rows * row_bytes)?;
        Ok(Matrix { buffer, scales, num_experts, weight_rows, cols, stride, features })
    }
}
