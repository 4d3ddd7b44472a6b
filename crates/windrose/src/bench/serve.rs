//! `windrose bench serve`: a load on any server that speaks OpenAI's API, and what its clients feel.
//!
//! ```text
//! arrivals ──► one task per request: waits until due, for its turn, then asks ──► answers ──► report
//! ```
//!
//! The client is one thread, which leaves a small machine to the server; it takes microseconds for a chunk. Latencies
//! are counted from when a request is sent: what waits for its turn under a limit of concurrency does not age.
//! Refused requests are counted, never sent again.

mod answer;
mod arrivals;
mod client;
mod options;
mod prompts;
mod report;
mod sse;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use axum::body::Bytes;
use clap::{ArgMatches, Command};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use self::answer::{Answer, ask};
use self::arrivals::arrivals;
use self::client::ApiClient;
use self::options::{Endpoint, Options};
use self::prompts::Prompts;
use self::report::{Load, Report};
use super::output;
use crate::progress::Progress;

const AFTER_HELP: &str = "TTFT: from sending a request to its first text. ITL: between two chunks of text of \
    one answer. TPOT: the mean time of an answer's tokens after the first. End to end: to the end of the \
    stream. Tokens are the server's own count. Answers are greedy. The exit status is 0 if any request succeeded.";

/// The subcommand.
pub(super) fn command() -> Command {
    Command::new("serve")
        .about("Measures what the clients of a running server feel, whichever speaks OpenAI's API")
        .after_help(AFTER_HELP)
        .args(Options::args())
}

/// Loads the server and reports.
///
/// # Errors
/// If it cannot be asked at all, or every request failed.
pub(super) fn run(arguments: &ArgMatches) -> Result<()> {
    let options = Options::new(arguments)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let report = runtime.block_on(measure(&options))?;
    output::write(options.json.as_deref(), &report.table(), &report)?;
    ensure!(report.num_ok > 0, "every request failed");
    Ok(())
}

async fn measure(options: &Options) -> Result<Report> {
    let client = ApiClient::new(&options.url, options.api_key.as_deref())?;
    let model = match &options.model {
        Some(model) => model.clone(),
        None => first_model(&client).await?,
    };
    let prompts = Prompts::new(&client, &model, options).await;
    let body = |index| request(options, &model, prompts.prompt(index));
    let load = load(options, &client, &model, &prompts);
    let asker = Arc::new(Asker { client, path: options.endpoint.path(), timeout: options.timeout });
    // Numbered behind the measured ones, so that none of those is in a cache.
    for index in options.num_requests..options.num_requests + options.num_warm_ups {
        asker.ask(body(index)).await.context("a warm-up request failed")?;
    }
    let requests = (0..options.num_requests).map(body).collect();
    let (outcomes, duration) = send_all(&asker, requests, options).await;
    Ok(Report::new(load, outcomes, duration))
}

async fn first_model(client: &ApiClient) -> Result<String> {
    let models = client.get("/v1/models").await;
    let models = models.with_context(|| format!("cannot ask {} for its models", client.base()))?;
    let id = models.pointer("/data/0/id").and_then(Value::as_str);
    id.map(str::to_owned).context("/v1/models lists no model; name one with --model")
}

fn request(options: &Options, model: &str, prompt: String) -> Bytes {
    let mut body = json!({
        "model": model,
        "max_tokens": options.output_len,
        "temperature": 0,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    match options.endpoint {
        Endpoint::Chat => body["messages"] = json!([{"role": "user", "content": prompt}]),
        Endpoint::Completions => body["prompt"] = json!(prompt),
    }
    if options.ignore_eos {
        body["ignore_eos"] = json!(true);
    }
    for (name, value) in &options.extra_body {
        body[name] = value.clone();
    }
    body.to_string().into()
}

fn load(options: &Options, client: &ApiClient, model: &str, prompts: &Prompts) -> Load {
    Load {
        url: client.base().to_owned(),
        model: model.to_owned(),
        endpoint: options.endpoint.path(),
        concurrency: (options.concurrency < usize::MAX).then_some(options.concurrency),
        request_rate: options.request_rate.is_finite().then_some(options.request_rate),
        prompt_unit: prompts.unit,
        prompt_len: options.prompt_len,
        shared_prefix_len: options.shared_prefix_len,
        output_len: options.output_len,
        ignore_eos: options.ignore_eos,
        seed: options.seed,
        extra_body: options.extra_body.clone(),
    }
}

/// A client that gives up in time.
struct Asker {
    client: ApiClient,
    path: &'static str,
    timeout: Duration,
}

impl Asker {
    async fn ask(&self, body: Bytes) -> Result<Answer> {
        let answer = timeout(self.timeout, ask(&self.client, self.path, body)).await;
        answer.with_context(|| format!("not answered within {} s", self.timeout.as_secs()))?
    }
}

/// Sends every request when it is due and its turn; how each ended, and how long all took.
async fn send_all(
    asker: &Arc<Asker>,
    requests: Vec<Bytes>,
    options: &Options,
) -> (Vec<Result<Answer>>, Duration) {
    let turns = Arc::new(Semaphore::new(options.concurrency.min(Semaphore::MAX_PERMITS)));
    let mut progress = Progress::new("asking", requests.len());
    let mut tasks = JoinSet::new();
    let start = Instant::now();
    let due = arrivals(requests.len(), options.request_rate, options.seed);
    for (body, due) in requests.into_iter().zip(due) {
        let (asker, turns) = (asker.clone(), turns.clone());
        tasks.spawn(async move {
            sleep_until(start + due).await;
            let _turn = turns.acquire().await.expect("nobody closes it");
            asker.ask(body).await
        });
    }
    let mut outcomes = Vec::new();
    while let Some(outcome) = tasks.join_next().await {
        outcomes.push(outcome.context("a request panicked").flatten());
        progress.advance_to(outcomes.len());
    }
    (outcomes, start.elapsed())
}
