//! Weight matrices `[out, in]`: [`Packed`] for products, or a table of bf16 rows to be looked up.
//!
//! A table whose view is stored in bf16 is kept as the bytes it came in, usually a file mapping, so loading it copies
//! nothing and the page cache is its only copy. Views of other types, and dummy weights, are converted once into memory
//! of our own.

use std::cell::RefCell;
use std::mem;
use std::ops::Range;

use backend::{BackendError, ExpertsView, WeightData, WeightType, WeightView};
use bytemuck::{Pod, Zeroable};
use bytes::Bytes;
use half::bf16;

use crate::format::{WeightFormat, WeightFormats};
use crate::grid::Grid;
use crate::isa::Isa;
use crate::numbers::Element;
use crate::operand::Operand;
use crate::packed::{PANEL_ROWS, Packed, Packer};
use crate::simd::Simd;
use crate::team::Team;
use crate::tensor::Buffer;

/// Most activation rows of one [`Matrix::dot`]: a span of so many, and their sums, fit an L2 cache.
pub(crate) const CALL_TOKENS: usize = 512;

/// The sums of one [`Matrix::dot`]: for each panel of [`PANEL_ROWS`] weight rows, one row per token.
///
/// Their memory goes from task to task of a thread: to allocate it took 2% of a task with one token.
pub(crate) struct PanelSums {
    sums: Vec<TokenSums>,
    num_tokens: usize,
}

thread_local! {
    /// The memory of sums that are no longer needed, for those that will be.
    static SPARE_SUMS: RefCell<Vec<Vec<TokenSums>>> = const { RefCell::new(Vec::new()) };
}

impl Default for PanelSums {
    fn default() -> Self {
        let sums = SPARE_SUMS.with_borrow_mut(Vec::pop).unwrap_or_default();
        Self { sums, num_tokens: 0 }
    }
}

impl Drop for PanelSums {
    fn drop(&mut self) {
        SPARE_SUMS.with_borrow_mut(|spare| spare.push(mem::take(&mut self.sums)));
    }
}

/// A token's sums with a panel, which begin with a cache line: a vector across two costs twice as much.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct TokenSums([f32; PANEL_ROWS]);

const _: () = assert!(size_of::<TokenSums>() == size_of::<f32>() * PANEL_ROWS);

// SAFETY: numbers, for which all zeros is a value.
unsafe impl Zeroable for TokenSums {}
// SAFETY: numbers for which any bits are a value; the size above leaves no room for padding.
unsafe impl Pod for TokenSums {}

impl PanelSums {
    /// Zeros for a product.
    #[inline(always)]
    pub(crate) fn reset(&mut self, num_weight_rows: usize, num_tokens: usize) -> &mut [[f32; PANEL_ROWS]] {
        self.num_tokens = num_tokens;
        self.sums.clear();
        self.sums.resize(num_weight_rows.div_ceil(PANEL_ROWS) * num_tokens, Zeroable::zeroed());
        bytemuck::cast_slice_mut(&mut self.sums)
    }

    /// The sums with the token and the first weight row of each, counted from the product's first.
    #[inline(always)]
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, usize, &[f32; PANEL_ROWS])> {
        self.sums.chunks(self.num_tokens.max(1)).enumerate().flat_map(|(panel, sums)| {
            sums.iter().enumerate().map(move |(token, TokenSums(sums))| (token, panel * PANEL_ROWS, sums))
        })
    }
}

/// A matrix `[out, in]`, of one or more parts stacked along their rows.
pub struct Matrix {
    rows: usize,
    cols: usize,
    storage: Storage,
}

enum Storage {
    Table(Elements),
    Packed(Packed),
}

enum Elements {
    /// Native-endian bf16, aligned for it.
    Mapped(Bytes),
    Owned(Buffer<bf16>),
}

/// How much memory matrices take.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct WeightSize {
    weights: usize,
    bytes: usize,
}

/// The gate, up and down matrices of a layer's experts, by expert id.
pub struct Experts {
    pub(crate) gate: Vec<Matrix>,
    pub(crate) up: Vec<Matrix>,
    pub(crate) down: Vec<Matrix>,
}

impl Matrix {
    /// Makes a table to look rows up in.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if the view must be converted and there is no room for it.
    ///
    /// # Panics
    /// If the data is not as long as its shape says; the loader checks it.
    pub(crate) fn table(view: &WeightView, team: &mut Team) -> Result<Self, BackendError> {
        let storage = Storage::Table(Elements::new(view, team)?);
        Ok(Self { rows: view.rows, cols: view.cols, storage })
    }

    /// Makes a matrix to multiply with of views of one width.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if there is no room for it.
    ///
    /// # Panics
    /// If the views differ in width or their data is not as long as their shape says; the loader checks both.
    pub(crate) fn packed(
        views: &[WeightView],
        format: WeightFormat,
        packer: &mut Packer,
        isa: Isa,
        team: &mut Team,
    ) -> Result<Self, BackendError> {
        let cols = views[0].cols;
        assert!(views.iter().all(|view| view.cols == cols), "stacked matrices have one width");
        let storage = Storage::Packed(packer.pack(format, views, isa, team)?);
        Ok(Self { rows: views.iter().map(|view| view.rows).sum(), cols, storage })
    }

    /// Input features.
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Output features.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// One row.
    ///
    /// # Panics
    /// If the matrix is not a table.
    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> &[bf16] {
        let Storage::Table(elements) = &self.storage else { panic!("only a table's rows are looked up") };
        &elements.as_slice()[row * self.cols..][..self.cols]
    }

    /// Bytes that it takes.
    fn num_bytes(&self) -> usize {
        match &self.storage {
            Storage::Table(elements) => size_of_val(elements.as_slice()),
            Storage::Packed(packed) => packed.num_bytes(),
        }
    }

    /// What is multiplied.
    ///
    /// # Panics
    /// If the matrix is a table.
    #[inline(always)]
    pub(crate) fn panels(&self) -> &Packed {
        let Storage::Packed(packed) = &self.storage else { panic!("a table is not multiplied") };
        packed
    }

    /// What is read first for the products of columns from `col` on, which begins a panel or is beyond the last.
    #[inline(always)]
    pub(crate) fn beginning(&self, col: usize) -> &[u8] {
        self.panels().beginning(col)
    }

    /// Computes `weight[c] · x[r]` for all `rows` and whole panels of `cols`, of which the last may be cut short. `then`
    /// is what the thread will most likely read next, and is asked for in time.
    ///
    /// # Panics
    /// If the operand is not in the form that the matrix multiplies.
    #[inline(always)]
    pub(crate) fn dot<S: Simd>(
        &self,
        simd: S,
        cols: Range<usize>,
        x: Operand<'_>,
        rows: Range<usize>,
        then: &[u8],
        sums: &mut PanelSums,
    ) {
        self.panels().dot(simd, cols, x, rows, then, sums);
    }
}

impl Experts {
    /// Makes the experts of one layer.
    ///
    /// # Errors
    /// As [`Matrix::packed`].
    pub(crate) fn new(
        view: &ExpertsView,
        formats: WeightFormats,
        packer: &mut Packer,
        isa: Isa,
        team: &mut Team,
    ) -> Result<Self, BackendError> {
        let gate_up = formats.of(view.gate.iter().chain(&view.up));
        let down = formats.of(&view.down);
        let mut matrices = |views: &[WeightView], format| -> Result<Vec<Matrix>, BackendError> {
            views
                .iter()
                .map(|view| Matrix::packed(std::slice::from_ref(view), format, packer, isa, team))
                .collect()
        };
        Ok(Self {
            gate: matrices(&view.gate, gate_up)?,
            up: matrices(&view.up, gate_up)?,
            down: matrices(&view.down, down)?,
        })
    }

    /// All of them.
    pub(crate) fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        self.gate.iter().chain(&self.up).chain(&self.down)
    }
}

impl WeightSize {
    /// Adds a matrix.
    pub(crate) fn add(&mut self, matrix: &Matrix) {
        self.weights += matrix.rows * matrix.cols;
        self.bytes += matrix.num_bytes();
    }

    /// Bits of a weight on average, its share of all that is kept beside included; `None` if there are no weights.
    pub(crate) fn bits(self) -> Option<f64> {
        (self.weights > 0).then(|| 8.0 * self.bytes as f64 / self.weights as f64)
    }
}

impl Elements {
    fn new(view: &WeightView, team: &mut Team) -> Result<Self, BackendError> {
        if let WeightData::Stored(bytes) = &view.data {
            assert_eq!(
                bytes.len(),
                view.rows * view.dtype.row_bytes(view.cols),
                "stored data fits its shape"
            );
            let usable = bytemuck::try_cast_slice::<u8, bf16>(bytes).is_ok();
            if view.dtype == WeightType::Bf16 && cfg!(target_endian = "little") && usable {
                return Ok(Self::Mapped(bytes.clone()));
            }
        }
        convert(view, team).map(Self::Owned)
    }

    #[inline(always)]
    fn as_slice(&self) -> &[bf16] {
        match self {
            Self::Mapped(bytes) => bytemuck::cast_slice(bytes),
            Self::Owned(buffer) => buffer,
        }
    }
}

/// Rounds a view into memory of our own, on all threads.
fn convert(view: &WeightView, team: &mut Team) -> Result<Buffer<bf16>, BackendError> {
    let mut buffer = Buffer::<bf16>::zeroed("a table of weights", view.len())?;
    let rows_per_task = (1 << 16) / view.cols.max(1) + 1;
    team.for_each(Grid::row_bands(&mut buffer, view.cols, rows_per_task), |mut band| {
        let mut decoded = vec![0.0; view.cols];
        for row in band.rows() {
            convert_row(view, row, &mut decoded, band.row(row));
        }
    });
    Ok(buffer)
}

/// Decodes one row into `decoded` and rounds it to bf16.
fn convert_row(view: &WeightView, row: usize, decoded: &mut [f32], out: &mut [bf16]) {
    view.row_to_f32(row, decoded);
    out.iter_mut().zip(decoded).for_each(|(out, &mut element)| *out = Element::from_f32(element));
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    fn view(dtype: WeightType, rows: usize, cols: usize, data: WeightData) -> WeightView {
        WeightView { rows, cols, dtype, data }
    }

    #[track_caller]
    fn check(view: &WeightView, mapped: bool) {
        let table = Matrix::table(view, &mut Team::new(2)).unwrap();
        let got: Vec<bf16> = (0..table.rows()).flat_map(|row| table.row(row)).copied().collect();
        assert_eq!(got, view.to_bf16());
        assert_eq!(matches!(table.storage, Storage::Table(Elements::Mapped(_))), mapped);
    }

    #[test]
    fn every_weight_type_becomes_the_same_bf16_as_in_the_reference() {
        let (rows, cols) = (37, 19);
        let values: Vec<f32> = (0..rows * cols).map(|i| (i as f32).sin()).collect();
        let f32s: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let f16s: Vec<u8> = values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect();
        let bf16s: Vec<u8> = values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
        check(&view(WeightType::F32, rows, cols, WeightData::Stored(f32s.into())), false);
        check(&view(WeightType::F16, rows, cols, WeightData::Stored(f16s.into())), false);
        check(&view(WeightType::F32, rows, cols, WeightData::Dummy { seed: 3, mean: 0.5, std: 2.0 }), false);
        check(
            &view(WeightType::Bf16, rows, cols, WeightData::Stored(bf16s.clone().into())),
            cfg!(target_endian = "little"),
        );

        let misaligned = Bytes::from([vec![0], bf16s].concat()).slice(1..);
        check(&view(WeightType::Bf16, rows, cols, WeightData::Stored(misaligned)), false);
    }
}
