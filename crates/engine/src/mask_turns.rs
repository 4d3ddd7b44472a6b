//! Whose masks are made before a step, so that a grammar that takes long holds up few others, and nobody for long.
//!
//! A mask takes microseconds, or milliseconds where somebody means harm, and the engine's thread makes them all. Before
//! a step it does for [`TIME_PER_STEP`], and ends the mask that it is at; a sequence whose mask is still to be made
//! sits the step out. That delays its tokens and changes none of them. Turns are fair in time, not in number: next is
//! whoever's turn will end first on an account of the time that each has taken (fair queueing; a turn takes as long as
//! the one before it), so that a mask of 20 µs does not wait behind a hundred of 10 ms.

use std::time::Duration;

use crate::config::Clock;
use crate::sequence::Sequence;

/// Time after which no further mask is begun before a step. Enough for the masks of 100 honest grammars.
pub(crate) const TIME_PER_STEP: Duration = Duration::from_millis(5);
/// What a sequence's first turn is taken to need: more than most, so that newcomers do not hold up who is known.
const FIRST_TURN: Duration = Duration::from_millis(1);

/// The order of turns.
#[derive(Debug, Default)]
pub(crate) struct MaskTurns {
    /// When the last turn began, in the time of accounts. Whoever's account is behind has let turns go by.
    begun_at: Duration,
}

/// A sequence's turns.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MaskAccount {
    /// When its last turn ended.
    ended_at: Duration,
    /// What that took.
    took: Duration,
}

impl Default for MaskAccount {
    fn default() -> Self {
        Self { ended_at: Duration::ZERO, took: FIRST_TURN }
    }
}

impl MaskTurns {
    /// Gives turns to those of `sequences` that are due, one of them at least.
    pub(crate) fn take<'a>(&mut self, sequences: impl Iterator<Item = &'a mut Sequence>, clock: &Clock) {
        let mut due: Vec<&mut Sequence> = sequences.filter(|sequence| sequence.is_mask_due()).collect();
        if due.is_empty() {
            return;
        }
        due.sort_unstable_by_key(|sequence| {
            let MaskAccount { ended_at, took } = sequence.mask_account;
            (self.begun_at.max(ended_at) + took, sequence.key)
        });
        let started_at = clock();
        let mut now = started_at;
        for sequence in due {
            if now.saturating_sub(started_at) >= TIME_PER_STEP {
                return;
            }
            sequence.make_mask();
            let took = clock().saturating_sub(now);
            self.begun_at = self.begun_at.max(sequence.mask_account.ended_at);
            sequence.mask_account = MaskAccount { ended_at: self.begun_at + took, took };
            now += took;
        }
    }
}
