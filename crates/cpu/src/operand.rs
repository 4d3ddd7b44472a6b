//! What a matrix multiplies: rows of activations in bf16, or quantised to 8 bits for quantised weights.
//!
//! ```text
//! row of bf16     ├──────────── span: 128 columns, one scale ────────────┤
//!                 ├── group: 32 ─┤                                         Σ of each group, for the offset
//! quantised       8 quads of four bytes, in the order that the kernels take them
//! ```
//!
//! Quantising happens once per product, right before it: it is a small share of the work, and so no verb has to
//! know what the next one will do with its result. Non-finite values make their row's scale NaN, so that they reach
//! the result.

use backend::BackendError;
use half::bf16;

use crate::grid::{Grid, Tile};
use crate::isa::{Isa, Kernel};
use crate::numbers::{Element, nearest_i8, scale_and_factor};
use crate::packed::GROUP;
use crate::simd::{QUAD, Simd};
use crate::team::Team;
use crate::tensor::{Buffer, Rows};

/// Groups of columns over which a row has one scale.
pub(crate) const SPAN_GROUPS: usize = 4;
/// Columns over which a row has one scale.
const SPAN: usize = SPAN_GROUPS * GROUP;

/// The quads of a group.
type GroupQuads = [i32; GROUP / QUAD];

/// Rows of activations in the form that a matrix takes.
#[derive(Clone, Copy)]
pub(crate) enum Operand<'a> {
    Bf16(Rows<'a, bf16>),
    Quantised(QuantisedRows<'a>),
}

/// Room for the largest operand, quantised.
#[derive(Default)]
pub(crate) struct Scratch {
    buffers: Option<Buffers>,
}

struct Buffers {
    groups: Buffer<GroupQuads>,
    starts: Buffer<i32>,
    scales: Buffer<f32>,
}

/// Quantised rows.
#[derive(Clone, Copy)]
pub(crate) struct QuantisedRows<'a> {
    groups: &'a [GroupQuads],
    starts: &'a [i32],
    scales: &'a [f32],
    num_groups: usize,
}

/// One quantised row.
#[derive(Clone, Copy, Default)]
pub(crate) struct QuantisedRow<'a> {
    /// By group, padded with zeros.
    pub(crate) groups: &'a [GroupQuads],
    /// By group: `-offset · Σ x`, where sums of products with stored weights start.
    pub(crate) starts: &'a [i32],
    /// By span.
    pub(crate) scales: &'a [f32],
}

impl<'a> QuantisedRows<'a> {
    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> QuantisedRow<'a> {
        let num_spans = self.num_groups.div_ceil(SPAN_GROUPS);
        QuantisedRow {
            groups: &self.groups[row * self.num_groups..][..self.num_groups],
            starts: &self.starts[row * self.num_groups..][..self.num_groups],
            scales: &self.scales[row * num_spans..][..num_spans],
        }
    }
}

impl Scratch {
    /// Makes room for `max_rows` rows of `features`.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if there is none.
    pub(crate) fn reserve(&mut self, max_rows: usize, features: usize) -> Result<(), BackendError> {
        let num_groups = max_rows * features.div_ceil(GROUP);
        let num_spans = max_rows * features.div_ceil(SPAN);
        let held = |len: fn(&Buffers) -> usize| self.buffers.as_ref().map_or(0, len);
        let (num_groups, num_spans) =
            (num_groups.max(held(|held| held.groups.len())), num_spans.max(held(|held| held.scales.len())));
        let what = "quantised activations";
        self.buffers = Some(Buffers {
            groups: Buffer::zeroed(what, num_groups)?,
            starts: Buffer::zeroed(what, num_groups)?,
            scales: Buffer::zeroed(what, num_spans)?,
        });
        Ok(())
    }

    /// Quantises the first `rows` rows for weights that are stored with `offset`.
    pub(crate) fn quantise(
        &mut self,
        x: Rows<'_, bf16>,
        rows: usize,
        offset: i32,
        isa: Isa,
        team: &mut Team,
    ) -> QuantisedRows<'_> {
        let Buffers { groups, starts, scales } =
            self.buffers.as_mut().expect("room was reserved with the tensors");
        let (num_groups, num_spans) = (x.features().div_ceil(GROUP), x.features().div_ceil(SPAN));
        let (groups, starts) = (&mut groups[..rows * num_groups], &mut starts[..rows * num_groups]);
        let scales = &mut scales[..rows * num_spans];
        let band_rows = team.band_rows(rows, x.features());
        let tiles = (
            (Grid::row_bands(groups, num_groups, band_rows), Grid::row_bands(starts, num_groups, band_rows)),
            Grid::row_bands(scales, num_spans, band_rows),
        );
        team.for_each(tiles, |((groups, starts), scales)| {
            isa.run(Quantise { x, offset, groups, starts, scales });
        });
        QuantisedRows { groups, starts, scales, num_groups }
    }
}

/// Quantises the rows of its tiles.
struct Quantise<'a> {
    x: Rows<'a, bf16>,
    offset: i32,
    groups: Tile<'a, GroupQuads>,
    starts: Tile<'a, i32>,
    scales: Tile<'a, f32>,
}

impl Kernel for Quantise<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        for row in self.groups.rows() {
            let spans = self.x.row(row).chunks(SPAN);
            let groups = self.groups.row(row).chunks_mut(SPAN_GROUPS);
            let starts = self.starts.row(row).chunks_mut(SPAN_GROUPS);
            let outputs = groups.zip(starts).zip(self.scales.row(row));
            for (x, ((groups, starts), scale)) in spans.zip(outputs) {
                let factor;
                (*scale, factor) = scale_and_factor(largest_magnitude(x));
                for ((x, group), start) in x.chunks(GROUP).zip(groups).zip(starts) {
                    let values = quantised(x, factor);
                    *start = -self.offset * values.iter().map(|&value| i32::from(value)).sum::<i32>();
                    *group = bytemuck::cast(values);
                }
            }
        }
    }
}

/// The largest magnitude; infinite or NaN if any value is. Magnitudes of bf16 are ordered like their bits.
#[inline(always)]
fn largest_magnitude(x: &[bf16]) -> f32 {
    let bits = x.iter().map(|x| x.to_bits() & 0x7fff).fold(0, u16::max);
    Element::to_f32(bf16::from_bits(bits))
}

/// `x · factor` rounded to the nearest integer, ties to even, padded with zeros.
#[inline(always)]
fn quantised(x: &[bf16], factor: f32) -> [i8; GROUP] {
    let mut padded = [bf16::ZERO; GROUP];
    padded[..x.len()].copy_from_slice(x);
    padded.map(|x| nearest_i8(Element::to_f32(x) * factor))
}
