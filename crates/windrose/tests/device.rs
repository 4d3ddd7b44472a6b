//! The device that the real binary chooses, and what it says about it.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};

/// More than loading the demo model takes, fewer than its answers.
const LAUNCHES_UNTIL_FAILURE: u32 = 700;

fn windrose() -> Command {
    Command::new(env!("CARGO_BIN_EXE_windrose"))
}

/// A server that has said where it listens.
struct Server {
    process: Child,
    url: String,
    /// Open as long as the server lives, or its next word would end it.
    _stdout: BufReader<ChildStdout>,
}

impl Server {
    fn start(device: &str, fail_after: Option<u32>) -> Self {
        let mut command = windrose();
        command.args(["serve", "--port", "0", "--device", device]);
        command.envs(fail_after.map(|launches| ("FAKE_CUDA_FAIL_AFTER", launches.to_string())));
        let mut process = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stdout = BufReader::new(process.stdout.take().unwrap());
        let mut banner = String::new();
        stdout.read_line(&mut banner).unwrap();
        let url = banner.split_whitespace().last().unwrap_or_default().to_owned();
        Self { process, url, _stdout: stdout }
    }

    /// Waits for its end; what it logged.
    fn wait(self) -> (ExitStatus, String) {
        let output = self.process.wait_with_output().unwrap();
        (output.status, String::from_utf8(output.stderr).unwrap())
    }
}

/// What a server logs until it serves.
fn log_of_start(device: &str) -> String {
    let mut server = Server::start(device, None);
    let serves = server.url.starts_with("http://");
    server.process.kill().unwrap();
    let (_, log) = server.wait();
    assert!(serves, "{log}");
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

    let doctor = windrose().arg("doctor").output().unwrap();
    let page = String::from_utf8_lossy(&doctor.stdout);
    assert!(doctor.status.success() && page.contains(&format!("the processor: {reason}")), "{page}");

    let needs_gpu = [
        &["generate", "Hello", "--device", "cuda"][..],
        &["doctor", "--device", "cuda"],
        &["doctor", "--weights", "fp8"],
    ];
    for command in needs_gpu {
        let output = windrose().args(command).output().unwrap();
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && log.contains(&reason), "{log}");
    }
}

#[test]
fn the_demo_model_answers_on_a_gpu() {
    let Some(gpu) = cuda::probe_or_skip() else { return };
    let doctor = windrose().arg("doctor").output().unwrap();
    let page = String::from_utf8_lossy(&doctor.stdout);
    assert!(page.lines().any(|line| line.contains("runs on") && line.contains(&gpu.name)), "{page}");

    let log = log_of_start("auto");
    assert!(log.contains("backend=\"cuda "), "{log}");
    let formats = [("bf16", "bf16"), ("bf16", "q8"), ("fp8", "q8")];
    for (weights, kv_cache) in formats {
        let question = ["generate", "--device", "cuda", "--weights", weights, "--kv-cache", kv_cache];
        let output = windrose().args(question).arg("What is 12 + 30?").output().unwrap();
        if gpu.capability.has_e4m3() || (weights, kv_cache) == ("bf16", "bf16") {
            assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "42", "{output:?}");
        } else {
            let log = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success() && log.contains(&gpu.name) && log.contains("fp8"), "{log}");
        }
    }
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
    let server = Server::start("cuda", Some(LAUNCHES_UNTIL_FAILURE));
    let load = ["bench", "serve", "--url", &server.url, "--output-len", "400"];
    let client = windrose().args(load).output().unwrap();
    let log = String::from_utf8_lossy(&client.stderr);
    assert!(log.contains("The model failed while processing your request."), "{log}");

    let (status, log) = server.wait();
    assert!(!status.success(), "{log}");
    assert!(log.contains("the device failed") && log.contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{log}");
}
