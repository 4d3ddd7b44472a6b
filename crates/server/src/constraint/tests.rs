//! Grammars on the demo model's vocabulary, under a model that takes any allowed token as soon as another:
//! whatever it writes must be what was asked for.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use engine::Constraint;
use model::mix64;
use serde_json::{Value, json};

use super::compiler::Template;
use super::*;
use crate::text::detokenizer::Detokenizer;
use crate::text::model::{TextFiles, TextModel};

static TEXT: LazyLock<TextModel> = LazyLock::new(|| text_model(|tokenizer_json| tokenizer_json));
static COMPILER: LazyLock<Compiler> = LazyLock::new(|| Compiler::new(&TEXT, 1536));
/// The demo model's vocabulary, grown to the size of a Llama's or a Mistral's.
static LARGE: LazyLock<Compiler> = LazyLock::new(|| Compiler::new(&text_model(grown), LARGE_VOCABULARY));
const LARGE_VOCABULARY: usize = 32_000;

fn text_model(tokenizer: impl Fn(Vec<u8>) -> Vec<u8>) -> TextModel {
    let file = |name: &str| demo::files().iter().find(|(file, _)| *file == name).unwrap().1.to_vec();
    let files = TextFiles {
        tokenizer_json: tokenizer(file("tokenizer.json")),
        tokenizer_config_json: Some(file("tokenizer_config.json")),
        chat_template: None,
        generation_config_json: Some(file("generation_config.json")),
    };
    TextModel::new(&files).unwrap()
}

/// Adds the commonest pieces of words of this repository's own texts, which is what training would find, and no merges:
/// a grammar reads tokens, and does not ask how they come to be. A piece is of letters or of other characters, as all
/// but one of the 31 741 of Mixtral's own vocabulary are.
fn grown(tokenizer_json: Vec<u8>) -> Vec<u8> {
    let texts = [
        include_str!("../../../../README.md"),
        include_str!("../../../README.md"),
        include_str!("../../../demo/eval/memory.jsonl"),
        include_str!("../../../demo/eval/python.jsonl"),
        include_str!("../../../demo/eval/story.jsonl"),
        include_str!("../../../demo/eval/tools.jsonl"),
        include_str!("../../../demo/eval/translate.jsonl"),
        include_str!("../../../demo/train/data.py"),
        include_str!("../../../demo/train/skills.py"),
        include_str!("../../../demo/train/tables.py"),
        include_str!("../../../../LICENSE"),
        include_str!("tests.rs"),
    ];
    let mut counts: HashMap<String, usize> = HashMap::new();
    for word in texts.iter().flat_map(|text| text.split_whitespace()) {
        let chars: Vec<char> = std::iter::once('\u{2581}').chain(word.chars()).collect();
        let is_of_one_kind = |a: &char, b: &char| *a == '\u{2581}' || a.is_alphabetic() == b.is_alphabetic();
        for run in chars.chunk_by(is_of_one_kind).map(|run| &run[..run.len().min(20)]) {
            for len in 2..=run.len() {
                run.windows(len).for_each(|piece| *counts.entry(piece.iter().collect()).or_default() += 1);
            }
        }
    }
    let mut pieces: Vec<(String, usize)> = counts.into_iter().collect();
    // A long piece saves more tokens than a short one that is as common.
    pieces.sort_by_cached_key(|(piece, count)| {
        (std::cmp::Reverse(count * (piece.chars().count() - 1)), piece.clone())
    });
    let mut tokenizer: Value = serde_json::from_slice(&tokenizer_json).unwrap();
    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    for (piece, _) in pieces {
        let id = vocabulary.len();
        if id < LARGE_VOCABULARY && !vocabulary.contains_key(&piece) {
            vocabulary.insert(piece, json!(id));
        }
    }
    assert_eq!(vocabulary.len(), LARGE_VOCABULARY);
    serde_json::to_vec(&tokenizer).unwrap()
}

const EOS: u32 = 2;
const MAX_TOKENS: usize = 400;

#[tokio::main(flavor = "current_thread")]
async fn compile(source: Source, begins_with_space: bool) -> Result<Arc<Template>, GrammarError> {
    COMPILER.compile(source, begins_with_space).await
}

#[tokio::main(flavor = "current_thread")]
async fn compile_large(source: Source) -> Result<Arc<Template>, GrammarError> {
    LARGE.compile(source, true).await
}

/// Takes allowed tokens at random, and returns them if they come to an end.
fn write(constraint: &mut dyn Constraint, seed: u64) -> Option<Vec<u32>> {
    write_or_give_up(constraint, seed, false)
}

/// The same. `gives_up`: a grammar may become too complex for its text.
fn write_or_give_up(constraint: &mut dyn Constraint, seed: u64, gives_up: bool) -> Option<Vec<u32>> {
    let mut tokens = Vec::new();
    for index in 0..MAX_TOKENS as u64 {
        let mask = constraint.allowed().expect("the text is bound");
        let is_allowed =
            |&token: &u32| mask.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1);
        let allowed: Vec<u32> = (0..mask.len() as u32 * u32::BITS).filter(is_allowed).collect();
        if allowed.is_empty() && gives_up {
            return None;
        }
        assert!(!allowed.is_empty(), "a text can go on");
        let token = allowed[(mix64(seed ^ mix64(index)) % allowed.len() as u64) as usize];
        if token == EOS {
            return Some(tokens);
        }
        tokens.push(token);
        constraint.accept(token);
        if constraint.is_complete() {
            return Some(tokens);
        }
        constraint.prepare();
    }
    None
}

fn shown(tokens: &[u32]) -> String {
    let mut detokenizer = Detokenizer::new(Arc::clone(TEXT.tokenizer.vocabulary()));
    let mut text = String::new();
    tokens.iter().for_each(|&token| detokenizer.push(token, &mut text));
    detokenizer.finish(&mut text);
    text
}

/// Texts of a grammar that came to an end.
fn texts(source: Source, count: usize) -> Vec<String> {
    let template = compile(source, true).unwrap();
    let bound = Bound { text_behind_space: Some(template), ..Bound::default() };
    let mut constraints = bound.start(count, true).into_iter().map(Option::unwrap);
    let texts = (0..).map_while(|seed| Some(write(constraints.next()?.as_mut(), seed)));
    texts.flatten().map(|tokens| shown(&tokens)).collect()
}

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "kind": {"enum": ["é", "b c", null]},
            "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        },
        "required": ["name", "age", "kind", "tags"],
        "additionalProperties": false,
    })
}

#[test]
fn every_text_is_what_was_asked_for_without_the_space_that_is_not_shown() {
    let written = texts(Source::Schema(schema()), 50);
    assert!(written.len() > 40, "{} of 50 came to an end", written.len());
    for text in written {
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text:?}"));
        assert!(value["name"].as_str().unwrap().chars().count() <= 12 && value["age"].is_u64(), "{text}");
    }
    let choices = ["yes", "no \"really\"", " with space", "é\n"].map(str::to_owned).to_vec();
    for text in texts(Source::Choice(choices.clone()), 30) {
        assert!(choices.contains(&text), "{text:?}");
    }
    for text in texts(Source::Regex("^[a-c]{2,4} é*$".into()), 30) {
        let (letters, rest) = text.split_once(' ').unwrap_or_else(|| panic!("{text:?}"));
        assert!((2..=4).contains(&letters.len()) && rest.chars().all(|c| c == 'é'), "{text:?}");
    }
    for text in texts(Source::Lark("start: item (\",\" item)*\nitem: /[0-9]/ | \"x\"".into()), 30) {
        assert!(text.split(',').all(|item| item.len() == 1), "{text:?}");
    }
}

fn calls(is_single: bool) -> Source {
    let tool = |name: &str, parameters| Tool { name: name.into(), parameters };
    let tools = vec![
        tool("first", Some(schema())),
        tool("other", Some(json!({"type": "object", "properties": {}, "additionalProperties": false}))),
    ];
    Source::Calls(Calls { tools, is_single })
}

/// Whatever computes a mask, it allows what the matcher would take.
#[test]
fn masks_allow_exactly_the_tokens_that_can_follow() {
    for source in [
        Source::Regex(r"[A-Za-z ,é]{10,200}\.".into()),
        Source::Regex(r"\d{4}-\d{2}-\d{2}( \w+)?".into()),
        Source::Regex("[a-z]{1,12}@[^x]{3,9}".into()),
        Source::Choice(["yes", "no", " maybe"].map(str::to_owned).to_vec()),
        Source::Lark("start: (WORD \" \")+ \".\"\nWORD: /[A-Z]?[a-z]+/".into()),
        Source::Schema(schema()),
    ] {
        let shown = format!("{source:?}");
        let mut matcher = compile(source, true).unwrap().matcher.deep_clone();
        for step in 0..12 {
            let Ok(mask) = matcher.compute_mask() else { break };
            let takes = |&token: &u32| token != EOS && matcher.validate_tokens(&[token]).unwrap() == 1;
            let taken: Vec<u32> = (0..1536).filter(takes).collect();
            let allowed: Vec<u32> = mask.iter().filter(|&token| token != EOS).collect();
            assert_eq!(allowed, taken, "{shown}, step {step}");
            let Some(&token) = allowed.get(mix64(step) as usize % allowed.len().max(1)) else { break };
            matcher.consume_token(token).unwrap();
        }
    }
}

#[test]
fn calls_follow_their_token_and_are_forced_first_or_left_to_the_model() {
    let calls_token = TEXT.tool_calls_token.unwrap();
    for is_single in [true, false] {
        let calls = Some(compile(calls(is_single), false).unwrap());
        let bound = Bound { calls, calls_token: Some(calls_token), is_forced: true, ..Bound::default() };
        for (seed, constraint) in (0..).zip(bound.start(20, true)) {
            let Some(tokens) = write(constraint.unwrap().as_mut(), seed) else { continue };
            assert_eq!(tokens[0], calls_token);
            let text = shown(&tokens);
            let value: Value =
                serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text:?}"));
            let calls = value.as_array().unwrap();
            assert!(!calls.is_empty() && (!is_single || calls.len() == 1), "{text}");
            assert!(
                calls.iter().all(|call| call["name"] == "other" || call["arguments"]["age"].is_u64()),
                "{text}"
            );
        }
        let free = Bound { is_forced: false, ..bound.clone() };
        let mut constraint = free.start(1, true).remove(0).unwrap();
        assert_eq!(constraint.allowed(), None);
        constraint.accept(400);
        assert_eq!(constraint.allowed(), None);
        constraint.accept(calls_token);
        assert!(constraint.allowed().is_some());

        let text = Some(compile(Source::any_object(), true).unwrap());
        let either = Bound { text_behind_space: text, is_forced: false, ..bound };
        let mut constraint = either.start(1, true).remove(0).unwrap();
        let allows = |constraint: &dyn Constraint| {
            constraint.allowed().unwrap()[(calls_token / 32) as usize] >> (calls_token % 32) & 1 == 1
        };
        assert!(allows(constraint.as_ref()));
        let space = TEXT.tokenizer.token_to_id("▁").unwrap();
        constraint.accept(space);
        assert!(constraint.is_due());
        constraint.prepare();
        assert!(!constraint.is_due() && !allows(constraint.as_ref()));
    }
}

#[test]
fn what_cannot_be_compiled_is_refused_with_its_place() {
    let check = |source: Source, place: &str, words: &str| {
        let shown: String = format!("{source:?}").chars().take(100).collect();
        match compile(source, true).map(|_| ()) {
            Err(GrammarError::Invalid { at, message, .. }) => {
                assert!(at == place && message.contains(words), "{shown}: {at:?} {message}");
            }
            other => panic!("{shown}: {other:?}"),
        }
    };
    let of = |a: Value| Source::Schema(json!({"type": "object", "properties": {"a": a, "b": {}}}));
    check(of(json!({"type": "strin"})), ".properties.a", "strin");
    check(of(json!({"items": {"type": "string", "pattern": "("}})), ".properties.a.items", "unclosed group");
    check(of(json!({"$ref": "https://example.com/x"})), "", "$ref");
    check(of(json!({"type": "array", "uniqueItems": true})), ".properties.a", "uniqueItems");
    check(of(json!({"not": {}})), ".properties.a", "not");
    check(of(json!({"type": "string", "format": "nonsense"})), ".properties.a", "nonsense");
    check(Source::Schema(json!({"type": "object", "x-guidance": {"lenient": true}, "not": {}})), "", "not");
    check(of(json!({"type": "object", "minProperties": 3})), ".properties.a", "minProperties");
    check(Source::Schema(json!({"properties": 1})), "", "object");
    check(Source::Schema(json!({"$ref": "#/$defs/a", "$defs": {"a": {"type": "x"}}})), ".$defs.a", "x");
    check(Source::Regex("(".into()), "", "unclosed group");
    check(Source::Regex("(?=a)b".into()), "", "look-around");
    check(Source::Regex("(".repeat(10_000)), "", "nested");
    check(Source::Lark("start: nothing".into()), "", "nothing");
    check(Source::Lark("start: start".into()), "", "no text");
    check(Source::Lark("start: <s>".into()), "", "");
    check(Source::Lark("start: <[5]>".into()), "", "");
    check(Source::Lark(format!("start: {}\"a\"", "\"a\" | ".repeat(20_000))), "", "Too many");
}

#[test]
fn hostile_grammars_cost_little_and_spoil_nothing() {
    let refers = |i: usize| json!({"type": "array", "items": {"$ref": format!("#/$defs/d{}", i + 1)}});
    let mut chain: serde_json::Map<String, Value> =
        (0..3000).map(|index| (format!("d{index}"), refers(index))).collect();
    chain.insert("d3000".into(), json!({}));
    let deep = (0..60).fold(json!({}), |inner, _| json!({"items": inner}));
    let wide: serde_json::Map<String, Value> =
        (0..2000).map(|i| (format!("p{i}"), json!({"type": "string", "maxLength": i}))).collect();
    let hostile = [
        Source::Schema(json!({"$ref": "#/$defs/d0", "$defs": chain})),
        Source::Schema(json!({"$ref": "#"})),
        Source::Schema(json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}})),
        Source::Schema(deep),
        Source::Schema(json!({"type": "object", "properties": wide})),
        Source::Schema(json!({"type": "string", "maxLength": 100_000_000})),
        Source::Schema(json!({"type": "array", "maxItems": 100_000_000, "minItems": 1_000_000})),
        Source::Regex("(a{1000}){1000}".into()),
        Source::Regex("(a|b)*a(a|b){200}".into()),
        Source::Lark(format!("start: A\nA: \"a\"{}", " & /a/".repeat(5000))),
        Source::Choice((0..1000).map(|index| format!("{index} {}", "x".repeat(50))).collect()),
    ];
    for source in hostile {
        let shown: String = format!("{source:?}").chars().take(100).collect();
        let started = Instant::now();
        let outcome = compile(source, true).map_or_else(|error| error.to_string(), |_| "compiles".into());
        println!("{:?} {shown}: {outcome}", started.elapsed());
        assert!(started.elapsed().as_secs() < 4, "{shown}: {:?}", started.elapsed());
        assert!(compile(Source::Schema(schema()), true).is_ok());
    }
}

/// A mask per token: what a choice adds to a step. Prints the figures; only gross ones fail it.
#[test]
fn masks_take_microseconds() {
    let flat = json!({"name": {"type": "string"}, "age": {"type": "integer"}, "is_new": {"type": "boolean"}});
    let object = |fields: Value| {
        let required: Vec<String> = fields.as_object().unwrap().keys().cloned().collect();
        json!({"type": "object", "properties": fields, "required": required, "additionalProperties": false})
    };
    let nested =
        json!({"who": object(flat.clone()), "all": {"type": "array", "items": object(flat.clone())}});
    let words = ["red", "green", "blue", "dark red", "dark green", "dark blue", "black", "white"];
    for (name, source) in [
        ("flat object", Source::Schema(object(flat))),
        ("nested objects", Source::Schema(object(nested))),
        ("bounded fields", Source::Schema(schema())),
        ("enum", Source::Schema(json!({"enum": words}))),
        ("string", Source::Schema(json!({"type": "string"}))),
        ("any object", Source::any_object()),
        ("address", Source::Regex(r"[a-z0-9._]{1,20}@[a-z0-9]{1,20}\.(com|org|net)".into())),
        ("name", Source::Regex(r"[A-Z][a-z]{1,15}( [A-Z][a-z]{1,15}){1,3}".into())),
        ("identifier", Source::Regex(r"[A-Za-z_][A-Za-z0-9_]{0,40}".into())),
        ("words", Source::Regex(r"[A-Za-z ,]{10,200}\.".into())),
        ("date", Source::Regex(r"\d{4}-\d{2}-\d{2}".into())),
    ] {
        let bound = Bound { text_behind_space: Some(compile_large(source).unwrap()), ..Bound::default() };
        let mut took = Vec::new();
        for seed in 0..100 {
            // A request each: nothing is learnt from the one before.
            let inner = bound.start(1, true).remove(0).unwrap();
            let mut constraint = Timed { inner, took: Vec::new() };
            write(&mut constraint, seed);
            took.append(&mut constraint.took);
        }
        took.sort_unstable();
        let mean = took.iter().sum::<Duration>() / took.len() as u32;
        let [median, high] = [took.len() / 2, took.len() * 99 / 100].map(|index| took[index]);
        let most = took[took.len() - 1];
        println!(
            "{name}: {} masks, mean {mean:.1?}, p50 {median:.1?}, p99 {high:.1?}, max {most:.1?}",
            took.len()
        );
        assert!(mean < Duration::from_millis(1), "{name}: {mean:?}");
    }
}

/// Masks are made on the engine's thread, one by one: a hostile one must not hold up a step for long.
#[test]
fn the_masks_of_hostile_grammars_are_bounded() {
    for source in [
        Source::Regex("(a|b)*a(a|b){18}".into()),
        Source::Regex("(.*a){30}.*b".into()),
        Source::Regex("(.{0,60}[a-f]){12}".into()),
        Source::Regex(r"[\s\S]{0,3000}x".into()),
        Source::Lark("start: x\nx: \"a\" | x x".into()),
        Source::Lark("start: x \"!\"\nx: /[a-z ]/ | x x | x x x".into()),
        Source::Lark("start: (a | b | c)* \"!\"\na: /[a-z]+/\nb: /[a-m]+/\nc: /[n-z]+ ?/".into()),
        Source::Schema(json!({"type": "string", "pattern": "^(a|b)*a(a|b){15}$"})),
    ] {
        let shown = format!("{source:?}");
        let template = match compile_large(source) {
            Ok(template) => template,
            Err(error) => {
                println!("{shown}: {error}");
                continue;
            }
        };
        let bound = Bound { text_behind_space: Some(template), ..Bound::default() };
        let mut most = Duration::ZERO;
        let mut num_masks = 0;
        for seed in 0..4 {
            let mut constraint = Timed { inner: bound.start(1, true).remove(0).unwrap(), took: Vec::new() };
            write_or_give_up(&mut constraint, seed, true);
            num_masks += constraint.took.len();
            most = constraint.took.into_iter().fold(most, Duration::max);
        }
        println!("{shown}: {num_masks} masks, max {most:.1?}");
        assert!(most < Duration::from_millis(100), "{shown}: {most:?}");
    }
}

struct Timed {
    inner: Box<dyn Constraint>,
    took: Vec<Duration>,
}

impl Constraint for Timed {
    fn allowed(&self) -> Option<&[u32]> {
        self.inner.allowed()
    }

    fn accept(&mut self, token: u32) {
        let started = Instant::now();
        self.inner.accept(token);
        self.took.push(started.elapsed());
    }

    fn is_due(&self) -> bool {
        self.inner.is_due()
    }

    fn prepare(&mut self) {
        let started = Instant::now();
        self.inner.prepare();
        if let Some(took) = self.took.last_mut() {
            *took += started.elapsed();
        }
    }

    fn is_complete(&self) -> bool {
        self.inner.is_complete()
    }
}
