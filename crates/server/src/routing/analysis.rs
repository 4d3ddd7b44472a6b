//! What a text says about a model's routers: how its tokens spread over experts, whether neighbours go to the same one,
//! which experts are chosen together, and how far two texts are from each other.
//!
//! Pure arithmetic on records. Shares are of choices: a token that visits two experts counts half for each.
//!
//! Source: Mixtral of Experts (arXiv 2401.04088), section 5: proportions of tokens per domain, and the share of tokens
//! whose first choice is that of the token before them.

use model::RoutingRecord;
use serde::Serialize;

/// One layer's routing of a text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct LayerAnalysis {
    layer: u32,
    /// `[experts]` share of all choices.
    shares: Vec<f64>,
    /// `[experts]` share of the gate weights.
    gate_shares: Vec<f64>,
    /// Of the shares; log2 of the number of experts is even.
    entropy_bits: f64,
    /// Share of the busiest expert over an even share.
    imbalance: f64,
    /// Share of tokens whose first choice is their predecessor's; null for a text of one token.
    first_choice_repetition: Option<f64>,
    /// Share of tokens that have some expert in common with their predecessor.
    any_choice_repetition: Option<f64>,
    /// `[experts, experts]` share of tokens that visit both; the diagonal is the share that visits the one.
    co_activation: Vec<Vec<f64>>,
}

impl LayerAnalysis {
    /// Analyses the `index`-th layer of a record of at least one token.
    pub(crate) fn new(record: &RoutingRecord, index: usize, num_experts: usize) -> Self {
        let num_tokens = record.num_tokens();
        let (mut shares, mut gate_shares) = (vec![0.0; num_experts], vec![0.0; num_experts]);
        let mut co_activation = vec![vec![0.0; num_experts]; num_experts];
        let (mut num_first, mut num_any) = (0, 0);
        for token in 0..num_tokens {
            let (ids, weights) = record.choice(token, index);
            for (&id, &weight) in ids.iter().zip(weights) {
                shares[id as usize] += 1.0 / ids.len() as f64;
                gate_shares[id as usize] += f64::from(weight);
                ids.iter().for_each(|&other| co_activation[id as usize][other as usize] += 1.0);
            }
            if token > 0 {
                let (before, _) = record.choice(token - 1, index);
                num_first += usize::from(ids[0] == before[0]);
                num_any += usize::from(ids.iter().any(|id| before.contains(id)));
            }
        }
        normalise(&mut shares);
        normalise(&mut gate_shares);
        co_activation.iter_mut().flatten().for_each(|share| *share /= num_tokens as f64);
        let repetition = |count: usize| (num_tokens > 1).then(|| count as f64 / (num_tokens - 1) as f64);
        Self {
            layer: record.layers[index],
            entropy_bits: entropy_bits(&shares),
            imbalance: shares.iter().copied().fold(0.0, f64::max) * num_experts as f64,
            first_choice_repetition: repetition(num_first),
            any_choice_repetition: repetition(num_any),
            shares,
            gate_shares,
            co_activation,
        }
    }
}

/// How far the texts' shares are from each other in one layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct LayerDivergence {
    layer: u32,
    /// `[texts, texts]` Jensen-Shannon divergence in bits: 0 for equal shares, 1 for texts without a common expert.
    bits: Vec<Vec<f64>>,
}

impl LayerDivergence {
    /// Compares the same layer of several texts.
    pub(crate) fn new(layers: &[&LayerAnalysis]) -> Self {
        let row = |a: &&LayerAnalysis| layers.iter().map(|b| divergence_bits(&a.shares, &b.shares)).collect();
        Self { layer: layers[0].layer, bits: layers.iter().map(row).collect() }
    }
}

fn normalise(values: &mut [f64]) {
    let sum: f64 = values.iter().sum();
    values.iter_mut().for_each(|value| *value /= sum);
}

fn entropy_bits(shares: &[f64]) -> f64 {
    shares.iter().filter(|&&share| share > 0.0).map(|share| -share * share.log2()).sum()
}

/// Jensen-Shannon divergence: the entropy of the mean less the mean entropy.
fn divergence_bits(a: &[f64], b: &[f64]) -> f64 {
    let mean: Vec<f64> = a.iter().zip(b).map(|(a, b)| (a + b) / 2.0).collect();
    // Rounding may leave a trace below zero.
    (entropy_bits(&mean) - (entropy_bits(a) + entropy_bits(b)) / 2.0).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A record of one layer, two experts per token.
    fn record(choices: &[[u32; 2]]) -> RoutingRecord {
        let mut record = RoutingRecord::new(0, vec![3], 2);
        choices.iter().for_each(|ids| record.push_choice(ids, &[0.75, 0.25]));
        record
    }

    #[test]
    fn shares_repetition_and_co_activation_count_tokens() {
        let analysis = LayerAnalysis::new(&record(&[[0, 1], [0, 2], [1, 0], [3, 2]]), 0, 4);
        assert_eq!(analysis.layer, 3);
        assert_eq!(analysis.shares, [3. / 8., 2. / 8., 2. / 8., 1. / 8.]);
        assert_eq!(analysis.gate_shares, [1.75 / 4., 1.0 / 4., 0.5 / 4., 0.75 / 4.]);
        assert_eq!(analysis.imbalance, 1.5);
        assert_eq!(analysis.first_choice_repetition, Some(1. / 3.));
        assert_eq!(analysis.any_choice_repetition, Some(2. / 3.));
        assert_eq!(analysis.co_activation[0], [0.75, 0.5, 0.25, 0.0]);
        assert!((analysis.entropy_bits - 1.905_639).abs() < 1e-6);
    }

    #[test]
    fn texts_without_a_common_expert_are_a_bit_apart() {
        let [a, b] = [[[0, 1]; 3], [[2, 3]; 3]].map(|choices| LayerAnalysis::new(&record(&choices), 0, 4));
        let divergence = LayerDivergence::new(&[&a, &b]);
        assert_eq!(divergence.bits, [[0.0, 1.0], [1.0, 0.0]]);
    }
}
