//! From 32 weights to a scale and 32 small integers.

use half::f16;

use super::GROUP;
use crate::numbers::nearest;

/// Scales tried for a group of 4-bit weights, as the value that its largest weight would get.
const Q4_LARGEST: [f32; 9] = [-8.0, -9.0, -8.6, -8.3, -7.7, -7.4, -7.0, -6.6, -6.2];
/// Lanes of a sum, so that it becomes vector code and has one order.
const LANES: usize = 16;

/// A quantised group: weight `i` is about `scale · values[i]`.
pub(super) struct Quantised {
    pub(super) scale: f16,
    pub(super) values: [i32; GROUP],
}

/// Quantises to -127..=127, the largest weight to one of the ends.
#[inline(always)]
pub(super) fn q8(weights: &[f32; GROUP]) -> Quantised {
    let scale = f16::from_f32(largest_magnitude(weights) / 127.0);
    Quantised { scale, values: rounded(weights, inverse(scale.to_f32()), -127, 127) }
}

/// Quantises to -8..=7 with the scale, of those tried, that leaves the least squared error.
///
/// For given integers `q` the best scale is `Σ w·q / Σ q²`, so each attempt rounds with a first guess and is
/// judged at that scale.
#[inline(always)]
pub(super) fn q4(weights: &[f32; GROUP]) -> Quantised {
    let largest = largest(weights);
    let mut best = q4_attempt(weights, Q4_LARGEST[0] * inverse(largest));
    for value in &Q4_LARGEST[1..] {
        let tried = q4_attempt(weights, value * inverse(largest));
        if tried.0 < best.0 {
            best = tried;
        }
    }
    best.1
}

/// The squared error of the integers nearest to `weights · factor` at their best scale, and both.
#[inline(always)]
fn q4_attempt(weights: &[f32; GROUP], factor: f32) -> (f32, Quantised) {
    let values = rounded(weights, factor, -8, 7);
    let products = sum(
        #[inline(always)]
        |i| weights[i] * values[i] as f32,
    );
    let squares = sum(
        #[inline(always)]
        |i| (values[i] * values[i]) as f32,
    );
    let scale = f16::from_f32(products * inverse(squares));
    let wide_scale = scale.to_f32();
    let error = sum(
        #[inline(always)]
        |i| {
            let difference = weights[i] - wide_scale * values[i] as f32;
            difference * difference
        },
    );
    (error, Quantised { scale, values })
}

/// The first weight of the largest magnitude.
#[inline(always)]
fn largest(weights: &[f32; GROUP]) -> f32 {
    let magnitude = largest_magnitude(weights).to_bits();
    weights.iter().copied().find(|w| w.abs().to_bits() == magnitude).unwrap_or_default()
}

/// The largest magnitude. NaN or infinite if any weight is, which makes the scale so too, and with it every product: a
/// broken checkpoint must not look like a sound one. Magnitudes are ordered like their bits.
#[inline(always)]
fn largest_magnitude(weights: &[f32; GROUP]) -> f32 {
    f32::from_bits(weights.iter().map(|w| w.abs().to_bits()).fold(0, u32::max))
}

/// `1 / x`, and 0 for 0.
#[inline(always)]
fn inverse(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { 1.0 / x }
}

/// `weights · factor` rounded to the nearest integer, ties to even.
#[inline(always)]
fn rounded(weights: &[f32; GROUP], factor: f32, least: i32, most: i32) -> [i32; GROUP] {
    // A loop, because `map` is a function of its own, without the instruction set that this is inlined into.
    let mut values = [0; GROUP];
    for (value, w) in values.iter_mut().zip(weights) {
        *value = nearest(w * factor).clamp(least, most);
    }
    values
}

#[inline(always)]
fn sum(term: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    for first in (0..GROUP).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += term(first + lane);
        }
    }
    crate::numbers::sum_lanes(&mut lanes)
}

#[cfg(test)]
mod tests {
    use backend::dummy_value;

    use super::*;

    /// Mean squared errors of a quantiser and of a rival on normal weights, as shares of the variance.
    fn errors(
        ours: impl Fn(&[f32; GROUP]) -> Quantised,
        rival: impl Fn(&[f32; GROUP]) -> Quantised,
    ) -> [f64; 2] {
        let mut sums = [0.0; 2];
        let groups = 4000;
        for group in 0..groups {
            let weights: [f32; GROUP] =
                std::array::from_fn(|i| dummy_value(1, group * GROUP as u64 + i as u64, 0.0, 1.0).to_f32());
            for (sum, quantised) in sums.iter_mut().zip([ours(&weights), rival(&weights)]) {
                let scale = f64::from(quantised.scale.to_f32());
                let errors = weights.iter().zip(quantised.values);
                *sum += errors.map(|(&w, q)| (f64::from(w) - scale * f64::from(q)).powi(2)).sum::<f64>();
            }
        }
        sums.map(|sum| sum / (groups * GROUP as u64) as f64)
    }

    /// GGML's Q8_0: the scale is rounded to f16 after it has served to round the weights.
    fn ggml_q8_0(weights: &[f32; GROUP]) -> Quantised {
        let scale = largest_magnitude(weights) / 127.0;
        let values = weights.map(|w| (w * inverse(scale)).round() as i32);
        Quantised { scale: f16::from_f32(scale), values }
    }

    /// GGML's Q4_0: the largest weight becomes -8.
    fn ggml_q4_0(weights: &[f32; GROUP]) -> Quantised {
        let scale = largest(weights) / -8.0;
        let values = weights.map(|w| (w * inverse(scale) + 8.5).min(15.0) as i32 - 8);
        Quantised { scale: f16::from_f32(scale), values }
    }

    #[test]
    fn errors_are_below_those_of_the_usual_formats_of_the_same_size() {
        let [ours, theirs] = errors(q8, ggml_q8_0);
        println!("q8: {ours:.3e} of the variance, Q8_0: {theirs:.3e}");
        assert!(ours <= theirs);
        let [ours, theirs] = errors(q4, ggml_q4_0);
        println!("q4: {ours:.3e} of the variance, Q4_0: {theirs:.3e}");
        assert!(ours <= theirs);
    }

    #[test]
    fn zeros_stay_zeros_and_what_is_not_finite_stays_so() {
        for quantise in [q8, q4] {
            let zeros = quantise(&[0.0; GROUP]);
            assert_eq!((zeros.scale.to_f32(), zeros.values), (0.0, [0; GROUP]));
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut weights = [1.0; GROUP];
                weights[7] = bad;
                assert!(!quantise(&weights).scale.is_finite(), "{bad}");
            }
        }
    }
}
