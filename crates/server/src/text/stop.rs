//! Stop strings: lets text through until one of them is complete, and holds back what may still become one.
//!
//! The stop string that is complete first ends the text, before its first character; of several complete at
//! the same character, the longest. So the result does not depend on how the text was cut into pieces, and
//! nothing needs to be generated beyond the character that decides. (Looking for the leftmost start instead
//! would have to wait for a longer stop string to fail.)
//!
//! One Knuth-Morris-Pratt automaton per stop string: a few instructions per byte and stop, whatever the text.
//! Bytes are enough, for no character of UTF-8 begins inside another.

/// Finds the first stop string in a text that arrives in pieces.
#[derive(Debug, Default)]
pub(crate) struct StopMatcher {
    patterns: Vec<Pattern>,
    /// Text that arrived and was not let through: the longest possible beginning of a stop string.
    held: String,
    /// The stop string that was complete.
    met: Option<String>,
}

#[derive(Debug)]
struct Pattern {
    bytes: Vec<u8>,
    /// `fallback[n]` is the length of the longest proper prefix of `bytes[..n]` that also ends it.
    fallback: Vec<usize>,
    /// How many bytes of the pattern the text now ends with.
    matched: usize,
}

impl StopMatcher {
    /// Looks for these strings; empty ones are never found.
    pub(crate) fn new(stops: &[String]) -> Self {
        let patterns = stops.iter().filter(|stop| !stop.is_empty()).map(|stop| Pattern::new(stop));
        Self { patterns: patterns.collect(), held: String::new(), met: None }
    }

    /// Takes in `text` and appends to `out` what is safe to show; returns whether a stop string is complete.
    /// After that nothing is held, and whatever follows belongs to another text.
    pub(crate) fn push(&mut self, text: &str, out: &mut String) -> bool {
        let arrived = self.held.len();
        self.held.push_str(text);
        for end in arrived + 1..=self.held.len() {
            let byte = self.held.as_bytes()[end - 1];
            let complete = self.patterns.iter_mut().filter_map(|pattern| pattern.advance(byte)).max();
            if let Some(stop_len) = complete {
                out.push_str(&self.held[..end - stop_len]);
                self.met = Some(self.held[end - stop_len..end].to_owned());
                self.forget();
                return true;
            }
        }
        let held_len = self.patterns.iter().map(|pattern| pattern.matched).max().unwrap_or(0);
        out.extend(self.held.drain(..self.held.len() - held_len));
        false
    }

    /// Appends what was held back: the text ended before a stop string was complete.
    pub(crate) fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.forget();
    }

    /// The stop string that ended the text.
    pub(crate) fn met(&self) -> Option<&str> {
        self.met.as_deref()
    }

    /// Whether all text that arrived has been let through.
    pub(crate) fn is_idle(&self) -> bool {
        self.held.is_empty()
    }

    fn forget(&mut self) {
        self.held.clear();
        self.patterns.iter_mut().for_each(|pattern| pattern.matched = 0);
    }
}

impl Pattern {
    fn new(stop: &str) -> Self {
        let bytes = stop.as_bytes().to_vec();
        let mut fallback = vec![0; bytes.len() + 1];
        let mut len = 0;
        for end in 1..bytes.len() {
            while len > 0 && bytes[len] != bytes[end] {
                len = fallback[len];
            }
            len += usize::from(bytes[len] == bytes[end]);
            fallback[end + 1] = len;
        }
        Self { bytes, fallback, matched: 0 }
    }

    /// Takes in one byte; returns the pattern's length if that byte completes it.
    fn advance(&mut self, byte: u8) -> Option<usize> {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.fallback[self.matched];
        }
        self.matched += usize::from(self.bytes[self.matched] == byte);
        (self.matched == self.bytes.len()).then_some(self.matched)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let stops: Vec<String> = stops.iter().map(|&stop| stop.to_owned()).collect();
        let mut matcher = StopMatcher::new(&stops);
        let mut out = String::new();
        for piece in pieces {
            if matcher.push(piece, &mut out) {
                return (out, true);
            }
        }
        matcher.finish(&mut out);
        (out, false)
    }

    /// The specification: at every character, the longest stop string that ends there.
    fn naive(stops: &[&str], text: &str) -> (String, bool) {
        let ends = text.char_indices().map(|(start, c)| start + c.len_utf8());
        for end in ends {
            let complete = stops.iter().filter(|stop| !stop.is_empty() && text[..end].ends_with(**stop));
            if let Some(len) = complete.map(|stop| stop.len()).max() {
                return (text[..end - len].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    #[test]
    fn text_ends_before_the_stop_string_that_is_complete_first() {
        let check = |stops: &[&str], pieces: &[&str], expected: &str, stopped: bool| {
            assert_eq!(run(stops, pieces), (expected.to_owned(), stopped), "{stops:?} in {pieces:?}");
        };
        check(&["\n\n"], &["a\n", "b\n", "\nc"], "a\nb", true);
        check(&["STOP"], &["abc S", "T", "O"], "abc STO", false);
        check(&["aab"], &["aaa", "ab"], "aa", true);
        check(&["abcd", "bc"], &["abcd"], "a", true);
        check(&["c", "abc"], &["abc"], "", true);
        check(&["é!"], &["caf", "é", "!"], "caf", true);
        check(&[""], &["abc"], "abc", false);
        check(&[], &["abc"], "abc", false);
    }

    #[test]
    fn held_text_is_never_more_than_a_possible_stop_string() {
        let mut matcher = StopMatcher::new(&["END".into()]);
        let mut out = String::new();
        assert!(!matcher.push("the E", &mut out));
        assert_eq!((out.as_str(), matcher.is_idle()), ("the ", false));
        assert!(!matcher.push("gg", &mut out));
        assert_eq!((out.as_str(), matcher.is_idle()), ("the Egg", true));
    }

    proptest! {
        #[test]
        fn the_result_does_not_depend_on_the_pieces(
            text in "[abé]{0,40}",
            stops in proptest::collection::vec("[abé]{0,5}", 0..4),
            cuts in proptest::collection::vec(0usize..40, 0..6),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let chars: Vec<char> = text.chars().collect();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(chars.len())).collect();
            cuts.extend([0, chars.len()]);
            cuts.sort_unstable();
            let pieces: Vec<String> = cuts.windows(2).map(|cut| chars[cut[0]..cut[1]].iter().collect()).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            prop_assert_eq!(run(&stops, &pieces), naive(&stops, &text));
        }
    }
}
