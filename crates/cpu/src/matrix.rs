//! Weight matrices `[out, in]`: bf16 rows that stay where they are whenever they can, or quantised panels.
//!
//! A stored bf16 view is kept as the bytes it came in, usually a file mapping, so loading a model copies
//! nothing and the page cache is its only copy. Views of other types, and dummy weights, are converted once
//! into memory of our own. Stacked parts stay apart; only row numbers are stacked. Quantised matrices are always
//! in memory of our own, see [`Packed`].

use std::ops::Range;

use backend::{BackendError, ExpertsView, WeightData, WeightType, WeightView};
use bytes::Bytes;
use half::bf16;

use crate::dot::{MAX_ROWS, MAX_TOKENS, TokenRows, WeightRows, dot_rows, dot_strips};
use crate::grid::Grid;
use crate::isa::Isa;
use crate::numbers::Element;
use crate::operand::{FEW_ROWS, Operand};
use crate::packed::{Packed, PackedFormat, Packer};
use crate::simd::{RowPairs, Simd};
use crate::team::Team;
use crate::tensor::Buffer;

/// Most activation rows of one [`Matrix::dot`], whole strips: a span of so many quantised rows fits the L1 cache beside
/// the weights, one of so many bf16 rows half of an L2 cache.
pub(crate) const CALL_TOKENS: usize = 128;

/// The sums of one [`Matrix::dot`]: for each panel of [`MAX_ROWS`] weight rows, one row per token.
#[derive(Default)]
pub(crate) struct PanelSums {
    sums: Vec<[f32; MAX_ROWS]>,
    num_tokens: usize,
    /// Weights on their way.
    scratch: Vec<RowPairs>,
}

impl PanelSums {
    /// Zeros for a product.
    #[inline(always)]
    pub(crate) fn reset(&mut self, num_weight_rows: usize, num_tokens: usize) -> &mut [[f32; MAX_ROWS]] {
        self.num_tokens = num_tokens;
        self.sums.clear();
        self.sums.resize(num_weight_rows.div_ceil(MAX_ROWS) * num_tokens, [0.0; MAX_ROWS]);
        &mut self.sums
    }

    /// The sums with the token and the first weight row of each, counted from the product's first.
    #[inline(always)]
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, usize, &[f32; MAX_ROWS])> {
        self.sums.chunks(self.num_tokens.max(1)).enumerate().flat_map(|(panel, sums)| {
            sums.iter().enumerate().map(move |(token, sums)| (token, panel * MAX_ROWS, sums))
        })
    }
}

/// In which format the weights of products are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WeightFormat {
    /// 16 bits, where they lie if they are stored so.
    #[default]
    Bf16,
    /// 8.5 bits, quantised when loaded.
    Q8,
    /// 4.5 bits, quantised when loaded.
    Q4,
}

/// A matrix `[out, in]` of one or more parts stacked along their rows.
pub struct Matrix {
    rows: usize,
    cols: usize,
    storage: Storage,
}

enum Storage {
    Bf16(Vec<Part>),
    Packed(Packed),
}

struct Part {
    rows: Range<usize>,
    elements: Elements,
}

enum Elements {
    /// Native-endian bf16, aligned for it.
    Mapped(Bytes),
    Owned(Buffer<bf16>),
}

/// The gate, up and down matrices of a layer's experts, by expert id.
pub struct Experts {
    pub(crate) gate: Vec<Matrix>,
    pub(crate) up: Vec<Matrix>,
    pub(crate) down: Vec<Matrix>,
}

impl WeightFormat {
    /// All formats, the most precise first.
    pub const ALL: [Self; 3] = [Self::Bf16, Self::Q8, Self::Q4];

    /// The name in settings and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::Q8 => "q8",
            Self::Q4 => "q4",
        }
    }

    /// The packed format; `None` for bf16.
    pub(crate) fn packed(self) -> Option<PackedFormat> {
        match self {
            Self::Bf16 => None,
            Self::Q8 => Some(PackedFormat::Q8),
            Self::Q4 => Some(PackedFormat::Q4),
        }
    }

    /// Bits of a weight, its share of a scale included.
    pub fn bits(self) -> f64 {
        match self {
            Self::Bf16 => 16.0,
            Self::Q8 => 8.5,
            Self::Q4 => 4.5,
        }
    }
}

impl Matrix {
    /// Makes a matrix of views of one width.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if a view must be converted and there is no room for it.
    ///
    /// # Panics
    /// If the views differ in width or their data is not as long as their shape says; the loader checks both.
    pub(crate) fn new(
        views: &[WeightView],
        format: WeightFormat,
        packer: &mut Packer,
        isa: Isa,
        team: &mut Team,
    ) -> Result<Self, BackendError> {
        let cols = views[0].cols;
        assert!(views.iter().all(|view| view.cols == cols), "stacked matrices have one width");
        let storage = match format.packed() {
            None => Storage::Bf16(Part::stack(views, team)?),
            Some(format) => Storage::Packed(packer.pack(format, views, isa, team)?),
        };
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

    /// The quantised form, if it has one.
    pub(crate) fn packed(&self) -> Option<&Packed> {
        match &self.storage {
            Storage::Bf16(_) => None,
            Storage::Packed(packed) => Some(packed),
        }
    }

    /// One row.
    ///
    /// # Panics
    /// If the matrix is quantised.
    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> &[bf16] {
        match &self.storage {
            Storage::Bf16(parts) => bf16_row(parts, self.cols, row),
            Storage::Packed(_) => panic!("a quantised matrix has no bf16 rows"),
        }
    }

    /// Computes `weight[c] · x[r]` for all `cols` and `rows`: of bf16 matrices up to [`MAX_ROWS`] columns, of quantised
    /// ones whole panels.
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
        sums: &mut PanelSums,
    ) {
        match (&self.storage, x) {
            (Storage::Bf16(parts), Operand::Bf16(x)) => {
                let weights = WeightRows::new(cols.map(|col| bf16_row(parts, self.cols, col)));
                sums.reset(weights.len(), rows.len());
                let PanelSums { sums, scratch, .. } = sums;
                if rows.len() > FEW_ROWS {
                    dot_strips(simd, &weights, x.strips(rows.start), scratch, sums);
                } else {
                    for (first, sums) in rows.step_by(MAX_TOKENS).zip(sums.chunks_mut(MAX_TOKENS)) {
                        let tokens = TokenRows::new((first..first + sums.len()).map(|row| x.row(row)));
                        dot_rows(simd, &weights, &tokens, sums);
                    }
                }
            }
            (Storage::Packed(packed), Operand::Quantised(x)) => packed.dot(simd, cols, x, rows, sums),
            _ => panic!("an operand has the form that its matrix multiplies"),
        }
    }
}

#[inline(always)]
fn bf16_row(parts: &[Part], cols: usize, row: usize) -> &[bf16] {
    let part = parts.iter().find(|part| row < part.rows.end).expect("a row of the matrix");
    let start = (row - part.rows.start) * cols;
    &part.elements.as_slice()[start..start + cols]
}

impl Part {
    fn stack(views: &[WeightView], team: &mut Team) -> Result<Vec<Self>, BackendError> {
        let mut first_row = 0;
        let part = |view: &WeightView| {
            let rows = first_row..first_row + view.rows;
            first_row = rows.end;
            Ok(Self { rows, elements: Elements::new(view, team)? })
        };
        views.iter().map(part).collect()
    }
}

impl Experts {
    /// Makes the experts of one layer.
    ///
    /// # Errors
    /// As [`Matrix::new`].
    pub(crate) fn new(
        view: &ExpertsView,
        format: WeightFormat,
        packer: &mut Packer,
        isa: Isa,
        team: &mut Team,
    ) -> Result<Self, BackendError> {
        let mut matrices = |views: &[WeightView]| -> Result<Vec<Matrix>, BackendError> {
            views
                .iter()
                .map(|view| Matrix::new(std::slice::from_ref(view), format, packer, isa, team))
                .collect()
        };
        Ok(Self { gate: matrices(&view.gate)?, up: matrices(&view.up)?, down: matrices(&view.down)? })
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
    let mut buffer = Buffer::<bf16>::zeroed("a weight matrix", view.len())?;
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
        let mut team = Team::new(2);
        let (format, mut packer) = (WeightFormat::Bf16, Packer::default());
        let views = std::slice::from_ref(view);
        let matrix = Matrix::new(views, format, &mut packer, Isa::Portable, &mut team).unwrap();
        let got: Vec<bf16> = (0..matrix.rows()).flat_map(|row| matrix.row(row)).copied().collect();
        assert_eq!(got, view.to_bf16());
        let Storage::Bf16(parts) = &matrix.storage else { panic!("bf16 is stored as bf16") };
        assert_eq!(matches!(parts[0].elements, Elements::Mapped(_)), mapped);
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
