//! Conversions and functions of single numbers, written without branches so that loops over them become
//! vector code for whatever instruction set they are inlined into.
//!
//! None of them uses a fused multiply-add, so they give the same bits on every instruction set.

use bytemuck::Pod;
use half::bf16;

/// An element of an activation tensor.
pub(crate) trait Element: Pod + Send + Sync {
    /// Rounds to the element's type.
    fn from_f32(x: f32) -> Self;
    /// Widens to f32.
    fn to_f32(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    /// Rounds to nearest, ties to even; a NaN stays a NaN.
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
        let quieted = bits | 0x0040_0000;
        Self::from_bits(((if x.is_nan() { quieted } else { rounded }) >> 16) as u16)
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// Rounds a number of magnitude below 2²² to the nearest integer, ties to even; others become any integer.
#[inline(always)]
pub(crate) fn nearest(x: f32) -> i32 {
    (x + ROUND).to_bits().wrapping_sub(ROUND.to_bits()).cast_signed()
}

/// The same, of which it keeps the low 8 bits.
#[inline(always)]
pub(crate) fn nearest_i8(x: f32) -> i8 {
    (x + ROUND).to_bits() as i8
}

/// The scale of 8-bit integers whose largest stands for `largest`, and the factor that makes numbers such integers. A
/// largest that is not finite makes the scale NaN, so that it reaches whatever is computed.
#[inline(always)]
pub(crate) fn scale_and_factor(largest: f32) -> (f32, f32) {
    let scale = if largest.is_finite() { largest / 127.0 } else { f32::NAN };
    (scale, if largest > 0.0 { 127.0 / largest } else { 0.0 })
}

/// Adding 1.5 · 2²³ leaves the nearest integer in the low bits of the mantissa.
const ROUND: f32 = 12_582_912.0;

/// `e^x` within 2 units in the last place between -87 and 88, where it saturates; a NaN stays a NaN.
///
/// With `n = round(x / ln 2)` and `r = x - n ln 2`, it is `2^n e^r`, and a polynomial does for `e^r` on
/// `|r| <= ln 2 / 2`. Source: `expf` of the Cephes library.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;

    // Comparisons that are false for a NaN let it through.
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5e-1;
    let power_of_two = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    (p * r * r + r + 1.0) * power_of_two
}

/// `x · sigmoid(x)`.
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// Sums lanes as a balanced tree.
#[inline(always)]
pub(crate) fn sum_lanes(lanes: &mut [f32]) -> f32 {
    fold_lanes(lanes, |lower, upper| lower + upper)
}

/// Folds lanes as a balanced tree: the upper half into the lower until one is left.
#[inline(always)]
pub(crate) fn fold_lanes(lanes: &mut [f32], fold: impl Fn(f32, f32) -> f32) -> f32 {
    assert!(lanes.len().is_power_of_two());
    let mut width = lanes.len() / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = fold(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for i in -87_000..88_000 {
            let x = i as f32 / 1000.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 2.0 * f64::from(f32::EPSILON), "exp({x}) is off by {error:e}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(f32::NEG_INFINITY) < 2e-38 && exp(f32::INFINITY) > 1e38);
    }

    #[test]
    fn the_nearest_integer_is_even_on_ties() {
        for i in -1270..=1270 {
            let x = i as f32 / 10.0;
            assert_eq!(nearest_i8(x), x.round_ties_even() as i8, "{x}");
        }
        assert_eq!([0.5, 1.5, -2.5, 126.5].map(nearest_i8), [0, 2, -2, 126]);
    }

    #[test]
    fn rounding_to_bf16_is_that_of_half() {
        for i in 0..1_000_000u32 {
            let x = f32::from_bits(i.wrapping_mul(0x9e37_79b9));
            let (got, expected) = (<bf16 as Element>::from_f32(x), bf16::from_f32(x));
            assert!(got == expected || (got.is_nan() && expected.is_nan()), "{x}");
            assert_eq!(Element::to_f32(expected).to_bits(), expected.to_f32().to_bits(), "{x}");
        }
    }
}
