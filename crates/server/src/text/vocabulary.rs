//! What each token adds to a text, tabulated once when a model is loaded.
//!
//! Hugging Face's `tokenizer.json` describes decoding as a chain of passes over all tokens. Both chains that
//! Llama and Mistral models use act on each token by itself, except for bytes that only together make a
//! character and for the space at the start; so a table of pieces replaces the chain, and streaming needs no
//! second look at earlier tokens.

use serde_json::Value;
use tokenizers::Tokenizer;

use super::model::TextError;

/// The pieces of all tokens, and how pieces join.
#[derive(Debug)]
pub(crate) struct Vocabulary {
    pieces: Vec<Piece>,
    pub(crate) joining: Joining,
}

/// What one token adds to a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Piece {
    /// Nothing: a control token, or an id that the tokenizer does not know.
    Control(Box<str>),
    /// Bytes of text; a part of a character only under [`Joining::Bytes`].
    Text(Box<[u8]>),
    /// One byte of a character that has no token of its own (`<0xE2>`).
    Byte(u8),
}

/// How the pieces of a text become characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Joining {
    /// Llama 2, Mistral, Mixtral: text, and single bytes where a character has no token.
    ByteFallback {
        /// A space at the very start of a text is not shown.
        strips_first_space: bool,
    },
    /// Llama 3, Mistral Nemo: every token is a string of bytes.
    Bytes,
}

impl Vocabulary {
    /// Tabulates a tokenizer; `decoder` is that entry of its `tokenizer.json`.
    ///
    /// # Errors
    /// If the decoder is of a kind that is not known here.
    pub(crate) fn new(tokenizer: &Tokenizer, decoder: &Value) -> Result<Self, TextError> {
        let joining = joining(decoder)?;
        let len = tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id + 1);
        let pieces = (0..len).map(|id| piece(tokenizer, joining, id)).collect();
        Ok(Self { pieces, joining })
    }

    /// What token `id` adds to a text.
    pub(crate) fn piece(&self, id: u32) -> &Piece {
        static UNKNOWN: std::sync::LazyLock<Piece> = std::sync::LazyLock::new(|| Piece::Control("".into()));
        self.pieces.get(id as usize).unwrap_or(&UNKNOWN)
    }

    /// Whether token `id` adds nothing to a text.
    pub(crate) fn is_control(&self, id: u32) -> bool {
        matches!(self.piece(id), Piece::Control(_))
    }
}

/// Recognises `Sequence[Replace ▁, ByteFallback, Fuse, Strip]` (the last optional) and `ByteLevel`.
fn joining(decoder: &Value) -> Result<Joining, TextError> {
    let kind = |decoder: &Value| decoder["type"].as_str().unwrap_or("none").to_owned();
    if kind(decoder) == "ByteLevel" {
        return Ok(Joining::Bytes);
    }
    let steps = decoder["decoders"].as_array().map(Vec::as_slice).unwrap_or_default();
    let kinds: Vec<String> = steps.iter().map(kind).collect();
    let is_replace = |step: &Value| step["pattern"]["String"] == "▁" && step["content"] == " ";
    let is_strip = |step: &Value| step["content"] == " " && step["start"] == 1 && step["stop"] == 0;
    match kinds.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["Replace", "ByteFallback", "Fuse"] if is_replace(&steps[0]) => {
            Ok(Joining::ByteFallback { strips_first_space: false })
        }
        ["Replace", "ByteFallback", "Fuse", "Strip"] if is_replace(&steps[0]) && is_strip(&steps[3]) => {
            Ok(Joining::ByteFallback { strips_first_space: true })
        }
        _ => Err(TextError::Decoder(decoder.to_string().chars().take(200).collect())),
    }
}

fn piece(tokenizer: &Tokenizer, joining: Joining, id: u32) -> Piece {
    let Some(token) = tokenizer.id_to_token(id) else {
        return Piece::Control("".into());
    };
    if tokenizer.get_added_vocabulary().is_special_token(&token) {
        return Piece::Control(token.into());
    }
    match joining {
        Joining::Bytes => Piece::Text(byte_level_bytes(&token).into()),
        Joining::ByteFallback { .. } => match fallback_byte(&token) {
            Some(byte) => Piece::Byte(byte),
            None => Piece::Text(token.replace('▁', " ").into_bytes().into()),
        },
    }
}

/// The byte that a token such as `<0x0A>` stands for.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// The bytes of a token in GPT-2's spelling, which writes each byte as a printable character; a token with
/// any other character stands for itself.
fn byte_level_bytes(token: &str) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = token.chars().map(byte_of_printable).collect();
    bytes.unwrap_or_else(|| token.as_bytes().to_vec())
}

/// Inverts GPT-2's `bytes_to_unicode`: printable bytes of Latin-1 stand for themselves, the other 68 are
/// U+0100 and up in ascending order.
fn byte_of_printable(c: char) -> Option<u8> {
    let is_printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    match u32::from(c) {
        code @ 0..=0xFF => u8::try_from(code).ok().filter(is_printable),
        code => (0..=u8::MAX).filter(|byte| !is_printable(byte)).nth(code as usize - 0x100),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn printable_characters_invert_gpt2s_table() {
        let check = |c: char, byte: Option<u8>| assert_eq!(byte_of_printable(c), byte, "{c:?}");
        check('A', Some(b'A'));
        check('Ġ', Some(b' '));
        check('Ċ', Some(b'\n'));
        check('ł', Some(0xA0));
        check('Ń', Some(0xAD));
        check('ń', None);
        check(' ', None);
    }

    #[test]
    fn decoders_are_recognised_or_refused() {
        let replace = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
        let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
        let (fallback, fuse) = (json!({"type": "ByteFallback"}), json!({"type": "Fuse"}));
        let llama = json!({"type": "Sequence", "decoders": [replace, fallback, fuse, strip]});
        assert_eq!(joining(&llama).unwrap(), Joining::ByteFallback { strips_first_space: true });
        let plain = json!({"type": "Sequence", "decoders": [replace, fallback, fuse]});
        assert_eq!(joining(&plain).unwrap(), Joining::ByteFallback { strips_first_space: false });
        assert_eq!(joining(&json!({"type": "ByteLevel"})).unwrap(), Joining::Bytes);
        for other in
            [json!({"type": "WordPiece"}), json!(null), json!({"type": "Sequence", "decoders": [fuse]})]
        {
            assert!(joining(&other).is_err(), "{other}");
        }
    }

    #[test]
    fn byte_tokens_are_exactly_six_characters() {
        for (token, byte) in [("<0x0A>", Some(10)), ("<0xfF>", Some(255)), ("<0x0>", None), ("<0x00A>", None)]
        {
            assert_eq!(fallback_byte(token), byte, "{token}");
        }
    }
}
