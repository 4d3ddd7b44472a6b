//! `windrose bench` as people call it: the real binary, the demo model, sizes so small that it is over in a second.

use std::process::Command;

use serde_json::Value;

fn windrose(arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_windrose"));
    command.args(arguments.split(' '));
    command
}

#[track_caller]
fn assert_positive(row: &Value, figures: &[impl AsRef<str>]) {
    for figure in figures.iter().map(AsRef::as_ref) {
        let value = row.pointer(figure).and_then(Value::as_f64).unwrap_or(f64::NAN);
        assert!(value > 0.0 && value.is_finite(), "{figure} is {value} in {row}");
    }
}

#[test]
fn every_figure_of_the_model_is_positive() {
    let arguments = "bench --device cpu --threads 2 --prompt-len 8,40 --output-len 3 --num-seqs 1,3 --repetitions 2 \
                     --max-num-batched-tokens 16 --json -";
    let output = windrose(arguments).output().unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{log}");
    assert!(log.contains("tokens/s"), "with JSON on standard output the table is on standard error: {log}");

    let report: Value = serde_json::from_slice(&output.stdout).expect("standard output is JSON alone");
    for limits in ["/limits_before", "/limits_after"] {
        assert_positive(&report, &["read_bytes_per_s", "dot_flop_per_s"].map(|f| format!("{limits}/{f}")));
    }
    assert_positive(&report, &["/load_seconds"]);
    assert_positive(&report, &["/memory/resident_bytes", "/memory/weight_bytes", "/memory/cache_bytes"]);
    let results = report["results"].as_array().unwrap();
    let kinds: Vec<_> =
        results.iter().map(|row| (row["phase"].as_str().unwrap(), &row["num_seqs"])).collect();
    let of_a_context = [("prefill", 1), ("decode", 1), ("decode", 3)];
    assert_eq!(kinds.len(), 2 * of_a_context.len());
    assert!(
        kinds
            .iter()
            .zip(of_a_context.iter().cycle())
            .all(|(got, expected)| got.0 == expected.0 && *got.1 == expected.1)
    );
    for row in results {
        let figures = [
            "/tokens_per_s/median",
            "/tokens_per_s/min",
            "/step_ms/median",
            "/read_bytes_per_s",
            "/read_share",
            "/flop_per_s",
            "/dot_share",
        ];
        assert_positive(row, &figures);
    }
    assert_eq!(results[3]["num_steps"], 3, "40 tokens are 3 chunks of at most 16");
}

#[test]
fn a_context_that_the_model_was_not_trained_for_is_refused() {
    let output = windrose("bench --prompt-len 100000").output().unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && log.contains("100032"), "{log}");
}
