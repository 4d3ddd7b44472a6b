//! The fields of every body, in the order in which people look for them.

use std::ops::RangeInclusive;

use engine::limits::REPETITION_PENALTY;
use model::RunnerLimits;

use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, SchemaType};

use super::schema::{Field, Named, boolean, integer, list, number, object, one_of, open_object, string};
use crate::api::routing::GATE_TEMPERATURE;
use crate::api::routing_analysis::{MAX_ABLATIONS, MAX_TEXTS};
use crate::api::{anthropic, responses};
use crate::config::limits::*;
use crate::state::AppState;

const U32: RangeInclusive<i64> = 0..=u32::MAX as i64;
const POSITIVE: RangeInclusive<i64> = 1..=u32::MAX as i64;

pub(super) fn chat(state: &AppState) -> Vec<Named> {
    let mut fields = conversation();
    fields.extend([
        ("max_completion_tokens", integer(POSITIVE, "Default: the rest of the context")),
        ("max_tokens", integer(POSITIVE, "The older name of the same")),
        ("logprobs", boolean("Adds the log-probabilities of the answer's tokens")),
        ("top_logprobs", integer(0..=MAX_CHAT_LOGPROBS, "Alternatives to each, with `logprobs`")),
        ("response_format", response_format()),
        ("modalities", open_list("Only [\"text\"]")),
    ]);
    fields.extend(bounds());
    fields.extend(shared(state));
    fields
}

pub(super) fn completion(state: &AppState) -> Vec<Named> {
    let mut fields = vec![
        ("prompt", anything("Text, texts, token ids, or lists of token ids")),
        ("max_tokens", integer(U32, "Default: 16")),
        ("echo", boolean("Repeats the prompt; with `logprobs`, scored")),
        ("logprobs", integer(0..=MAX_COMPLETION_LOGPROBS, "Alternatives to each token")),
        (
            "best_of",
            integer(1..=i64::from(state.config.max_choices), "Generates more choices than are shown"),
        ),
    ];
    fields.extend(bounds());
    fields.extend(shared(state));
    fields
}

/// What an answer must look like, in a chat.
fn response_format() -> Field {
    let schema = vec![
        ("name", string("Letters, digits, _ and -")),
        ("description", string("")),
        ("schema", anything("JSON schema")),
        ("strict", boolean("The answer is what the schema says in any case")),
    ];
    let format = vec![
        ("type", string("text, json_object or json_schema")),
        ("json_schema", object("Of json_schema", schema)),
    ];
    object("What the answer must look like", format)
}

/// The same in other words, of which a request has one.
fn bounds() -> Vec<Named> {
    vec![
        ("regex", string("The answer matches it from end to end")),
        ("choice", list(string(""), MAX_CHOICE_STRINGS, "The answer is one of these")),
        ("grammar", string("The answer follows it: Lark, as llguidance has it")),
    ]
}

/// What is said about routing.
fn routing(state: &AppState) -> Vec<Named> {
    let limits = state.engine.limits();
    let record = vec![
        ("layers", list(anything("A layer"), limits.num_layers, "Others are left out")),
        ("prompt", boolean("From the prompt's first token on")),
        ("encoding", string("json or base64")),
    ];
    vec![("routing", one_of("Which experts tokens went to", [boolean(""), object("", record)])), moe(limits)]
}

fn moe(limits: &RunnerLimits) -> Named {
    let (each, mut one) = (object("", steering(limits)), steering(limits));
    one.push(("replay", replay(limits)));
    let forms = [object("", one), list(each, limits.num_layers, "")];
    ("moe", one_of("Decides which experts tokens go to", forms))
}

/// The overrides of some layers.
fn steering(limits: &RunnerLimits) -> Vec<Named> {
    let experts = |about| list(anything("An expert"), limits.num_experts, about);
    vec![
        ("layers", list(anything("A layer"), limits.num_layers, "Default: all")),
        ("top_k", integer(1..=limits.max_steered_experts() as i64, "Experts per token")),
        ("ban", experts("No token goes to them")),
        ("force", experts("Every token goes to them")),
        ("temperature", number(GATE_TEMPERATURE, "Flattens or sharpens the gate weights")),
        ("random", object("Chooses at random", vec![("seed", integer(SEED, ""))])),
    ]
}

/// A recorded routing, in either encoding.
fn replay(limits: &RunnerLimits) -> Field {
    object(
        "A recorded routing",
        vec![
            ("start", integer(0..=i64::from(u32::MAX / 2), "Position of the first token")),
            ("layers", list(anything("A layer"), limits.num_layers, "Default: all")),
            ("encoding", string("json or base64")),
            ("shape", list(anything(""), 3, "Of base64: tokens, layers, experts per token")),
            ("experts", anything("By token, layer and rank")),
            ("weights", anything("By token, layer and rank")),
        ],
    )
}

pub(super) fn analysis(state: &AppState) -> Vec<Named> {
    let limits = state.engine.limits();
    let ablation = object("", vec![("name", string("")), moe(limits)]);
    let mut text = vec![("name", string("")), ("text", string("Text; or `messages` instead"))];
    text.extend(conversation());
    let mut fields = vec![
        ("model", string("The served name; absent means it")),
        ("texts", list(object("", text), MAX_TEXTS, "Named texts")),
        ("text", string("One text without a name; or `messages`, or `texts`")),
        ("layers", list(anything("A layer"), limits.num_layers, "Default: all")),
        ("tokens", boolean("Adds each token's loss")),
        ("ablations", list(ablation, MAX_ABLATIONS, "Reads the texts again under overrides")),
    ];
    fields.extend(conversation());
    fields
}

pub(super) fn response(state: &AppState) -> Vec<Named> {
    let max_items = MAX_MESSAGES;
    let part = object(
        "Text",
        vec![
            ("type", string("input_text, output_text or text")),
            ("text", string("")),
            ("annotations", list(open_object(""), max_items, "Ignored; an answer's parts have them")),
            ("logprobs", open_list("Ignored; an answer's parts have them")),
        ],
    );
    let parts = || one_of("Text, or parts", [string(""), list(part.clone(), max_items, "")]);
    let item = object(
        "A message, a call or a call's result",
        vec![
            ("type", string("message, function_call or function_call_output")),
            ("id", string("")),
            ("status", string("")),
            ("role", string("user, assistant, system or developer")),
            ("content", parts()),
            ("call_id", string("")),
            ("name", string("")),
            ("arguments", string("A JSON object")),
            ("output", parts()),
        ],
    );
    let mut fields = vec![
        ("input", one_of("Text, or items", [string(""), list(item, max_items, "")])),
        ("instructions", string("A system message; not carried on to later responses")),
        ("previous_response_id", string("A kept response to go on from")),
        ("store", boolean("Default: true")),
        ("max_output_tokens", integer(POSITIVE, "Default: the rest of the context")),
        ("tools", open_list("Functions, flat: type, name, description, parameters")),
        ("tool_choice", anything("none, auto, required, or a function by name")),
        (
            "text",
            object(
                "The answer's form",
                vec![
                    ("format", open_object("text, json_object, or json_schema with its name and schema")),
                    ("verbosity", string("medium")),
                ],
            ),
        ),
        ("include", list(string("message.output_text.logprobs"), MAX_TOOLS, "")),
        ("truncation", string("disabled")),
        ("background", boolean("Only false")),
        ("reasoning", object("Only none", vec![("effort", string("none"))])),
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
    let cache_control = || ("cache_control", open_object("Ignored: prefixes are cached in any case"));
    let text = |more: Vec<Named>| {
        let own = vec![("type", string("text")), ("text", string("")), cache_control()];
        object("A block", own.into_iter().chain(more).collect())
    };
    let texts = |about| one_of(about, [string(""), list(text(Vec::new()), MAX_MESSAGES, "")]);
    let block = text(vec![
        ("id", string("Of a tool_use")),
        ("name", string("Of a tool_use")),
        ("input", open_object("Of a tool_use")),
        ("tool_use_id", string("Of a tool_result")),
        ("content", texts("Of a tool_result")),
        ("is_error", boolean("Of a tool_result")),
    ]);
    let message = object(
        "",
        vec![
            ("role", string("user or assistant")),
            ("content", one_of("", [string(""), list(block, MAX_MESSAGES, "text, tool_use, tool_result")])),
        ],
    );
    let tool = object(
        "",
        vec![
            ("type", string("custom")),
            ("name", string("")),
            ("description", string("")),
            ("input_schema", open_object("JSON schema")),
            cache_control(),
        ],
    );
    let choice = vec![
        ("type", string("auto, any, tool or none")),
        ("name", string("Of tool")),
        ("disable_parallel_tool_use", boolean("")),
    ];
    let mut fields = vec![
        ("messages", list(message, MAX_MESSAGES, "The conversation")),
        ("system", texts("A system message")),
        ("stop_sequences", list(string(""), MAX_STOPS, "Never shown")),
        ("tools", list(tool, MAX_TOOLS, "Functions that the model may call")),
        ("tool_choice", object("", choice)),
        ("metadata", object("", vec![("user_id", string(""))])),
        ("service_tier", string("auto or standard_only")),
        ("thinking", object("Only disabled", vec![("type", string("disabled"))])),
    ];
    let is_shared = |name: &str| anthropic::request::SHARED.contains(&name);
    fields.extend(chat(state).into_iter().filter(|(name, _)| is_shared(name)));
    fields
}

pub(super) fn tokenize(_state: &AppState) -> Vec<Named> {
    let mut fields = vec![
        ("model", string("The served name; absent means it")),
        ("prompt", string("Text; or `messages` instead")),
        ("add_special_tokens", boolean("Begins with the start token; default: true")),
    ];
    fields.extend(conversation());
    fields
}

pub(super) fn detokenize(_state: &AppState) -> Vec<Named> {
    vec![("model", string("The served name; absent means it")), ("tokens", open_list("Token ids"))]
}

/// Messages and tools.
fn conversation() -> Vec<Named> {
    let function = object(
        "",
        vec![
            ("name", string("Letters, digits, _ and -")),
            ("description", string("")),
            ("parameters", open_object("JSON schema")),
            ("strict", boolean("Arguments follow the schema even where the model calls of its own accord")),
        ],
    );
    let called = object("", vec![("name", string("")), ("arguments", string("A JSON object"))]);
    let call = object("", vec![("id", string("")), ("type", string("function")), ("function", called)]);
    let part = object("", vec![("type", string("text")), ("text", string(""))]);
    let message = object(
        "",
        vec![
            ("role", string("system, developer, user, assistant or tool")),
            ("content", one_of("", [string(""), list(part, MAX_MESSAGES, "")])),
            ("name", string("")),
            ("tool_calls", list(call, MAX_TOOLS, "Of an assistant")),
            ("tool_call_id", string("Of a tool")),
        ],
    );
    let tool = object("", vec![("type", string("function")), ("function", function)]);
    vec![
        ("messages", list(message, MAX_MESSAGES, "The conversation")),
        ("tools", list(tool, MAX_TOOLS, "Functions that the model may call")),
        ("tool_choice", anything("none, auto, required, a named function, or allowed_tools")),
        ("parallel_tool_calls", boolean("Default: true")),
    ]
}

/// What chat and completions share.
fn shared(state: &AppState) -> Vec<Named> {
    let repetition = f64::from(*REPETITION_PENALTY.start())..=f64::from(*REPETITION_PENALTY.end());
    let stream_options = vec![
        ("include_usage", boolean("A last chunk with the usage")),
        ("continuous_usage_stats", boolean("The usage so far in every chunk")),
    ];
    let mut fields = vec![
        ("model", string("The served name; absent means it")),
        ("n", integer(1..=i64::from(state.config.max_choices), "Choices per prompt")),
        ("temperature", number(TEMPERATURE, "Default: 1; 0 takes the likeliest token")),
        ("top_p", number(0.0..=1.0, "Default: 1")),
        ("top_k", integer(-1..=i64::from(i32::MAX), "0 or -1 keeps all, the default")),
        ("min_p", number(0.0..=1.0, "Default: 0")),
        ("presence_penalty", number(PENALTY, "Default: 0")),
        ("frequency_penalty", number(PENALTY, "Default: 0")),
        ("repetition_penalty", number(repetition, "Default: 1")),
        ("logit_bias", open_object("Token id to -100 to 100")),
        ("seed", integer(SEED, "Repeats a random answer")),
        ("stop", one_of("Never shown", [string(""), list(string(""), MAX_STOPS, "")])),
        ("stop_token_ids", list(token(), MAX_STOP_TOKENS, "Token ids that end a choice")),
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
        ("prompt_logprobs", integer(0..=MAX_CHAT_LOGPROBS, "Scores the prompt; not streamed")),
        ("timings", boolean("Adds where the time went")),
        ("priority", integer(i64::from(i32::MIN)..=i64::from(i32::MAX), "Lower runs earlier")),
        ("deadline_ms", integer(1..=MAX_DEADLINE_MS, "Time from arrival after which the answer ends")),
        ("cache_salt", string("Prefixes are shared only with requests of the same salt")),
        ("user", string("Accepted, as by OpenAI")),
        ("safety_identifier", string("Accepted, as by OpenAI")),
        ("prompt_cache_key", string("Accepted, as by OpenAI")),
        ("metadata", open_object("Accepted, as by OpenAI: up to 16 strings")),
        ("store", boolean("Only false")),
        ("service_tier", string("auto or default")),
        ("verbosity", string("medium")),
        ("reasoning_effort", string("none")),
    ];
    fields.extend(routing(state));
    fields
}

fn token() -> Field {
    integer(U32, "A token id")
}

fn open_list(about: &str) -> Field {
    ArrayBuilder::new().items(anything("")).description(Some(about)).into()
}

fn anything(about: &str) -> Field {
    ObjectBuilder::new().schema_type(SchemaType::AnyValue).description(Some(about)).into()
}
