//! How evenly the routers spread tokens over experts, added up over all steps, so that whoever reads two snapshots has the
//! means of what lies between.
//!
//! One thread adds, any thread reads; a sum of reals is an atomic of its bits.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use model::{ExpertLoad, RunnerLimits};

/// What the routers did in all steps so far; all numbers only grow.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RoutingStats {
    /// `[num_layers, num_experts]` what each expert had to do; the last layer's mostly have the tokens whose logits
    /// are wanted.
    pub experts: Vec<ExpertLoad>,
    /// `[num_layers]`
    pub layers: Vec<LayerStats>,
}

/// Sums over the steps in which a layer routed tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LayerStats {
    /// Such steps.
    pub num_steps: u64,
    /// Experts that had tokens, which are those whose weights were read.
    pub num_distinct_experts: u64,
    /// Tokens of the busiest expert over the mean of all experts; 1 is even.
    pub imbalance: f64,
    /// Entropy in bits of the experts' shares of a step's tokens; log2 of their number is even.
    pub entropy_bits: f64,
    /// Tokens that the tiles of the experts' products had room for.
    pub tile_rows: u64,
}

impl LayerStats {
    /// A step's share of the sums, from its tokens per expert.
    fn of_step(loads: &[ExpertLoad]) -> Self {
        let total: u64 = loads.iter().map(|load| load.num_tokens).sum();
        if total == 0 {
            return Self::default();
        }
        let busy = loads.iter().map(|load| load.num_tokens).filter(|&num_tokens| num_tokens > 0);
        let shares = busy.map(|num_tokens| num_tokens as f64 / total as f64);
        let largest = shares.clone().fold(0.0, f64::max);
        Self {
            num_steps: 1,
            num_distinct_experts: shares.clone().count() as u64,
            imbalance: largest * loads.len() as f64,
            entropy_bits: shares.map(|share| -share * share.log2()).sum(),
            tile_rows: loads.iter().map(|load| load.tile_rows).sum(),
        }
    }
}

/// The atomics behind [`RoutingStats`].
#[derive(Debug, Default)]
pub(crate) struct SharedRoutingStats {
    experts: Vec<SharedLoad>,
    layers: Vec<SharedLayer>,
}

#[derive(Debug, Default)]
struct SharedLoad {
    num_tokens: AtomicU64,
    gate_weight: Real,
    tile_rows: AtomicU64,
}

#[derive(Debug, Default)]
struct SharedLayer {
    num_steps: AtomicU64,
    num_distinct_experts: AtomicU64,
    imbalance: Real,
    entropy_bits: Real,
    tile_rows: AtomicU64,
}

/// A real number that one thread adds to.
#[derive(Debug, Default)]
struct Real(AtomicU64);

impl Real {
    fn get(&self) -> f64 {
        f64::from_bits(self.0.load(Relaxed))
    }

    fn add(&self, value: f64) {
        self.0.store((self.get() + value).to_bits(), Relaxed);
    }
}

impl SharedRoutingStats {
    pub(crate) fn new(limits: &RunnerLimits) -> Self {
        let experts = limits.num_layers * limits.num_experts;
        Self {
            experts: (0..experts).map(|_| SharedLoad::default()).collect(),
            layers: (0..limits.num_layers).map(|_| SharedLayer::default()).collect(),
        }
    }

    /// Adds a step's loads `[num_layers, num_experts]`.
    pub(crate) fn add(&self, loads: &[ExpertLoad]) {
        for (shared, load) in self.experts.iter().zip(loads) {
            shared.num_tokens.fetch_add(load.num_tokens, Relaxed);
            shared.gate_weight.add(load.gate_weight);
            shared.tile_rows.fetch_add(load.tile_rows, Relaxed);
        }
        let num_experts = self.experts.len() / self.layers.len().max(1);
        for (shared, loads) in self.layers.iter().zip(loads.chunks_exact(num_experts.max(1))) {
            let step = LayerStats::of_step(loads);
            shared.num_steps.fetch_add(step.num_steps, Relaxed);
            shared.num_distinct_experts.fetch_add(step.num_distinct_experts, Relaxed);
            shared.imbalance.add(step.imbalance);
            shared.entropy_bits.add(step.entropy_bits);
            shared.tile_rows.fetch_add(step.tile_rows, Relaxed);
        }
    }

    pub(crate) fn snapshot(&self) -> RoutingStats {
        let load = |shared: &SharedLoad| ExpertLoad {
            num_tokens: shared.num_tokens.load(Relaxed),
            gate_weight: shared.gate_weight.get(),
            tile_rows: shared.tile_rows.load(Relaxed),
        };
        let layer = |shared: &SharedLayer| LayerStats {
            num_steps: shared.num_steps.load(Relaxed),
            num_distinct_experts: shared.num_distinct_experts.load(Relaxed),
            imbalance: shared.imbalance.get(),
            entropy_bits: shared.entropy_bits.get(),
            tile_rows: shared.tile_rows.load(Relaxed),
        };
        RoutingStats {
            experts: self.experts.iter().map(load).collect(),
            layers: self.layers.iter().map(layer).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::limits;

    #[test]
    fn steps_add_up_to_sums_of_what_each_was() {
        let limits = RunnerLimits { num_layers: 2, num_experts: 4, ..limits() };
        let stats = SharedRoutingStats::new(&limits);
        let loads = |counts: [u64; 8]| {
            // In tiles of 4 tokens.
            counts.map(|num_tokens| ExpertLoad {
                num_tokens,
                gate_weight: num_tokens as f64 / 2.0,
                tile_rows: num_tokens.next_multiple_of(4),
            })
        };
        stats.add(&loads([1, 1, 1, 1, 8, 0, 0, 0]));
        stats.add(&loads([2, 2, 0, 0, 0, 0, 0, 0]));
        let RoutingStats { experts, layers } = stats.snapshot();
        assert_eq!(experts[0], ExpertLoad { num_tokens: 3, gate_weight: 1.5, tile_rows: 8 });
        let first = LayerStats {
            num_steps: 2,
            num_distinct_experts: 6,
            imbalance: 3.0,
            entropy_bits: 3.0,
            tile_rows: 24,
        };
        let second = LayerStats {
            num_steps: 1,
            num_distinct_experts: 1,
            imbalance: 4.0,
            entropy_bits: 0.0,
            tile_rows: 8,
        };
        assert_eq!(layers, [first, second]);
    }
}
