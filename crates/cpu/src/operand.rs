//! What a matrix multiplies: rows of activations in bf16, or quantised to 8 bits for quantised weights.
//!
//! Either is made once per product, right before it, in the order in which rows are multiplied: it is a small share of
//! the work, and so no verb has to know what the next one will do with its result.

mod bf16;
mod quantised;

use std::ops::Range;

use backend::{BackendError, Routing};

use crate::isa::Isa;
use crate::matrix::Matrix;
use crate::team::Team;
use crate::tensor::Tensor;
use bf16::StripBuffer;
pub(crate) use bf16::{Bf16Rows, FEW_ROWS};
pub(crate) use quantised::{QuantisedBuffer, QuantisedRows, SPAN_GROUPS, SpanRows};

/// Rows of activations in the form that a matrix takes.
#[derive(Clone, Copy)]
pub(crate) enum Operand<'a> {
    Bf16(Bf16Rows<'a>),
    Quantised(QuantisedRows<'a>),
}

/// Which rows of a tensor an operand is made of, and which of them meet the same weights.
#[derive(Clone, Copy)]
pub(crate) enum Order<'a> {
    /// All, as they lie.
    Given,
    /// As they lie, which is grouped by expert.
    Grouped(&'a Routing),
    /// Each token once per expert that it is routed to, grouped by expert.
    Gathered(&'a Routing),
}

impl<'a> Order<'a> {
    /// The tensor's row that is the operand's row `row`.
    #[inline(always)]
    pub(crate) fn source(self, row: usize) -> usize {
        match self {
            Self::Given | Self::Grouped(_) => row,
            Self::Gathered(routing) => routing.permutation[row] as usize / routing.top_k,
        }
    }

    fn num_groups(self) -> usize {
        self.routing().map_or(1, Routing::num_experts)
    }

    /// The groups of `num_rows` rows.
    fn groups(self, num_rows: usize) -> impl Iterator<Item = Range<usize>> {
        let rows = move |group| self.routing().map_or(0..num_rows, |routing| routing.expert_range(group));
        (0..self.num_groups()).map(rows)
    }

    /// The group of a row, and its first row.
    #[inline(always)]
    fn group_of(self, row: usize) -> (usize, usize) {
        let Some(routing) = self.routing() else { return (0, 0) };
        let expert = routing.expert_offsets.partition_point(|&start| start as usize <= row) - 1;
        (expert, routing.expert_range(expert).start)
    }

    #[inline(always)]
    fn routing(self) -> Option<&'a Routing> {
        match self {
            Self::Given => None,
            Self::Grouped(routing) | Self::Gathered(routing) => Some(routing),
        }
    }
}

/// Room for the largest operand in either form.
#[derive(Default)]
pub(crate) struct Scratch {
    max_rows: usize,
    max_features: usize,
    max_groups: usize,
    quantised: Option<QuantisedBuffer>,
    strips: Option<StripBuffer>,
}

impl Scratch {
    /// Makes room for as many rows, of as many features, as any tensor has.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if there is none.
    pub(crate) fn reserve(&mut self, max_rows: usize, max_features: usize) -> Result<(), BackendError> {
        self.max_rows = self.max_rows.max(max_rows);
        self.max_features = self.max_features.max(max_features);
        self.allocate()
    }

    /// Makes room for as many experts as any layer has.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if there is none.
    pub(crate) fn reserve_groups(&mut self, max_groups: usize) -> Result<(), BackendError> {
        self.max_groups = self.max_groups.max(max_groups);
        self.allocate()
    }

    /// Maps what is reserved, which costs memory only where it is written.
    fn allocate(&mut self) -> Result<(), BackendError> {
        self.quantised = Some(QuantisedBuffer::new(self.max_rows, self.max_features)?);
        self.strips = Some(StripBuffer::new(self.max_rows, self.max_groups.max(1), self.max_features)?);
        Ok(())
    }

    /// Makes an operand for `weight` of the first `num_rows` rows of an order of `x`.
    pub(crate) fn operand<'a>(
        &'a mut self,
        x: &'a Tensor,
        order: Order<'a>,
        num_rows: usize,
        weight: &Matrix,
        isa: Isa,
        team: &mut Team,
    ) -> Operand<'a> {
        const RESERVED: &str = "room was reserved with the tensors";
        match weight.packed() {
            None => {
                let strips = self.strips.as_mut().expect(RESERVED);
                Operand::Bf16(strips.make(x.bf16(), order, num_rows, isa, team))
            }
            Some(packed) => {
                let quantised = self.quantised.as_mut().expect(RESERVED);
                Operand::Quantised(quantised.quantise(x.bf16(), order, num_rows, packed.offset(), isa, team))
            }
        }
    }
}
