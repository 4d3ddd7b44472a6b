//! The draw of a token, in integers: a token's weight is its probability relative to the likeliest one's, as a number of
//! 2⁻³⁰ths. Integers add up to the same sum in any order, so a device may split the row as it likes and still take the
//! token that this plain implementation takes.
//!
//! Tokens are ranked by weight, the lower id first on a tie. What is less likely than 2⁻³¹ times the likeliest token
//! weighs nothing; rounding moves a probability by at most as much.

use std::f32::consts::{LN_2, LOG2_E};

/// The weight of the likeliest token.
const LARGEST_WEIGHT: u32 = 1 << WEIGHT_BITS;
const WEIGHT_BITS: i32 = 30;
/// Added to an f32 and taken away again, rounds it to an integer.
const ROUNDS: f32 = 1.5 * (1 << 23) as f32;
/// Below this 2ˣ is nothing beside a weight, and above it all that follows is a normal number.
const LEAST_EXPONENT: f32 = -64.0;
/// 2ˣ = 1 + x (c₀ + x (c₁ + …)) for |x| ≤ ½, off by 1.2 · 10⁻⁷ at most: the series of eˣ, in powers of ln 2.
const EXP2: [f32; 6] = {
    let mut coefficients = [LN_2; 6];
    let mut order = 1;
    while order < 6 {
        coefficients[order] = coefficients[order - 1] * LN_2 / (order + 1) as f32;
        order += 1;
    }
    coefficients
};
/// Weights that are added up before the sum is looked at.
const CHUNK: usize = 64;
/// Heavy tokens are looked for among those of 2⁻⁶ of the largest weight, then of 2⁻¹² …
const STEP_BITS: u32 = 6;

/// What a logit's distance to the largest is multiplied by: log2(e) / temperature.
pub fn weight_scale(temperature: f32) -> f32 {
    (LOG2_E / temperature).min(f32::MAX)
}

/// 2^((logit − max) · scale) in 2⁻³⁰ths, rounded. Every operation is one of f32 and rounds as IEEE 754 says; none is fused.
#[inline]
fn weight(logit: f32, max: f32, scale: f32) -> u32 {
    let x = ((logit - max) * scale).max(LEAST_EXPONENT);
    let shifted = x + ROUNDS;
    let part = x - (shifted - ROUNDS);
    let series = EXP2.iter().rev().fold(0.0, |sum, coefficient| (sum + coefficient) * part);
    // The rounded exponent is in the lowest bits of what it was rounded with; from there it goes to where f32 has it.
    let exponent = shifted.to_bits().wrapping_sub(ROUNDS.to_bits()).wrapping_add(WEIGHT_BITS as u32 + 127);
    ((1.0 + series) * f32::from_bits(exponent << 23) + 0.5) as i32 as u32
}

/// The weights of a row of logits of which `max` is the largest.
pub(super) fn weights(logits: &[f32], max: f32, scale: f32) -> Vec<u32> {
    logits.iter().map(|&logit| weight(logit, max, scale)).collect()
}

/// The sum of weights, of which there are fewer than 2²³: it is below 2⁵³, so f64 has it exactly.
pub(super) fn total(weights: impl IntoIterator<Item = u32>) -> u64 {
    weights.into_iter().map(u64::from).sum()
}

/// The least weight that `min_p` keeps, at least 1.
pub fn least_weight(min_p: f32) -> u32 {
    ((min_p * LARGEST_WEIGHT as f32).ceil() as u32).max(1)
}

/// A token and its weight.
pub(super) type Weighted = (u32, u32);

/// The first tokens by rank, down to the one with which their number and weight are `enough`; all that weigh anything
/// if they never are.
pub(super) fn heaviest(weights: &[u32], enough: impl Fn(usize, u64) -> bool) -> Vec<Weighted> {
    let mut heavy = Vec::new();
    for bits in (0..=WEIGHT_BITS as u32).step_by(STEP_BITS as usize).skip(1) {
        let least = LARGEST_WEIGHT >> bits;
        heavy.clear();
        heavy.extend((0..).zip(weights.iter().copied()).filter(|&(_, weight)| weight >= least));
        let sum = total(heavy.iter().map(|&(_, weight)| weight));
        if enough(heavy.len(), sum) {
            break;
        }
    }
    heavy.sort_unstable_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
    truncate(&mut heavy, enough);
    heavy
}

/// Keeps the tokens, which are in the order of their ranks, down to the one with which they are `enough`.
pub(super) fn truncate(ranked: &mut Vec<Weighted>, enough: impl Fn(usize, u64) -> bool) {
    let mut sum = 0;
    let reaches = |(index, &(_, weight)): (usize, &Weighted)| {
        sum += u64::from(weight);
        enough(index + 1, sum)
    };
    if let Some(last) = ranked.iter().enumerate().position(reaches) {
        ranked.truncate(last + 1);
    }
}

/// The token at which the weights of those of at least `least_weight`, added up by rising id, exceed `uniform` of their
/// sum.
pub(super) fn draw(weights: &[u32], least_weight: u32, uniform: f64) -> u32 {
    let kept = |weight: u32| if weight >= least_weight { weight } else { 0 };
    let sums: Vec<u64> =
        weights.chunks(CHUNK).map(|chunk| total(chunk.iter().map(|&weight| kept(weight)))).collect();
    let total: u64 = sums.iter().sum();
    // The product may round up to the whole sum.
    let mut target = ((uniform * total as f64) as u64).min(total - 1);
    let passes = |sum: u64, target: &mut u64| {
        let found = *target < sum;
        if !found {
            *target -= sum;
        }
        found
    };
    let chunk = sums.iter().position(|&sum| passes(sum, &mut target)).expect("the likeliest token is kept");
    let rest = &weights[chunk * CHUNK..];
    let token = rest.iter().position(|&weight| passes(u64::from(kept(weight)), &mut target));
    (chunk * CHUNK + token.expect("its chunk's sum exceeds the target")) as u32
}

/// The same among some tokens, in any order.
pub(super) fn draw_of(mut tokens: Vec<Weighted>, uniform: f64) -> u32 {
    tokens.sort_unstable();
    let (ids, weights): (Vec<_>, Vec<_>) = tokens.into_iter().unzip();
    ids[draw(&weights, 1, uniform) as usize]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_is_the_exponential_to_a_few_millionths() {
        assert_eq!(weight(3.5, 3.5, LOG2_E), LARGEST_WEIGHT);
        assert_eq!(weight(f32::NEG_INFINITY, 3.5, LOG2_E), 0);
        assert_eq!(weight(3.4, 3.5, weight_scale(f32::MIN_POSITIVE / 1e6)), 0);
        for step in 0..4000 {
            let logit = -step as f32 / 200.0;
            let (got, exact) =
                (weight(logit, 0.0, LOG2_E), f64::from(logit).exp() * f64::from(LARGEST_WEIGHT));
            assert!((f64::from(got) - exact).abs() <= 0.5 + 3e-6 * exact, "{logit}: {got} for {exact}");
        }
    }

    #[test]
    fn weights_are_specified_to_the_bit() {
        let hash = (0..20_000).fold(0u64, |hash, step| {
            let weight = weight(-step as f32 / 700.0, 0.0, LOG2_E / 0.7);
            super::super::mix64(hash ^ u64::from(weight))
        });
        assert_eq!(hash, 0x013d_0f7d_cb79_746d, "{hash:#x}");
    }

    #[test]
    fn the_heaviest_are_ranked_by_weight_and_id() {
        let weights = [5, LARGEST_WEIGHT, 7, 0, 7, LARGEST_WEIGHT >> 3];
        assert_eq!(
            heaviest(&weights, |count, _| count >= 3),
            [(1, LARGEST_WEIGHT), (5, LARGEST_WEIGHT >> 3), (2, 7)]
        );
        let wanted = u64::from(LARGEST_WEIGHT + (LARGEST_WEIGHT >> 3) + 8);
        let ids = |enough: &dyn Fn(usize, u64) -> bool| -> Vec<u32> {
            heaviest(&weights, enough).into_iter().map(|(token, _)| token).collect()
        };
        assert_eq!(ids(&|_, sum| sum >= wanted), [1, 5, 2, 4]);
        assert_eq!(ids(&|_, _| false), [1, 5, 2, 4, 0]);
    }

    #[test]
    fn a_draw_walks_the_ids_and_skips_what_weighs_too_little() {
        let weights: Vec<u32> = (0..200).map(|id| if id % 2 == 0 { 10 } else { 3 }).collect();
        assert_eq!([0.0, 0.0105, 0.999].map(|uniform| draw(&weights, 10, uniform)), [0, 2, 198]);
        assert_eq!(draw(&weights, 1, 10.5 / 1300.0), 1);
        assert_eq!(draw_of(vec![(9, 1), (4, 3)], 0.74), 4);
        assert_eq!(draw_of(vec![(9, 1), (4, 3)], 0.76), 9);
    }
}
