//! Rows in bf16: where they lie, and in strips where many are multiplied with the same weights.
//!
//! Every group of rows, an expert's, begins a strip of its own. With a strip more than fill its rows for each group
//! before it, the strips of a group begin at a number that nobody has to keep:
//!
//! ```text
//! rows of group g      start .. end
//! strips of group g    start / 16 + g ..          never before the end of the strips of group g - 1
//! ```

use std::ops::Range;

use backend::BackendError;
use half::bf16;

use super::Order;
use crate::dot::{RowList, Strips, make_strip, strip_len};
use crate::grid::{Grid, Tile};
use crate::isa::{Isa, Kernel};
use crate::simd::{RowPairs, STRIP_ROWS, Simd};
use crate::team::Team;
use crate::tensor::{Buffer, Rows};

/// Most rows that are multiplied where they lie: strips pay when many share the weights that a task turns for them.
pub(crate) const FEW_ROWS: usize = 64;

/// Rows of activations.
#[derive(Clone, Copy)]
pub(crate) struct Bf16Rows<'a> {
    rows: Rows<'a, bf16>,
    order: Order<'a>,
    /// Set for groups of more than [`FEW_ROWS`] rows.
    strips: Strips<'a>,
}

impl<'a> Bf16Rows<'a> {
    /// One row.
    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> &'a [bf16] {
        self.rows.row(self.order.source(row))
    }

    /// The strips from a row on, which is a whole number of strips from the start of its group.
    #[inline(always)]
    pub(crate) fn strips(&self, first_row: usize) -> Strips<'a> {
        let (group, start) = self.order.group_of(first_row);
        self.strips.skip(first_strip(group, start) + (first_row - start) / STRIP_ROWS)
    }
}

/// Where the strips of a group begin whose first row is `start`.
fn first_strip(group: usize, start: usize) -> usize {
    start / STRIP_ROWS + group
}

/// Room for strips.
pub(super) struct StripBuffer(Buffer<RowPairs>);

impl StripBuffer {
    /// Makes room for rows of `features` features in so many groups.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if there is none.
    pub(super) fn new(num_rows: usize, num_groups: usize, features: usize) -> Result<Self, BackendError> {
        let num_strips = first_strip(num_groups, num_rows);
        let strips = Buffer::zeroed("activations side by side", num_strips * strip_len(features))?;
        strips.prefer_huge_pages();
        Ok(Self(strips))
    }

    /// Makes the strips of the first `num_rows` rows of an order.
    pub(super) fn make<'a>(
        &'a mut self,
        rows: Rows<'a, bf16>,
        order: Order<'a>,
        num_rows: usize,
        isa: Isa,
        team: &mut Team,
    ) -> Bf16Rows<'a> {
        let strip_len = strip_len(rows.features());
        let num_strips = match order.groups(num_rows).any(|group| group.len() > FEW_ROWS) {
            true => first_strip(order.num_groups(), num_rows),
            false => 0,
        };
        let strips = &mut self.0[..num_strips * strip_len];
        team.for_each(Grid::row_bands(strips, strip_len, 1), |strips| {
            isa.run(MakeStrips { rows, order, num_rows, strips });
        });
        Bf16Rows { rows, order, strips: Strips::new(strips, rows.features()) }
    }
}

/// Makes the strips that the tile covers.
struct MakeStrips<'a> {
    rows: Rows<'a, bf16>,
    order: Order<'a>,
    num_rows: usize,
    strips: Tile<'a, RowPairs>,
}

impl MakeStrips<'_> {
    /// The rows of a strip; none if nobody will ask for it.
    fn rows_of(&self, strip: usize) -> Range<usize> {
        let groups = self.order.groups(self.num_rows).enumerate();
        let mut wanted = groups.filter(|(_, rows)| rows.len() > FEW_ROWS);
        let rows = wanted.find_map(|(group, rows)| {
            let before = strip.checked_sub(first_strip(group, rows.start))? * STRIP_ROWS;
            (before < rows.len()).then(|| rows.start + before..rows.end.min(rows.start + before + STRIP_ROWS))
        });
        rows.unwrap_or(0..0)
    }
}

impl Kernel for MakeStrips<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        for strip in self.strips.rows() {
            let sources = self.rows_of(strip).map(|row| self.rows.row(self.order.source(row)));
            let rows = RowList::<STRIP_ROWS>::new(sources);
            if !rows.is_empty() {
                make_strip(simd, &rows, self.strips.row(strip));
            }
        }
    }
}
