//! Tool calls as Mistral's models write them: after the token `[TOOL_CALLS]`, a JSON list of
//! `{"name": ..., "arguments": {...}}`, read as it is written.
//!
//! A call is passed on as soon as it has a name and its arguments begin; then their bytes go out as they come,
//! untouched. A whole answer appends up the same parts, so that both forms are equal. What turns out not to be
//! a call before the first is passed on is text: the client sees what the model wrote. Arguments are bounded
//! by their brackets and not parsed: whether they are what a tool takes is its constraint's business, or the
//! client's.

use std::mem::take;

use crate::random;

/// One call that the model wants made, or a part of one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ToolCall {
    /// Its place among the calls of its answer.
    pub(crate) index: usize,
    /// A fresh name for the call, by which its result comes back; empty in all parts but the first.
    pub(crate) id: String,
    /// The tool; empty in all parts but the first.
    pub(crate) name: String,
    /// A JSON object, as text.
    pub(crate) arguments: String,
}

impl ToolCall {
    /// Appends parts of calls to calls.
    pub(crate) fn append(calls: &mut Vec<Self>, parts: Vec<Self>) {
        for part in parts {
            match calls.last_mut() {
                Some(call) if call.index == part.index => call.arguments.push_str(&part.arguments),
                _ => calls.push(part),
            }
        }
    }
}

/// What a piece of writing turned out to be.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Read {
    pub(crate) calls: Vec<ToolCall>,
    /// Not calls after all.
    pub(crate) text: String,
}

/// The list as far as it is written.
#[derive(Debug)]
pub(crate) struct CallReader {
    place: Place,
    /// Only the first call is passed on.
    is_single: bool,
    /// Everything, until a call is passed on.
    written: String,
    num_calls: usize,
    item: Item,
}

/// What is known of the call being read.
#[derive(Debug, Default)]
struct Item {
    name: Option<String>,
    /// Arguments that wait for the name.
    held_arguments: String,
    has_arguments: bool,
    is_open: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
enum Place {
    /// Before `[`.
    Start,
    /// Before a call or the end of the list.
    List { is_first: bool },
    /// Behind a call.
    BehindItem,
    /// Before a key or the end of a call.
    Item { is_first: bool },
    /// In a key, of which this is written.
    Key(String),
    /// Before `:`.
    Colon(Field),
    /// Before a value.
    ValueStart(Field),
    /// In a value.
    Value(Field, Value),
    /// Behind a value.
    BehindValue,
    /// Behind `]`.
    Done,
    /// It is no list of calls.
    #[default]
    Broken,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    Name,
    Arguments,
    Other,
}

/// A value as far as it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Value {
    kind: Kind,
    depth: usize,
    in_string: bool,
    is_escaped: bool,
    /// The value, where it is read as a whole.
    written: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Nested,
    String,
    Plain,
}

impl CallReader {
    pub(crate) fn new(is_single: bool) -> Self {
        Self { place: Place::Start, is_single, written: String::new(), num_calls: 0, item: Item::default() }
    }

    /// Whether there is at least one call, and none is unfinished.
    pub(crate) fn has_whole_calls(&self) -> bool {
        self.num_calls > 0 && !self.item.is_open
    }

    /// Reads on.
    pub(crate) fn push(&mut self, text: &str) -> Read {
        let mut read = Read::default();
        if self.num_calls == 0 {
            self.written.push_str(text);
        }
        for c in text.chars() {
            let place = take(&mut self.place);
            self.place = self.step(place, c, &mut read);
        }
        if self.num_calls > 0 {
            self.written.clear();
        } else if self.place == Place::Broken {
            read.text = take(&mut self.written);
        }
        read
    }

    /// What was held back: the list is not written on.
    pub(crate) fn finish(&mut self) -> Read {
        let mut read = Read::default();
        if self.num_calls == 0 {
            read.text = take(&mut self.written);
        }
        read
    }

    fn step(&mut self, place: Place, c: char, read: &mut Read) -> Place {
        if c.is_ascii_whitespace() && !matches!(place, Place::Key(_) | Place::Value(..)) {
            return place;
        }
        match (place, c) {
            (Place::Start, '[') => Place::List { is_first: true },
            (Place::List { .. }, '{') => {
                self.item = Item::default();
                Place::Item { is_first: true }
            }
            (Place::List { is_first: false }, ']') | (Place::BehindItem, ']') => Place::Done,
            (Place::BehindItem, ',') => Place::List { is_first: false },
            (Place::Item { .. }, '"') => Place::Key(String::new()),
            (Place::Item { is_first: true }, '}') | (Place::BehindValue, '}') => self.end_item(read),
            (Place::BehindValue, ',') => Place::Item { is_first: false },
            (Place::Key(key), '"') => Place::Colon(self.field(&key)),
            (Place::Key(key), c) if key.len() < 64 => Place::Key(key + c.encode_utf8(&mut [0; 4])),
            (Place::Colon(field), ':') => Place::ValueStart(field),
            (Place::ValueStart(field), c) => self.begin_value(field, c, read),
            (Place::Value(field, value), c) => self.go_on(field, value, c, read),
            (Place::Done, _) => Place::Done,
            _ => Place::Broken,
        }
    }

    /// Of several values of one name the first counts.
    fn field(&self, key: &str) -> Field {
        match key {
            "name" if self.item.name.is_none() => Field::Name,
            "arguments" | "parameters" if !self.item.has_arguments => Field::Arguments,
            _ => Field::Other,
        }
    }

    fn begin_value(&mut self, field: Field, c: char, read: &mut Read) -> Place {
        let kind = match c {
            '"' => Kind::String,
            '{' | '[' => Kind::Nested,
            _ => Kind::Plain,
        };
        match (field, kind, c) {
            (Field::Name, Kind::String, _) | (Field::Arguments, Kind::String, _) | (Field::Other, ..) => {}
            (Field::Arguments, Kind::Nested, '{') => {}
            _ => return Place::Broken,
        }
        self.item.has_arguments |= field == Field::Arguments;
        let nothing = Value { kind, depth: 0, in_string: false, is_escaped: false, written: String::new() };
        self.go_on(field, nothing, c, read)
    }

    fn go_on(&mut self, field: Field, mut value: Value, c: char, read: &mut Read) -> Place {
        if value.kind == Kind::Plain && matches!(c, ',' | '}' | ']') {
            return self.step(Place::BehindValue, c, read);
        }
        match (field, value.kind) {
            (Field::Arguments, Kind::Nested) => self.pass_on(c.encode_utf8(&mut [0; 4]), read),
            (Field::Name | Field::Arguments, _) => value.written.push(c),
            (Field::Other, _) => {}
        }
        if !value.ends_with(c) {
            return Place::Value(field, value);
        }
        match (field, value.kind) {
            (Field::Name, _) => match serde_json::from_str(&value.written) {
                Ok(name) => {
                    self.item.name = Some(name);
                    let held = take(&mut self.item.held_arguments);
                    if !held.is_empty() {
                        self.pass_on(&held, read);
                    }
                }
                Err(_) => return Place::Broken,
            },
            // Some models write the object as a string.
            (Field::Arguments, Kind::String) => match serde_json::from_str::<String>(&value.written) {
                Ok(arguments) => self.pass_on(&arguments, read),
                Err(_) => return Place::Broken,
            },
            _ => {}
        }
        Place::BehindValue
    }

    /// Passes arguments on, and the call itself if these are its first; without a name they wait.
    fn pass_on(&mut self, arguments: &str, read: &mut Read) {
        let Some(name) = &self.item.name else {
            self.item.held_arguments.push_str(arguments);
            return;
        };
        if !self.item.is_open {
            self.item.is_open = true;
            self.num_calls += 1;
            if self.is_passed_on() {
                let index = self.num_calls - 1;
                read.calls.push(ToolCall {
                    index,
                    id: random::call_id(),
                    name: name.clone(),
                    arguments: String::new(),
                });
            }
        }
        if self.is_passed_on() {
            let part = ToolCall {
                index: self.num_calls - 1,
                arguments: arguments.to_owned(),
                ..ToolCall::default()
            };
            ToolCall::append(&mut read.calls, vec![part]);
        }
    }

    fn is_passed_on(&self) -> bool {
        !self.is_single || self.num_calls == 1
    }

    fn end_item(&mut self, read: &mut Read) -> Place {
        if self.item.name.is_none() {
            return Place::Broken;
        }
        if !self.item.is_open {
            self.pass_on("{}", read);
        }
        self.item.is_open = false;
        Place::BehindItem
    }
}

impl Value {
    /// Takes in a character; returns whether the value ends with it.
    fn ends_with(&mut self, c: char) -> bool {
        if self.in_string {
            let ends_string = c == '"' && !self.is_escaped;
            self.is_escaped = c == '\\' && !self.is_escaped;
            self.in_string = !ends_string;
        } else {
            match c {
                '"' => self.in_string = true,
                '{' | '[' => self.depth += 1,
                '}' | ']' => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
        }
        self.kind != Kind::Plain && self.depth == 0 && !self.in_string
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls with their names and arguments, and the text; the same however the writing is cut.
    #[track_caller]
    fn check(written: &str, expected: &[(&str, &str)], text: &str) -> CallReader {
        let mut last = None;
        for piece_len in [1, 2, 3, 7, 1000] {
            let mut reader = CallReader::new(false);
            let (mut calls, mut shown) = (Vec::new(), String::new());
            let chars: Vec<char> = written.chars().collect();
            let pieces = chars.chunks(piece_len).map(|piece| piece.iter().collect::<String>());
            let mut take_in = |read: Read| {
                ToolCall::append(&mut calls, read.calls);
                shown.push_str(&read.text);
            };
            pieces.for_each(|piece| take_in(reader.push(&piece)));
            take_in(reader.finish());
            let read: Vec<_> =
                calls.iter().map(|call| (call.name.as_str(), call.arguments.as_str())).collect();
            assert_eq!((read.as_slice(), shown.as_str()), (expected, text), "{written} by {piece_len}");
            assert!(calls.iter().zip(0..).all(|(call, index)| call.index == index && !call.id.is_empty()));
            last = Some(reader);
        }
        last.unwrap()
    }

    #[test]
    fn lists_of_calls_are_read_and_anything_else_is_text() {
        let reader = check(
            r#" [{"name": "f", "arguments": {"b": 1,  "a": "é}\"]"}}, {"name": "g"}]"#,
            &[("f", r#"{"b": 1,  "a": "é}\"]"}"#), ("g", "{}")],
            "",
        );
        assert!(reader.has_whole_calls());
        check(
            r#"[{"arguments":{"a":[{}]},"id":[1,{"x":"]"}],"name":"f\u0041","n":1.5}]"#,
            &[("fA", r#"{"a":[{}]}"#)],
            "",
        );
        check(r#"[{"name": "f", "parameters": "{\"a\": 1}"}]"#, &[("f", r#"{"a": 1}"#)], "");
        check(r#"[{"name": "f", "arguments": {}}] and more"#, &[("f", "{}")], "");
        for other in
            ["", "[]", "{}", "[1]", "so", r#"[{"arguments": {}}]"#, r#"[{"name": "f", "arguments": 1}]"#]
        {
            let reader = check(other, &[], other);
            assert!(!reader.has_whole_calls());
        }
    }

    #[test]
    fn what_is_cut_is_passed_on_as_far_as_it_goes() {
        let cut = r#"[{"name": "f", "argu"#;
        check(cut, &[], cut);
        let reader = check(r#"[{"name": "f", "arguments": {"a": [1"#, &[("f", r#"{"a": [1"#)], "");
        assert!(!reader.has_whole_calls());
        check(r#"[{"name": "f", "arguments": {}}, {"name": "#, &[("f", "{}")], "");
    }

    #[test]
    fn a_single_call_is_the_first() {
        let mut reader = CallReader::new(true);
        let read = reader.push(r#"[{"name": "f"}, {"name": "g", "arguments": {"a": 1}}]"#);
        assert_eq!(read.calls.iter().map(|call| call.name.as_str()).collect::<Vec<_>>(), ["f"]);
    }

    #[test]
    fn ids_are_fresh() {
        let calls = CallReader::new(false).push(r#"[{"name": "f"}, {"name": "f"}]"#).calls;
        assert_ne!(calls[0].id, calls[1].id);
    }
}
