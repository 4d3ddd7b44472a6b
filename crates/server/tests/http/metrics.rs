//! Metrics: the names are frozen, and everything adds up.

use std::collections::BTreeMap;

use serde_json::json;
use server::metric_names;

use crate::support::{Server, ids, say, scripted, server};

/// The contract. A name may be added; none may change or go.
const GOLDEN: [(&str, &str); 44] = [
    ("vllm:cache_config_info", "gauge"),
    ("vllm:e2e_request_latency_seconds", "histogram"),
    ("vllm:generation_tokens_total", "counter"),
    ("vllm:inter_token_latency_seconds", "histogram"),
    ("vllm:kv_cache_usage_perc", "gauge"),
    ("vllm:num_preemptions_total", "counter"),
    ("vllm:num_requests_running", "gauge"),
    ("vllm:num_requests_waiting", "gauge"),
    ("vllm:prefix_cache_hits_total", "counter"),
    ("vllm:prefix_cache_queries_total", "counter"),
    ("vllm:prompt_tokens_total", "counter"),
    ("vllm:request_generation_tokens", "histogram"),
    ("vllm:request_prompt_tokens", "histogram"),
    ("vllm:request_queue_time_seconds", "histogram"),
    ("vllm:request_success_total", "counter"),
    ("vllm:time_to_first_token_seconds", "histogram"),
    ("windrose_compute_seconds_total", "counter"),
    ("windrose_engine_steps_total", "counter"),
    ("windrose_engine_up", "gauge"),
    ("windrose_expert_tokens_total", "counter"),
    ("windrose_expert_gate_weight_total", "counter"),
    ("windrose_routing_steps_total", "counter"),
    ("windrose_routing_distinct_experts_total", "counter"),
    ("windrose_expert_tile_rows_total", "counter"),
    ("windrose_routing_imbalance_total", "counter"),
    ("windrose_routing_entropy_bits_total", "counter"),
    ("windrose_generation_tokens_total", "counter"),
    ("windrose_http_requests_total", "counter"),
    ("windrose_inter_token_latency_seconds", "histogram"),
    ("windrose_kv_blocks", "gauge"),
    ("windrose_kv_cache_usage_ratio", "gauge"),
    ("windrose_preemptions_total", "counter"),
    ("windrose_prefix_cache_hits_total", "counter"),
    ("windrose_prefix_cache_queries_total", "counter"),
    ("windrose_prompt_tokens_total", "counter"),
    ("windrose_queued_tokens", "gauge"),
    ("windrose_request_duration_seconds", "histogram"),
    ("windrose_request_generation_tokens", "histogram"),
    ("windrose_request_prompt_tokens", "histogram"),
    ("windrose_request_queue_seconds", "histogram"),
    ("windrose_requests_accepted_total", "counter"),
    ("windrose_requests_finished_total", "counter"),
    ("windrose_requests_running", "gauge"),
    ("windrose_requests_waiting", "gauge"),
];

/// Names beyond those above.
const GOLDEN_MORE: [(&str, &str); 2] =
    [("windrose_sequences_finished_total", "counter"), ("windrose_time_to_first_token_seconds", "histogram")];

/// Every series of the page with its value.
async fn series(server: &Server) -> BTreeMap<String, f64> {
    let page = server.get("/metrics").await.body;
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(name, value)| (name.to_owned(), value.parse().unwrap()))
        .collect()
}

fn sum(series: &BTreeMap<String, f64>, name: &str) -> f64 {
    let of_name = series.iter().filter(|(key, _)| key.split('{').next() == Some(name));
    of_name.map(|(_, value)| value).sum()
}

#[tokio::test]
async fn names_and_types_are_frozen() {
    let server = server(scripted(say("x")));
    server.chat(json!({})).await;
    let page = server.get("/metrics").await;
    assert!(page.headers["content-type"].to_str().unwrap().starts_with("text/plain; version=0.0.4"));
    let types = page.body.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let mut exposed: Vec<(&str, &str)> = types.collect();
    exposed.sort_unstable();
    let mut golden = [&GOLDEN[..], &GOLDEN_MORE].concat();
    golden.sort_unstable();
    assert_eq!(exposed, golden);
    let mut listed: Vec<(&str, &str)> =
        metric_names().into_iter().map(|(name, kind, _)| (name, kind)).collect();
    listed.sort_unstable();
    assert_eq!(listed, golden);
    assert!(
        page.body
            .lines()
            .filter(|line| !line.starts_with('#'))
            .all(|line| line.contains("model_name=\"windrose\""))
    );
}

#[tokio::test]
async fn every_choice_and_token_is_accounted_for() {
    let server = server(scripted(say("one two three")));
    let num_tokens = say("one two three").len() as f64;
    server.chat(json!({"n": 2})).await;
    server.chat(json!({"stream": true, "max_tokens": 2})).await;
    server.complete(json!({"stop": " two"})).await;
    server.chat(json!({"n": 0})).await;
    server.idle().await;
    let after = series(&server).await;
    assert_eq!(sum(&after, "windrose_requests_accepted_total"), 4.0);
    assert_eq!(sum(&after, "windrose_requests_finished_total"), 4.0);
    assert_eq!(sum(&after, "vllm:request_success_total"), 4.0);
    assert_eq!(sum(&after, "windrose_sequences_finished_total"), 4.0);
    let stopped = after
        .iter()
        .find(|(name, _)| name.starts_with("windrose_requests_finished_total{finished_reason=\"stop\""));
    assert_eq!(*stopped.unwrap().1, 3.0);
    assert!(sum(&after, "vllm:generation_tokens_total") >= 2.0 * num_tokens + 2.0 + ids("one").len() as f64);
    assert_eq!(sum(&after, "windrose_time_to_first_token_seconds_count"), 4.0);
    let tokens_in =
        sum(&after, "windrose_prompt_tokens_total") + sum(&after, "windrose_generation_tokens_total");
    assert!(sum(&after, "windrose_expert_tokens_total") > 0.0 && tokens_in > 0.0);
    assert_eq!(sum(&after, "windrose_http_requests_total"), 4.0);
}

#[tokio::test]
async fn a_client_cannot_make_up_series() {
    let server = server(scripted(say("x")));
    for path in ["/a", "/b", "/v1/models/c", "/v1/models/d"] {
        server.get(path).await;
    }
    let after = series(&server).await;
    let routes = after.keys().filter(|key| key.starts_with("windrose_http_requests_total"));
    assert_eq!(routes.count(), 2);
}
