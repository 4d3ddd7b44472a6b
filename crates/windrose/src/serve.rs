//! `windrose serve`: binds, loads, serves, and ends the way its supervisor expects.
//!
//! The port is bound before the model is loaded, so that a taken one is told at once. SIGTERM and SIGINT drain and
//! end with status 0; a model or device that fails ends everything with an error, for the supervisor to restart.

use std::future::Future;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use engine::{Clock, Engine, EngineConfig, EngineError, EngineHandle, EngineThread};
use model::ModelFiles;
use server::{AppState, Leave, ServerConfig, TextFiles, TextModel};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tracing::warn;

use crate::fingerprint;
use crate::load::Model;
use crate::settings::Settings;

/// The file without which there are no words.
const TOKENIZER: &str = "tokenizer.json";

/// Runs until a signal, or until the engine fails.
pub(crate) fn run(settings: &Settings) -> Result<()> {
    let listener = bind(settings)?;
    let address = listener.local_addr()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let model = Model::find(settings)?;
    let (state, engine, thread) = start(settings, &model)?;
    println!("{}", banner(&model.name, address));
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let (ended_sender, ended) = oneshot::channel();
        // Joining blocks, so a thread of its own does it and tells the async side.
        std::thread::spawn(move || ended_sender.send(thread.join()));
        let mut ended = Box::pin(ended);
        let mut failure = None;
        let shutdown = async {
            tokio::select! {
                leave = told_to_leave() => leave,
                result = &mut ended => {
                    failure = Some(result);
                    Leave::AtOnce
                }
            }
        };
        server::serve(listener, state, shutdown).await?;
        let result = match failure {
            Some(result) => result,
            None => {
                engine.abort();
                ended.await
            }
        };
        result.context("the engine's thread vanished")?.map_err(describe_failure)
    })
}

/// Loads the model and starts its engine and everything that a server shares.
pub(crate) fn start(settings: &Settings, model: &Model) -> Result<(AppState, EngineHandle, EngineThread)> {
    let text = TextModel::new(&text_files(model, settings)?)?;
    let runner = model.load(settings)?.runner;
    let limits = runner.limits();
    let engine_config = EngineConfig {
        max_num_seqs: limits.max_num_seqs,
        max_num_batched_tokens: limits.max_num_batched_tokens,
        max_queued_requests: settings.max_queued_requests,
        max_queued_tokens: settings.max_queued_tokens,
        enable_prefix_cache: settings.prefix_cache,
    };
    let start = Instant::now();
    let clock: Clock = Arc::new(move || start.elapsed());
    let (engine, thread) = Engine::spawn(runner, engine_config, clock.clone());
    let config = server_config(settings, model)?;
    Ok((AppState::new(config, text, engine.clone(), clock)?, engine, thread))
}

fn bind(settings: &Settings) -> Result<TcpListener> {
    let (host, port) = (settings.host.as_str(), settings.port);
    let listener = TcpListener::bind((host, port)).map_err(|error| {
        let advice = match error.kind() {
            std::io::ErrorKind::AddrInUse => {
                "; another program has this port: end it or choose one with --port"
            }
            std::io::ErrorKind::AddrNotAvailable => "; --host must be an address of this machine, or 0.0.0.0",
            std::io::ErrorKind::PermissionDenied => {
                "; ports below 1024 need privileges: choose one with --port"
            }
            _ => "",
        };
        anyhow::anyhow!("cannot listen on {host}:{port}: {error}{advice}")
    })?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// The words of a model, from its files. Dummy weights say nothing sensible in any words, so without a tokenizer
/// the demo model's will do, and a configuration alone is enough.
fn text_files(model: &Model, settings: &Settings) -> Result<TextFiles> {
    if let Some(files) = own_text_files(&model.files)? {
        return Ok(files);
    }
    if settings.dummy_seed()?.is_some() {
        warn!("the model has no tokenizer: the demo model's stands in for it");
        return Ok(own_text_files(&ModelFiles::Embedded(demo::files()))?.expect("the demo model's tokenizer"));
    }
    match &model.files {
        ModelFiles::Gguf(gguf) => bail!("{} has no tokenizer, which the server needs", gguf.name()),
        files => {
            bail!("{} is missing: the server needs the model's tokenizer", files.display_name(TOKENIZER))
        }
    }
}

/// The words that a model comes with; `None` if it has no tokenizer.
fn own_text_files(files: &ModelFiles) -> Result<Option<TextFiles>> {
    if let ModelFiles::Gguf(gguf) = files {
        return Ok(TextFiles::from_gguf(gguf.metadata())?);
    }
    let read = |name: &str| Ok::<_, anyhow::Error>(files.read(name)?.map(|contents| contents.to_vec()));
    let Some(tokenizer_json) = read(TOKENIZER)? else { return Ok(None) };
    let chat_template = read("chat_template.jinja")?.map(String::from_utf8).transpose();
    Ok(Some(TextFiles {
        tokenizer_json,
        tokenizer_config_json: read("tokenizer_config.json")?,
        chat_template: chat_template.context("chat_template.jinja is not UTF-8")?,
        generation_config_json: read("generation_config.json")?,
    }))
}

fn server_config(settings: &Settings, model: &Model) -> Result<ServerConfig> {
    let seconds = Duration::from_secs;
    Ok(ServerConfig {
        model_name: model.name.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        system_fingerprint: fingerprint::of(model, settings)?,
        api_keys: api_keys(settings)?,
        protect_metrics: settings.protect_metrics,
        cors_allowed_origins: settings.cors_allowed_origins.clone(),
        max_body_bytes: settings.max_body_bytes,
        max_prompt_bytes: settings.max_prompt_bytes,
        max_choices_per_request: settings.max_choices_per_request,
        max_stored_responses: settings.max_stored_responses,
        max_stored_response_bytes: settings.stored_responses_mib.saturating_mul(1 << 20),
        max_connections: settings.max_connections,
        header_read_timeout: seconds(settings.read_timeout_s),
        body_read_timeout: seconds(settings.read_timeout_s),
        write_timeout: seconds(settings.write_timeout_s),
        keep_alive_interval: (settings.keep_alive_s > 0).then(|| seconds(settings.keep_alive_s)),
        stall_timeout: seconds(settings.stall_timeout_s),
        drain_grace: seconds(settings.drain_grace_s),
        shutdown_timeout: seconds(settings.shutdown_timeout_s),
        ..ServerConfig::default()
    })
}

fn api_keys(settings: &Settings) -> Result<Vec<String>> {
    let mut keys = settings.api_keys.clone();
    if !settings.api_keys_file.is_empty() {
        let file = &settings.api_keys_file;
        let text =
            std::fs::read_to_string(file).with_context(|| format!("cannot read api_keys_file {file}"))?;
        let before = keys.len();
        keys.extend(text.lines().map(str::trim).filter(|key| !key.is_empty()).map(str::to_owned));
        if keys.len() == before {
            bail!("api_keys_file {file} has no key; remove the setting to serve everyone");
        }
    }
    Ok(keys)
}

/// Resolves at the first SIGTERM, which supervisors send, or SIGINT, which is Ctrl-C; a second one ends the process.
fn told_to_leave() -> impl Future<Output = Leave> {
    let listen = |kind| signal(kind).expect("the runtime handles signals");
    let (mut terminate, mut interrupt) = (listen(SignalKind::terminate()), listen(SignalKind::interrupt()));
    let mut next = async move || {
        tokio::select! {
            _ = terminate.recv() => Leave::AfterGrace,
            _ = interrupt.recv() => Leave::AtOnce,
        }
    };
    async move {
        let leave = next().await;
        tokio::spawn(async move {
            next().await;
            warn!("told to end again: not waiting for what still runs");
            std::process::exit(1);
        });
        leave
    }
}

fn describe_failure(error: EngineError) -> anyhow::Error {
    anyhow::Error::new(error).context("the engine failed; everything in flight was told so")
}

/// What a person sees first: where it listens, and two ways to ask that work when pasted.
fn banner(model: &str, address: SocketAddr) -> String {
    format!(
        r#"Windrose {version} serves {model} on http://{address}

Ask it from a shell:

  curl http://{address}/v1/chat/completions -H 'Content-Type: application/json' \
    -d '{{"messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'

or from Python (pip install openai):

  from openai import OpenAI
  client = OpenAI(base_url="http://{address}/v1", api_key="none")
  question = [{{"role": "user", "content": "What is the capital of France?"}}]
  answer = client.chat.completions.create(model="{model}", messages=question)
  print(answer.choices[0].message.content)
"#,
        version = env!("CARGO_PKG_VERSION"),
    )
}
