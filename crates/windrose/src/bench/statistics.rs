//! What is said of many numbers: the median with the extremes of a few repetitions, percentiles of many requests.

use serde::Serialize;

/// The middle of a few repetitions, and how far they lie apart.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

/// A distribution in four numbers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Distribution {
    pub(super) mean: f64,
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
}

impl Spread {
    /// # Panics
    /// If there are no values.
    pub(super) fn new(values: impl IntoIterator<Item = f64>) -> Self {
        let values = sorted(values);
        let ends = values.first().zip(values.last());
        let (&min, &max) = ends.expect("a spread is of at least one value");
        Self { median: percentile(&values, 50.0), min, max }
    }
}

impl Distribution {
    /// `None` of no values.
    pub(super) fn new(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let values = sorted(values);
        if values.is_empty() {
            return None;
        }
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let [p50, p90, p99] = [50.0, 90.0, 99.0].map(|percent| percentile(&values, percent));
        Some(Self { mean, p50, p90, p99 })
    }
}

fn sorted(values: impl IntoIterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values
}

/// The value below which `percent` of the sorted values lie, interpolated between neighbours as numpy does.
fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let rank = percent / 100.0 * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[rank.floor() as usize], sorted[rank.ceil() as usize]);
    below + (above - below) * rank.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(values: &[f64], percent: f64, expected: f64) {
        let got = percentile(&sorted(values.iter().copied()), percent);
        assert!((got - expected).abs() < 1e-12, "{percent}% of {values:?} is {got}, expected {expected}");
    }

    #[test]
    fn percentiles_are_those_of_numpy() {
        check(&[7.0], 99.0, 7.0);
        check(&[4.0, 1.0, 3.0, 2.0], 50.0, 2.5);
        check(&[4.0, 1.0, 3.0, 2.0], 90.0, 3.7);
        check(&[1.0, 2.0, 3.0, 4.0, 5.0], 50.0, 3.0);
        check(&[1.0, 2.0, 3.0, 4.0, 5.0], 0.0, 1.0);
        check(&[1.0, 2.0, 3.0, 4.0, 5.0], 100.0, 5.0);
    }

    #[test]
    fn a_spread_has_the_median_between_its_ends() {
        assert_eq!(Spread::new([3.0, 1.0, 2.0]), Spread { median: 2.0, min: 1.0, max: 3.0 });
        assert_eq!(Spread::new([5.0]), Spread { median: 5.0, min: 5.0, max: 5.0 });
    }

    #[test]
    fn nothing_has_no_distribution() {
        assert_eq!(Distribution::new([]), None);
        let expected = Distribution { mean: 2.0, p50: 2.0, p90: 2.0, p99: 2.0 };
        assert_eq!(Distribution::new([2.0, 2.0]), Some(expected));
    }
}
