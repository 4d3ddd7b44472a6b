//! The device that the real binary chooses, and what it says about it.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

fn windrose() -> Command {
    Command::new(env!("CARGO_BIN_EXE_windrose"))
}

/// What a server logs until it serves.
fn log_of_start(device: &str) -> String {
    let mut command = windrose();
    command.args(["serve", "--port", "0", "--device", device]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = command.spawn().unwrap();
    let mut banner = String::new();
    BufReader::new(process.stdout.take().unwrap()).read_line(&mut banner).unwrap();
    process.kill().unwrap();
    let log = String::from_utf8(process.wait_with_output().unwrap().stderr).unwrap();
    assert!(banner.contains("http://"), "{log}");
    log
}

#[test]
fn without_a_gpu_the_processor_serves_and_one_line_says_why() {
    let Err(reason) = cuda::probe() else {
        println!("skipped: there is a GPU");
        return;
    };
    let reason = reason.to_string();
    let log = log_of_start("auto");
    assert_eq!(log.lines().filter(|line| line.contains(&reason)).count(), 1, "{log}");

    let output = windrose().args(["generate", "--device", "cuda", "Hello"]).output().unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && log.contains(&reason), "{log}");
}

#[test]
fn the_demo_model_answers_on_a_gpu() {
    if cuda::probe_or_skip().is_none() {
        return;
    }
    let log = log_of_start("auto");
    assert!(log.contains("backend=\"cuda "), "{log}");
    let output = windrose().args(["generate", "--device", "cuda", "What is 12 + 30?"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "42", "{output:?}");
}
