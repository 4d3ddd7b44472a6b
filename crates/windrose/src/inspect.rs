//! `windrose inspect`: what a model is, and what it costs to serve here.

use std::fmt::Write;

use cpu::{KvFormat, WeightFormat};
use model::{ModelConfig, ModelSummary};

use crate::load::{Model, token_bytes};

/// A page about a model: shape, parameters, bytes, and how many tokens fit in `available_bytes`.
pub(crate) fn page(model: &Model, available_bytes: u64) -> String {
    let (config, summary) = (&model.config, ModelSummary::new(&model.config));
    let attention = &config.attention;
    let mut page = String::new();
    let mut row =
        |label: &str, value: String| writeln!(page, "  {label:<22}{value}").expect("writing to a string");

    row("model", model.name.clone());
    row("architecture", config.architecture.name().to_owned());
    row("layers", config.num_layers.to_string());
    row("hidden, ffn", format!("{}, {}", config.hidden_size, config.ffn_size));
    let window = attention.sliding_window.map_or(String::new(), |window| format!(", window {window}"));
    row(
        "attention",
        format!(
            "{} query heads, {} kv heads, {} features each{window}",
            attention.num_heads, attention.num_kv_heads, attention.head_dim
        ),
    );
    row("experts", experts(config, &summary));
    row("vocabulary", config.vocab_size.to_string());
    row("context", format!("{} tokens", config.max_position_embeddings));
    row("parameters", parameters(config, &summary));
    row("weights", WeightFormat::ALL.map(|format| weights(&summary, format)).join(", "));
    let cache = |format| format!("{} in {}", bytes(token_bytes(&summary, config, format)), format.name());
    row("cache per token", KvFormat::ALL.map(cache).join(", "));
    row("fits here", capacity(model, &summary, available_bytes));
    page
}

fn experts(config: &ModelConfig, summary: &ModelSummary) -> String {
    if !config.has_router() {
        return "none: a dense model".to_owned();
    }
    let route = config.route;
    format!(
        "{} in each of {} layers, {} in all; a token visits {} per layer",
        route.num_experts, config.num_layers, summary.total_experts, route.top_k
    )
}

fn parameters(config: &ModelConfig, summary: &ModelSummary) -> String {
    let total = count(summary.total_parameters);
    if !config.has_router() {
        return total;
    }
    format!(
        "{total} in all, {} active per token (an expert has {}, a layer's attention {}, shared by all its experts)",
        count(summary.active_parameters),
        count(summary.expert_parameters),
        count(summary.attention_parameters),
    )
}

fn capacity(model: &Model, summary: &ModelSummary, available_bytes: u64) -> String {
    let available = bytes(available_bytes);
    let name = model.device.weights();
    match available_bytes.checked_sub(summary.weight_bytes(model.device.weight_bits())) {
        None => format!("no: {available} of memory are available, less than {name} weights take"),
        Some(left) => {
            let tokens = left / token_bytes(summary, &model.config, model.device.kv_cache());
            let contexts = tokens / model.config.max_position_embeddings as u64;
            format!("{tokens} tokens of cache in {available} beside {name} weights, {contexts} full contexts")
        }
    }
}

fn weights(summary: &ModelSummary, format: WeightFormat) -> String {
    format!("{} in {}", bytes(summary.weight_bytes(format.bits())), format.name())
}

/// A number of parameters as people say it.
fn count(parameters: u64) -> String {
    match parameters as f64 {
        n if n >= 1e9 => format!("{:.2} B", n / 1e9),
        n if n >= 1e6 => format!("{:.2} M", n / 1e6),
        n if n >= 1e3 => format!("{:.1} k", n / 1e3),
        n => format!("{n}"),
    }
}

/// A size in binary units.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut size = bytes as f64;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < UNITS.len() {
        size /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{size:.2} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_counts_read_naturally() {
        assert_eq!(bytes(131_072), "128.00 KiB");
        assert_eq!(bytes(12), "12 B");
        assert_eq!(count(46_702_792_704), "46.70 B");
        assert_eq!(count(5_700_000), "5.70 M");
    }
}
