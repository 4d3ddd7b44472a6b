//! The series that are copied from the engine's [`Stats`] whenever Prometheus asks.

use engine::{EngineHandle, FinishReason, Stats};
use prometheus::{Counter, Gauge, GaugeVec, IntCounter, IntCounterVec};

use super::Registration;
use super::routing_series::{RoutingSeries, raise};

/// A series, and how its value is read.
type Copied<Series, Value> = (Series, fn(&Stats) -> Value);

/// The series that are copied from the engine's [`Stats`].
pub(super) struct EngineSeries {
    gauges: Vec<Copied<Gauge, f64>>,
    counters: Vec<Copied<IntCounter, u64>>,
    compute_seconds: Counter,
    blocks: GaugeVec,
    finished: IntCounterVec,
    routing: RoutingSeries,
}

impl EngineSeries {
    pub(super) fn new(new: &Registration, engine: &EngineHandle) -> prometheus::Result<Self> {
        let limits = engine.limits();
        let info = new.gauges("vllm:cache_config_info", &["block_size", "num_gpu_blocks"])?;
        let num_blocks = engine.stats().num_blocks;
        info.with_label_values(&[limits.block_size.to_string(), num_blocks.to_string()]).set(1.0);
        Ok(Self {
            gauges: vec![
                (new.gauge("windrose_requests_waiting")?, |stats| stats.num_waiting as f64),
                (new.gauge("windrose_requests_running")?, |stats| stats.num_running as f64),
                (new.gauge("windrose_queued_tokens")?, |stats| stats.queued_tokens as f64),
                (new.gauge("windrose_kv_cache_usage_ratio")?, |stats| {
                    num_held_blocks(stats) as f64 / stats.num_blocks.max(1) as f64
                }),
                (new.gauge("windrose_engine_up")?, |stats| f64::from(u8::from(!stats.is_stopped))),
            ],
            counters: vec![
                (new.counter("windrose_prompt_tokens_total")?, |stats| stats.prompt_tokens),
                (new.counter("windrose_generation_tokens_total")?, |stats| stats.generation_tokens),
                (new.counter("windrose_prefix_cache_queries_total")?, |stats| stats.prefix_cache_queries),
                (new.counter("windrose_prefix_cache_hits_total")?, |stats| stats.prefix_cache_hits),
                (new.counter("windrose_preemptions_total")?, |stats| stats.num_preemptions),
                (new.counter("windrose_engine_steps_total")?, |stats| stats.num_steps),
            ],
            compute_seconds: new.real_counter("windrose_compute_seconds_total")?,
            blocks: new.gauges("windrose_kv_blocks", &["state"])?,
            finished: new.counters("windrose_sequences_finished_total", &["finished_reason"])?,
            routing: RoutingSeries::new(new, limits)?,
        })
    }

    pub(super) fn copy(&self, stats: &Stats) {
        self.gauges.iter().for_each(|(gauge, read)| gauge.set(read(stats)));
        self.counters.iter().for_each(|(counter, read)| raise(counter, read(stats)));
        raise(&self.compute_seconds, stats.computed_for.as_secs_f64());
        let empty = stats.num_free_blocks.saturating_sub(stats.num_cached_blocks);
        let by_state =
            [("held", num_held_blocks(stats)), ("cached", stats.num_cached_blocks), ("empty", empty)];
        by_state.iter().for_each(|(state, num)| self.blocks.with_label_values(&[*state]).set(*num as f64));
        for reason in FinishReason::ALL {
            raise(&self.finished.with_label_values(&[reason.as_str()]), stats.finished[reason.index()]);
        }
        self.routing.copy(&stats.routing);
    }
}

fn num_held_blocks(stats: &Stats) -> usize {
    stats.num_blocks.saturating_sub(stats.num_free_blocks)
}
