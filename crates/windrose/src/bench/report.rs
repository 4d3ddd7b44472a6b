//! What `windrose bench` found, as a table and as JSON.

use std::fmt::Write;

use serde::Serialize;

use super::limits::Limits;
use super::sequences::Work;
use super::statistics::Spread;
use crate::inspect::bytes;

/// What was timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Phase {
    Prefill,
    Decode,
}

/// All repetitions of one measurement.
pub(super) struct Measurement {
    pub(super) phase: Phase,
    pub(super) num_seqs: usize,
    /// Tokens of each sequence: of its prompt in prefill, before its first step in decode.
    pub(super) context_len: usize,
    pub(super) samples: Vec<Work>,
}

/// Everything, with what is needed to repeat it.
#[derive(Serialize)]
pub(super) struct Report {
    pub(super) version: &'static str,
    pub(super) model: String,
    /// The seed, if the weights are random.
    pub(super) dummy_weights: Option<u64>,
    /// The instruction set or the GPU architecture.
    pub(super) kernels: String,
    pub(super) num_threads: usize,
    pub(super) max_num_batched_tokens: usize,
    pub(super) output_len: usize,
    pub(super) repetitions: usize,
    pub(super) seed: u64,
    /// From files to where they are computed with; random weights are made.
    pub(super) load_seconds: f64,
    pub(super) limits_before: Limits,
    pub(super) limits_after: Limits,
    pub(super) memory: Memory,
    pub(super) results: Vec<Row>,
}

/// What the process takes when all is measured, and what it cannot do without.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Memory {
    /// Mapped files included; `None` where the system does not say.
    pub(super) resident_bytes: Option<u64>,
    pub(super) weight_bytes: u64,
    /// Of keys and values; memory only where sequences have been.
    pub(super) cache_bytes: u64,
}

/// A measurement in the figures that are shown.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    phase: Phase,
    num_seqs: usize,
    context_len: usize,
    num_steps: usize,
    tokens_per_s: Spread,
    step_ms: Spread,
    /// The part of the time that the device computed; the rest it waited for its host. The median repetition's, as all
    /// that follows.
    device_share: f64,
    /// Bytes of weights, keys and values.
    read_bytes_per_s: f64,
    /// The part of the limit that this is.
    read_share: f64,
    flop_per_s: f64,
    /// The part of the limit that this is, where that was measured.
    dot_share: Option<f64>,
}

impl Measurement {
    /// Nothing measured yet.
    pub(super) fn new(phase: Phase, num_seqs: usize, context_len: usize) -> Self {
        Self { phase, num_seqs, context_len, samples: Vec::new() }
    }

    fn spread(&self, figure: impl Fn(&Work) -> f64) -> Spread {
        Spread::new(self.samples.iter().map(figure))
    }
}

impl Row {
    /// Sums up a measurement and compares it with the machine's limits.
    ///
    /// # Panics
    /// If nothing was measured.
    pub(super) fn new(measurement: &Measurement, limits: Limits) -> Self {
        let read_bytes_per_s = measurement.spread(|work| work.read_bytes as f64 / work.seconds).median;
        let flop_per_s = measurement.spread(|work| work.operations as f64 / work.seconds).median;
        Self {
            phase: measurement.phase,
            num_seqs: measurement.num_seqs,
            context_len: measurement.context_len,
            num_steps: measurement.samples[0].num_steps,
            tokens_per_s: measurement.spread(|work| work.num_tokens as f64 / work.seconds),
            step_ms: measurement.spread(|work| 1e3 * work.seconds / work.num_steps as f64),
            device_share: measurement.spread(|work| work.device_seconds / work.seconds).median,
            read_bytes_per_s,
            read_share: read_bytes_per_s / limits.read_bytes_per_s,
            flop_per_s,
            dot_share: limits.dot_flop_per_s.map(|limit| flop_per_s / limit),
        }
    }

    fn line(&self) -> String {
        let phase = match self.phase {
            Phase::Prefill => "prefill",
            Phase::Decode => "decode",
        };
        let dot_share = self.dot_share.map_or("-".to_owned(), |share| format!("{:.0}%", 100.0 * share));
        let range = format!("{} to {}", rounded(self.tokens_per_s.min), rounded(self.tokens_per_s.max));
        format!(
            "{phase:<8}{:>5}{:>9}{:>11}  {range:<19}{:>9}{:>6.1}%{:>8.2}{:>6.0}%{:>10.1}{dot_share:>7}",
            self.num_seqs,
            self.context_len,
            rounded(self.tokens_per_s.median),
            rounded(self.step_ms.median),
            100.0 * self.device_share,
            self.read_bytes_per_s / 1e9,
            100.0 * self.read_share,
            self.flop_per_s / 1e9,
        )
    }
}

impl Report {
    /// The page that people read.
    pub(super) fn table(&self) -> String {
        let mut table = String::new();
        let dummy = self.dummy_weights.map_or(String::new(), |seed| format!(" with dummy weights {seed}"));
        let mut line = |text: String| writeln!(table, "{text}").expect("writing to a string");
        line(format!("{}{dummy} on {}, {} threads", self.model, self.kernels, self.num_threads));
        for (when, limits) in [("before", self.limits_before), ("after", self.limits_after)] {
            let read = limits.read_bytes_per_s / 1e9;
            let dot = limits
                .dot_flop_per_s
                .map_or(String::new(), |dot| format!(", {:.1} GFLOP/s in dot products", dot / 1e9));
            line(format!("limits {when:<7}{read:>7.2} GB/s read{dot}"));
        }
        let Memory { resident_bytes, weight_bytes, cache_bytes } = self.memory;
        let resident = resident_bytes.map_or("unknown".to_owned(), bytes);
        line(format!(
            "memory {resident} resident; weights {} loaded in {:.2} s, cache {}",
            bytes(weight_bytes),
            self.load_seconds,
            bytes(cache_bytes)
        ));
        line(String::new());
        line(
            "phase    seqs  context   tokens/s  min to max          ms/step   busy    GB/s   read   GFLOP/s    dot"
                .into(),
        );
        self.results.iter().for_each(|row| line(row.line()));
        table
    }
}

/// A figure with three or more significant digits.
fn rounded(figure: f64) -> String {
    match figure {
        f if f >= 100.0 => format!("{f:.0}"),
        f if f >= 10.0 => format!("{f:.1}"),
        f => format!("{f:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_compares_the_median_with_the_limits() {
        let work = |seconds| Work {
            seconds,
            device_seconds: 0.75 * seconds,
            num_steps: 10,
            num_tokens: 20,
            read_bytes: 1_000_000_000,
            operations: 4_000_000_000,
        };
        let mut measurement = Measurement::new(Phase::Decode, 2, 64);
        measurement.samples.extend([work(1.0), work(0.5), work(2.0)]);
        let limits = Limits { read_bytes_per_s: 2e9, dot_flop_per_s: Some(16e9) };
        let row = Row::new(&measurement, limits);
        assert_eq!(row.tokens_per_s, Spread { median: 20.0, min: 10.0, max: 40.0 });
        assert_eq!(row.step_ms, Spread { median: 100.0, min: 50.0, max: 200.0 });
        assert_eq!((row.device_share, row.read_share, row.dot_share), (0.75, 0.5, Some(0.25)));
        assert!(row.line().starts_with("decode      2       64"), "{}", row.line());
    }
}
