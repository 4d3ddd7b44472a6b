//! Rows in bf16, for bf16 weights: copied into spans of 256 columns, those of neighbouring rows side by side,
//! `[span][row]`, as the [`quantised`](super::quantised) ones are and for the same reason.

use backend::BackendError;
use half::bf16;

use super::Order;
use crate::grid::{Grid, Tile};
use crate::isa::{Isa, Kernel};
use crate::packed::GROUP;
use crate::simd::{PAIR, Pair, Simd};
use crate::team::Team;
use crate::tensor::{Buffer, Rows};

/// Groups of columns of a span: with 32 weight rows it takes half of an L1 cache.
pub(crate) const BF16_SPAN_BLOCKS: usize = 8;
/// Columns of a span.
const SPAN: usize = BF16_SPAN_BLOCKS * GROUP;

/// The pairs of a span, by group.
type SpanPairs = [[Pair; GROUP / PAIR]; BF16_SPAN_BLOCKS];

/// Room for rows.
pub(crate) struct Bf16Buffer(Buffer<SpanPairs>);

/// Rows of activations, `[span][row]`; the last span is padded with zeros.
#[derive(Clone, Copy)]
pub(crate) struct Bf16Rows<'a> {
    spans: &'a [SpanPairs],
    num_rows: usize,
}

impl<'a> Bf16Rows<'a> {
    /// Spans of a row.
    #[inline(always)]
    pub(crate) fn num_spans(&self) -> usize {
        self.spans.len() / self.num_rows
    }

    /// One span of all rows.
    #[inline(always)]
    pub(crate) fn span(&self, span: usize) -> &'a [SpanPairs] {
        &self.spans[span * self.num_rows..][..self.num_rows]
    }
}

impl Bf16Buffer {
    /// Makes room for rows of `features` features.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if there is none.
    pub(crate) fn new(num_rows: usize, features: usize) -> Result<Self, BackendError> {
        let spans = Buffer::zeroed("activations in spans", num_rows * features.div_ceil(SPAN))?;
        spans.prefer_huge_pages();
        Ok(Self(spans))
    }

    /// Copies the first `num_rows` rows of an order.
    pub(crate) fn copy(
        &mut self,
        x: Rows<'_, bf16>,
        order: Order<'_>,
        num_rows: usize,
        isa: Isa,
        team: &mut Team,
    ) -> Bf16Rows<'_> {
        let spans = &mut self.0[..num_rows * x.features().div_ceil(SPAN)];
        let band_rows = team.band_rows(num_rows, x.features());
        team.for_each(Grid::column_bands(spans, num_rows, band_rows), |spans| {
            isa.run(Copy { x, order, spans });
        });
        Bf16Rows { spans, num_rows }
    }
}

/// Copies the rows that are the columns of its tile.
struct Copy<'a> {
    x: Rows<'a, bf16>,
    order: Order<'a>,
    spans: Tile<'a, SpanPairs>,
}

impl Kernel for Copy<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        for (index, row) in self.spans.cols().enumerate() {
            for (span, x) in self.x.row(self.order.source(row)).chunks(SPAN).enumerate() {
                let out = self.spans.row(span)[index].as_flattened_mut().as_flattened_mut();
                out[..x.len()].copy_from_slice(x);
                out[x.len()..].fill(bf16::ZERO);
            }
        }
    }
}
