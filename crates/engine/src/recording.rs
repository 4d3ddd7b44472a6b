//! What a sequence's tokens were routed to, collected from its steps until its reader is told.
//!
//! A position is recorded once, however often it is computed: a preempted sequence goes on where it was, and the
//! positions that are still wanted are never taken from the prefix cache. This file does not decide when to tell.

use std::ops::Range;

use model::{LayerChoices, RoutingRecord};

/// Which routing a request wants to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordRouting {
    /// Layers, ascending, each once.
    pub layers: Vec<u32>,
    /// From the first token on (choice 0 only), and not only from the prompt's last: the token whose successor is the
    /// first to be generated.
    pub prompt: bool,
}

/// The record of one sequence.
#[derive(Debug)]
pub(crate) struct Recording {
    /// Begins where the reader was told last.
    pending: RoutingRecord,
}

impl Recording {
    /// Begins a record with position `start`, of layers that route a token to `width` experts at most.
    pub(crate) fn new(start: usize, layers: Vec<u32>, width: usize) -> Self {
        Self { pending: RoutingRecord::new(start as u32, layers, width) }
    }

    /// The next position that is wanted.
    pub(crate) fn next_position(&self) -> usize {
        self.pending.end() as usize
    }

    /// Takes in what a step chose for the positions `chunk`, the first of which is its token `first_token`.
    pub(crate) fn extend(&mut self, choices: &[LayerChoices], first_token: usize, chunk: Range<usize>) {
        for position in chunk.start.max(self.next_position())..chunk.end {
            let token = first_token + position - chunk.start;
            for index in 0..self.pending.layers.len() {
                let (ids, weights) = choices[self.pending.layers[index] as usize].of(token);
                self.pending.push_choice(ids, weights);
            }
        }
    }

    /// What was recorded since the last call, if anything.
    pub(crate) fn take(&mut self) -> Option<RoutingRecord> {
        if self.pending.num_tokens() == 0 {
            return None;
        }
        let next = RoutingRecord::new(self.pending.end(), self.pending.layers.clone(), self.pending.width);
        Some(std::mem::replace(&mut self.pending, next))
    }
}
