//! What `windrose bench serve` asks, whom, and how fast, from its arguments.

use std::time::Duration;

use anyhow::{Result, bail};
use clap::builder::RangedU64ValueParser;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, value_parser};
use serde_json::{Map, Value};

use crate::bench::plan::json_arg;
use crate::settings::Settings;

/// Where the key is looked for that was not given.
const API_KEY_VARIABLE: &str = "OPENAI_API_KEY";
/// Answers in flight if neither their number nor the rate of requests is given.
const DEFAULT_CONCURRENCY: usize = 8;
/// Above every sensible count, below every overflow.
const MAX_COUNT: u64 = 1 << 20;
/// Requests per second; the last of the most requests is then due within the year.
const MIN_REQUEST_RATE: f64 = 0.05;

/// How the model is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Endpoint {
    Chat,
    Completions,
}

/// A load and where it goes.
#[derive(Debug)]
pub(super) struct Options {
    pub(super) url: String,
    /// `None`: the first that the server lists.
    pub(super) model: Option<String>,
    pub(super) api_key: Option<String>,
    pub(super) endpoint: Endpoint,
    /// Most answers in flight.
    pub(super) concurrency: usize,
    /// Per second; infinite: all are due at once.
    pub(super) request_rate: f64,
    pub(super) num_requests: usize,
    pub(super) num_warm_ups: usize,
    pub(super) prompt_len: usize,
    pub(super) shared_prefix_len: usize,
    pub(super) output_len: usize,
    /// Whether answers go on past their end, to `output_len`.
    pub(super) ignore_eos: bool,
    pub(super) seed: u64,
    /// Fields that are put into every body, over what it has of the same name.
    pub(super) extra_body: Map<String, Value>,
    /// Of one request.
    pub(super) timeout: Duration,
    /// Where JSON goes: a file, or - for standard output.
    pub(super) json: Option<String>,
}

impl Endpoint {
    pub(super) fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
        }
    }
}

impl Options {
    /// The arguments, with the settings of the server that is not started here out of sight.
    pub(super) fn args() -> Vec<Arg> {
        let hidden = Settings::args().into_iter().filter(|arg| arg.get_id() != "model");
        let hidden = hidden.map(|arg| arg.hide(true));
        whom().into_iter().chain(how_fast()).chain(what()).chain([json_arg()]).chain(hidden).collect()
    }

    /// Reads them.
    ///
    /// # Errors
    /// If a setting of a server is among them, which would otherwise be ignored in silence.
    pub(super) fn new(arguments: &ArgMatches) -> Result<Self> {
        refuse_settings(arguments)?;
        let text = |name: &str| arguments.get_one::<String>(name).cloned();
        let count = |name: &str| arguments.get_one::<usize>(name).copied();
        let expect = |name: &str| count(name).expect("it has a default");
        let request_rate = arguments.get_one("request_rate").copied();
        // Who names a rate wants requests at that rate, however many are in flight.
        let concurrency = if request_rate.is_some() { usize::MAX } else { DEFAULT_CONCURRENCY };
        Ok(Self {
            url: text("url").expect("it is required"),
            model: text("model"),
            api_key: text("api_key").or_else(|| std::env::var(API_KEY_VARIABLE).ok()),
            endpoint: match text("endpoint").as_deref() {
                Some("completions") => Endpoint::Completions,
                _ => Endpoint::Chat,
            },
            concurrency: count("concurrency").unwrap_or(concurrency),
            request_rate: request_rate.unwrap_or(f64::INFINITY),
            num_requests: expect("num_requests"),
            num_warm_ups: expect("warmup"),
            prompt_len: expect("prompt_len"),
            shared_prefix_len: expect("shared_prefix_len"),
            output_len: expect("output_len"),
            ignore_eos: !arguments.get_flag("no_ignore_eos"),
            seed: *arguments.get_one("seed").expect("it has a default"),
            extra_body: arguments.get_one("extra_body").cloned().unwrap_or_default(),
            timeout: Duration::from_secs(expect("timeout_s") as u64),
            json: text("json"),
        })
    }
}

fn option(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name.replace('_', "-")).help(help).action(ArgAction::Set)
}

fn count(name: &'static str, min: u64, help: &'static str) -> Arg {
    option(name, help)
        .value_name("N")
        .value_parser(RangedU64ValueParser::<usize>::new().range(min..=MAX_COUNT))
}

fn whom() -> [Arg; 4] {
    [
        option("url", "The server, such as http://127.0.0.1:8000").value_name("URL").required(true),
        option("model", "The model's name there [default: the first of /v1/models]").value_name("NAME"),
        option("api_key", "A key that the server accepts [default: the variable OPENAI_API_KEY]")
            .value_name("KEY"),
        option("endpoint", "How the model is asked")
            .value_name("NAME")
            .value_parser(["chat", "completions"])
            .default_value("chat"),
    ]
}

fn how_fast() -> [Arg; 5] {
    [
        count(
            "concurrency",
            1,
            "Most answers in flight; the next request is sent when one ends [default: 8, or no limit with \
             --request-rate]",
        ),
        option(
            "request_rate",
            "Requests per second, at random times as of independent users (Poisson); inf sends all at once",
        )
        .value_name("R")
        .value_parser(parse_rate),
        count("num_requests", 1, "Requests to measure").default_value("64"),
        count("warmup", 0, "Requests before them, one by one, that are not measured").default_value("1"),
        count("timeout_s", 1, "Seconds after which a request has failed").default_value("600"),
    ]
}

fn what() -> [Arg; 6] {
    [
        count(
            "prompt_len",
            1,
            "Tokens of a prompt where the server has /tokenize, words elsewhere; a chat template adds to them",
        )
        .default_value("128"),
        count("shared_prefix_len", 0, "Tokens or words before them that all prompts share").default_value("0"),
        count("output_len", 1, "Tokens of an answer").default_value("128"),
        Arg::new("no_ignore_eos").long("no-ignore-eos").action(ArgAction::SetTrue).help(
            "Does not send ignore_eos, which not every server knows; answers may then end before --output-len",
        ),
        option("seed", "Seed of the prompts and of the times")
            .value_name("SEED")
            .value_parser(value_parser!(u64))
            .default_value("0"),
        option("extra_body", "Fields of every request besides, such as {\"routing\": true}")
            .value_name("JSON")
            .value_parser(parse_object),
    ]
}

fn parse_object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("expected a JSON object: {error}"))
}

fn parse_rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if rate >= MIN_REQUEST_RATE => Ok(rate),
        _ => Err(format!("expected inf, or at least {MIN_REQUEST_RATE} per second")),
    }
}

fn refuse_settings(arguments: &ArgMatches) -> Result<()> {
    for arg in Settings::args() {
        let id = arg.get_id().as_str();
        if id != "model" && arguments.value_source(id) == Some(ValueSource::CommandLine) {
            bail!("--{} is a setting of a server, and this one runs already", id.replace('_', "-"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Command;

    use super::*;

    fn parse(arguments: &str) -> Result<Options> {
        let command = Command::new("serve").args(Options::args());
        let words = arguments.split_whitespace();
        Options::new(&command.try_get_matches_from(["serve", "--url", "http://x"].into_iter().chain(words))?)
    }

    #[track_caller]
    fn check_load(arguments: &str, concurrency: usize, request_rate: f64) {
        let options = parse(arguments).unwrap();
        assert_eq!((options.concurrency, options.request_rate), (concurrency, request_rate), "{arguments}");
    }

    #[test]
    fn a_rate_lifts_the_limit_of_concurrency_unless_both_are_given() {
        check_load("", DEFAULT_CONCURRENCY, f64::INFINITY);
        check_load("--concurrency 3", 3, f64::INFINITY);
        check_load("--request-rate 2.5", usize::MAX, 2.5);
        check_load("--request-rate inf", usize::MAX, f64::INFINITY);
        check_load("--request-rate 2.5 --concurrency 3", 3, 2.5);
    }

    #[track_caller]
    fn check_refused(arguments: &str, words: &str) {
        let error = format!("{:#}", parse(arguments).expect_err("must be refused"));
        assert!(error.contains(words), "{arguments}: {error}");
    }

    #[test]
    fn nonsense_and_settings_of_the_server_are_refused() {
        check_refused("--request-rate 0", "at least 0.05");
        check_refused("--request-rate nan", "at least 0.05");
        check_refused("--extra-body []", "expected a JSON object");
        check_refused("--num-requests 0", "num-requests");
        check_refused("--endpoint embeddings", "completions");
        check_refused("--threads 2", "--threads is a setting");
    }

    #[test]
    fn the_model_is_a_name_here() {
        assert_eq!(parse("--model some/name").unwrap().model.as_deref(), Some("some/name"));
        assert_eq!(parse("").unwrap().model, None);
    }
}
