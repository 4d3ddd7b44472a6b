//! Names for the contents of cache blocks: a keyed 128-bit hash of a full block's tokens, chained to all
//! tokens before it.
//!
//! ```text
//! root(scope) ──► hash(root, tokens 0..16) ──► hash(that, tokens 16..32) ──► ...
//! ```
//!
//! Two blocks of one name hold the same keys and values, because these depend on nothing but the tokens up
//! to and including the block. Tokens are not compared on a hit: the hash is a SipHash with a random key
//! that never leaves the process, so nobody can search for two prompts of one name, and by chance 2^40
//! blocks hold such a pair with a probability below 2^-48. The root binds a chain to whom it may be shown.

use std::hash::{BuildHasher, Hasher, RandomState};

use siphasher::sip128::{Hasher128, SipHasher13};

/// The name of a full block's contents and of all that precedes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct BlockHash(u128);

/// Who may share a chain of blocks.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Scope<'a> {
    /// All requests with this `cache_salt`, or all without one.
    Salt(Option<&'a str>),
    /// The choices of one submission.
    Submission(u64),
}

/// Computes [`BlockHash`]es under one key.
#[derive(Debug, Clone)]
pub(crate) struct BlockHasher {
    keyed: SipHasher13,
}

impl BlockHasher {
    /// Makes a hasher with a key of its own, which the operating system's randomness seeds.
    pub(crate) fn new() -> Self {
        let random = RandomState::new();
        Self { keyed: SipHasher13::new_with_keys(random.hash_one(0u64), random.hash_one(1u64)) }
    }

    /// The parent of a chain's first block.
    pub(crate) fn root(&self, scope: Scope<'_>) -> BlockHash {
        // The first byte tells the three kinds apart, whatever bytes follow.
        let mut hasher = self.keyed;
        match scope {
            Scope::Salt(None) => hasher.write(&[0]),
            Scope::Salt(Some(salt)) => {
                hasher.write(&[1]);
                hasher.write(salt.as_bytes());
            }
            Scope::Submission(number) => {
                hasher.write(&[2]);
                hasher.write(&number.to_ne_bytes());
            }
        }
        BlockHash(hasher.finish128().as_u128())
    }

    /// The block of `tokens` that follows `parent`.
    pub(crate) fn child(&self, parent: BlockHash, tokens: &[u32]) -> BlockHash {
        let mut hasher = self.keyed;
        hasher.write(&parent.0.to_ne_bytes());
        hasher.write(bytemuck::cast_slice(tokens));
        BlockHash(hasher.finish128().as_u128())
    }
}

/// Spares a map over [`BlockHash`]es from hashing what is a keyed hash already.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct AlreadyHashed(u64);

impl Hasher for AlreadyHashed {
    fn write_u128(&mut self, hash: u128) {
        self.0 = hash as u64; // The low half is as random as the whole.
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("a block hash is written as one u128");
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_depends_on_the_scope_and_on_every_token_up_to_the_block() {
        let hasher = BlockHasher::new();
        let name = |scope, first: &[u32], second: &[u32]| {
            hasher.child(hasher.child(hasher.root(scope), first), second)
        };
        let base = name(Scope::Salt(None), &[1, 2], &[3, 4]);
        assert_eq!(base, name(Scope::Salt(None), &[1, 2], &[3, 4]));
        let others = [
            name(Scope::Salt(None), &[1, 2], &[3, 5]),
            name(Scope::Salt(None), &[0, 2], &[3, 4]),
            name(Scope::Salt(None), &[2, 1], &[3, 4]),
            name(Scope::Salt(Some("")), &[1, 2], &[3, 4]),
            name(Scope::Salt(Some("a")), &[1, 2], &[3, 4]),
            name(Scope::Submission(0), &[1, 2], &[3, 4]),
            name(Scope::Submission(1), &[1, 2], &[3, 4]),
            BlockHasher::new().child(base, &[]),
        ];
        for (i, other) in others.iter().enumerate() {
            assert_ne!(base, *other, "{i}");
            assert!(!others[..i].contains(other), "{i}");
        }
    }
}
