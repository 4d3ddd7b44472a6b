//! The series of the routers, copied from the engine's [`RoutingStats`].
//!
//! There are two per layer and expert and five per layer, whatever is served: 672 series for Mixtral 8x7B. All are
//! counters, so that a range of time has means: distinct experts, imbalance and entropy per step, tokens per expert, fill
//! of tiles.

use engine::{LayerStats, RoutingStats};
use model::{ExpertLoad, RunnerLimits};
use prometheus::core::{Atomic, GenericCounter, GenericCounterVec};
use prometheus::{Counter, IntCounter};

use super::Registration;

/// A counter, and how its value is read.
type Read<From, Counter, Value> = (Counter, fn(&From) -> Value);

pub(super) struct RoutingSeries {
    experts: Vec<ExpertSeries>,
    layers: Vec<LayerSeries>,
}

struct ExpertSeries {
    num_tokens: IntCounter,
    gate_weight: Counter,
}

struct LayerSeries {
    integers: [Read<LayerStats, IntCounter, u64>; 3],
    reals: [Read<LayerStats, Counter, f64>; 2],
}

impl RoutingSeries {
    pub(super) fn new(new: &Registration, limits: &RunnerLimits) -> prometheus::Result<Self> {
        let num_tokens = new.counters("windrose_expert_tokens_total", &["layer", "expert"])?;
        let gate_weight = new.real_counters("windrose_expert_gate_weight_total", &["layer", "expert"])?;
        let num_steps = new.counters("windrose_routing_steps_total", &["layer"])?;
        let num_distinct = new.counters("windrose_routing_distinct_experts_total", &["layer"])?;
        let tile_rows = new.counters("windrose_expert_tile_rows_total", &["layer"])?;
        let imbalance = new.real_counters("windrose_routing_imbalance_total", &["layer"])?;
        let entropy = new.real_counters("windrose_routing_entropy_bits_total", &["layer"])?;

        let expert = |index: usize| {
            let labels =
                [index / limits.num_experts, index % limits.num_experts].map(|label| label.to_string());
            ExpertSeries {
                num_tokens: num_tokens.with_label_values(&labels),
                gate_weight: gate_weight.with_label_values(&labels),
            }
        };
        let layer = |layer: usize| LayerSeries {
            integers: [
                (of_layer(&num_steps, layer), |stats| stats.num_steps),
                (of_layer(&num_distinct, layer), |stats| stats.num_distinct_experts),
                (of_layer(&tile_rows, layer), |stats| stats.tile_rows),
            ],
            reals: [
                (of_layer(&imbalance, layer), |stats| stats.imbalance),
                (of_layer(&entropy, layer), |stats| stats.entropy_bits),
            ],
        };
        Ok(Self {
            experts: (0..limits.num_layers * limits.num_experts).map(expert).collect(),
            layers: (0..limits.num_layers).map(layer).collect(),
        })
    }

    pub(super) fn copy(&self, stats: &RoutingStats) {
        for (series, &ExpertLoad { num_tokens, gate_weight, .. }) in self.experts.iter().zip(&stats.experts) {
            raise(&series.num_tokens, num_tokens);
            raise(&series.gate_weight, gate_weight);
        }
        for (series, stats) in self.layers.iter().zip(&stats.layers) {
            series.integers.iter().for_each(|(counter, read)| raise(counter, read(stats)));
            series.reals.iter().for_each(|(counter, read)| raise(counter, read(stats)));
        }
    }
}

fn of_layer<P: Atomic>(counters: &GenericCounterVec<P>, layer: usize) -> GenericCounter<P> {
    counters.with_label_values(&[layer.to_string()])
}

/// Copies a counter that another keeps.
pub(super) fn raise<P: Atomic>(counter: &GenericCounter<P>, value: P::T)
where
    P::T: PartialOrd + std::ops::Sub<Output = P::T>,
{
    let known = counter.get();
    if value > known {
        counter.inc_by(value - known);
    }
}
