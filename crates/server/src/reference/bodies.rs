//! The fields of every body, in the order in which people look for them.

use std::ops::RangeInclusive;

use engine::limits::{MAX_LOGIT_BIAS_ENTRIES, REPETITION_PENALTY};
use model::RunnerLimits;

use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, SchemaType};

use super::schema::*;
use crate::api::routing::GATE_TEMPERATURE;
use crate::api::routing_analysis::{MAX_ABLATIONS, MAX_TEXTS};
use crate::api::{anthropic, responses};
use crate::config::limits::*;
use crate::state::AppState;

const U32: RangeInclusive<i64> = 0..=u32::MAX as i64;
const POSITIVE: RangeInclusive<i64> = 1..=u32::MAX as i64;

pub(super) fn chat(state: &AppState) -> Vec<Named> {
    let mut fields = conversation(state);
    fields.extend([
        ("max_completion_tokens", integer(POSITIVE, "Default: the rest of the context")),
        ("max_tokens", integer(POSITIVE, "The older name of the same")),
        ("logprobs", boolean("Adds the log-probabilities of the answer's tokens")),
        ("top_logprobs", integer(0..=MAX_CHAT_LOGPROBS, "Alternatives to each, with `logprobs`")),
        ("response_format", response_format()),
        ("modalities", some(word(&["text"], ""), 1, "What the answer is made of")),
    ]);
    fields.extend(bounds(state));
    fields.extend(shared(state));
    fields
}

pub(super) fn completion(state: &AppState) -> Vec<Named> {
    let mut fields = vec![
        ("prompt", prompts(state)),
        ("max_tokens", integer(U32, "Default: 16")),
        ("echo", boolean("Repeats the prompt; with `logprobs`, scored")),
        ("logprobs", integer(0..=MAX_COMPLETION_LOGPROBS, "Alternatives to each token")),
        (
            "best_of",
            integer(1..=i64::from(state.config.max_choices), "Generates more choices than are shown"),
        ),
    ];
    fields.extend(bounds(state));
    fields.extend(shared(state));
    fields
}

/// Text, texts, token ids, or lists of token ids.
fn prompts(state: &AppState) -> Field {
    let max_prompts = state.config.max_prompts;
    let text = || text(0..=state.config.max_prompt_bytes, "");
    let ids = || some(token(state), state.engine.limits().max_model_len, "Token ids");
    one_of("What is continued", [text(), some(text(), max_prompts, ""), ids(), some(ids(), max_prompts, "")])
}

/// What an answer must look like, in a chat.
fn response_format() -> Field {
    let schema = vec![
        ("name", name("")),
        ("description", string("")),
        ("schema", open_object("JSON schema")),
        ("strict", boolean("The answer is what the schema says in any case")),
    ];
    let schema = demanding(&["name", "schema"], "", schema);
    let of_schema = vec![("type", word(&["json_schema"], "")), ("json_schema", schema)];
    let plain = demanding(&["type"], "", vec![("type", word(&["text", "json_object"], ""))]);
    one_of("What the answer must look like", [plain, demanding(&["type", "json_schema"], "", of_schema)])
}

/// The same in other words, of which a request has one.
fn bounds(state: &AppState) -> Vec<Named> {
    let mut of_vllm = vec![("json", open_object("JSON schema")), ("json_object", boolean("Any object"))];
    of_vllm.extend(texts());
    let mut bounds = vec![("structured_outputs", object("One of these, as vLLM has them", of_vllm))];
    let vocab_size = state.engine.limits().vocab_size;
    bounds.push(("allowed_token_ids", some(token(state), vocab_size, "The answer is made of these")));
    bounds.extend(texts());
    bounds
}

fn texts() -> Vec<Named> {
    let choice = text(0..=MAX_CHOICE_BYTES, "");
    vec![
        ("regex", expression("The answer matches it from end to end")),
        ("choice", some(choice, MAX_CHOICE_STRINGS, "The answer is one of these")),
        ("grammar", text(1..=MAX_GRAMMAR_BYTES, "The answer follows it: Lark, as llguidance has it")),
    ]
}

/// What is said about routing.
fn routing(state: &AppState) -> Vec<Named> {
    let limits = state.engine.limits();
    let record = vec![
        ("layers", layers(limits, "Others are left out")),
        ("prompt", boolean("From the prompt's first token on")),
        ("encoding", word(&["json", "base64"], "")),
    ];
    vec![("routing", one_of("Which experts tokens went to", [boolean(""), object("", record)])), moe(limits)]
}

fn moe(limits: &RunnerLimits) -> Named {
    let (each, mut one) = (object("", steering(limits)), steering(limits));
    one.push(("replay", replay(limits)));
    let forms = [object("", one), list(each, limits.num_layers, "")];
    ("moe", one_of("Decides which experts tokens go to", forms))
}

fn layers(limits: &RunnerLimits, about: &str) -> Field {
    let layer = integer(0..=limits.num_layers as i64 - 1, "In ascending order");
    set(layer, limits.num_layers, about)
}

/// The overrides of some layers.
fn steering(limits: &RunnerLimits) -> Vec<Named> {
    let expert = integer(0..=limits.num_experts as i64 - 1, "");
    let experts = |about| set(expert.clone(), limits.num_experts, about);
    vec![
        ("layers", layers(limits, "Default: all")),
        ("top_k", integer(1..=limits.max_steered_experts() as i64, "Experts per token")),
        ("ban", experts("No token goes to them")),
        ("force", experts("Every token goes to them")),
        ("temperature", number(GATE_TEMPERATURE, "Flattens or sharpens the gate weights")),
        ("random", object("Chooses at random", vec![("seed", integer(SEED, ""))])),
    ]
}

/// A recorded routing, in either encoding.
fn replay(limits: &RunnerLimits) -> Field {
    demanding(
        &["experts", "weights"],
        "A recorded routing",
        vec![
            ("start", integer(0..=i64::from(u32::MAX / 2), "Position of the first token")),
            ("layers", layers(limits, "Default: all")),
            ("encoding", word(&["json", "base64"], "")),
            ("shape", list(anything(""), 3, "Of base64: tokens, layers, experts per token")),
            ("experts", anything("By token, layer and rank")),
            ("weights", anything("By token, layer and rank")),
        ],
    )
}

pub(super) fn analysis(state: &AppState) -> Vec<Named> {
    let limits = state.engine.limits();
    let ablation = demanding(&["name", "moe"], "", vec![("name", label("")), moe(limits)]);
    let words = |about| text(0..=state.config.max_prompt_bytes, about);
    let mut named = vec![("name", label("")), ("text", words("Text; or `messages` instead"))];
    named.extend(conversation(state));
    let mut fields = vec![
        model(state),
        ("texts", some(demanding(&["name"], "", named), MAX_TEXTS, "Named texts")),
        ("text", words("One text without a name; or `messages`, or `texts`")),
        ("layers", layers(limits, "Default: all")),
        ("tokens", boolean("Adds each token's loss")),
        ("ablations", list(ablation, MAX_ABLATIONS, "Reads the texts again under overrides")),
    ];
    fields.extend(conversation(state));
    fields
}

pub(super) fn response(state: &AppState) -> Vec<Named> {
    let max_items = MAX_MESSAGES;
    let words = |about| text(0..=state.config.max_prompt_bytes, about);
    let part = demanding(
        &["type", "text"],
        "Text",
        vec![
            ("type", word(&["input_text", "output_text", "text"], "")),
            ("text", words("")),
            ("annotations", list(open_object(""), max_items, "Ignored; an answer's parts have them")),
            ("logprobs", open_list("Ignored; an answer's parts have them")),
        ],
    );
    let parts = || one_of("Text, or parts", [words(""), list(part.clone(), max_items, "")]);
    let item = |about, kind: &'static str, required: &[&str], fields: Vec<Named>| {
        let own = vec![("type", word(&[kind], "")), ("id", label("")), ("status", label(""))];
        demanding(required, about, own.into_iter().chain(fields).collect())
    };
    let role = word(&["user", "assistant", "system", "developer"], "");
    let message = vec![("role", role), ("content", parts())];
    let call = vec![("call_id", label("")), ("name", label("")), ("arguments", words("A JSON object"))];
    let output = vec![("call_id", label("")), ("output", parts())];
    let items = [
        item("A message", "message", &["role", "content"], message),
        item("A call", "function_call", &["type", "call_id", "name", "arguments"], call),
        item("A call's result", "function_call_output", &["type", "call_id", "output"], output),
    ];
    let mut fields = vec![
        ("input", one_of("Text, or items", [words(""), some(one_of("", items), max_items, "")])),
        ("instructions", words("A system message; not carried on to later responses")),
        ("previous_response_id", label("A kept response to go on from")),
        ("store", boolean("Default: true")),
        ("max_output_tokens", integer(POSITIVE, "Default: the rest of the context")),
        ("tools", open_list("Functions, flat: type, name, description, parameters")),
        (
            "tool_choice",
            one_of("", [word(&["none", "auto", "required"], ""), open_object("A function by name")]),
        ),
        (
            "text",
            object(
                "The answer's form",
                vec![
                    ("format", open_object("text, json_object, or json_schema with its name and schema")),
                    ("verbosity", word(&["medium"], "")),
                ],
            ),
        ),
        ("include", list(word(&responses::request::INCLUDABLE, ""), MAX_TOOLS, "")),
        ("truncation", word(&["disabled"], "")),
        ("background", never("This server answers at once")),
        ("reasoning", object("This model does not reason", vec![("effort", word(&["none"], ""))])),
    ];
    let own: Vec<&str> = fields.iter().map(|(name, _)| *name).collect();
    let is_shared = |name: &&str| responses::request::SHARED.contains(name) && !own.contains(name);
    let chats: Vec<Named> = chat(state).into_iter().filter(|(name, _)| is_shared(name)).collect();
    fields.extend(chats);
    fields
}

pub(super) fn message(state: &AppState) -> Vec<Named> {
    let mut fields = message_count(state);
    fields.push(("max_tokens", integer(POSITIVE, "Required here")));
    fields
}

pub(super) fn message_count(state: &AppState) -> Vec<Named> {
    let words = |about| text(0..=state.config.max_prompt_bytes, about);
    let block = |kind, required: &[&str], fields: Vec<Named>| {
        let ignored = ("cache_control", open_object("Ignored: prefixes are cached in any case"));
        let own = vec![("type", word(&[kind], "")), ignored];
        demanding(&[&["type"], required].concat(), "", own.into_iter().chain(fields).collect())
    };
    let said = || block("text", &["text"], vec![("text", words(""))]);
    let texts = |about| one_of(about, [words(""), list(said(), MAX_MESSAGES, "")]);
    let used = vec![("id", label("")), ("name", label("")), ("input", open_object(""))];
    let result =
        vec![("tool_use_id", label("")), ("content", texts("")), ("is_error", boolean("Said to nobody"))];
    let message = |role, block| {
        let blocks = list(one_of("", [said(), block]), MAX_MESSAGES, "");
        let fields = vec![("role", word(&[role], "")), ("content", one_of("", [words(""), blocks]))];
        demanding(&["role", "content"], "", fields)
    };
    let messages = [
        message("user", block("tool_result", &["tool_use_id"], result)),
        message("assistant", block("tool_use", &["id", "name", "input"], used)),
    ];
    let tool = vec![
        ("type", word(&["custom"], "")),
        ("name", name("")),
        ("description", string("")),
        ("input_schema", open_object("JSON schema")),
        ("cache_control", open_object("Ignored: prefixes are cached in any case")),
    ];
    let tool = demanding(&["name", "input_schema"], "", tool);
    let choice = vec![
        ("type", word(&["auto", "any", "tool", "none"], "")),
        ("name", label("Of tool")),
        ("disable_parallel_tool_use", boolean("")),
    ];
    let thinking = demanding(&["type"], "", vec![("type", word(&["disabled"], ""))]);
    let mut fields = vec![
        ("messages", some(one_of("", messages), MAX_MESSAGES, "The conversation")),
        ("system", texts("A system message")),
        ("stop_sequences", list(text(1..=MAX_STOP_BYTES, ""), MAX_STOPS, "Never shown")),
        ("tools", list(tool, MAX_TOOLS, "Functions that the model may call")),
        ("tool_choice", demanding(&["type"], "", choice)),
        ("metadata", object("", vec![("user_id", label(""))])),
        ("service_tier", word(&["auto", "standard_only"], "")),
        ("thinking", thinking),
    ];
    let is_shared = |name: &str| anthropic::request::SHARED.contains(&name);
    fields.extend(chat(state).into_iter().filter(|(name, _)| is_shared(name)));
    fields
}

pub(super) fn tokenize(state: &AppState) -> Vec<Named> {
    let mut fields = vec![
        model(state),
        ("prompt", text(0..=state.config.max_prompt_bytes, "Text; or `messages` instead")),
        ("add_special_tokens", boolean("Begins with the start token; default: true")),
    ];
    fields.extend(conversation(state));
    fields
}

pub(super) fn detokenize(state: &AppState) -> Vec<Named> {
    vec![model(state), ("tokens", list(token(state), state.config.max_prompt_bytes, "Token ids"))]
}

fn model(state: &AppState) -> Named {
    ("model", word(&[&state.config.model_name], "The served name; absent means it"))
}

/// Messages and tools.
fn conversation(state: &AppState) -> Vec<Named> {
    let function = vec![
        ("name", name("")),
        ("description", string("")),
        ("parameters", open_object("JSON schema")),
        ("strict", boolean("Arguments follow the schema even where the model calls of its own accord")),
    ];
    let tool = of_function(demanding(&["name"], "", function));
    vec![
        ("messages", some(messages(state), MAX_MESSAGES, "The conversation")),
        ("tools", list(tool, MAX_TOOLS, "Functions that the model may call")),
        ("tool_choice", tool_choice()),
        ("parallel_tool_calls", boolean("Default: true")),
    ]
}

/// One message, by its role.
fn messages(state: &AppState) -> Field {
    let words = |about| text(0..=state.config.max_prompt_bytes, about);
    let part = vec![("type", word(&["text"], "")), ("text", words(""))];
    let part = demanding(&["type", "text"], "", part);
    let message = |roles: &[&str], required: &[&str], more: Vec<Named>| {
        let content = one_of("", [words(""), list(part.clone(), MAX_MESSAGES, "")]);
        let own = vec![("role", word(roles, "")), ("content", content), ("name", label(""))];
        demanding(&[&["role"], required].concat(), "", own.into_iter().chain(more).collect())
    };
    let called = vec![("name", label("")), ("arguments", words("A JSON object"))];
    let called = demanding(&["name", "arguments"], "", called);
    let call = vec![("id", label("")), ("type", word(&["function"], "")), ("function", called)];
    let call = demanding(&["id", "type", "function"], "", call);
    let forms = [
        message(&["system", "developer", "user", "assistant"], &["content"], Vec::new()),
        message(&["assistant"], &["tool_calls"], vec![("tool_calls", some(call, MAX_TOOLS, ""))]),
        message(&["tool"], &["content", "tool_call_id"], vec![("tool_call_id", label(""))]),
    ];
    one_of("", forms)
}

fn tool_choice() -> Field {
    let named = || of_function(demanding(&["name"], "", vec![("name", name(""))]));
    let allowed = vec![
        ("mode", word(&["auto", "required"], "")),
        ("tools", some(named(), MAX_TOOLS, "Some of `tools`")),
    ];
    let allowed = vec![
        ("type", word(&["allowed_tools"], "")),
        ("allowed_tools", demanding(&["mode", "tools"], "", allowed)),
    ];
    let allowed = demanding(&["type", "allowed_tools"], "", allowed);
    one_of("Default: auto", [word(&["none", "auto", "required"], ""), named(), allowed])
}

/// A function, or its name, as OpenAI wraps it.
fn of_function(function: Field) -> Field {
    demanding(&["type", "function"], "", vec![("type", word(&["function"], "")), ("function", function)])
}

/// What chat and completions share.
fn shared(state: &AppState) -> Vec<Named> {
    let repetition = f64::from(*REPETITION_PENALTY.start())..=f64::from(*REPETITION_PENALTY.end());
    let stop = || text(1..=MAX_STOP_BYTES, "");
    let stream_options = vec![
        ("include_usage", boolean("A last chunk with the usage")),
        ("continuous_usage_stats", boolean("The usage so far in every chunk")),
    ];
    let mut fields = vec![
        model(state),
        ("n", integer(1..=i64::from(state.config.max_choices), "Choices per prompt")),
        ("temperature", number(TEMPERATURE, "Default: 1; 0 takes the likeliest token")),
        ("top_p", number(0.0..=1.0, "Default: 1")),
        ("top_k", integer(-1..=i64::from(i32::MAX), "0 or -1 keeps all, the default")),
        ("min_p", number(0.0..=1.0, "Default: 0")),
        ("presence_penalty", number(PENALTY, "Default: 0")),
        ("frequency_penalty", number(PENALTY, "Default: 0")),
        ("repetition_penalty", number(repetition, "Default: 1")),
        (
            "logit_bias",
            map(Some("^[0-9]+$"), number(LOGIT_BIAS, ""), MAX_LOGIT_BIAS_ENTRIES, "Token id to bias"),
        ),
        ("seed", integer(SEED, "Repeats a random answer")),
        ("stop", one_of("Never shown", [stop(), list(stop(), MAX_STOPS, "")])),
        ("stop_token_ids", list(token(state), MAX_STOP_TOKENS, "Token ids that end a choice")),
        ("min_tokens", integer(U32, "No end of sequence before")),
        ("ignore_eos", boolean("Generates past the end")),
        ("stream", boolean("Answers as server-sent events")),
        ("stream_options", object("Only when streamed", stream_options)),
        ("return_progress", boolean("A stream says how far its prompt is")),
        (
            "sse_ping_interval",
            integer(-1..=MAX_PING_INTERVAL_S, "Seconds of silence before a comment; -1: never"),
        ),
        ("return_token_ids", boolean("Adds the ids of prompt and answer")),
        ("return_tokens_as_token_ids", boolean("Log-probabilities name tokens by their ids")),
        ("prompt_logprobs", integer(0..=MAX_CHAT_LOGPROBS, "Scores the prompt; not streamed")),
        ("timings", boolean("Adds where the time went")),
        ("priority", integer(i64::from(i32::MIN)..=i64::from(i32::MAX), "Lower runs earlier")),
        ("deadline_ms", integer(1..=MAX_DEADLINE_MS, "Time from arrival after which the answer ends")),
        ("cache_salt", text(1..=MAX_LABEL_BYTES, "Prefixes are shared only with requests of the same salt")),
        ("user", label("Accepted, as by OpenAI")),
        ("safety_identifier", label("Accepted, as by OpenAI")),
        ("prompt_cache_key", label("Accepted, as by OpenAI")),
        ("metadata", map(None, label(""), MAX_METADATA, "Accepted, as by OpenAI")),
        ("store", never("This server stores no answers")),
        ("service_tier", word(&["auto", "default"], "")),
        ("verbosity", word(&["medium"], "")),
        ("reasoning_effort", word(&["none"], "")),
    ];
    fields.extend(routing(state));
    fields
}

fn token(state: &AppState) -> Field {
    integer(0..=state.engine.limits().vocab_size as i64 - 1, "A token id")
}

fn open_list(about: &str) -> Field {
    ArrayBuilder::new().items(anything("")).description(Some(about)).into()
}

fn anything(about: &str) -> Field {
    ObjectBuilder::new().schema_type(SchemaType::AnyValue).description(Some(about)).into()
}
