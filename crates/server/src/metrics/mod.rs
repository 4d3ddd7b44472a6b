//! What Prometheus sees. Names are a contract: `definitions.rs` lists them all, a test freezes them, and the
//! README's table is compared with them.
//!
//! Our names begin with `windrose_`. Where vLLM has a series of the same meaning, it is exposed a second
//! time under vLLM's name, so that dashboards, KEDA recipes and the Kubernetes Gateway's inference extension
//! work unchanged. Every series carries `model_name` and `engine`.
//!
//! The engine's numbers are copied from its [`Stats`] when Prometheus asks; what only the server knows
//! (latencies, HTTP) is observed as it happens.

mod definitions;
mod engine_series;
mod routing_series;

use std::sync::{Mutex, PoisonError};

use engine::{EngineHandle, FinishReason, Stats};
use prometheus::core::Collector;
use prometheus::{
    Counter, CounterVec, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts,
    Registry, TextEncoder, exponential_buckets,
};

pub use definitions::metric_names;

use definitions::DEFINITIONS;
use engine_series::EngineSeries;

/// The series of one server.
pub(crate) struct Metrics {
    registry: Registry,
    /// Held while a scrape copies the engine's numbers, so that two scrapes do not mix.
    engine: Mutex<EngineSeries>,
    pub(crate) http_requests: IntCounterVec,
    pub(crate) requests_accepted: IntCounter,
    pub(crate) requests_finished: IntCounterVec,
    pub(crate) first_token_seconds: Histogram,
    pub(crate) inter_token_seconds: Histogram,
    pub(crate) request_seconds: Histogram,
    pub(crate) queue_seconds: Histogram,
    pub(crate) request_prompt_tokens: Histogram,
    pub(crate) request_generation_tokens: Histogram,
}

impl Metrics {
    pub(crate) fn new(model_name: &str, engine: &EngineHandle) -> prometheus::Result<Self> {
        let labels =
            [("model_name", model_name), ("engine", "0")].map(|(name, value)| (name.into(), value.into()));
        let new = Registration { registry: Registry::new_custom(None, Some(labels.into()))? };
        // Prometheus' advice: a counter exists from the start, so that its first increase is seen.
        let requests_finished = new.counters("windrose_requests_finished_total", &["finished_reason"])?;
        FinishReason::ALL
            .iter()
            .for_each(|reason| requests_finished.with_label_values(&[reason.as_str()]).reset());
        Ok(Self {
            http_requests: new.counters("windrose_http_requests_total", &["route", "method", "status"])?,
            requests_accepted: new.counter("windrose_requests_accepted_total")?,
            requests_finished,
            first_token_seconds: new
                .histogram("windrose_time_to_first_token_seconds", seconds_from(0.001)?)?,
            inter_token_seconds: new
                .histogram("windrose_inter_token_latency_seconds", seconds_from(0.0001)?)?,
            request_seconds: new.histogram("windrose_request_duration_seconds", seconds_from(0.001)?)?,
            queue_seconds: new.histogram("windrose_request_queue_seconds", seconds_from(0.001)?)?,
            request_prompt_tokens: new.histogram("windrose_request_prompt_tokens", token_buckets()?)?,
            request_generation_tokens: new
                .histogram("windrose_request_generation_tokens", token_buckets()?)?,
            engine: Mutex::new(EngineSeries::new(&new, engine)?),
            registry: new.registry,
        })
    }

    /// The page that Prometheus reads.
    pub(crate) fn render(&self, stats: &Stats) -> prometheus::Result<String> {
        let series = self.engine.lock().unwrap_or_else(PoisonError::into_inner);
        series.copy(stats);
        let mut families = self.registry.gather();
        drop(series);
        for definition in DEFINITIONS {
            let family = families.iter().find(|family| family.name() == definition.name);
            if let (Some(alias), Some(family)) = (definition.alias, family) {
                let mut family = family.clone();
                family.set_name(alias.to_owned());
                families.push(family);
            }
        }
        TextEncoder::new().encode_to_string(&families)
    }
}

/// 1, 2.5, 5, 10, ... times `smallest`, up to about five minutes.
fn seconds_from(smallest: f64) -> prometheus::Result<Vec<f64>> {
    let decades = exponential_buckets(smallest, 10.0, 8)?.into_iter();
    let steps = decades.flat_map(|decade| [1.0, 2.5, 5.0].map(|step| decade * step));
    Ok(steps.filter(|&bound| bound <= 500.0).collect())
}

/// Powers of two up to the longest contexts.
fn token_buckets() -> prometheus::Result<Vec<f64>> {
    exponential_buckets(1.0, 2.0, 18)
}

/// A registry, and the names that may be put in it.
struct Registration {
    registry: Registry,
}

impl Registration {
    fn options(name: &str) -> Opts {
        let definition = DEFINITIONS.iter().find(|definition| definition.name == name);
        Opts::new(name, definition.expect("every metric is defined").help)
    }

    fn add<C: Collector + Clone + 'static>(&self, collector: C) -> prometheus::Result<C> {
        self.registry.register(Box::new(collector.clone()))?;
        Ok(collector)
    }

    fn counter(&self, name: &str) -> prometheus::Result<IntCounter> {
        self.add(IntCounter::with_opts(Self::options(name))?)
    }

    fn counters(&self, name: &str, labels: &[&str]) -> prometheus::Result<IntCounterVec> {
        self.add(IntCounterVec::new(Self::options(name), labels)?)
    }

    fn real_counter(&self, name: &str) -> prometheus::Result<Counter> {
        self.add(Counter::with_opts(Self::options(name))?)
    }

    fn real_counters(&self, name: &str, labels: &[&str]) -> prometheus::Result<CounterVec> {
        self.add(CounterVec::new(Self::options(name), labels)?)
    }

    fn gauge(&self, name: &str) -> prometheus::Result<Gauge> {
        self.add(Gauge::with_opts(Self::options(name))?)
    }

    fn gauges(&self, name: &str, labels: &[&str]) -> prometheus::Result<GaugeVec> {
        self.add(GaugeVec::new(Self::options(name), labels)?)
    }

    fn histogram(&self, name: &str, buckets: Vec<f64>) -> prometheus::Result<Histogram> {
        self.add(Histogram::with_opts(HistogramOpts::from(Self::options(name)).buckets(buckets))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_fine_and_cover_minutes() {
        let buckets = seconds_from(0.0001).unwrap();
        assert_eq!(buckets[0], 0.0001);
        assert!(*buckets.last().unwrap() >= 250.0 && buckets.is_sorted(), "{buckets:?}");
    }
}
