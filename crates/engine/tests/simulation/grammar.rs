//! A constraint for tests: which tokens may follow is a hash of those before, so that a token that is lost,
//! repeated or taken against it changes all that comes after.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use engine::Constraint;
use model::mix64;

use crate::scenario::{EOS, VOCAB_SIZE};

/// What a world's constraints are drawn from; equal ones bound equal texts alike.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grammar {
    pub(crate) seed: u64,
    /// Tokens after which the text is complete.
    pub(crate) max_len: u32,
    /// Tokens after which nothing may follow, not even an end.
    pub(crate) fails_at: u32,
    /// Time that a mask takes.
    pub(crate) mask_us: u64,
}

impl Grammar {
    /// Begins a text; its masks move the hand of a clock.
    pub(crate) fn start(self, choice: u32, now_us: Arc<AtomicU64>) -> FakeConstraint {
        let state = mix64(self.seed ^ u64::from(choice));
        let mask = Vec::new();
        let mut constraint =
            FakeConstraint { grammar: self, state, num_tokens: 0, mask, is_due: false, now_us };
        constraint.renew();
        constraint
    }
}

pub(crate) struct FakeConstraint {
    grammar: Grammar,
    state: u64,
    num_tokens: u32,
    mask: Vec<u32>,
    is_due: bool,
    now_us: Arc<AtomicU64>,
}

impl FakeConstraint {
    fn renew(&mut self) {
        let hash = mix64(self.state);
        // A few of the vocabulary's tokens; the end is one of them in a third of all places.
        let text = (hash & hash >> 32) as u32 & !(1 << EOS) & ((1 << VOCAB_SIZE) - 1);
        let end = u32::from(hash.is_multiple_of(3)) << EOS;
        let is_stuck = text == 0 && end == 0;
        let word = if is_stuck { 1 << EOS } else { text | end };
        self.mask = if self.num_tokens == self.grammar.fails_at { Vec::new() } else { vec![word] };
    }
}

impl Constraint for FakeConstraint {
    fn allowed(&self) -> Option<&[u32]> {
        assert!(!self.is_due, "a mask is looked at when it has been made");
        Some(&self.mask)
    }

    fn accept(&mut self, token: u32) {
        assert!(!self.is_due && self.mask[0] >> token & 1 == 1, "only what is allowed is taken");
        self.state = mix64(self.state ^ u64::from(token));
        self.num_tokens += 1;
        self.is_due = true;
    }

    fn is_due(&self) -> bool {
        self.is_due
    }

    fn prepare(&mut self) {
        assert!(std::mem::take(&mut self.is_due), "a mask is made once");
        self.now_us.fetch_add(self.grammar.mask_us, Relaxed);
        self.renew();
    }

    fn is_complete(&self) -> bool {
        self.num_tokens == self.grammar.max_len
    }
}
