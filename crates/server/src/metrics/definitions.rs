//! Every metric by name. Dashboards and alerts of others depend on this list: add to it, and change nothing.

/// One metric of the contract.
pub(super) struct Definition {
    pub(super) name: &'static str,
    kind: &'static str,
    pub(super) help: &'static str,
    /// vLLM's name for the same.
    pub(super) alias: Option<&'static str>,
}

const fn define(
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    alias: Option<&'static str>,
) -> Definition {
    Definition { name, kind, help, alias }
}

/// All metrics, by rising distance from the client.
pub(super) const DEFINITIONS: &[Definition] = &[
    define(
        "windrose_http_requests_total",
        "counter",
        "HTTP requests answered, by route, method and status",
        None,
    ),
    define(
        "windrose_requests_accepted_total",
        "counter",
        "choices accepted for generation (n counts n)",
        None,
    ),
    define(
        "windrose_requests_finished_total",
        "counter",
        "choices ended, by reason: stop, length, cancelled, deadline, shutdown, error",
        Some("vllm:request_success_total"),
    ),
    define(
        "windrose_time_to_first_token_seconds",
        "histogram",
        "time from a request's arrival to its first token",
        Some("vllm:time_to_first_token_seconds"),
    ),
    define(
        "windrose_inter_token_latency_seconds",
        "histogram",
        "time between two tokens of a choice",
        Some("vllm:inter_token_latency_seconds"),
    ),
    define(
        "windrose_request_duration_seconds",
        "histogram",
        "time from a request's arrival to the end of a choice",
        Some("vllm:e2e_request_latency_seconds"),
    ),
    define(
        "windrose_request_queue_seconds",
        "histogram",
        "time that a choice waited for its first step",
        Some("vllm:request_queue_time_seconds"),
    ),
    define(
        "windrose_request_prompt_tokens",
        "histogram",
        "prompt tokens of a choice",
        Some("vllm:request_prompt_tokens"),
    ),
    define(
        "windrose_request_generation_tokens",
        "histogram",
        "tokens generated for a choice",
        Some("vllm:request_generation_tokens"),
    ),
    define("windrose_requests_waiting", "gauge", "choices that wait", Some("vllm:num_requests_waiting")),
    define(
        "windrose_requests_running",
        "gauge",
        "choices that take part in steps",
        Some("vllm:num_requests_running"),
    ),
    define("windrose_queued_tokens", "gauge", "tokens of the choices that wait", None),
    define(
        "windrose_kv_cache_usage_ratio",
        "gauge",
        "share of cache blocks held, 0 to 1",
        Some("vllm:kv_cache_usage_perc"),
    ),
    define(
        "windrose_kv_blocks",
        "gauge",
        "cache blocks by state: held, cached (free, with a prefix), empty",
        None,
    ),
    define("vllm:cache_config_info", "gauge", "always 1; labels give block size and number of blocks", None),
    define(
        "windrose_prompt_tokens_total",
        "counter",
        "prompt tokens of requests begun",
        Some("vllm:prompt_tokens_total"),
    ),
    define(
        "windrose_generation_tokens_total",
        "counter",
        "tokens generated, whatever the end",
        Some("vllm:generation_tokens_total"),
    ),
    define(
        "windrose_prefix_cache_queries_total",
        "counter",
        "prompt tokens looked up in the prefix cache",
        Some("vllm:prefix_cache_queries_total"),
    ),
    define(
        "windrose_prefix_cache_hits_total",
        "counter",
        "prompt tokens found in the prefix cache",
        Some("vllm:prefix_cache_hits_total"),
    ),
    define(
        "windrose_preemptions_total",
        "counter",
        "times that a choice lost its blocks to another",
        Some("vllm:num_preemptions_total"),
    ),
    define("windrose_engine_steps_total", "counter", "steps of the engine", None),
    define(
        "windrose_compute_seconds_total",
        "counter",
        "seconds that the device computed steps, by its own clock; its rate is the share of time that it was busy",
        None,
    ),
    define("windrose_engine_up", "gauge", "1 while the engine runs", None),
    define(
        "windrose_sequences_finished_total",
        "counter",
        "sequences ended in the engine, by reason; a stop string ends one as cancelled",
        None,
    ),
    define(
        "windrose_expert_tokens_total",
        "counter",
        "tokens computed by each expert, by layer and expert; in the last layer mostly those whose logits were wanted",
        None,
    ),
    define(
        "windrose_expert_gate_weight_total",
        "counter",
        "sum of the gate weights of those tokens, by layer and expert",
        None,
    ),
    define(
        "windrose_expert_tile_rows_total",
        "counter",
        "tokens that the tiles of the experts' products had room for, by layer",
        None,
    ),
    define("windrose_routing_steps_total", "counter", "steps in which a layer routed tokens, by layer", None),
    define(
        "windrose_routing_distinct_experts_total",
        "counter",
        "experts that had tokens in a step, summed over steps, by layer",
        None,
    ),
    define(
        "windrose_routing_imbalance_total",
        "counter",
        "tokens of a step's busiest expert over the mean of all experts, summed over steps, by layer",
        None,
    ),
    define(
        "windrose_routing_entropy_bits_total",
        "counter",
        "entropy of the experts' shares of a step's tokens, summed over steps, by layer",
        None,
    ),
];

/// Name, type and meaning of every metric, vLLM's names included.
pub fn metric_names() -> Vec<(&'static str, &'static str, &'static str)> {
    let named = |name, definition: &Definition| (name, definition.kind, definition.help);
    let ours = DEFINITIONS.iter().map(|definition| named(definition.name, definition));
    let aliases = DEFINITIONS.iter().filter_map(|definition| Some(named(definition.alias?, definition)));
    ours.chain(aliases).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_is_defined_twice() {
        let mut names: Vec<_> = metric_names().into_iter().map(|(name, ..)| name).collect();
        let num_names = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), num_names);
    }
}
