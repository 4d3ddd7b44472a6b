//! When requests are sent.

use std::time::Duration;

use model::mix64;

/// When each of `num_requests` is due, from the start: a seeded Poisson process of `rate` per second, or all at once
/// if that is infinite.
pub(super) fn arrivals(num_requests: usize, rate: f64, seed: u64) -> Vec<Duration> {
    let mut now = 0.0;
    let next = |index: usize| {
        // The time between two events of a Poisson process is exponential: -ln(u) / rate, with u in (0, 1].
        now -= uniform(mix64(seed) ^ index as u64).ln() / rate;
        Duration::from_secs_f64(now)
    };
    (0..num_requests).map(next).collect()
}

/// A number in (0, 1], of 53 bits.
fn uniform(key: u64) -> f64 {
    ((mix64(key) >> 11) + 1) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_exponential_and_seeded() {
        let (num_requests, rate) = (20_000, 4.0);
        let times = arrivals(num_requests, rate, 1);
        assert!(times.is_sorted());
        assert_eq!(times, arrivals(num_requests, rate, 1));
        assert_ne!(times, arrivals(num_requests, rate, 2));

        let gaps: Vec<f64> = times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((mean * rate - 1.0).abs() < 0.05, "mean gap {mean}");
        assert!((variance.sqrt() / mean - 1.0).abs() < 0.05, "an exponential's deviation is its mean");
    }

    #[test]
    fn an_infinite_rate_is_all_at_once() {
        assert!(arrivals(10, f64::INFINITY, 0).iter().all(Duration::is_zero));
    }
}
