//! Where in a schema it fails. llguidance says what is wrong and not where, so the parts are tried one by one:
//! the innermost part that fails by itself is the place.

use std::time::{Duration, Instant};

use serde_json::Value;

/// Parts that are tried at most.
const MAX_TRIES: usize = 200;
/// Time after which no further part is tried: a place is worth less than an answer.
const MAX_TIME: Duration = Duration::from_millis(500);

/// The path of the failing part within `schema` (such as `.properties.age`) and its message; `message` is
/// that of the whole, which is known to fail.
pub(super) fn locate(
    schema: &Value,
    message: String,
    compile: &mut dyn FnMut(&Value) -> Result<(), String>,
) -> (String, String) {
    let mut found = (String::new(), message);
    let (started, mut num_tries) = (Instant::now(), 0);
    if !refers_to_definitions_only(schema) {
        return found;
    }
    let mut part = schema;
    'descend: loop {
        for (step, inner) in parts(part) {
            if num_tries == MAX_TRIES || started.elapsed() > MAX_TIME {
                return found;
            }
            num_tries += 1;
            if let Err(message) = compile(&with_definitions(inner, schema)) {
                found = (format!("{}{step}", found.0), message);
                part = inner;
                continue 'descend;
            }
        }
        return found;
    }
}

/// The schemas right inside one.
fn parts(schema: &Value) -> Vec<(String, &Value)> {
    let mut parts = Vec::new();
    for key in ["properties", "patternProperties", "$defs", "definitions"] {
        let Some(inner) = schema[key].as_object() else { continue };
        parts.extend(inner.iter().map(|(name, inner)| (format!(".{key}.{name}"), inner)));
    }
    for key in ["items", "additionalProperties"] {
        parts.extend(schema.get(key).map(|inner| (format!(".{key}"), inner)));
    }
    for key in ["prefixItems", "anyOf", "oneOf", "allOf"] {
        let Some(inner) = schema[key].as_array() else { continue };
        parts.extend(inner.iter().enumerate().map(|(index, inner)| (format!(".{key}[{index}]"), inner)));
    }
    // `false` fails by itself, and is meant where it stands.
    parts.retain(|(_, inner)| !inner.is_boolean());
    parts
}

fn with_definitions(part: &Value, root: &Value) -> Value {
    let mut part = part.clone();
    let Some(fields) = part.as_object_mut() else { return part };
    for key in ["$defs", "definitions"] {
        if let Some(definitions) = root.get(key) {
            fields.insert(key.to_owned(), definitions.clone());
        }
    }
    part
}

/// Whether a part means the same outside of its whole.
fn refers_to_definitions_only(schema: &Value) -> bool {
    match schema {
        Value::Object(fields) => fields.iter().all(|(key, inner)| match (key.as_str(), inner) {
            ("$ref", Value::String(to)) => to.starts_with("#/$defs/") || to.starts_with("#/definitions/"),
            _ => refers_to_definitions_only(inner),
        }),
        Value::Array(items) => items.iter().all(refers_to_definitions_only),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_innermost_part_that_fails_is_found() {
        let mut compile = |schema: &Value| match schema.to_string().contains("bad") {
            true => Err("no".to_owned()),
            false => Ok(()),
        };
        let mut check = |schema: Value, expected: &str| {
            assert_eq!(locate(&schema, "no".to_owned(), &mut compile).0, expected, "{schema}");
        };
        check(json!({"type": "bad"}), "");
        check(
            json!({"properties": {"a": {}, "b": {"items": {"anyOf": [{}, {"type": "bad"}]}}}}),
            ".properties.b.items.anyOf[1]",
        );
        check(json!({"$defs": {"x": {"type": "bad"}}, "$ref": "#/$defs/x"}), ".$defs.x");
        check(json!({"properties": {"a": {"$ref": "#/properties/bad"}}}), "");
    }
}
