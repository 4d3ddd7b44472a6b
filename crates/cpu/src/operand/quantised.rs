//! Rows quantised to 8 bits, for quantised weights.
//!
//! ```text
//! row of bf16     ├──────────── span: 128 columns, one scale ────────────┤
//!                 ├── group: 32 ─┤                                         Σ of each group, for the offset
//! quantised       8 quads of four bytes, in the order that the kernels take them
//! ```
//!
//! The spans of neighbouring rows lie side by side, `[span][row]`: kernels walk many rows along a span before the next,
//! and rows whole would lie a multiple of 4 KiB apart and fight over the same ways of the L1 cache. Non-finite values
//! make their row's scale NaN, so that they reach the result.

use std::ops::Range;

use backend::BackendError;
use half::bf16;

use super::Order;
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

/// The quads of a span, by group.
type SpanQuads = [[i32; GROUP / QUAD]; SPAN_GROUPS];
/// Of each group of a span, `-offset · Σ x`: where sums of products with unsigned weights start.
type SpanStarts = [i32; SPAN_GROUPS];

/// Room for quantised rows.
pub(crate) struct QuantisedBuffer {
    quads: Buffer<SpanQuads>,
    starts: Buffer<SpanStarts>,
    scales: Buffer<f32>,
}

/// Quantised rows, `[span][row]`.
#[derive(Clone, Copy)]
pub(crate) struct QuantisedRows<'a> {
    quads: &'a [SpanQuads],
    starts: &'a [SpanStarts],
    scales: &'a [f32],
    num_rows: usize,
}

/// A span of neighbouring quantised rows.
#[derive(Clone, Copy)]
pub(crate) struct SpanRows<'a> {
    /// Of a row's last span only the groups that the matrix has are set, the last one padded with zeros.
    pub(crate) quads: &'a [SpanQuads],
    pub(crate) starts: &'a [SpanStarts],
    pub(crate) scales: &'a [f32],
}

impl<'a> QuantisedRows<'a> {
    /// Spans of a row.
    #[inline(always)]
    pub(crate) fn num_spans(&self) -> usize {
        self.scales.len() / self.num_rows
    }

    /// One span of some rows.
    #[inline(always)]
    pub(crate) fn span(&self, span: usize, rows: Range<usize>) -> SpanRows<'a> {
        let range = span * self.num_rows + rows.start..span * self.num_rows + rows.end;
        SpanRows {
            quads: &self.quads[range.clone()],
            starts: &self.starts[range.clone()],
            scales: &self.scales[range],
        }
    }
}

impl QuantisedBuffer {
    /// Makes room for rows of `features` features.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if there is none.
    pub(crate) fn new(num_rows: usize, features: usize) -> Result<Self, BackendError> {
        let (num_spans, what) = (num_rows * features.div_ceil(SPAN), "quantised activations");
        let quads = Buffer::zeroed(what, num_spans)?;
        quads.prefer_huge_pages();
        Ok(Self { quads, starts: Buffer::zeroed(what, num_spans)?, scales: Buffer::zeroed(what, num_spans)? })
    }

    /// Quantises the first `num_rows` rows of an order for weights that unsigned are `offset` more.
    pub(crate) fn quantise(
        &mut self,
        x: Rows<'_, bf16>,
        order: Order<'_>,
        num_rows: usize,
        offset: i32,
        isa: Isa,
        team: &mut Team,
    ) -> QuantisedRows<'_> {
        let num_spans = num_rows * x.features().div_ceil(SPAN);
        let quads = &mut self.quads[..num_spans];
        let (starts, scales) = (&mut self.starts[..num_spans], &mut self.scales[..num_spans]);
        let band_rows = team.band_rows(num_rows, x.features());
        let tiles = (
            (Grid::column_bands(quads, num_rows, band_rows), Grid::column_bands(starts, num_rows, band_rows)),
            Grid::column_bands(scales, num_rows, band_rows),
        );
        team.for_each(tiles, |((quads, starts), scales)| {
            isa.run(Quantise { x, order, offset, quads, starts, scales });
        });
        QuantisedRows { quads, starts, scales, num_rows }
    }
}

/// Quantises the rows that are the columns of its tiles.
struct Quantise<'a> {
    x: Rows<'a, bf16>,
    order: Order<'a>,
    offset: i32,
    quads: Tile<'a, SpanQuads>,
    starts: Tile<'a, SpanStarts>,
    scales: Tile<'a, f32>,
}

impl Kernel for Quantise<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        for (index, row) in self.scales.cols().enumerate() {
            for (span, x) in self.x.row(self.order.source(row)).chunks(SPAN).enumerate() {
                let factor;
                (self.scales.row(span)[index], factor) = scale_and_factor(largest_magnitude(x));
                let quads = &mut self.quads.row(span)[index];
                let starts = &mut self.starts.row(span)[index];
                for ((x, quads), start) in x.chunks(GROUP).zip(quads).zip(starts) {
                    let values = quantised(x, factor);
                    *start = -self.offset * values.iter().map(|&value| i32::from(value)).sum::<i32>();
                    *quads = bytemuck::cast(values);
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
    // Not `map`, which would not be compiled for the instruction set.
    let mut values = [0; GROUP];
    values.iter_mut().zip(padded).for_each(|(value, x)| *value = nearest_i8(Element::to_f32(x) * factor));
    values
}
