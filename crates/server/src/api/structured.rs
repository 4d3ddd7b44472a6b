//! `response_format`, vLLM's `structured_outputs` and `allowed_token_ids`, `regex`, `choice`, `grammar`: what an answer
//! must look like. At most one of them; all are compiled before a request is submitted, and one that cannot be is
//! refused with its place.

use serde_json::Value;

use super::fields::{Fields, missing, string_at, wrong_type, wrong_value};
use super::params::{indexed, token_ids};
use super::tools::Tools;
use crate::config::limits;
use crate::constraint::{Bound, GrammarError, Source, mask_of};
use crate::error::{ApiError, quoted};
use crate::state::AppState;

/// What an answer must look like, and the field that says so.
#[derive(Debug)]
pub(crate) struct Format {
    param: &'static str,
    wanted: Wanted,
}

#[derive(Debug)]
enum Wanted {
    Grammar(Source),
    /// An answer of these tokens.
    Tokens(Vec<u32>),
}

impl Format {
    fn new(param: &'static str, source: Source) -> Self {
        Self { param, wanted: Wanted::Grammar(source) }
    }
}

/// Takes the fields that say what an answer must look like; only a chat has a `response_format`.
pub(crate) fn take(
    fields: &mut Fields,
    is_chat: bool,
    vocab_size: usize,
) -> Result<Option<Format>, ApiError> {
    let mut formats = Vec::new();
    if is_chat {
        formats.extend(take_response_format(fields)?);
    }
    formats.extend(take_structured_outputs(fields)?);
    let texts = take_texts(fields)?.into_iter();
    formats.extend(texts.map(|(param, source)| Format::new(param, source)));
    if let Some(tokens) = take_tokens(fields, vocab_size)? {
        formats.push(Format { param: "allowed_token_ids", wanted: Wanted::Tokens(tokens) });
    }
    if let [first, second, ..] = &formats[..] {
        let first = first.param.split('.').next().unwrap_or_default();
        return Err(wrong_value(second.param, &format!("it cannot be combined with '{first}'")));
    }
    Ok(formats.pop())
}

/// An object of vLLM's: one of the same fields, a schema, or the wish for any JSON object.
fn take_structured_outputs(fields: &mut Fields) -> Result<Option<Format>, ApiError> {
    let Some(mut outputs) = fields.object("structured_outputs")? else { return Ok(None) };
    let mut formats: Vec<Format> = Vec::new();
    if let Some(schema) = outputs.take("json") {
        let param = "structured_outputs.json";
        formats.push(Format::new(param, Source::Schema(schema_at(param, schema)?)));
    }
    let texts = take_texts(&mut outputs)?.into_iter();
    formats.extend(texts.map(|(name, source)| {
        let param = match name {
            "regex" => "structured_outputs.regex",
            "choice" => "structured_outputs.choice",
            _ => "structured_outputs.grammar",
        };
        Format::new(param, source)
    }));
    if outputs.boolean("json_object")? == Some(true) {
        formats.push(Format::new("structured_outputs.json_object", Source::any_object()));
    }
    outputs.finish()?;
    let is_single = formats.len() == 1;
    let expected = "expected one of 'json', 'regex', 'choice', 'grammar' and 'json_object'";
    formats.pop().filter(|_| is_single).map(Some).ok_or_else(|| wrong_value("structured_outputs", expected))
}

fn take_tokens(fields: &mut Fields, vocab_size: usize) -> Result<Option<Vec<u32>>, ApiError> {
    let Some(ids) = fields.list("allowed_token_ids", vocab_size)? else { return Ok(None) };
    if ids.is_empty() {
        return Err(wrong_value("allowed_token_ids", "it must not be empty"));
    }
    token_ids("allowed_token_ids", &ids, vocab_size).map(Some)
}

/// What is said in strings, by the names of its fields.
fn take_texts(fields: &mut Fields) -> Result<Vec<(&'static str, Source)>, ApiError> {
    let mut texts = Vec::new();
    if let Some(regex) = fields.string("regex", limits::MAX_GRAMMAR_BYTES)? {
        texts.push(("regex", Source::Regex(regex)));
    }
    if let Some(choices) = take_choices(fields)? {
        texts.push(("choice", Source::Choice(choices)));
    }
    if let Some(grammar) = fields.string("grammar", limits::MAX_GRAMMAR_BYTES)? {
        texts.push(("grammar", Source::Lark(grammar)));
    }
    Ok(texts)
}

fn take_response_format(fields: &mut Fields) -> Result<Option<Format>, ApiError> {
    let Some(mut format) = fields.object("response_format")? else { return Ok(None) };
    let type_path = format.path("type");
    let kind = format.string("type", limits::MAX_LABEL_BYTES)?.ok_or_else(|| missing(&type_path))?;
    let source = match kind.as_str() {
        "text" => None,
        "json_object" => Some(Source::any_object()),
        "json_schema" => Some(take_json_schema(&mut format)?),
        other => {
            let expected = "expected 'text', 'json_object' or 'json_schema', but got";
            return Err(wrong_value(&type_path, &format!("{expected} {}", quoted(other))));
        }
    };
    format.finish()?;
    Ok(source.map(|source| Format::new("response_format.json_schema.schema", source)))
}

fn take_json_schema(format: &mut Fields) -> Result<Source, ApiError> {
    let path = format.path("json_schema");
    let mut described = format.object("json_schema")?.ok_or_else(|| missing(path))?;
    let [name_path, schema_path] = ["name", "schema"].map(|name| described.path(name));
    let name = described.string("name", limits::MAX_NAME_BYTES)?.ok_or_else(|| missing(&name_path))?;
    check_name(&name_path, &name)?;
    described.string("description", usize::MAX)?;
    // Whether it is strict or not, the answer is what the schema says.
    described.boolean("strict")?;
    let schema = described.take("schema").ok_or_else(|| missing(&schema_path))?;
    described.finish()?;
    Ok(Source::Schema(schema_at(&schema_path, schema)?))
}

fn schema_at(path: &str, schema: Value) -> Result<Value, ApiError> {
    if !schema.is_object() {
        return Err(wrong_type(path, "an object", &schema));
    }
    string_at(path, schema.to_string().into(), limits::MAX_GRAMMAR_BYTES)?;
    Ok(schema)
}

/// A name of a schema or a tool.
pub(crate) fn check_name(path: &str, name: &str) -> Result<(), ApiError> {
    let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    if name.is_empty() || !name.bytes().all(is_letter) {
        return Err(wrong_value(path, "expected letters, digits, '_' and '-'"));
    }
    Ok(())
}

fn take_choices(fields: &mut Fields) -> Result<Option<Vec<String>>, ApiError> {
    let path = fields.path("choice");
    let Some(choices) = fields.list("choice", limits::MAX_CHOICE_STRINGS)? else { return Ok(None) };
    if choices.is_empty() {
        return Err(wrong_value(&path, "it must not be empty"));
    }
    let choice = |(path, choice): (String, _)| string_at(&path, choice, limits::MAX_CHOICE_BYTES);
    indexed(&path, choices).into_iter().map(choice).collect::<Result<_, _>>().map(Some)
}

/// Compiles what an answer is bound to. `hides_space` has what is true of some of the request's texts: that a
/// space at their start is not shown, or that it is.
pub(crate) async fn compile(
    state: &AppState,
    format: Option<Format>,
    tools: &Tools,
    hides_space: &[bool],
) -> Result<Bound, ApiError> {
    let mut bound = Bound::default();
    if let Some(Format { param, wanted: Wanted::Tokens(tokens) }) = &format {
        if !tools.callable.is_empty() {
            return Err(wrong_value(param, "it cannot be combined with 'tools'"));
        }
        bound.tokens = Some(mask_of(tokens));
    }
    if let Some(Format { param, wanted: Wanted::Grammar(source) }) = format {
        let compile = |begins_with_space| state.grammars.compile(source.clone(), begins_with_space);
        let refused = |error| refused(error, param, &tools.callable);
        if hides_space.contains(&true) {
            bound.text_behind_space = Some(compile(true).await.map_err(refused)?);
        }
        if hides_space.contains(&false) {
            bound.text = Some(compile(false).await.map_err(refused)?);
        }
    }
    if !tools.callable.is_empty() {
        bound.calls_token = state.text.tool_calls_token;
        bound.is_forced = tools.is_forced;
    }
    if let Some(calls) = tools.calls() {
        let compiled = state.grammars.compile(Source::Calls(calls), false).await;
        bound.calls = Some(compiled.map_err(|error| refused(error, "tools", &tools.callable))?);
    }
    Ok(bound)
}

fn refused(error: GrammarError, param: &str, callable: &[super::tools::Callable]) -> ApiError {
    match error {
        GrammarError::Invalid { tool, at, message } => {
            let of_tool = tool.and_then(|tool| callable.get(tool)).map(|tool| tool.parameters_path.as_str());
            let mut path = format!("{}{at}", of_tool.unwrap_or(param));
            path.truncate(path.floor_char_boundary(limits::MAX_LABEL_BYTES));
            wrong_value(&path, &message)
        }
        GrammarError::TooSlow => wrong_value(param, &error.to_string()),
        GrammarError::Busy => ApiError::too_many_grammars(),
        GrammarError::Failed => ApiError::internal(),
    }
}
