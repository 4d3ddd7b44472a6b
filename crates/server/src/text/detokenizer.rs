//! From token ids to text, one token at a time: what has been shown is never taken back, and no character is
//! ever cut.
//!
//! Bytes that do not yet make a character wait for the next token; at the end they become U+FFFD, as in a
//! decode of the whole. The sum of all increments is Hugging Face's `decode(ids, skip_special_tokens=True)`,
//! with one exception. Its `ByteFallback` replaces *every* byte of a run of byte tokens if any of them is
//! invalid, also characters of that run which were complete before. To equal it even there, a stream would
//! have to show nothing until each run ends (a newline is such a token, and some scripts are nothing else).
//! Here what is complete is shown at once, and only what follows in a broken run becomes U+FFFD.

use std::sync::Arc;

use super::vocabulary::{Joining, Piece, Vocabulary};

const REPLACEMENT: &str = "\u{FFFD}";

/// The state between two tokens of one text.
#[derive(Debug, Clone)]
pub(crate) struct Detokenizer {
    vocabulary: Arc<Vocabulary>,
    /// Bytes of a character whose end has not arrived; at most three.
    pending: Vec<u8>,
    /// The current run of byte tokens is broken: all of it that follows is U+FFFD.
    is_run_broken: bool,
    /// The next character is the text's first, so that a space there may not be shown.
    is_at_start: bool,
}

impl Detokenizer {
    /// Starts a text of its own, such as a chat message.
    pub(crate) fn new(vocabulary: Arc<Vocabulary>) -> Self {
        Self { vocabulary, pending: Vec::new(), is_run_broken: false, is_at_start: true }
    }

    /// Starts a text that continues another: a completion of a prompt with these tokens. A leading space
    /// then separates two words, and is kept, unless the prompt had no text at all.
    pub(crate) fn after(vocabulary: Arc<Vocabulary>, prompt: &[u32]) -> Self {
        let is_at_start = prompt.iter().all(|&id| vocabulary.is_control(id));
        Self { is_at_start, ..Self::new(vocabulary) }
    }

    /// Appends to `out` what token `id` adds to the text.
    pub(crate) fn push(&mut self, id: u32, out: &mut String) {
        let start = out.len();
        let vocabulary = Arc::clone(&self.vocabulary);
        match (vocabulary.piece(id), vocabulary.joining) {
            (Piece::Control(_), _) => {}
            (Piece::Byte(byte), _) => self.push_byte(*byte, out),
            (Piece::Text(bytes), Joining::Bytes) => self.push_bytes(bytes, out),
            (Piece::Text(bytes), Joining::ByteFallback { .. }) => {
                self.end_run(out);
                out.push_str(&String::from_utf8_lossy(bytes));
            }
        }
        self.strip_first_space(start, out);
    }

    /// Appends what the text ends with: U+FFFD for bytes that did not become a character.
    pub(crate) fn finish(&mut self, out: &mut String) {
        match self.vocabulary.joining {
            Joining::Bytes => {
                out.push_str(&String::from_utf8_lossy(&self.pending));
                self.pending.clear();
            }
            Joining::ByteFallback { .. } => self.end_run(out),
        }
    }

    /// Whether every byte that arrived has become text.
    pub(crate) fn is_idle(&self) -> bool {
        self.pending.is_empty()
    }

    /// Whether token `id` adds nothing to a text.
    pub(crate) fn is_control(&self, id: u32) -> bool {
        self.vocabulary.is_control(id)
    }

    /// The bytes that token `id` by itself stands for at this place in the text; a control token's name.
    pub(crate) fn bytes_here(&self, id: u32) -> Vec<u8> {
        match self.vocabulary.piece(id) {
            Piece::Control(name) => name.as_bytes().to_vec(),
            Piece::Byte(byte) => vec![*byte],
            Piece::Text(bytes) if self.hides_space() => bytes.strip_prefix(b" ").unwrap_or(bytes).to_vec(),
            Piece::Text(bytes) => bytes.to_vec(),
        }
    }

    fn push_byte(&mut self, byte: u8, out: &mut String) {
        if self.is_run_broken {
            out.push_str(REPLACEMENT);
            return;
        }
        self.pending.push(byte);
        match std::str::from_utf8(&self.pending) {
            Ok(character) => {
                out.push_str(character);
                self.pending.clear();
            }
            Err(error) if error.error_len().is_none() => {}
            Err(_) => {
                self.replace_pending(out);
                self.is_run_broken = true;
            }
        }
    }

    /// A token that is not a byte token ends the run; what is incomplete stays so.
    fn end_run(&mut self, out: &mut String) {
        self.replace_pending(out);
        self.is_run_broken = false;
    }

    fn replace_pending(&mut self, out: &mut String) {
        self.pending.drain(..).for_each(|_| out.push_str(REPLACEMENT));
    }

    /// Like `String::from_utf8_lossy` of all bytes so far, except that an incomplete end waits.
    fn push_bytes(&mut self, bytes: &[u8], out: &mut String) {
        self.pending.extend_from_slice(bytes);
        let incomplete_len = self.pending.utf8_chunks().last().map_or(0, |chunk| {
            let is_incomplete = std::str::from_utf8(chunk.invalid()).is_err_and(|e| e.error_len().is_none());
            if is_incomplete { chunk.invalid().len() } else { 0 }
        });
        let complete_len = self.pending.len() - incomplete_len;
        out.push_str(&String::from_utf8_lossy(&self.pending[..complete_len]));
        self.pending.drain(..complete_len);
    }

    /// Whether a space that comes next is not shown.
    pub(crate) fn hides_space(&self) -> bool {
        self.is_at_start && self.vocabulary.joining == Joining::ByteFallback { strips_first_space: true }
    }

    fn strip_first_space(&mut self, start: usize, out: &mut String) {
        if out.len() == start {
            return;
        }
        if self.hides_space() && out[start..].starts_with(' ') {
            out.remove(start);
        }
        self.is_at_start = false;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;
    use crate::text::tokenizer::TextTokenizer;
    use crate::text::tokenizer::test_tokenizers::{BYTE_LEVEL, LLAMA};

    fn increments(text: &TextTokenizer, ids: &[u32]) -> Vec<String> {
        let mut detokenizer = Detokenizer::new(Arc::clone(text.vocabulary()));
        let mut pieces = Vec::new();
        for &id in ids {
            let mut out = String::new();
            detokenizer.push(id, &mut out);
            pieces.push(out);
        }
        let mut end = String::new();
        detokenizer.finish(&mut end);
        pieces.push(end);
        pieces
    }

    fn id(text: &TextTokenizer, token: &str) -> u32 {
        text.token_to_id(token).unwrap_or_else(|| panic!("{token} is not in the test's vocabulary"))
    }

    #[test]
    fn incomplete_characters_wait_and_are_replaced_only_at_the_end() {
        let text = &*LLAMA;
        let check = |tokens: &[&str], expected: &[&str]| {
            let ids: Vec<u32> = tokens.iter().map(|token| id(text, token)).collect();
            assert_eq!(increments(text, &ids), expected, "{tokens:?}");
        };
        check(&["▁a", "▁a"], &["a", " a", ""]);
        check(&["<0xE2>", "<0x82>", "<0xAC>"], &["", "", "€", ""]);
        check(&["<0xE2>", "a"], &["", "\u{FFFD}a", ""]);
        check(&["<0xE2>", "<0x82>"], &["", "", "\u{FFFD}\u{FFFD}"]);
        check(&["<0xE2>", "</s>", "<0x82>", "<0xAC>"], &["", "", "", "€", ""]);
        check(&["<0xFF>", "<0x41>", "a", "<0x41>"], &["\u{FFFD}", "\u{FFFD}", "a", "A", ""]);
        check(&["<0x0A>", "<0xFF>"], &["\n", "\u{FFFD}", ""]);
        check(&["<0x20>", "▁a"], &["", " a", ""]);
    }

    #[test]
    fn a_completion_keeps_the_space_that_separates_it_from_its_prompt() {
        let text = &*LLAMA;
        let space_a = id(text, "▁a");
        let first = |prompt: &[u32]| {
            let mut out = String::new();
            Detokenizer::after(Arc::clone(text.vocabulary()), prompt).push(space_a, &mut out);
            out
        };
        assert_eq!(first(&[id(text, "<s>"), space_a]), " a");
        assert_eq!(first(&[id(text, "<s>")]), "a");
    }

    #[test]
    fn a_million_tokens_take_linear_time() {
        let text = &*LLAMA;
        let half_a_character = vec![id(text, "<0xE2>"); 1_000_000];
        let started = std::time::Instant::now();
        assert_eq!(increments(text, &half_a_character).concat().chars().count(), 1_000_000);
        assert!(started.elapsed().as_secs() < 5, "{:?}", started.elapsed());
    }

    /// Whether Hugging Face would take back characters of a byte run that were complete.
    fn has_broken_run_with_complete_start(text: &TextTokenizer, ids: &[u32]) -> bool {
        let vocabulary = text.vocabulary();
        let mut runs = vec![Vec::new()];
        for &id in ids {
            match vocabulary.piece(id) {
                Piece::Byte(byte) => runs.last_mut().expect("never empty").push(*byte),
                Piece::Control(_) => {}
                Piece::Text(_) => runs.push(Vec::new()),
            }
        }
        runs.iter().any(|run| std::str::from_utf8(run).is_err_and(|error| error.valid_up_to() > 0))
    }

    /// The tokenizer of the demo model, which has words of many characters, and every byte.
    static DEMO: LazyLock<TextTokenizer> = LazyLock::new(|| {
        let json = include_bytes!("../../../demo/model/tokenizer.json");
        TextTokenizer::new(json).expect("the demo's tokenizer loads")
    });

    /// Any tokens of the demo, bytes more often than by chance, and characters of bytes.
    fn demo_ids() -> impl Strategy<Value = Vec<u32>> {
        let bytes = |character: char| {
            let mut utf8 = [0; 4];
            character.encode_utf8(&mut utf8).bytes().map(|byte| 10 + u32::from(byte)).collect()
        };
        let part = prop_oneof![
            3 => (0u32..1536).prop_map(|id| vec![id]),
            1 => (10u32..266).prop_map(|id| vec![id]),
            2 => any::<char>().prop_map(bytes),
        ];
        proptest::collection::vec(part, 0..12).prop_map(|parts| parts.concat())
    }

    proptest! {
        /// Wherever a stream ends, it has shown what a decode of the tokens so far gives.
        #[test]
        fn every_prefix_is_the_whole_decode_of_its_tokens(ids in demo_ids()) {
            let mut detokenizer = Detokenizer::new(Arc::clone(DEMO.vocabulary()));
            let mut shown = String::new();
            for len in 1..=ids.len() {
                detokenizer.push(ids[len - 1], &mut shown);
                let mut ended = shown.clone();
                detokenizer.clone().finish(&mut ended);
                if !has_broken_run_with_complete_start(&DEMO, &ids[..len]) {
                    prop_assert_eq!(ended, DEMO.whole_decode(&ids[..len]), "{:?}", &ids[..len]);
                }
            }
        }

        /// Wherever a prompt ends and its completion begins, the two texts join to the text of both.
        #[test]
        fn a_prompt_and_its_completion_join_to_the_whole_decode(ids in demo_ids()) {
            prop_assume!(!has_broken_run_with_complete_start(&DEMO, &ids));
            for split in 0..=ids.len() {
                let (prompt, completion) = ids.split_at(split);
                let mut joined = String::new();
                let mut before = Detokenizer::new(Arc::clone(DEMO.vocabulary()));
                prompt.iter().for_each(|&id| before.push(id, &mut joined));
                if !before.is_idle() || before.is_run_broken {
                    continue;
                }
                let mut detokenizer = Detokenizer::after(Arc::clone(DEMO.vocabulary()), prompt);
                completion.iter().for_each(|&id| detokenizer.push(id, &mut joined));
                detokenizer.finish(&mut joined);
                prop_assert_eq!(joined, DEMO.whole_decode(&ids), "{:?} after {:?}", completion, prompt);
            }
        }

        #[test]
        fn increments_of_any_ids_sum_to_the_whole_decode(
            ids in proptest::collection::vec(0u32..320, 0..24), bytes in proptest::collection::vec(10u32..266, 0..6),
        ) {
            let text = &*LLAMA;
            let ids = [ids, bytes].concat();
            prop_assume!(!has_broken_run_with_complete_start(text, &ids));
            prop_assert_eq!(increments(text, &ids).concat(), text.whole_decode(&ids));
        }

        #[test]
        fn increments_of_any_text_sum_to_the_whole_decode(text in "\\PC{0,30}") {
            for tokenizer in [&*LLAMA, &*BYTE_LEVEL] {
                let ids = tokenizer.encode(&text).unwrap();
                let sum = increments(tokenizer, &ids).concat();
                prop_assert_eq!(&sum, &tokenizer.whole_decode(&ids));
                if !text.starts_with(' ') && !text.contains('▁') {
                    prop_assert_eq!(&sum, &text);
                }
            }
        }

        #[test]
        fn increments_of_any_byte_strings_sum_to_the_whole_decode(
            ids in proptest::collection::vec(0u32..262, 0..24),
        ) {
            let text = &*BYTE_LEVEL;
            prop_assert_eq!(increments(text, &ids).concat(), text.whole_decode(&ids));
        }
    }
}
