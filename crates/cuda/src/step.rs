//! What varies from step to step: token ids, positions, block tables and the plan of attention, in one buffer that is
//! copied to the device when a step begins.

use backend::{BackendError, Batch};

use crate::attention::Plan;
use crate::device::{Buffer, Device};

/// Sections start at multiples of this many numbers, 64 bytes.
const ALIGNMENT: usize = 16;

/// The step's numbers on the host and on the device.
#[derive(Default)]
pub(crate) struct StepBuffers {
    host: Vec<u32>,
    device: Option<Buffer>,
    offsets: Offsets,
    num_tokens: usize,
}

/// First number of each section.
#[derive(Default)]
struct Offsets {
    token_ids: usize,
    positions: usize,
    slots: usize,
    block_tables: usize,
    logits_indices: usize,
    items: usize,
    folds: usize,
}

/// Where the sections are on the device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sections {
    pub(crate) token_ids: u64,
    pub(crate) positions: u64,
    pub(crate) slots: u64,
    pub(crate) block_tables: u64,
    pub(crate) logits_indices: u64,
    pub(crate) items: u64,
    pub(crate) folds: u64,
}

impl StepBuffers {
    /// Copies a step to the device; the last step must have been waited for.
    pub(crate) fn write(
        &mut self,
        device: &mut Device,
        batch: &Batch,
        plan: &Plan,
    ) -> Result<(), BackendError> {
        self.num_tokens = batch.num_tokens();
        self.host.clear();
        self.offsets = Offsets {
            token_ids: self.push(&batch.token_ids),
            positions: self.push(&batch.positions),
            slots: self.push(&batch.slot_mapping),
            logits_indices: self.push(&batch.logits_indices),
            items: self.push(bytemuck::cast_slice(&plan.items)),
            folds: self.push(bytemuck::cast_slice(&plan.folds)),
            // Last, for its size depends on the contexts, and a recording has the addresses of all others.
            block_tables: self.push(&batch.block_tables),
        };
        let num_bytes = size_of_val(&self.host[..]);
        let buffer = match self.device.take() {
            Some(buffer) if buffer.num_bytes() >= num_bytes => buffer,
            // Grows a few times while the first steps run, and never again.
            _ => device.allocate("a step's tokens and block tables", num_bytes.next_power_of_two())?,
        };
        device.write_later(self.device.insert(buffer), 0, &self.host);
        Ok(())
    }

    /// Tokens of the step.
    pub(crate) fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// Where the sections are.
    ///
    /// # Panics
    /// Before the first step.
    pub(crate) fn sections(&self) -> Sections {
        let start = self.device.as_ref().expect("a step was begun").address;
        let address = |offset: usize| start + (offset * size_of::<u32>()) as u64;
        Sections {
            token_ids: address(self.offsets.token_ids),
            positions: address(self.offsets.positions),
            slots: address(self.offsets.slots),
            block_tables: address(self.offsets.block_tables),
            logits_indices: address(self.offsets.logits_indices),
            items: address(self.offsets.items),
            folds: address(self.offsets.folds),
        }
    }

    fn push(&mut self, numbers: &[u32]) -> usize {
        let offset = self.host.len();
        self.host.extend_from_slice(numbers);
        self.host.resize(self.host.len().next_multiple_of(ALIGNMENT), 0);
        offset
    }
}
