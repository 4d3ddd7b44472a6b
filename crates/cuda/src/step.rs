//! What varies from step to step: token ids, positions, block tables and the plan of attention, in one buffer that is
//! copied to the device when a step begins.

use backend::{BackendError, Batch, RouteRule};

use crate::attention::Plan;
use crate::device::{Buffer, Device};
use crate::kernels::{RuleArguments, SteeringArguments};

/// Sections start at multiples of this many numbers, 64 bytes.
const ALIGNMENT: usize = 16;

/// The step's numbers on the host and on the device.
#[derive(Default)]
pub(crate) struct StepBuffers {
    host: Vec<u32>,
    rules: Vec<RuleArguments>,
    device: Option<Buffer>,
    offsets: Offsets,
    num_tokens: usize,
    num_token_rows: usize,
    num_layers: usize,
}

/// First number of each section.
#[derive(Default)]
struct Offsets {
    token_ids: usize,
    positions: usize,
    slots: usize,
    block_tables: usize,
    logits_indices: usize,
    decode_items: usize,
    prefill_items: usize,
    folds: usize,
    token_rows: usize,
    rules: usize,
    given_ids: usize,
    given_weights: usize,
}

/// Where the sections are on the device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sections {
    pub(crate) token_ids: u64,
    pub(crate) positions: u64,
    pub(crate) slots: u64,
    pub(crate) block_tables: u64,
    pub(crate) logits_indices: u64,
    pub(crate) decode_items: u64,
    pub(crate) prefill_items: u64,
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
        let steering = &batch.steering;
        self.num_tokens = batch.num_tokens();
        (self.num_token_rows, self.num_layers) = (steering.token_rows.len(), steering.num_layers);
        self.rules.clear();
        self.rules.extend(steering.rules.iter().map(rule_arguments));
        let rules = std::mem::take(&mut self.rules);
        self.host.clear();
        self.offsets = Offsets {
            token_ids: self.push(&batch.token_ids),
            positions: self.push(&batch.positions),
            slots: self.push(&batch.slot_mapping),
            logits_indices: self.push(&batch.logits_indices),
            decode_items: self.push(bytemuck::cast_slice(&plan.decode_items)),
            prefill_items: self.push(bytemuck::cast_slice(&plan.prefill_items)),
            folds: self.push(bytemuck::cast_slice(&plan.folds)),
            // Behind the others, for its size depends on the contexts, and a recording has the addresses of all before.
            block_tables: self.push(&batch.block_tables),
            // Steered steps are not recorded.
            token_rows: self.push(&steering.token_rows),
            rules: self.push(bytemuck::cast_slice(&rules)),
            given_ids: self.push(&steering.given_ids),
            given_weights: self.push(bytemuck::cast_slice(&steering.given_weights)),
        };
        self.rules = rules;
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
            decode_items: address(self.offsets.decode_items),
            prefill_items: address(self.offsets.prefill_items),
            folds: address(self.offsets.folds),
        }
    }

    /// The rules of steered tokens in layer `layer`.
    pub(crate) fn steering(&self, layer: usize) -> SteeringArguments {
        let start = self.device.as_ref().expect("a step was begun").address;
        let address = |offset: usize| start + (offset * size_of::<u32>()) as u64;
        SteeringArguments {
            token_rows: address(self.offsets.token_rows),
            rules: address(self.offsets.rules) + (layer * size_of::<RuleArguments>()) as u64,
            given_ids: address(self.offsets.given_ids),
            given_weights: address(self.offsets.given_weights),
            num_token_rows: self.num_token_rows as i32,
            num_layers: self.num_layers as i32,
        }
    }

    fn push(&mut self, numbers: &[u32]) -> usize {
        let offset = self.host.len();
        self.host.extend_from_slice(numbers);
        self.host.resize(self.host.len().next_multiple_of(ALIGNMENT), 0);
        offset
    }
}

fn rule_arguments(rule: &RouteRule) -> RuleArguments {
    let RouteRule { banned, forced, top_k, temperature, first_given } = *rule;
    RuleArguments { banned, forced, top_k, temperature, first_given, padding: 0 }
}
