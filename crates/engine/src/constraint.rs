//! What bounds a choice beyond its request: after each token, the tokens that may follow.
//!
//! The engine knows token ids only. Whoever submits a request makes its constraints, out of a grammar or
//! anything else, and the choice that owns one is the only one to move it: a token is accepted once, when it
//! is taken. Preemption computes tokens again and takes none, so a constraint is never set back.

/// The tokens that a text may be made of, one after the other.
pub trait Constraint: Send {
    /// The tokens that may come next: bit `t % 32` of word `t / 32` is token `t`, and what lies behind the last
    /// word may not. An end of sequence is among them only where the text may end. `None`: any token may.
    ///
    /// Nothing at all means that the constraint has failed; its choice ends with
    /// [`FinishReason::Error`](crate::FinishReason::Error). Not asked for while [`is_due`](Self::is_due).
    fn allowed(&self) -> Option<&[u32]>;

    /// Moves on to the place behind `token`, which was allowed and is no end of sequence. What takes time is left
    /// to [`prepare`](Self::prepare).
    fn accept(&mut self, token: u32);

    /// Whether what is allowed is still to be found out.
    fn is_due(&self) -> bool;

    /// Finds out what is allowed; called once where it is due, before a step or a later one.
    fn prepare(&mut self);

    /// Whether the text is complete and could only end: its choice then does, without an end of sequence.
    fn is_complete(&self) -> bool;
}

/// What a constraint leaves when some tokens are banned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Left {
    /// A token to take.
    Some,
    /// Nothing but what is banned.
    Banned,
    /// Nothing at all.
    Nothing,
}

/// Looks for a token that is allowed and not banned.
pub(crate) fn left(allowed: &[u32], banned: &[u32]) -> Left {
    if allowed.iter().all(|&word| word == 0) {
        return Left::Nothing;
    }
    let without = |(index, &word): (usize, &u32)| {
        let of_word = banned.iter().filter(|&&token| token / u32::BITS == index as u32);
        of_word.fold(word, |word, &token| word & !(1 << (token % u32::BITS)))
    };
    if allowed.iter().enumerate().map(without).any(|word| word != 0) { Left::Some } else { Left::Banned }
}

/// Whether `token` is in a mask.
pub(crate) fn is_allowed(allowed: &[u32], token: u32) -> bool {
    allowed.get((token / u32::BITS) as usize).is_some_and(|word| word >> (token % u32::BITS) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_allowed_and_not_banned() {
        let check = |allowed: &[u32], banned: &[u32], expected: Left| {
            assert_eq!(left(allowed, banned), expected, "{allowed:?} without {banned:?}");
        };
        check(&[], &[], Left::Nothing);
        check(&[0, 0], &[1], Left::Nothing);
        check(&[0, 4], &[2, 33], Left::Some);
        check(&[0, 4], &[2, 34, 34], Left::Banned);
        check(&[1, 4], &[34], Left::Some);
        assert!(is_allowed(&[0, 4], 34) && !is_allowed(&[0, 4], 2) && !is_allowed(&[0, 4], 64));
    }
}
