//! The device that the real binary chooses, and what it says about it.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

/// More than loading the demo model takes, fewer than its answers.
const LAUNCHES_UNTIL_FAILURE: u32 = 700;

fn windrose() -> Command {
    Command::new(env!("CARGO_BIN_EXE_windrose"))
}

/// A server that has said where it listens.
fn serve(device: &str, fail_after: Option<u32>) -> (Child, String) {
    let mut command = windrose();
    command.args(["serve", "--port", "0", "--device", device]).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.envs(fail_after.map(|launches| ("FAKE_CUDA_FAIL_AFTER", launches.to_string())));
    let mut process = command.spawn().unwrap();
    let mut banner = String::new();
    BufReader::new(process.stdout.take().unwrap()).read_line(&mut banner).unwrap();
    (process, banner.split_whitespace().last().unwrap_or_default().to_owned())
}

/// What a server logs until it serves.
fn log_of_start(device: &str) -> String {
    let (mut process, url) = serve(device, None);
    process.kill().unwrap();
    let log = String::from_utf8(process.wait_with_output().unwrap().stderr).unwrap();
    assert!(url.starts_with("http://"), "{log}");
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

#[test]
fn a_gpu_that_fails_fails_its_requests_and_ends_the_process() {
    if cuda::probe_or_skip().is_none() {
        return;
    }
    if std::env::var_os("FAKE_CUDA_CAPABILITY").is_none() {
        println!("skipped: only the fake driver fails when told to");
        return;
    }
    let (server, url) = serve("cuda", Some(LAUNCHES_UNTIL_FAILURE));
    let client = windrose().args(["bench", "serve", "--url", &url, "--output-len", "400"]).output().unwrap();
    let log = String::from_utf8_lossy(&client.stderr);
    assert!(log.contains("The model failed while processing your request."), "{log}");

    let server = server.wait_with_output().unwrap();
    let log = String::from_utf8_lossy(&server.stderr);
    assert!(!server.status.success(), "{log}");
    assert!(log.contains("the device failed") && log.contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{log}");
}
