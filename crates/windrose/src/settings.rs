//! All settings of the server, from four layers: the embedded `config.toml`, a file, `WINDROSE_*` variables, flags.
//!
//! `config.toml` is the one source: its keys become the flags and the variables, its comments their help, its
//! values the defaults and the types. [`Settings`] must have exactly its keys, which deserialising the embedded
//! file proves at start and in a test.

use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::{Arg, ArgAction, ArgMatches};
use serde::Deserialize;
use toml::{Table, Value};

/// The documented defaults, as committed at the root of the repository.
const DEFAULTS: &str = include_str!("../../../config.toml");
/// Prefix of the variables.
const ENV_PREFIX: &str = "WINDROSE_";

/// Every key of `config.toml`; what each means is written there.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Settings {
    pub(crate) model: String,
    pub(crate) served_model_name: String,
    pub(crate) dummy_weights: String,
    pub(crate) max_model_len: usize,
    pub(crate) device: String,
    pub(crate) gpu_memory_utilization: f64,
    pub(crate) cuda_graphs: bool,
    pub(crate) cuda_dependent_launches: bool,
    pub(crate) kernel_cache_dir: String,
    pub(crate) weights: String,
    pub(crate) packed_dir: String,
    pub(crate) copy_packed: bool,
    pub(crate) threads: usize,
    pub(crate) kv_cache_mib: usize,
    pub(crate) kv_cache: String,
    pub(crate) block_size: usize,
    pub(crate) prefix_cache: bool,
    pub(crate) max_num_seqs: usize,
    pub(crate) max_num_batched_tokens: usize,
    pub(crate) max_queued_requests: usize,
    pub(crate) max_queued_tokens: usize,
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) api_keys: Vec<String>,
    pub(crate) api_keys_file: String,
    pub(crate) protect_metrics: bool,
    pub(crate) cors_allowed_origins: Vec<String>,
    pub(crate) max_body_bytes: usize,
    pub(crate) max_prompt_bytes: usize,
    pub(crate) max_choices_per_request: usize,
    pub(crate) max_stored_responses: usize,
    pub(crate) stored_responses_mib: usize,
    pub(crate) max_connections: usize,
    pub(crate) read_timeout_s: u64,
    pub(crate) write_timeout_s: u64,
    pub(crate) keep_alive_s: u64,
    pub(crate) stall_timeout_s: u64,
    pub(crate) drain_grace_s: u64,
    pub(crate) shutdown_timeout_s: u64,
    pub(crate) log: String,
    pub(crate) log_format: String,
}

impl Settings {
    /// One flag per key, with the key's comment as its help.
    pub(crate) fn args() -> Vec<Arg> {
        let documented = documented_keys(DEFAULTS);
        let arg = |(index, (key, help)): (usize, (String, String))| {
            let arg = Arg::new(key.clone())
                .long(key.replace('_', "-"))
                .help(help.clone())
                .global(true)
                .action(ArgAction::Set)
                .value_name("VALUE")
                .display_order(100 + index)
                .help_heading("Settings (also WINDROSE_<KEY> and config.toml)");
            match key.as_str() {
                "dummy_weights" => arg.num_args(0..=1).default_missing_value("0").value_name("SEED"),
                _ => arg,
            }
        };
        documented.into_iter().enumerate().map(arg).collect()
    }

    /// Merges the layers; `env` is looked up by full variable name.
    ///
    /// # Errors
    /// If a layer has an unknown key or a value of the wrong type; the message names the layer and the key.
    pub(crate) fn resolve(
        file: Option<&Path>,
        env: impl Fn(&str) -> Option<String>,
        flags: &ArgMatches,
    ) -> Result<Self> {
        let mut merged: Table = DEFAULTS.parse().expect("the embedded config.toml is valid");
        if let Some(path) = file {
            overlay_file(&mut merged, path)?;
        }
        let keys: Vec<String> = merged.keys().cloned().collect();
        for key in keys {
            let variable = format!("{ENV_PREFIX}{}", key.to_uppercase());
            if let Some(text) = env(&variable) {
                merged[&key] = parse_like(&merged[&key], &text).with_context(|| variable)?;
            }
            if let Ok(Some(text)) = flags.try_get_one::<String>(&key) {
                merged[&key] = parse_like(&merged[&key], text)
                    .with_context(|| format!("--{}", key.replace('_', "-")))?;
            }
        }
        Value::Table(merged).try_into().context("configuration")
    }

    /// The seed of dummy weights, if they are asked for.
    pub(crate) fn dummy_seed(&self) -> Result<Option<u64>> {
        match self.dummy_weights.as_str() {
            "off" => Ok(None),
            seed => seed
                .parse()
                .map(Some)
                .with_context(|| format!("dummy_weights is \"{seed}\", expected \"off\" or a seed")),
        }
    }
}

fn overlay_file(merged: &mut Table, path: &Path) -> Result<()> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let layer: Table = text.parse().with_context(|| format!("{} is not valid TOML", path.display()))?;
    for (key, value) in layer {
        let Some(default) = merged.get(&key) else {
            bail!(
                "{}: there is no key \"{key}\"; config.toml in the repository documents all keys",
                path.display()
            );
        };
        if !value.same_type(default) {
            bail!("{}: {key} is {value}, expected a value like {default}", path.display());
        }
        merged.insert(key, value);
    }
    Ok(())
}

/// Reads text as the type of `default`; lists are comma-separated.
fn parse_like(default: &Value, text: &str) -> Result<Value> {
    let expected = |kind: &str| format!("\"{text}\" is not {kind}");
    Ok(match default {
        Value::Integer(_) => Value::Integer(text.parse().with_context(|| expected("a whole number"))?),
        Value::Float(_) => Value::Float(text.parse().with_context(|| expected("a number"))?),
        Value::Boolean(_) => Value::Boolean(text.parse().with_context(|| expected("true or false"))?),
        Value::Array(_) => {
            let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
            Value::Array(items.map(|item| Value::String(item.to_owned())).collect())
        }
        _ => Value::String(text.to_owned()),
    })
}

/// The keys of a configuration in order, each with the comment above it as one paragraph.
fn documented_keys(text: &str) -> Vec<(String, String)> {
    let mut keys = Vec::new();
    let mut comment: Vec<&str> = Vec::new();
    for line in text.lines() {
        if let Some(words) = line.strip_prefix('#') {
            comment.push(words.trim());
        } else if let Some((key, default)) = line.split_once(" = ") {
            let help = format!("{} [default: {default}]", comment.join(" "));
            keys.push((key.to_owned(), help));
            comment.clear();
        } else {
            comment.clear();
        }
    }
    keys
}

#[cfg(test)]
mod tests {
    use clap::Command;

    use super::*;

    fn flags(arguments: &[&str]) -> ArgMatches {
        let command = Command::new("windrose").args(Settings::args());
        command.get_matches_from(["windrose"].iter().chain(arguments))
    }

    fn resolve(file: Option<&str>, env: &[(&str, &str)], arguments: &[&str]) -> Result<Settings> {
        let directory =
            std::env::temp_dir().join(format!("windrose-settings-{:?}", std::thread::current().id()));
        let path = file.map(|text| {
            std::fs::write(&directory, text).unwrap();
            directory.as_path()
        });
        let lookup =
            |name: &str| env.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        let settings = Settings::resolve(path, lookup, &flags(arguments));
        let _ = std::fs::remove_file(&directory);
        settings
    }

    #[test]
    fn the_embedded_defaults_are_exactly_the_settings_and_all_documented() {
        resolve(None, &[], &[]).unwrap();
        let table: Table = DEFAULTS.parse().unwrap();
        let documented = documented_keys(DEFAULTS);
        assert_eq!(documented.len(), table.len());
        for (key, help) in documented {
            assert!(help.len() > 40, "{key} deserves a reason: {help}");
        }
    }

    #[test]
    fn a_flag_wins_over_a_variable_over_the_file_over_the_default() {
        let file = Some("block_size = 1\nmax_num_seqs = 2\nthreads = 3");
        let env = [("WINDROSE_MAX_NUM_SEQS", "20"), ("WINDROSE_THREADS", "30")];
        let settings = resolve(file, &env, &["--threads", "300"]).unwrap();
        assert_eq!((settings.block_size, settings.max_num_seqs, settings.threads), (1, 20, 300));
    }

    #[track_caller]
    fn check_error(result: Result<Settings>, words: &str) {
        let error = format!("{:#}", result.unwrap_err());
        assert!(error.contains(words), "{error}");
    }

    #[test]
    fn errors_name_the_layer_and_the_key() {
        check_error(resolve(Some("blok_size = 1"), &[], &[]), "blok_size");
        check_error(resolve(Some("block_size = \"x\""), &[], &[]), "block_size is \"x\"");
        check_error(resolve(None, &[("WINDROSE_THREADS", "many")], &[]), "WINDROSE_THREADS");
        check_error(resolve(None, &[], &["--block-size", "1.5"]), "--block-size");
    }

    #[test]
    fn dummy_weights_is_a_switch_or_a_seed() {
        let seed = |arguments: &[&str]| resolve(None, &[], arguments).unwrap().dummy_seed().unwrap();
        assert_eq!(seed(&[]), None);
        assert_eq!(seed(&["--dummy-weights"]), Some(0));
        assert_eq!(seed(&["--dummy-weights", "7"]), Some(7));
    }
}
