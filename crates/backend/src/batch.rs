//! The ragged batch of one step: which tokens of which sequences are computed, and where their keys and
//! values live in the paged cache.
//!
//! There is no prefill phase and no decode phase. A sequence contributes a chunk of one or more tokens
//! (its query); the chunk attends to everything that the sequence has in the cache, itself included.
//!
//! ```text
//! token_ids        a0 a1 a2 a3 | b0 | c0 c1        three sequences, 4 + 1 + 2 tokens
//! query_start_loc  0             4    5      7     [num_seqs + 1]
//! seq_lens         4             19   130          tokens in the cache after this step
//! positions        0  1  2  3  | 18 | 128 129
//! ```

use crate::steering::{Steering, StepSteering};

/// The tokens of one step, token-major, sequences one after another.
///
/// All lengths are in tokens. The padding block of the cache is block 0; no sequence owns it.
#[derive(Debug, Default, PartialEq)]
pub struct Batch {
    /// `[num_tokens]` token ids.
    pub token_ids: Vec<u32>,
    /// `[num_tokens]` position of each token in its sequence.
    pub positions: Vec<u32>,
    /// `[num_tokens]` cache slot of each token: `block * block_size + offset`.
    pub slot_mapping: Vec<u32>,
    /// `[num_seqs + 1]` offset of each sequence's first token; the last entry is `num_tokens`.
    pub query_start_loc: Vec<u32>,
    /// `[num_seqs]` tokens each sequence has in the cache after this step.
    pub seq_lens: Vec<u32>,
    /// Block ids of all sequences, concatenated.
    pub block_tables: Vec<u32>,
    /// `[num_seqs + 1]` offset of each sequence's first entry in `block_tables`.
    pub block_table_start_loc: Vec<u32>,
    /// `[num_logits]` indices of the tokens whose logits are wanted, ascending, each once.
    pub logits_indices: Vec<u32>,
    /// The tokens whose routing is steered.
    pub steering: StepSteering,
    /// The choices of all routers are wanted, for all tokens in all layers.
    pub records_routing: bool,
}

impl Clone for Batch {
    fn clone(&self) -> Self {
        let mut batch = Self::default();
        batch.clone_from(self);
        batch
    }

    /// Keeps this batch's allocations, so that a backend can take over a step's batch without making any.
    fn clone_from(&mut self, source: &Self) {
        self.token_ids.clone_from(&source.token_ids);
        self.positions.clone_from(&source.positions);
        self.slot_mapping.clone_from(&source.slot_mapping);
        self.query_start_loc.clone_from(&source.query_start_loc);
        self.seq_lens.clone_from(&source.seq_lens);
        self.block_tables.clone_from(&source.block_tables);
        self.block_table_start_loc.clone_from(&source.block_table_start_loc);
        self.logits_indices.clone_from(&source.logits_indices);
        self.steering.clone_from(&source.steering);
        self.records_routing = source.records_routing;
    }
}

/// The sizes that shape a step's launches, and nothing else about it.
///
/// A backend may round them up to a bucket so that a captured graph can be replayed; rows beyond the batch
/// are padding whose results nobody reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StepShape {
    /// Rows of the token-wise verbs.
    pub num_tokens: usize,
    /// Sequences in the batch.
    pub num_seqs: usize,
    /// Rows of the verbs after `gather_rows`.
    pub num_logits: usize,
    /// Most experts that a token visits in a layer, if some tokens are steered; 0 if none is.
    pub steered_experts_per_token: usize,
    /// The last layer routes all tokens, and not only those whose logits are wanted.
    pub routes_all_tokens: bool,
}

impl Batch {
    /// Starts an empty batch, ready for [`Batch::push_sequence`].
    pub fn new() -> Self {
        Self { query_start_loc: vec![0], block_table_start_loc: vec![0], ..Self::default() }
    }

    /// Empties the batch and keeps its allocations.
    pub fn clear(&mut self) {
        self.token_ids.clear();
        self.positions.clear();
        self.slot_mapping.clear();
        self.query_start_loc.truncate(1);
        self.seq_lens.clear();
        self.block_tables.clear();
        self.block_table_start_loc.truncate(1);
        self.logits_indices.clear();
        self.steering.clear();
        self.records_routing = false;
    }

    /// Appends one sequence's chunk: `tokens` follow the `num_computed_tokens` that the cache already holds.
    ///
    /// # Panics
    /// If the chunk is empty or `block_table` is too short for the sequence after the chunk.
    pub fn push_sequence(
        &mut self,
        tokens: &[u32],
        num_computed_tokens: u32,
        block_table: &[u32],
        block_size: u32,
    ) {
        let seq_len = num_computed_tokens + tokens.len() as u32;
        assert!(!tokens.is_empty(), "a sequence in a batch has at least one token");
        assert!(seq_len.div_ceil(block_size) as usize <= block_table.len());

        self.token_ids.extend_from_slice(tokens);
        for position in num_computed_tokens..seq_len {
            let block = block_table[(position / block_size) as usize];
            self.positions.push(position);
            self.slot_mapping.push(block * block_size + position % block_size);
        }
        self.query_start_loc.push(self.token_ids.len() as u32);
        self.seq_lens.push(seq_len);
        self.block_tables.extend_from_slice(block_table);
        self.block_table_start_loc.push(self.block_tables.len() as u32);
    }

    /// Steers the routing of the sequence that was pushed last.
    pub fn steer_last_sequence(&mut self, steering: &Steering) {
        let query = self.query_range(self.num_seqs() - 1);
        self.steering.push(steering, query.start, &self.positions[query]);
    }

    /// Number of tokens in the batch.
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// Number of sequences in the batch.
    pub fn num_seqs(&self) -> usize {
        self.seq_lens.len()
    }

    /// The exact sizes of this batch, before any backend rounds them up.
    pub fn shape(&self) -> StepShape {
        StepShape {
            num_tokens: self.num_tokens(),
            num_seqs: self.num_seqs(),
            num_logits: self.logits_indices.len(),
            steered_experts_per_token: self.steering.experts_per_token,
            // Where all logits are wanted there is no difference.
            routes_all_tokens: (self.records_routing || !self.steering.is_empty())
                && self.logits_indices.len() < self.num_tokens(),
        }
    }

    /// Range of token rows that belong to sequence `seq_index`.
    pub fn query_range(&self, seq_index: usize) -> std::ops::Range<usize> {
        self.query_start_loc[seq_index] as usize..self.query_start_loc[seq_index + 1] as usize
    }

    /// Block table of sequence `seq_index`.
    pub fn block_table(&self, seq_index: usize) -> &[u32] {
        let start = self.block_table_start_loc[seq_index] as usize;
        &self.block_tables[start..self.block_table_start_loc[seq_index + 1] as usize]
    }

    /// Checks the invariants that every backend relies on.
    ///
    /// # Panics
    /// If one does not hold: such a batch is a bug of its maker, never the fault of a request.
    pub fn assert_valid(&self, block_size: u32, num_blocks: u32) {
        let num_tokens = self.num_tokens();
        assert_eq!(self.positions.len(), num_tokens);
        assert_eq!(self.slot_mapping.len(), num_tokens);
        assert_eq!(self.query_start_loc.len(), self.num_seqs() + 1);
        assert_eq!(self.block_table_start_loc.len(), self.num_seqs() + 1);
        assert_eq!(self.query_start_loc.last().map(|&n| n as usize), Some(num_tokens));
        assert!(self.block_tables.iter().all(|&block| block < num_blocks));
        assert!(self.slot_mapping.iter().all(|&slot| slot / block_size < num_blocks));
        assert!(self.logits_indices.is_sorted_by(|a, b| a < b));
        assert!(self.logits_indices.iter().all(|&row| (row as usize) < num_tokens));
        for seq_index in 0..self.num_seqs() {
            let query = self.query_range(seq_index);
            let seq_len = self.seq_lens[seq_index];
            assert!(!query.is_empty() && query.len() as u32 <= seq_len);
            assert_eq!(self.positions[query.end - 1] + 1, seq_len);
            assert!(self.block_table(seq_index).len() as u32 * block_size >= seq_len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pushed_sequences_map_positions_to_slots() {
        let mut batch = Batch::new();
        batch.push_sequence(&[7, 8, 9], 3, &[5, 2], 4);
        batch.push_sequence(&[1], 0, &[3], 4);
        assert_eq!(batch.positions, [3, 4, 5, 0]);
        assert_eq!(batch.slot_mapping, [23, 8, 9, 12]);
        assert_eq!(batch.query_range(1), 3..4);
        assert_eq!(batch.block_table(0), [5, 2]);
        batch.assert_valid(4, 6);

        batch.clear();
        assert_eq!(batch, Batch::new());
    }
}
