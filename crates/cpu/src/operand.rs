//! What a matrix multiplies: rows of activations in bf16, or quantised to 8 bits for quantised weights.
//!
//! Either is made once per product, right before it, in the order in which rows are multiplied: it is a small share of
//! the work, and so no verb has to know what the next one will do with its result.

mod bf16;
mod quantised;

use backend::{BackendError, Routing};

use crate::isa::Isa;
use crate::packed::Packed;
use crate::team::Team;
use crate::tensor::Tensor;
use bf16::Bf16Buffer;
pub(crate) use bf16::{BF16_SPAN_BLOCKS, Bf16Rows};
use quantised::QuantisedBuffer;
pub(crate) use quantised::{QuantisedRows, SPAN_GROUPS, SpanRows};

/// Rows of activations in the form that a matrix takes.
#[derive(Clone, Copy)]
pub(crate) enum Operand<'a> {
    Bf16(Bf16Rows<'a>),
    Quantised(QuantisedRows<'a>),
}

/// Which rows of a tensor an operand is made of.
#[derive(Clone, Copy)]
pub(crate) enum Order<'a> {
    /// All, as they lie.
    Given,
    /// Each token once per expert that it is routed to, grouped by expert.
    Gathered(&'a Routing),
}

impl<'a> Order<'a> {
    /// The tensor's row that is the operand's row `row`.
    #[inline(always)]
    pub(crate) fn source(self, row: usize) -> usize {
        match self {
            Self::Given => row,
            Self::Gathered(routing) => routing.permutation[row] as usize / routing.width,
        }
    }
}

/// Room for the largest operand in either form.
#[derive(Default)]
pub(crate) struct Scratch {
    max_rows: usize,
    max_features: usize,
    bf16: Option<Bf16Buffer>,
    quantised: Option<QuantisedBuffer>,
}

impl Scratch {
    /// Makes room for as many rows, of as many features, as any tensor has. It costs memory only where it is written.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if there is none.
    pub(crate) fn reserve(&mut self, max_rows: usize, max_features: usize) -> Result<(), BackendError> {
        self.max_rows = self.max_rows.max(max_rows);
        self.max_features = self.max_features.max(max_features);
        self.bf16 = Some(Bf16Buffer::new(self.max_rows, self.max_features)?);
        self.quantised = Some(QuantisedBuffer::new(self.max_rows, self.max_features)?);
        Ok(())
    }

    /// Makes an operand for `weight` of the first `num_rows` rows of an order of `x`.
    pub(crate) fn operand<'a>(
        &'a mut self,
        x: &Tensor,
        order: Order<'_>,
        num_rows: usize,
        weight: &Packed,
        isa: Isa,
        team: &mut Team,
    ) -> Operand<'a> {
        const RESERVED: &str = "room was reserved with the tensors";
        match weight.offset() {
            None => {
                let bf16 = self.bf16.as_mut().expect(RESERVED);
                Operand::Bf16(bf16.copy(x.bf16(), order, num_rows, isa, team))
            }
            Some(offset) => {
                let quantised = self.quantised.as_mut().expect(RESERVED);
                Operand::Quantised(quantised.quantise(x.bf16(), order, num_rows, offset, isa, team))
            }
        }
    }
}
