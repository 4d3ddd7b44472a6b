//! A constraint for tests: which tokens may follow is a hash of those before, so that a token that is lost,
//! repeated or taken against it changes all that comes after.

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
}

impl Grammar {
    pub(crate) fn start(self, choice: u32) -> FakeConstraint {
        let state = mix64(self.seed ^ u64::from(choice));
        let mut constraint = FakeConstraint { grammar: self, state, num_tokens: 0, mask: Vec::new() };
        constraint.renew();
        constraint
    }
}

pub(crate) struct FakeConstraint {
    grammar: Grammar,
    state: u64,
    num_tokens: u32,
    mask: Vec<u32>,
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
        Some(&self.mask)
    }

    fn accept(&mut self, token: u32) {
        assert!(self.mask[0] >> token & 1 == 1, "only what is allowed is taken");
        self.state = mix64(self.state ^ u64::from(token));
        self.num_tokens += 1;
        self.renew();
    }

    fn is_complete(&self) -> bool {
        self.num_tokens == self.grammar.max_len
    }
}
