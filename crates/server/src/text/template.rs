//! The chat template: Jinja that comes with the model and turns messages into one string, rendered as
//! `transformers` renders it (`utils/chat_template_utils.py`).
//!
//! A template is the model's and never the client's, and still it is not trusted with the server: it runs on
//! limited fuel, and its output is cut off at a limit.

use std::borrow::Cow;
use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind, State, Value, context};
use minijinja_contrib::pycompat;
use serde_json::Value as Json;

use super::control::ControlTokens;
use super::model::TextError;
use super::{python_json, strftime};

/// Instructions that one rendering may take; a conversation of a thousand messages needs about 10⁵.
const MAX_FUEL: u64 = 20_000_000;
const NAME: &str = "chat_template";

/// A model's chat template, ready to render.
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

/// The names of a model's special tokens that templates refer to.
#[derive(Debug, Default)]
pub(crate) struct SpecialTokens {
    pub(crate) bos: String,
    pub(crate) eos: String,
}

impl ChatTemplate {
    /// Compiles `source`, with control tokens in their private spelling.
    ///
    /// # Errors
    /// If the template has a syntax error.
    pub(crate) fn new(
        source: &str,
        tokens: &SpecialTokens,
        control: &ControlTokens,
    ) -> Result<Self, TextError> {
        let mut environment = Environment::new();
        environment.set_syntax(syntax()?);
        environment.set_fuel(Some(MAX_FUEL));
        environment.set_unknown_method_callback(python_method);
        environment.add_filter("tojson", tojson);
        environment.add_filter("trim", trim);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        let compiled = environment.add_template_owned(NAME, control.respell(source));
        compiled.map_err(|error| TextError::Template(error.to_string()))?;
        Ok(Self {
            environment,
            bos_token: control.respell(&tokens.bos),
            eos_token: control.respell(&tokens.eos),
        })
    }

    /// Renders a conversation, up to the point where the assistant's answer begins.
    ///
    /// # Errors
    /// [`TextError::Conversation`] if the template refuses the messages, or runs into a limit.
    pub(crate) fn render(
        &self,
        messages: &[Json],
        tools: Option<&[Json]>,
        max_bytes: usize,
    ) -> Result<String, TextError> {
        let context = context! {
            messages => Value::from(Serde(messages)),
            tools => tools.map(|tools| Value::from(Serde(tools))),
            documents => (),
            add_generation_prompt => true,
            bos_token => &self.bos_token,
            eos_token => &self.eos_token,
        };
        let mut out = Limited { text: Vec::new(), max_bytes, is_full: false };
        let template = self.environment.get_template(NAME).map_err(refused)?;
        let rendered = template.render_captured_to(context, &mut out);
        if out.is_full {
            let message = format!("the rendered conversation is longer than {max_bytes} bytes; shorten it");
            return Err(TextError::Conversation(message));
        }
        rendered.map_err(refused)?;
        String::from_utf8(out.text).map_err(|error| TextError::Conversation(error.to_string()))
    }
}

/// Jinja as `transformers` sets it up.
fn syntax() -> Result<SyntaxConfig, TextError> {
    let built = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    built.map_err(|error| TextError::Template(error.to_string()))
}

/// What a client is told: the words of `raise_exception`, or what went wrong without places in the template.
fn refused(error: Error) -> TextError {
    let message = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    TextError::Conversation(message)
}

/// Methods of Python's strings and collections, which templates call.
fn python_method(
    state: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let text = value.as_str().filter(|_| args.is_empty());
    match (method, text) {
        ("strip", Some(text)) => Ok(text.trim_matches(is_python_space).into()),
        ("lstrip", Some(text)) => Ok(text.trim_start_matches(is_python_space).into()),
        ("rstrip", Some(text)) => Ok(text.trim_end_matches(is_python_space).into()),
        _ => pycompat::unknown_method_callback(state, value, method, args),
    }
}

fn trim(text: Cow<'_, str>, characters: Option<Cow<'_, str>>) -> String {
    match characters {
        Some(characters) => text.trim_matches(|c| characters.contains(c)).to_owned(),
        None => text.trim_matches(is_python_space).to_owned(),
    }
}

/// `str.isspace`: Python counts the separators of files, groups, records and units as white space, Unicode's
/// property, and so Rust, does not.
fn is_python_space(character: char) -> bool {
    character.is_whitespace() || matches!(character, '\u{1C}'..='\u{1F}')
}

fn raise_exception(message: &str) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.to_owned()))
}

fn strftime_now(format: &str) -> Result<String, Error> {
    strftime::now(format)
        .ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "strftime_now does not know this format"))
}

fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // The rest of `json.dumps`' options that templates pass are its behaviour here anyway.
    let _: (Option<Value>, Option<Value>) = (options.get("ensure_ascii")?, options.get("sort_keys")?);
    options.assert_all_used()?;
    let json = match indent {
        Some(indent) => python_json::to_string_indented(value, indent),
        None => python_json::to_string(value),
    };
    json.map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))
}

/// A string that refuses to grow beyond a limit.
struct Limited {
    text: Vec<u8>,
    max_bytes: usize,
    /// Something did not fit any more.
    is_full: bool,
}

impl io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.text.len() + bytes.len() > self.max_bytes {
            self.is_full = true;
            return Err(io::Error::other("the rendered conversation is too long"));
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render(source: &str, messages: Json, tools: Option<Json>) -> Result<String, TextError> {
        let control =
            ControlTokens::new(&json!({"added_tokens": [{"id": 1, "content": "<s>", "special": true}]}));
        let tokens = SpecialTokens { bos: "<s>".into(), eos: "</s>".into() };
        let template = ChatTemplate::new(source, &tokens, &control)?;
        let rendered = template.render(
            messages.as_array().unwrap(),
            tools.as_ref().map(|t| &t.as_array().unwrap()[..]),
            1000,
        );
        rendered.map(|text| control.unspell(&text))
    }

    #[track_caller]
    fn check(source: &str, expected: &str) {
        let messages = json!([{"role": "user", "content": " <Hi & \"you\"> "}]);
        let tools = json!([{"type": "function", "b": 1, "a": [1.0, "é"]}]);
        assert_eq!(render(source, messages, Some(tools)).unwrap(), expected, "{source}");
    }

    #[test]
    fn templates_render_as_transformers_renders_them() {
        check("{{ bos_token }}{{ messages[0]['content'] | trim }}{{ eos_token }}", "<s><Hi & \"you\"></s>");
        check("{{ messages[0].content.strip().split(' ')[0] }}", "<Hi");
        check("{{ tools | tojson }}", "[{\"type\": \"function\", \"b\": 1, \"a\": [1.0, \"é\"]}]");
        check("{{ messages[0].content | tojson }}", "\" <Hi & \\\"you\\\"> \"");
        check("{% for m in messages %}\n  {% if true %}\nx\n{% endif %}\n{% endfor %}\n", "x\n");
        check(
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "1",
        );
        check("{{ documents is none }} {{ nothing is defined }} {{ messages[1:] | length }}", "True False 0");
        check("{% for x in range(9) %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}", "01");
    }

    #[test]
    fn white_space_is_what_python_takes_for_it() {
        let padded = "'\u{1C}\u{1D} \u{1E}\u{85}a\u{1F}\u{A0}\u{200B}\u{3000}'";
        check(&format!("{{{{ {padded} | trim }}}}"), "a\u{1F}\u{A0}\u{200B}");
        check(&format!("{{{{ {padded}.strip() }}}}"), "a\u{1F}\u{A0}\u{200B}");
        check(&format!("{{{{ {padded}.lstrip().rstrip('\u{3000}\u{200B}') }}}}"), "a\u{1F}\u{A0}");
        check("{{ '\u{1C}a\u{1F}'.rstrip() }}", "\u{1C}a");
        check("{{ 'xyaxb' | trim('xyb') }}", "a");
    }

    #[test]
    fn a_template_refuses_a_conversation_in_its_own_words() {
        let Err(TextError::Conversation(message)) =
            render("{{ raise_exception('roles must alternate') }}", json!([]), None)
        else {
            panic!("the template raised nothing");
        };
        assert_eq!(message, "roles must alternate");
    }

    #[test]
    fn a_conversation_that_is_too_long_is_refused_as_such() {
        let Err(TextError::Conversation(message)) = render("{{ 'long' * 300 }}", json!([]), None) else {
            panic!("1200 bytes fit in 1000");
        };
        assert_eq!(message, "the rendered conversation is longer than 1000 bytes; shorten it");
    }

    #[test]
    fn a_template_can_exhaust_neither_time_nor_memory() {
        let loops = "{% for a in range(10000) %}{% for b in range(10000) %}{% for c in range(10000) %}{% endfor %}{% endfor %}{% endfor %}";
        let recursion = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}";
        let output = "{% for a in range(9000) %}aaaaaaaaaaaaaaaaaaa{% endfor %}";
        for source in [loops, recursion, output, "{{ 'a' * 1000000000000 }}"] {
            assert!(matches!(render(source, json!([]), None), Err(TextError::Conversation(_))), "{source}");
        }
    }
}
