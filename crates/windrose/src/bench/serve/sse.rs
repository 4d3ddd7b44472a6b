//! Server-sent events from the bytes of a body, however the network cut them.
//!
//! Follows the parsing rules of the HTML standard (section 9.2.6): lines end in LF, CR or CRLF, a line that begins
//! with a colon is a comment, the `data` lines of an event are joined by LF, an empty line ends the event, and what
//! is not ended is not an event. Fields other than `data`, and events without any, mean nothing here.

use anyhow::{Result, ensure};

/// Most bytes of an event: far above any chunk of an answer, so that a broken server cannot fill the memory.
const MAX_EVENT_BYTES: usize = 1 << 20;

/// The state between two pieces of a body.
#[derive(Default)]
pub(super) struct SseParser {
    line: Vec<u8>,
    /// The data lines of the event so far, each with an LF behind it.
    data: Vec<u8>,
    /// The last byte was a CR, so an LF belongs to it.
    after_cr: bool,
    past_first_line: bool,
}

impl SseParser {
    /// Takes the next bytes; the data of the events that they complete.
    ///
    /// # Errors
    /// If an event is larger than any answer's.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mut events = Vec::new();
        for &byte in bytes {
            match byte {
                b'\n' if self.after_cr => {}
                b'\n' | b'\r' => events.extend(self.end_line()),
                _ => self.line.push(byte),
            }
            self.after_cr = byte == b'\r';
        }
        let num_bytes = self.line.len() + self.data.len();
        ensure!(
            num_bytes <= MAX_EVENT_BYTES,
            "an event of the stream is larger than {MAX_EVENT_BYTES} bytes"
        );
        Ok(events)
    }

    /// The event, if this was the empty line behind one.
    fn end_line(&mut self) -> Option<Vec<u8>> {
        let line = std::mem::take(&mut self.line);
        let mut line = &line[..];
        if !std::mem::replace(&mut self.past_first_line, true) {
            line = line.strip_prefix("\u{feff}".as_bytes()).unwrap_or(line);
        }
        if line.is_empty() {
            self.data.pop();
            return Some(std::mem::take(&mut self.data)).filter(|data| !data.is_empty());
        }
        if let Some(value) = line.strip_prefix(b"data") {
            match value {
                [] => self.data.push(b'\n'),
                [b':', b' ', value @ ..] | [b':', value @ ..] => {
                    self.data.extend_from_slice(value);
                    self.data.push(b'\n');
                }
                // Another field, such as `database`.
                _ => {}
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The events are the same wherever the stream is cut in two, and byte by byte.
    #[track_caller]
    fn check(stream: &str, expected: &[&str]) {
        let parse = |pieces: &[&[u8]]| -> Vec<String> {
            let mut parser = SseParser::default();
            let events = pieces.iter().flat_map(|piece| parser.push(piece).unwrap());
            events.map(|event| String::from_utf8(event).unwrap()).collect()
        };
        for cut in 0..=stream.len() {
            let (left, right) = stream.as_bytes().split_at(cut);
            assert_eq!(parse(&[left, right]), expected, "{stream:?} cut at {cut}");
        }
        let bytes: Vec<&[u8]> = stream.as_bytes().chunks(1).collect();
        assert_eq!(parse(&bytes), expected, "{stream:?} byte by byte");
    }

    #[test]
    fn events_do_not_depend_on_where_the_network_cuts() {
        check("data: {\"a\": 1}\n\ndata: [DONE]\n\n", &["{\"a\": 1}", "[DONE]"]);
        check("data: grüße\n\ndata: 東京\n\n", &["grüße", "東京"]);
    }

    #[test]
    fn every_line_ending_ends_a_line() {
        check("data: a\r\n\r\ndata: b\r\n\r\n", &["a", "b"]);
        check("data: a\r\rdata: b\r\r", &["a", "b"]);
        check("data: a\r\n\ndata: b\n\r\n", &["a", "b"]);
    }

    #[test]
    fn comments_and_other_fields_are_nothing() {
        check(": keep-alive\n\n:\n\ndata: a\n\n", &["a"]);
        check("event: token\nid: 7\ndata: a\nretry: 10\n\n", &["a"]);
        check("database: x\n\ndata: a\n: comment\ndata: b\n\n", &["a\nb"]);
    }

    #[test]
    fn one_space_empty_lines_and_the_byte_order_mark_are_as_in_the_standard() {
        check("data:a\n\ndata:  b\n\n", &["a", " b"]);
        check("data\n\ndata: a\n\n", &["a"]);
        check("data\ndata: a\n\n", &["\na"]);
        check("\u{feff}data: a\n\n", &["a"]);
    }

    #[test]
    fn an_event_that_is_not_ended_is_none() {
        check("data: a\n\ndata: b", &["a"]);
        check("data: a\n\ndata: b\n", &["a"]);
    }

    #[test]
    fn an_event_without_end_is_refused() {
        let mut parser = SseParser::default();
        let kibibyte = [b'x'; 1024];
        let refused = (0..=MAX_EVENT_BYTES / kibibyte.len()).any(|_| parser.push(&kibibyte).is_err());
        assert!(refused);
    }
}
