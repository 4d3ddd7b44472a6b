//! `windrose generate "prompt"`: one answer on the terminal, as it is written.
//!
//! It asks the same router that `serve` exposes, in process and without a socket, so that there is one path from
//! words to tokens and back.

use std::io::{IsTerminal, Read, Write, stdin, stdout};

use anyhow::{Context, Result, bail};
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use http_body_util::BodyExt;
use serde_json::{Map, Value, json};
use server::AppState;
use tower::ServiceExt;

use crate::load::Model;
use crate::serve;
use crate::settings::Settings;

/// The subcommand's own arguments; the names of sampling parameters are those of the API.
pub(crate) fn command() -> Command {
    let number = |name: &'static str, help: &'static str| {
        Arg::new(name)
            .long(name.replace('_', "-"))
            .help(help)
            .action(ArgAction::Set)
            .value_parser(value_parser!(f64))
            .allow_negative_numbers(true)
    };
    Command::new("generate")
        .about("Answers one prompt on the terminal")
        .arg(Arg::new("prompt").help("The question; - reads standard input").required(true))
        .arg(
            Arg::new("raw")
                .long("raw")
                .action(ArgAction::SetTrue)
                .help("Continues the text, without a chat template"),
        )
        .arg(Arg::new("system").long("system").help("A system message"))
        .arg(number("max_tokens", "Most tokens to generate [default: until the model stops; 128 with --raw]"))
        .arg(number("temperature", "0 takes the likeliest token [default: 0]"))
        .arg(number("top_p", "Keeps the likeliest tokens up to this probability"))
        .arg(number("seed", "Repeats a random answer"))
}

/// Loads the model, streams the answer to standard output.
pub(crate) fn run(settings: &Settings, arguments: &ArgMatches) -> Result<()> {
    let prompt = match arguments.get_one::<String>("prompt").map(String::as_str) {
        Some("-") => read_standard_input()?,
        prompt => prompt.unwrap_or_default().to_owned(),
    };
    let (state, engine, thread) = serve::start(settings, &Model::find(settings)?)?;
    let (path, body) = request(arguments, &prompt);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let answered = runtime.block_on(stream(state, path, &body));
    engine.abort();
    thread.join().context("the engine failed")?;
    answered
}

fn read_standard_input() -> Result<String> {
    if stdin().is_terminal() {
        eprintln!("reading the prompt from the terminal, end it with Ctrl-D");
    }
    let mut text = String::new();
    stdin().read_to_string(&mut text).context("cannot read the prompt from standard input")?;
    Ok(text)
}

/// The API request that the arguments amount to.
fn request(arguments: &ArgMatches, prompt: &str) -> (&'static str, Value) {
    let mut body = Map::from_iter([("stream".to_owned(), json!(true)), ("temperature".to_owned(), json!(0))]);
    for name in ["temperature", "top_p"] {
        if let Some(&value) = arguments.get_one::<f64>(name) {
            body.insert(name.to_owned(), json!(value));
        }
    }
    for name in ["max_tokens", "seed"] {
        if let Some(&value) = arguments.get_one::<f64>(name) {
            body.insert(name.to_owned(), json!(value as i64));
        }
    }
    if arguments.get_flag("raw") {
        body.insert("prompt".to_owned(), json!(prompt));
        body.entry("max_tokens").or_insert(json!(128));
        return ("/v1/completions", body.into());
    }
    let system = arguments.get_one::<String>("system");
    let system = system.map(|content| json!({"role": "system", "content": content}));
    let messages: Vec<Value> =
        system.into_iter().chain([json!({"role": "user", "content": prompt})]).collect();
    body.insert("messages".to_owned(), json!(messages));
    ("/v1/chat/completions", body.into())
}

/// Asks the router and prints the deltas of its events.
async fn stream(state: AppState, path: &str, body: &Value) -> Result<()> {
    let request = http::Request::post(path)
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(axum::body::Body::from(body.to_string()))?;
    let response = server::app(state).oneshot(request).await?;
    let is_success = response.status().is_success();
    let mut body = response.into_body();
    let mut unread = Vec::new();
    while let Some(frame) = body.frame().await {
        unread.extend_from_slice(&frame?.into_data().unwrap_or_default());
        if !is_success {
            continue;
        }
        while let Some(end) = unread.windows(2).position(|pair| pair == b"\n\n") {
            let event: Vec<u8> = unread.drain(..end + 2).collect();
            print_event(&String::from_utf8_lossy(&event))?;
        }
    }
    if !is_success {
        bail!("{}", error_message(&unread));
    }
    println!();
    Ok(())
}

fn print_event(event: &str) -> Result<()> {
    let Some(data) = event.trim_end().strip_prefix("data: ").filter(|&data| data != "[DONE]") else {
        return Ok(());
    };
    let chunk: Value = serde_json::from_str(data)?;
    if chunk.get("error").is_some() {
        bail!("{}", error_message(data.as_bytes()));
    }
    let choice = &chunk["choices"][0];
    let text = choice["delta"]["content"].as_str().or_else(|| choice["text"].as_str()).unwrap_or_default();
    let mut out = stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

fn error_message(body: &[u8]) -> String {
    let parsed: Value = serde_json::from_slice(body).unwrap_or_default();
    parsed["error"]["message"].as_str().unwrap_or("the answer could not be generated").to_owned()
}
