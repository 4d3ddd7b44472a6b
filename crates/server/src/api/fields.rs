//! A JSON object that is taken apart field by field, so that every mistake is answered with the field's path,
//! what was expected and what was found, and a field that nobody asked for is refused by name.
//!
//! `null` means absent. Rejected: `serde` derives, whose errors say neither ranges nor types in OpenAI's
//! words, which do not combine `flatten` with `deny_unknown_fields`, and which repeat every default twice.

use std::ops::RangeInclusive;

use serde_json::{Map, Number, Value};

use super::record::{self, Kind};
use crate::error::{ApiError, quoted};

/// The fields of one JSON object that were not taken yet, and where the object stands in the body.
#[derive(Debug)]
pub(crate) struct Fields {
    path: String,
    map: Map<String, Value>,
}

impl Fields {
    /// Parses a request body. `serde_json` bounds its nesting.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let value: Value = serde_json::from_slice(body).map_err(|error| {
            ApiError::invalid_body(format!("We could not parse the JSON body of your request: {error}."))
        })?;
        match value {
            Value::Object(map) => Ok(Self { path: String::new(), map }),
            other => Err(ApiError::invalid_body(format!(
                "The JSON body of your request must be an object, but it is {}.",
                type_of(&other)
            ))),
        }
    }

    /// The object at `path`.
    pub(crate) fn of(value: Value, path: String) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self { path, map }),
            other => Err(wrong_type(&path, "an object", &other)),
        }
    }

    /// Path of the field `name` in the body, such as `messages[0].content`.
    pub(crate) fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// The fields of another endpoint's body, made from a client's; see [`record`].
    pub(crate) fn translated(map: Map<String, Value>) -> Self {
        record::close();
        Self { path: String::new(), map }
    }

    /// Takes a field of any type.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.take_as(name, Kind::Any)
    }

    fn take_as(&mut self, name: &str, kind: Kind) -> Option<Value> {
        record::note(|| self.path(name), kind);
        self.map.remove(name).filter(|value| !value.is_null())
    }

    pub(crate) fn boolean(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        let Some(value) = self.take_as(name, Kind::Boolean) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| wrong_type(&self.path(name), "a boolean", &value))
    }

    pub(crate) fn integer(
        &mut self,
        name: &str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take_as(name, Kind::Integer(*range.start(), *range.end())) else {
            return Ok(None);
        };
        integer_at(&self.path(name), &value, range).map(Some)
    }

    pub(crate) fn number(&mut self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.take_as(name, Kind::Number(*range.start(), *range.end())) else {
            return Ok(None);
        };
        number_at(&self.path(name), &value, range).map(Some)
    }

    pub(crate) fn string(&mut self, name: &str, max_bytes: usize) -> Result<Option<String>, ApiError> {
        let Some(value) = self.take_as(name, Kind::String) else { return Ok(None) };
        string_at(&self.path(name), value, max_bytes).map(Some)
    }

    pub(crate) fn object(&mut self, name: &str) -> Result<Option<Fields>, ApiError> {
        let Some(value) = self.take_as(name, Kind::Object) else { return Ok(None) };
        Fields::of(value, self.path(name)).map(Some)
    }

    pub(crate) fn list(&mut self, name: &str, max_len: usize) -> Result<Option<Vec<Value>>, ApiError> {
        let Some(value) = self.take_as(name, Kind::List(max_len)) else { return Ok(None) };
        list_at(&self.path(name), value, max_len).map(Some)
    }

    /// Takes all fields that are left, whatever their names.
    pub(crate) fn rest(self) -> impl Iterator<Item = (String, Value)> {
        self.map.into_iter()
    }

    /// Refuses what was not taken; an unknown field that is `null` is as good as absent.
    pub(crate) fn finish(self) -> Result<(), ApiError> {
        let unknown = self.map.iter().find(|(_, value)| !value.is_null());
        let Some((name, _)) = unknown else { return Ok(()) };
        let shown: String = name.chars().take(100).collect();
        let message = format!("Unknown or unsupported parameter: {}.", quoted(&self.path(name)));
        Err(ApiError::invalid(self.path(&shown), "unknown_parameter", message))
    }
}

/// A required field that is not there.
pub(crate) fn missing(path: impl Into<String>) -> ApiError {
    let path = path.into();
    let message = format!("Missing required parameter: '{path}'.");
    ApiError::invalid(path, "missing_required_parameter", message)
}

/// A field whose value is of the wrong type; `expected` has its article.
pub(crate) fn wrong_type(path: &str, expected: &str, found: &Value) -> ApiError {
    let message =
        format!("Invalid type for '{path}': expected {expected}, but got {} instead.", type_of(found));
    ApiError::invalid(path, "invalid_type", message)
}

/// A field whose value is of the right type and still not possible.
pub(crate) fn wrong_value(path: &str, expected: &str) -> ApiError {
    ApiError::invalid(path, "invalid_value", format!("Invalid value for '{path}': {expected}."))
}

pub(crate) fn integer_at(path: &str, value: &Value, range: RangeInclusive<i64>) -> Result<i64, ApiError> {
    let Value::Number(number) = value else { return Err(wrong_type(path, "an integer", value)) };
    let (min, max) = (*range.start(), *range.end());
    match as_integer(number) {
        None => Err(wrong_type(path, "an integer", value)),
        Some(integer) if integer < i128::from(min) => {
            Err(out_of_range(path, "integer_below_min_value", "integer below minimum", ">=", min, number))
        }
        Some(integer) if integer > i128::from(max) => {
            Err(out_of_range(path, "integer_above_max_value", "integer above maximum", "<=", max, number))
        }
        Some(integer) => Ok(integer as i64),
    }
}

/// The integer that a JSON number is, 1.0 and 1e2 too, as JSON schema has it; one too long for 64 bits was read as a
/// float, which may have been rounded onto the end of their range, and saturates beyond it.
fn as_integer(number: &Number) -> Option<i128> {
    let beyond = |float: f64| (float as i128).saturating_add(float.signum() as i128);
    let whole = |float: f64| if float.abs() >= 2f64.powi(63) { beyond(float) } else { float as i128 };
    let spelled = number.as_i64().map(i128::from).or(number.as_u64().map(i128::from));
    spelled.or_else(|| number.as_f64().filter(|float| float.fract() == 0.0).map(whole))
}

/// The integer that a value is, if it is one below `end`.
pub(crate) fn index_below(value: &Value, end: usize) -> Option<u32> {
    let Value::Number(number) = value else { return None };
    as_integer(number)
        .filter(|index| (0..end as i128).contains(index))
        .and_then(|index| index.try_into().ok())
}

pub(crate) fn number_at(path: &str, value: &Value, range: RangeInclusive<f64>) -> Result<f64, ApiError> {
    let Value::Number(number) = value else { return Err(wrong_type(path, "a number", value)) };
    let float = number.as_f64().ok_or_else(|| wrong_type(path, "a number", value))?;
    let (min, max) = (*range.start(), *range.end());
    if float < min {
        return Err(out_of_range(
            path,
            "decimal_below_min_value",
            "decimal below minimum",
            ">=",
            min,
            number,
        ));
    }
    if float > max {
        return Err(out_of_range(
            path,
            "decimal_above_max_value",
            "decimal above maximum",
            "<=",
            max,
            number,
        ));
    }
    Ok(float)
}

fn out_of_range<T: std::fmt::Display>(
    path: &str,
    code: &'static str,
    what: &str,
    relation: &str,
    limit: T,
    found: &Number,
) -> ApiError {
    let message = format!(
        "Invalid '{path}': {what} value. Expected a value {relation} {limit}, but got {found} instead."
    );
    ApiError::invalid(path, code, message)
}

pub(crate) fn string_at(path: &str, value: Value, max_bytes: usize) -> Result<String, ApiError> {
    match value {
        Value::String(text) if text.len() <= max_bytes => Ok(text),
        Value::String(text) => {
            let message = format!(
                "Invalid '{path}': string too long. Expected at most {max_bytes} bytes, but got {} instead.",
                text.len()
            );
            Err(ApiError::invalid(path, "string_above_max_length", message))
        }
        other => Err(wrong_type(path, "a string", &other)),
    }
}

pub(crate) fn list_at(path: &str, value: Value, max_len: usize) -> Result<Vec<Value>, ApiError> {
    match value {
        Value::Array(items) if items.len() <= max_len => Ok(items),
        Value::Array(items) => {
            let message = format!(
                "Invalid '{path}': array too long. Expected at most {max_len} items, but got {} instead.",
                items.len()
            );
            Err(ApiError::invalid(path, "array_above_max_length", message))
        }
        other => Err(wrong_type(path, "an array", &other)),
    }
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(number) if as_integer(number).is_some() => "an integer",
        Value::Number(_) => "a decimal number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(json: &str) -> Fields {
        Fields::parse(json.as_bytes()).unwrap()
    }

    #[test]
    fn integers_of_any_size_are_taken_or_refused_in_words() {
        let check = |json: &str, expected: Result<Option<i64>, &str>| {
            let taken = fields(&format!("{{\"n\": {json}}}")).integer("n", 1..=128);
            assert_eq!(taken.map_err(|error| error.body.code.unwrap()), expected, "{json}");
        };
        check("1", Ok(Some(1)));
        check("128", Ok(Some(128)));
        check("2.0", Ok(Some(2)));
        check("1e2", Ok(Some(100)));
        check("null", Ok(None));
        for low in ["-1", "0", "-9223372036854775808", "-1180591620717411303424"] {
            check(low, Err("integer_below_min_value"));
        }
        for high in ["129", "2147483648", "9223372036854775808", "1180591620717411303424", "1e300"] {
            check(high, Err("integer_above_max_value"));
        }
        for other in ["1.5", "\"1\"", "true", "[1]", "{}"] {
            check(other, Err("invalid_type"));
        }
    }

    #[test]
    fn an_integer_just_beyond_64_bits_is_not_the_last_of_them() {
        let check = |json: &str, expected: Result<Option<i64>, &str>| {
            let taken = fields(&format!("{{\"n\": {json}}}")).integer("n", i64::MIN..=i64::MAX);
            assert_eq!(taken.map_err(|error| error.body.code.unwrap()), expected, "{json}");
        };
        check("-9223372036854775808", Ok(Some(i64::MIN)));
        check("9223372036854775807", Ok(Some(i64::MAX)));
        check("-9223372036854775809", Err("integer_below_min_value"));
        check("9223372036854775808", Err("integer_above_max_value"));
        check("18446744073709551616", Err("integer_above_max_value"));
    }

    #[test]
    fn numbers_that_are_not_finite_are_not_json() {
        for json in ["NaN", "Infinity", "-Infinity", "1e999"] {
            let error = Fields::parse(format!("{{\"temperature\": {json}}}").as_bytes()).unwrap_err();
            assert_eq!(error.body.code, Some("invalid_json"), "{json}");
        }
    }

    #[test]
    fn unknown_fields_are_refused_by_path_unless_null() {
        assert!(fields(r#"{"a": null}"#).finish().is_ok());
        let mut outer = fields(r#"{"a": {"b": 1}}"#);
        let error = outer.object("a").unwrap().unwrap().finish().unwrap_err();
        assert_eq!((error.body.param.as_deref(), error.body.code), (Some("a.b"), Some("unknown_parameter")));
    }

    #[test]
    fn bodies_must_be_objects_of_bounded_depth() {
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        for body in ["", "[]", "1", "{", "\u{feff}{}", deep.as_str()] {
            assert!(Fields::parse(body.as_bytes()).is_err());
        }
    }
}
