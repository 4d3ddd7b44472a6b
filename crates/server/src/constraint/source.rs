//! What an answer may be, and how llguidance is told.
//!
//! A tokenizer of the Llama family writes a space before the first word of an answer, which is not shown. A
//! grammar of such an answer begins with that space, always: were it optional, a grammar that itself begins
//! with a space could have it hidden.

use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use serde::Serialize;
use serde_json::{Value, json};

/// White space that JSON may have in one place: a space or an indented line, and not what goes on for ever.
const JSON_WHITESPACE: &str = r"(\x20|\x0D?\x0A[\x20\x09]{0,40})?";
/// Deepest nesting of brackets in a regular expression or a grammar: their parsers recurse.
const MAX_NESTING: usize = 100;

/// What an answer may be.
#[derive(Debug, Clone, Serialize)]
pub(crate) enum Source {
    /// JSON that a schema describes.
    Schema(Value),
    /// A text that a regular expression matches from end to end.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A text of a grammar in llguidance's dialect of Lark.
    Lark(String),
    /// Calls of tools, as Mistral's models write them.
    Calls(Calls),
}

/// The tools that may be called, and how often.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Calls {
    pub(crate) tools: Vec<Tool>,
    pub(crate) is_single: bool,
}

/// A tool that may be called.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Tool {
    pub(crate) name: String,
    /// The schema of its arguments; `None`: any object.
    pub(crate) parameters: Option<Value>,
}

impl Source {
    /// Any JSON object.
    pub(crate) fn any_object() -> Self {
        Self::Schema(any_object())
    }

    /// The grammar in llguidance's terms.
    ///
    /// # Errors
    /// If its brackets are nested too deeply, or its schema has what llguidance takes and does not keep to.
    pub(super) fn grammar(&self, begins_with_space: bool) -> Result<TopLevelGrammar, String> {
        let mut grammars = match self {
            Self::Schema(schema) => {
                check_schema(schema)?;
                vec![json_grammar(schema)]
            }
            Self::Regex(regex) => {
                check_nesting(regex)?;
                vec![GrammarWithLexer::from_regex(without_anchors(regex))]
            }
            Self::Choice(choices) => vec![GrammarWithLexer::from_lark(choice(choices))],
            Self::Lark(lark) => {
                check_nesting(lark)?;
                vec![GrammarWithLexer::from_lark(lark.clone())]
            }
            Self::Calls(calls) => {
                calls.tools.iter().filter_map(|tool| tool.parameters.as_ref()).try_for_each(check_schema)?;
                calls.grammars()
            }
        };
        if begins_with_space {
            grammars[0].name = Some("answer".to_owned());
            grammars.insert(0, GrammarWithLexer::from_lark(r#"start: " " @answer"#.to_owned()));
        }
        Ok(TopLevelGrammar { grammars, max_tokens: None })
    }
}

impl Calls {
    fn grammars(&self) -> Vec<GrammarWithLexer> {
        let names: Vec<String> = (0..self.tools.len()).map(|index| format!("call_{index}")).collect();
        let more = if self.is_single { "" } else { r#" (", " call)*"# };
        let mut lark = format!("start: /[ \\n]?/ \"[\" call{more} \"]\"\ncall: {}\n", names.join(" | "));
        let mut grammars = Vec::with_capacity(1 + self.tools.len());
        for (index, tool) in self.tools.iter().enumerate() {
            let head = format!("{{\"name\": {}, \"arguments\": ", json!(tool.name));
            lark.push_str(&format!("call_{index}: {} @arguments_{index} \"}}\"\n", json!(head)));
            let mut arguments = json_grammar(tool.parameters.as_ref().unwrap_or(&any_object()));
            arguments.name = Some(format!("arguments_{index}"));
            grammars.push(arguments);
        }
        grammars.insert(0, GrammarWithLexer::from_lark(lark));
        grammars
    }
}

fn any_object() -> Value {
    json!({"type": "object"})
}

/// A schema with this server's own options, whatever the client's are: with `lenient` it could ask for
/// keywords to be passed over.
fn json_grammar(schema: &Value) -> GrammarWithLexer {
    let mut schema = schema.clone();
    if let Some(schema) = schema.as_object_mut() {
        schema.insert("x-guidance".to_owned(), json!({"whitespace_pattern": JSON_WHITESPACE}));
    }
    GrammarWithLexer::from_json_schema(schema)
}

/// llguidance counts members and may write one key twice, unless the schema names it.
fn check_schema(schema: &Value) -> Result<(), String> {
    match schema {
        Value::Object(fields) => {
            let num_required = fields.get("required").and_then(Value::as_array).map_or(0, Vec::len) as u64;
            let least = fields.get("minProperties").and_then(Value::as_u64).unwrap_or(0);
            let names_all = schema["additionalProperties"] == false && schema["patternProperties"].is_null();
            if least > num_required + 1 && !names_all {
                return Err(
                    "minProperties may count one property that is not required, unless all are named"
                        .to_owned(),
                );
            }
            fields.values().try_for_each(check_schema)
        }
        Value::Array(items) => items.iter().try_for_each(check_schema),
        _ => Ok(()),
    }
}

/// The expression without anchors at its ends, which say what is so already: all of a text must match.
fn without_anchors(regex: &str) -> &str {
    let regex = regex.strip_prefix('^').unwrap_or(regex);
    let num_escapes = regex.trim_end_matches('$').chars().rev().take_while(|&c| c == '\\').count();
    match regex.strip_suffix('$') {
        Some(rest) if num_escapes.is_multiple_of(2) => rest,
        _ => regex,
    }
}

fn choice(choices: &[String]) -> String {
    let quoted: Vec<String> = choices.iter().map(|choice| json!(choice).to_string()).collect();
    format!("start: CHOICE\nCHOICE: {}", quoted.join(" | "))
}

fn check_nesting(text: &str) -> Result<(), String> {
    let mut depth = 0usize;
    for c in text.chars() {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_NESTING {
            return Err(format!("its brackets are nested more than {MAX_NESTING} deep"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anchors_at_the_ends_are_left_out_and_escaped_ones_are_not() {
        let check = |regex: &str, expected: &str| assert_eq!(without_anchors(regex), expected, "{regex}");
        check("a", "a");
        check("^a$", "a");
        check(r"^a\$", r"a\$");
        check(r"a\\$", r"a\\");
        check("$", "");
    }

    #[test]
    fn objects_of_many_unnamed_members_are_refused() {
        let check =
            |schema: Value, is_kept: bool| assert_eq!(check_schema(&schema).is_ok(), is_kept, "{schema}");
        check(json!({"minProperties": 1}), true);
        check(json!({"items": {"minProperties": 2}}), false);
        check(json!({"minProperties": 2, "required": ["a"]}), true);
        check(
            json!({"minProperties": 2, "properties": {"a": {}, "b": {}}, "additionalProperties": false}),
            true,
        );
        check(
            json!({"minProperties": 2, "patternProperties": {"a": {}}, "additionalProperties": false}),
            false,
        );
        check(json!({"properties": {"minProperties": {"type": "integer"}}}), true);
    }

    #[test]
    fn nesting_is_bounded() {
        assert!(check_nesting(&"()".repeat(1000)).is_ok());
        assert!(check_nesting(&"(".repeat(101)).is_err());
    }
}
