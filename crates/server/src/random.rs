//! Numbers that nobody can guess, for ids and for seeds that a client leaves to us.

use std::hash::{BuildHasher, RandomState};

/// 64 bits from the standard library's own source: SipHash under keys that the system drew.
pub(crate) fn bits() -> u64 {
    RandomState::new().hash_one(0)
}

/// A fresh name: `prefix` and 32 hexadecimal digits.
pub(crate) fn id(prefix: &str) -> String {
    format!("{prefix}{:016x}{:016x}", bits(), bits())
}

/// A fresh name of nine letters and digits, the form that Mistral's templates want of a tool call's id.
pub(crate) fn call_id() -> String {
    const ALPHABET: &[u8; 62] = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    let digits = std::iter::successors(Some(bits()), |rest| Some(rest / 62));
    digits.take(9).map(|rest| char::from(ALPHABET[(rest % 62) as usize])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_fresh_and_of_the_promised_form() {
        assert_ne!(id("x-"), id("x-"));
        assert_eq!(id("x-").len(), 34);
        let call = call_id();
        assert!(call.len() == 9 && call.bytes().all(|byte| byte.is_ascii_alphanumeric()), "{call}");
    }
}
