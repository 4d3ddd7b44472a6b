//! The command line of Windrose, and the one place where its crates meet.
//!
//! `serve` (what runs without a subcommand), `generate`, `inspect`, `doctor`, `quantize` and `bench` share one set of
//! settings, which come from `config.toml` (see [`settings`]). Only the settings and the benches are worth testing
//! alone.
#![forbid(unsafe_code)]

mod bench;
mod device;
mod doctor;
mod fingerprint;
mod generate;
mod inspect;
mod load;
mod memory;
mod packed_file;
mod progress;
mod quantize;
mod serve;
mod settings;

use std::io::{IsTerminal, stderr};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use tracing_subscriber::EnvFilter;

use crate::load::Model;
use crate::settings::Settings;

const AFTER_HELP: &str = "Without a subcommand, `serve` runs. Every setting is also a key of a file given with \
    --config and a variable WINDROSE_<KEY>; a flag wins over a variable, a variable over the file.";

fn main() -> ExitCode {
    match run(&command().get_matches()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("windrose: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn command() -> Command {
    let config = Arg::new("config")
        .long("config")
        .global(true)
        .action(ArgAction::Set)
        .value_name("FILE")
        .value_parser(value_parser!(PathBuf))
        .help("A file with the settings that differ from config.toml's defaults");
    let model = Arg::new("path")
        .value_name("MODEL")
        .help("Its directory or .gguf file [default: the setting `model`]");
    let serve = Command::new("serve").about("Serves a model behind OpenAI's API (the default)");
    Command::new("windrose")
        .about("Serves sparse mixture-of-experts models of the Mixtral family behind OpenAI's API")
        .version(env!("CARGO_PKG_VERSION"))
        .after_help(AFTER_HELP)
        .arg(config)
        .args(Settings::args())
        .subcommand(serve)
        .subcommand(generate::command())
        .subcommand(bench::command())
        .subcommand(
            Command::new("doctor")
                .about("Says what this machine has, what would run the model, and why nothing better does"),
        )
        .subcommand(
            Command::new("inspect")
                .about("Says what a model is: experts, parameters, bytes, and how many tokens fit here")
                .arg(model.clone()),
        )
        .subcommand(
            Command::new("quantize")
                .about("Quantises a model's weights to q8 (or --weights q4) ahead of its first start")
                .arg(model),
        )
}

fn run(matches: &ArgMatches) -> Result<()> {
    let (name, arguments) = matches.subcommand().unwrap_or(("serve", matches));
    let file = arguments.get_one::<PathBuf>("config");
    let mut settings =
        Settings::resolve(file.map(PathBuf::as_path), |name| std::env::var(name).ok(), arguments)?;
    match name {
        "serve" => {
            start_log(&settings, &settings.log)?;
            serve::run(&settings)
        }
        "generate" => {
            // The answer is what people came for; of the log only what goes wrong.
            start_log(&settings, "warn")?;
            generate::run(&settings, arguments)
        }
        "quantize" => {
            start_log(&settings, &settings.log)?;
            settings.model = model_path(arguments, &settings);
            quantize::run(&mut settings)
        }
        "doctor" => {
            start_log(&settings, "warn")?;
            doctor::run(&settings)
        }
        "bench" => {
            start_log(&settings, "warn")?;
            bench::run(&settings, arguments)
        }
        _ => {
            settings.model = model_path(arguments, &settings);
            let model = Model::find(&settings)?;
            print!("{}", inspect::page(&model, model.device.available_bytes()));
            Ok(())
        }
    }
}

/// The model named on the command line, or in the settings.
fn model_path(arguments: &ArgMatches, settings: &Settings) -> String {
    arguments.get_one::<String>("path").unwrap_or(&settings.model).clone()
}

/// Logs to standard error, so that standard output has only what was asked for.
fn start_log(settings: &Settings, filter: &str) -> Result<()> {
    let filter: EnvFilter = filter.parse().with_context(|| format!("log is \"{filter}\""))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(stderr);
    match settings.log_format.as_str() {
        "text" => log.with_ansi(stderr().is_terminal()).with_target(false).init(),
        "json" => log.json().init(),
        other => bail!("log_format is \"{other}\", expected \"text\" or \"json\""),
    }
    Ok(())
}
