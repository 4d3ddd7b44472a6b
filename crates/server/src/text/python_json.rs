//! JSON as Python's `json.dumps(value, ensure_ascii=False)` writes it, which is what `transformers` makes of
//! `tojson`: tool schemas in a prompt must be the very characters that the model was trained on.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};

/// Writes `value` on one line with `", "` and `": "` between items.
///
/// # Errors
/// If the value cannot be JSON (a map whose keys are no strings).
pub(crate) fn to_string(value: &impl Serialize) -> serde_json::Result<String> {
    write(value, OneLine)
}

/// Writes `value` with one item per line, `indent` spaces deeper on each level.
///
/// # Errors
/// As [`to_string`].
pub(crate) fn to_string_indented(value: &impl Serialize, indent: usize) -> serde_json::Result<String> {
    let indent = " ".repeat(indent.min(MAX_INDENT));
    write(value, Indented(serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes())))
}

const MAX_INDENT: usize = 16;

fn write(value: &impl Serialize, formatter: impl Formatter) -> serde_json::Result<String> {
    let mut json = Vec::new();
    value.serialize(&mut Serializer::with_formatter(&mut json, formatter))?;
    Ok(String::from_utf8(json).expect("serde_json writes UTF-8"))
}

struct OneLine;

impl Formatter for OneLine {
    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }

    fn write_f64<W: ?Sized + Write>(&mut self, out: &mut W, value: f64) -> io::Result<()> {
        out.write_all(float_repr(value).as_bytes())
    }
}

/// `serde_json`'s own layout, which is Python's, with Python's numbers.
struct Indented<'a>(serde_json::ser::PrettyFormatter<'a>);

impl Formatter for Indented<'_> {
    fn begin_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.begin_array(out)
    }

    fn end_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.end_array(out)
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_array_value(out, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.end_array_value(out)
    }

    fn begin_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.begin_object(out)
    }

    fn end_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.end_object(out)
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_object_key(out, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.begin_object_value(out)
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.end_object_value(out)
    }

    fn write_f64<W: ?Sized + Write>(&mut self, out: &mut W, value: f64) -> io::Result<()> {
        out.write_all(float_repr(value).as_bytes())
    }
}

/// Python's `repr` of a float: the shortest digits that read back as the same number, with an exponent below
/// 1e-4 and from 1e16 on.
fn float_repr(value: f64) -> String {
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').expect("this format has an exponent");
    match exponent.parse::<i32>().expect("an exponent is a number") {
        -4..=15 => {
            let plain = value.to_string();
            if plain.contains('.') { plain } else { plain + ".0" }
        }
        exponent => format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn json_is_pythons() {
        let value = json!({"b": [1, 2.0, "é\"\n\u{7f}\u{1f}"], "a": {}, "c": [null, true, -3]});
        let expected = "{\"b\": [1, 2.0, \"é\\\"\\n\u{7f}\\u001f\"], \"a\": {}, \"c\": [null, true, -3]}";
        assert_eq!(to_string(&value).unwrap(), expected);
        assert_eq!(
            to_string_indented(&json!({"a": [1.0], "b": []}), 2).unwrap(),
            "{\n  \"a\": [\n    1.0\n  ],\n  \"b\": []\n}"
        );
    }

    #[test]
    fn floats_are_pythons() {
        for (value, expected) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.5, "1.5"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.25e22, "1.25e+22"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.5e-300, "1.5e-300"),
            (123_456_789.125, "123456789.125"),
        ] {
            assert_eq!(float_repr(value), expected);
        }
    }
}
