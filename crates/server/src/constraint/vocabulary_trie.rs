//! The vocabulary as llguidance walks it: a trie of the bytes that tokens add to a text.
//!
//! Control tokens have no bytes here, so that no grammar can ask for one; only the ends of sequence are taken
//! where a text may end. The byte 0xFF, which no UTF-8 has, is llguidance's own mark and left out.

use std::sync::Arc;

use llguidance::toktrie::{ApproximateTokEnv, INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie};

use crate::text::vocabulary::{Piece, Vocabulary};

/// The trie, and the mask of all tokens that it can ever allow.
pub(super) struct VocabularyTrie {
    pub(super) env: TokEnv,
    /// Text and ends of sequence.
    pub(super) permitted: Arc<[u32]>,
}

impl VocabularyTrie {
    /// Builds the trie of a model's first `vocab_size` tokens.
    pub(super) fn new(vocabulary: &Vocabulary, eos_token_ids: &[u32], vocab_size: usize) -> Self {
        let words: Vec<Vec<u8>> = (0..vocab_size as u32).map(|id| word(vocabulary.piece(id))).collect();
        let ends: Vec<u32> = eos_token_ids.iter().copied().filter(|&id| (id as usize) < vocab_size).collect();
        let mut permitted = vec![0; vocab_size.div_ceil(u32::BITS as usize)];
        let texts = (0..).zip(&words).filter(|(_, word)| !word.is_empty()).map(|(id, _)| id);
        for id in texts.chain(ends.iter().copied()) {
            permitted[(id / u32::BITS) as usize] |= 1 << (id % u32::BITS);
        }
        let trie = TokTrie::from(&TokRxInfo::new(vocab_size as u32, INVALID_TOKEN), &words);
        let trie = if ends.is_empty() { trie } else { trie.with_eos_tokens(&ends) };
        Self { env: Arc::new(ApproximateTokEnv::new(trie)), permitted: permitted.into() }
    }
}

fn word(piece: &Piece) -> Vec<u8> {
    let bytes = match piece {
        Piece::Control(_) => Vec::new(),
        Piece::Text(bytes) => bytes.to_vec(),
        Piece::Byte(byte) => vec![*byte],
    };
    if bytes.contains(&TokTrie::SPECIAL_TOKEN_MARKER) { Vec::new() } else { bytes }
}
