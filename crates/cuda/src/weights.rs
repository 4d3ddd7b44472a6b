//! Weights on their way to the device: rows go through two staging buffers in turn, so that the host decodes one while
//! the other travels, and a kernel puts them where the products want them. Dummy weights are made on the device.

use backend::{BackendError, WeightData, WeightType, WeightView};
use half::bf16;

use crate::device::{Buffer, Device, Grid};
use crate::kernels::Placement;
use crate::tensor::{Matrix, stride};

/// Elements of a staging buffer: 16 MiB.
const STAGING_ELEMENTS: usize = 8 << 20;
/// Of both staging buffers.
pub(crate) const STAGING_BYTES: usize = 2 * STAGING_ELEMENTS * size_of::<bf16>();
/// Rows of gate, then rows of up, that lie side by side.
const INTERLEAVE: usize = 8;
const PLACE_THREADS: u32 = 256;

/// The staging buffers.
pub(crate) struct Uploader {
    slots: Vec<Slot>,
    next: usize,
}

struct Slot {
    host: Vec<bf16>,
    device: Buffer,
}

/// Where the rows of a view go.
#[derive(Debug, Clone, Copy)]
struct Place {
    first_row: usize,
    interleaved: bool,
}

impl Uploader {
    pub(crate) fn new() -> Self {
        Self { slots: Vec::new(), next: 0 }
    }

    /// One matrix of several parts.
    pub(crate) fn matrix(
        &mut self,
        device: &mut Device,
        parts: &[WeightView],
    ) -> Result<Matrix, BackendError> {
        let cols = parts[0].cols;
        assert!(parts.iter().all(|part| part.cols == cols), "stacked matrices have one width");
        let rows = parts.iter().map(|part| part.rows).sum();
        let matrix = allocate(device, "a matrix", 1, rows, cols, rows)?;
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
        let matrix = allocate(device, "the experts of a layer", gate.len(), weight_rows, hidden, ffn)?;
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
        let matrix = allocate(device, "the experts of a layer", down.len(), rows, cols, rows)?;
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
        if let WeightData::Dummy { seed, mean, std } = view.data {
            let grid = Grid::new(view.rows, PLACE_THREADS);
            device.launch("place_dummy", grid, &[&seed, &mean, &std, &address, &placement]);
            return device.check();
        }
        let rows_per_slot = (STAGING_ELEMENTS / view.cols).max(1);
        for first in (0..view.rows).step_by(rows_per_slot) {
            let rows = rows_per_slot.min(view.rows - first);
            let slot = self.fill(device, view, first, rows)?;
            device.write_later(&slot.device, 0, &slot.host);
            let (from, first) = (slot.device.address, first as i32);
            device.launch(
                "place_rows",
                Grid::new(rows, PLACE_THREADS),
                &[&from, &first, &address, &placement],
            );
        }
        // Host memory may be written again from here on.
        device.synchronize();
        device.check()
    }

    /// Decodes rows into the next slot.
    fn fill(
        &mut self,
        device: &mut Device,
        view: &WeightView,
        first: usize,
        rows: usize,
    ) -> Result<&Slot, BackendError> {
        if self.slots.len() < 2 {
            let device =
                device.allocate("staging of weights", STAGING_ELEMENTS.max(view.cols) * size_of::<bf16>())?;
            self.slots.push(Slot { host: Vec::new(), device });
        }
        let index = self.next % self.slots.len();
        if index == 0 {
            device.synchronize();
        }
        self.next = index + 1;
        let slot = &mut self.slots[index];
        decode_rows(view, first, rows, &mut slot.host);
        Ok(slot)
    }
}

fn decode_rows(view: &WeightView, first: usize, rows: usize, out: &mut Vec<bf16>) {
    out.clear();
    if let (WeightData::Stored(bytes), WeightType::Bf16) = (&view.data, view.dtype) {
        let row_bytes = view.dtype.row_bytes(view.cols);
        assert_eq!(bytes.len(), view.rows * row_bytes);
        out.resize(rows * view.cols, bf16::ZERO);
        bytemuck::cast_slice_mut(out).copy_from_slice(&bytes[first * row_bytes..][..rows * row_bytes]);
        return;
    }
    let mut decoded = vec![0.0; view.cols];
    for row in first..first + rows {
        view.row_to_f32(row, &mut decoded);
        out.extend(decoded.iter().map(|&element| bf16::from_f32(element)));
    }
}

fn allocate(
    device: &mut Device,
    what: &str,
    num_experts: usize,
    weight_rows: usize,
    cols: usize,
    features: usize,
) -> Result<Matrix, BackendError> {
    let stride = stride(cols);
    let buffer = device.allocate(what, num_experts * weight_rows * stride * size_of::<bf16>())?;
    Ok(Matrix { buffer, num_experts, weight_rows, cols, stride, features })
}
