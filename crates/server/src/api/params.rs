//! The parameters that chat and completions share, from JSON to the engine's [`Request`].
//!
//! Defaults are OpenAI's, for every model: `generation_config.json` gives the ends of answers and nothing
//! else, so that the same request means the same whichever model is behind it.

use std::time::Duration;

use engine::Request;
use engine::limits::{MAX_LOGIT_BIAS_ENTRIES, REPETITION_PENALTY};
use model::SampleParams;
use serde_json::Value;

use super::fields::{Fields, integer_at, list_at, missing, number_at, string_at, wrong_type, wrong_value};
use super::routing::RoutingParams;
use crate::answer::StreamOptions;
use crate::config::limits;
use crate::error::{ApiError, quoted};
use crate::logprobs::TokenNames;
use crate::random;
use crate::state::AppState;

/// Parameters of a generation, checked.
#[derive(Debug)]
pub(crate) struct Params {
    pub(crate) n: u32,
    pub(crate) stops: Vec<String>,
    pub(crate) streamed: Option<StreamOptions>,
    pub(crate) service_tier: Option<&'static str>,
    pub(crate) routing: RoutingParams,
    sampling: SampleParams,
    min_tokens: u32,
    ignore_eos: bool,
    stop_token_ids: Vec<u32>,
    priority: i32,
    deadline: Option<Duration>,
    cache_salt: Option<String>,
    /// Adds where the time went.
    pub(crate) has_timings: bool,
    /// Adds the ids of the prompt's tokens and of the answer's.
    pub(crate) returns_token_ids: bool,
    /// What tokens are called beside their log-probabilities.
    pub(crate) token_names: TokenNames,
    /// Adds the log-probabilities of the prompt's tokens, and of this many alternatives.
    pub(crate) num_prompt_logprobs: Option<u32>,
}

/// What differs between the requests of one client request, and between endpoints.
#[derive(Debug)]
pub(crate) struct Generate {
    pub(crate) id: String,
    pub(crate) prompt: Vec<u32>,
    pub(crate) num_choices: u32,
    pub(crate) max_tokens: u32,
    pub(crate) num_logprobs: Option<u32>,
    pub(crate) num_prompt_logprobs: Option<u32>,
}

impl Params {
    /// Takes the shared parameters out of a request.
    pub(crate) fn take(fields: &mut Fields, state: &AppState) -> Result<Self, ApiError> {
        check_model(fields, &state.config.model_name)?;
        take_labels(fields)?;
        check_effort(fields)?;
        let vocab_size = state.engine.limits().vocab_size;
        let streamed = take_stream(fields)?;
        Ok(Self {
            n: fields.integer("n", 1..=i64::from(state.config.max_choices))?.unwrap_or(1) as u32,
            stops: take_stops(fields)?,
            streamed,
            service_tier: take_service_tier(fields)?,
            routing: RoutingParams::take(fields, state.engine.limits())?,
            sampling: take_sampling(fields, vocab_size)?,
            min_tokens: fields.integer("min_tokens", 0..=i64::from(u32::MAX))?.unwrap_or(0) as u32,
            ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
            stop_token_ids: take_stop_token_ids(fields, vocab_size)?,
            priority: fields.integer("priority", i64::from(i32::MIN)..=i64::from(i32::MAX))?.unwrap_or(0)
                as i32,
            deadline: fields
                .integer("deadline_ms", 1..=limits::MAX_DEADLINE_MS)?
                .map(|ms| Duration::from_millis(ms as u64)),
            cache_salt: take_cache_salt(fields)?,
            has_timings: fields.boolean("timings")?.unwrap_or(false),
            returns_token_ids: fields.boolean("return_token_ids")?.unwrap_or(false),
            token_names: take_token_names(fields)?,
            num_prompt_logprobs: take_prompt_logprobs(fields, streamed.is_some())?,
        })
    }

    /// The engine's request for one prompt.
    ///
    /// # Errors
    /// If `min_tokens` is above `max_tokens`.
    pub(crate) fn request(&self, state: &AppState, generate: Generate) -> Result<Request, ApiError> {
        if self.min_tokens > generate.max_tokens {
            let expected = format!("it must not be above max_tokens, which is {}", generate.max_tokens);
            return Err(wrong_value("min_tokens", &expected));
        }
        Ok(Request {
            id: generate.id,
            prompt: generate.prompt,
            num_choices: generate.num_choices,
            sampling: self.sampling.clone(),
            max_tokens: generate.max_tokens,
            min_tokens: self.min_tokens,
            eos_token_ids: state.text.eos_token_ids.clone(),
            ignore_eos: self.ignore_eos,
            stop_token_ids: self.stop_token_ids.clone(),
            num_logprobs: generate.num_logprobs,
            num_prompt_logprobs: generate.num_prompt_logprobs.max(self.num_prompt_logprobs),
            reports_progress: self.streamed.is_some_and(|options| options.reports_progress),
            priority: self.priority,
            deadline: self.deadline,
            cache_salt: self.cache_salt.clone(),
            record_routing: self.routing.record.clone(),
            steering: self.routing.steering.clone(),
        })
    }
}

/// How many tokens may be generated after a prompt: as many as asked for, or `default` if nothing was said;
/// never beyond the model's context.
pub(crate) fn token_budget(
    prompt_len: usize,
    asked: Option<u32>,
    default: u32,
    max_model_len: usize,
    prompt_param: &str,
) -> Result<u32, ApiError> {
    let remaining = max_model_len.saturating_sub(prompt_len);
    let overflow =
        |requested: String| Err(ApiError::context_length_exceeded(prompt_param, max_model_len, &requested));
    match asked {
        Some(asked) if prompt_len + asked as usize > max_model_len => overflow(format!(
            "you requested {} tokens ({prompt_len} in the {prompt_param}, {asked} in the completion). Please reduce \
             the length of the {prompt_param} or completion",
            prompt_len + asked as usize
        )),
        Some(asked) => Ok(asked),
        None if remaining == 0 => overflow(format!(
            "your {prompt_param} resulted in {prompt_len} tokens. Please reduce the length of the {prompt_param}"
        )),
        None => Ok(default.min(u32::try_from(remaining).unwrap_or(u32::MAX))),
    }
}

/// A missing model means the served one.
pub(crate) fn check_model(fields: &mut Fields, served: &str) -> Result<(), ApiError> {
    match fields.string("model", limits::MAX_LABEL_BYTES)? {
        Some(model) if model != served => Err(ApiError::model_not_found(&model)),
        _ => Ok(()),
    }
}

/// Fields that say something about the request without changing its answer: accepted, as OpenAI does.
fn take_labels(fields: &mut Fields) -> Result<(), ApiError> {
    for name in ["user", "safety_identifier", "prompt_cache_key"] {
        fields.string(name, limits::MAX_LABEL_BYTES)?;
    }
    if let Some(metadata) = fields.object("metadata")? {
        let path = metadata.path("");
        for (num, (name, value)) in metadata.rest().enumerate() {
            if num == limits::MAX_METADATA {
                return Err(wrong_value(
                    "metadata",
                    &format!("it has more than {} entries", limits::MAX_METADATA),
                ));
            }
            string_at(&format!("{path}{name}"), value, limits::MAX_LABEL_BYTES)?;
        }
    }
    match fields.boolean("store")? {
        Some(true) => Err(wrong_value("store", "this server stores no answers")),
        _ => Ok(()),
    }
}

/// Fields that ask models which reason to do so more or less: this one answers in one way only.
fn check_effort(fields: &mut Fields) -> Result<(), ApiError> {
    for (name, only) in [("verbosity", "medium"), ("reasoning_effort", "none")] {
        let value = fields.string(name, limits::MAX_LABEL_BYTES)?;
        if value.is_some_and(|value| value != only) {
            return Err(wrong_value(name, &format!("this model supports only '{only}'")));
        }
    }
    Ok(())
}

fn take_token_names(fields: &mut Fields) -> Result<TokenNames, ApiError> {
    let are_ids = fields.boolean("return_tokens_as_token_ids")?.unwrap_or(false);
    Ok(if are_ids { TokenNames::Ids } else { TokenNames::Texts })
}

fn take_prompt_logprobs(fields: &mut Fields, is_streamed: bool) -> Result<Option<u32>, ApiError> {
    match fields.integer("prompt_logprobs", 0..=limits::MAX_CHAT_LOGPROBS)? {
        Some(_) if is_streamed => {
            Err(wrong_value("prompt_logprobs", "it is not available when 'stream' is true"))
        }
        num => Ok(num.map(|num| num as u32)),
    }
}

fn take_service_tier(fields: &mut Fields) -> Result<Option<&'static str>, ApiError> {
    match fields.string("service_tier", limits::MAX_LABEL_BYTES)?.as_deref() {
        None => Ok(None),
        Some("auto" | "default") => Ok(Some("default")),
        Some(other) => Err(wrong_value(
            "service_tier",
            &format!("expected 'auto' or 'default', but got {}", quoted(other)),
        )),
    }
}

fn take_sampling(fields: &mut Fields, vocab_size: usize) -> Result<SampleParams, ApiError> {
    let repetition = f64::from(*REPETITION_PENALTY.start())..=f64::from(*REPETITION_PENALTY.end());
    let seed = fields.integer("seed", limits::SEED)?.map_or_else(random::bits, |seed| seed as u64);
    Ok(SampleParams {
        temperature: fields.number("temperature", limits::TEMPERATURE)?.unwrap_or(1.0) as f32,
        // vLLM writes "all tokens" as -1, Hugging Face as 0.
        top_k: fields.integer("top_k", -1..=i64::from(i32::MAX))?.unwrap_or(0).max(0) as u32,
        top_p: fields.number("top_p", 0.0..=1.0)?.unwrap_or(1.0) as f32,
        min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(0.0) as f32,
        presence_penalty: fields.number("presence_penalty", limits::PENALTY)?.unwrap_or(0.0) as f32,
        frequency_penalty: fields.number("frequency_penalty", limits::PENALTY)?.unwrap_or(0.0) as f32,
        repetition_penalty: fields.number("repetition_penalty", repetition)?.unwrap_or(1.0) as f32,
        logit_bias: take_logit_bias(fields, vocab_size)?,
        seed,
    })
}

fn take_logit_bias(fields: &mut Fields, vocab_size: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(biases) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    let mut logit_bias = Vec::new();
    for (token, bias) in biases.rest() {
        if logit_bias.len() == MAX_LOGIT_BIAS_ENTRIES {
            return Err(wrong_value(
                "logit_bias",
                &format!("it has more than {MAX_LOGIT_BIAS_ENTRIES} entries"),
            ));
        }
        let id = token.parse::<u32>().ok().filter(|&id| (id as usize) < vocab_size);
        let id = id.ok_or_else(|| {
            wrong_value("logit_bias", &format!("{} is no token id below {vocab_size}", quoted(&token)))
        })?;
        let bias = number_at(&format!("logit_bias.{id}"), &bias, limits::LOGIT_BIAS)?;
        logit_bias.push((id, bias as f32));
    }
    // JSON keys may spell one id twice ("7", "07"); the engine takes each once.
    logit_bias.sort_by_key(|&(id, _)| id);
    logit_bias.dedup_by_key(|&mut (id, _)| id);
    Ok(logit_bias)
}

fn take_stops(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let stops = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(stop @ Value::String(_)) => vec![("stop".to_owned(), stop)],
        Some(stops @ Value::Array(_)) => indexed("stop", list_at("stop", stops, limits::MAX_STOPS)?),
        Some(other) => return Err(wrong_type("stop", "a string or an array of strings", &other)),
    };
    let check = |(path, stop): (String, Value)| {
        let stop = string_at(&path, stop, limits::MAX_STOP_BYTES)?;
        if stop.is_empty() { Err(wrong_value(&path, "a stop string must not be empty")) } else { Ok(stop) }
    };
    stops.into_iter().map(check).collect()
}

fn take_stop_token_ids(fields: &mut Fields, vocab_size: usize) -> Result<Vec<u32>, ApiError> {
    let ids = fields.list("stop_token_ids", limits::MAX_STOP_TOKENS)?.unwrap_or_default();
    token_ids("stop_token_ids", &ids, vocab_size)
}

/// Token ids of the model, each checked.
pub(crate) fn token_ids(path: &str, values: &[Value], vocab_size: usize) -> Result<Vec<u32>, ApiError> {
    let id = |(index, value): (usize, &Value)| {
        let id = value.as_u64().filter(|&id| id < vocab_size as u64);
        // The path is spelled out only where there is something to say about it.
        id.map_or_else(
            || integer_at(&format!("{path}[{index}]"), value, 0..=vocab_size as i64 - 1),
            |id| Ok(id as i64),
        )
    };
    values.iter().enumerate().map(id).map(|id| id.map(|id| id as u32)).collect()
}

/// The items of an array with their paths.
pub(crate) fn indexed(path: &str, items: Vec<Value>) -> Vec<(String, Value)> {
    items.into_iter().enumerate().map(|(index, item)| (format!("{path}[{index}]"), item)).collect()
}

fn take_stream(fields: &mut Fields) -> Result<Option<StreamOptions>, ApiError> {
    let is_streamed = fields.boolean("stream")?.unwrap_or(false);
    let only_streamed = |name: &str| wrong_value(name, "it is only allowed when 'stream' is true");
    let reports_progress = fields.boolean("return_progress")?.unwrap_or(false);
    if reports_progress && !is_streamed {
        return Err(only_streamed("return_progress"));
    }
    let mut streamed = StreamOptions { reports_progress, ..StreamOptions::default() };
    match fields.integer("sse_ping_interval", -1..=limits::MAX_PING_INTERVAL_S)? {
        Some(_) if !is_streamed => return Err(only_streamed("sse_ping_interval")),
        Some(0) => return Err(wrong_value("sse_ping_interval", "expected seconds, or -1 for never")),
        // llama.cpp writes "never" as -1.
        seconds => {
            streamed.keep_alive_interval = seconds.map(|s| u64::try_from(s).ok().map(Duration::from_secs))
        }
    }
    let Some(mut options) = fields.object("stream_options")? else {
        return Ok(is_streamed.then_some(streamed));
    };
    if !is_streamed {
        return Err(only_streamed("stream_options"));
    }
    streamed.include_usage = options.boolean("include_usage")?.unwrap_or(false);
    streamed.continuous_usage = options.boolean("continuous_usage_stats")?.unwrap_or(false);
    if streamed.continuous_usage && !streamed.include_usage {
        let path = options.path("continuous_usage_stats");
        return Err(wrong_value(&path, "it is only allowed when 'include_usage' is true"));
    }
    options.finish()?;
    Ok(Some(streamed))
}

fn take_cache_salt(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    match fields.string("cache_salt", limits::MAX_LABEL_BYTES)? {
        Some(salt) if salt.is_empty() => Err(wrong_value("cache_salt", "it must not be empty")),
        salt => Ok(salt),
    }
}

/// A field that must be there.
pub(crate) fn required(fields: &mut Fields, name: &str) -> Result<Value, ApiError> {
    fields.take(name).ok_or_else(|| missing(fields.path(name)))
}
