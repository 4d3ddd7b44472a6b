//! Progress of loading: a bar on a terminal, now and then a log line elsewhere.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use tracing::info;

/// Time between two log lines.
const LOG_INTERVAL: Duration = Duration::from_secs(5);

/// A task of known length.
pub(crate) struct Progress {
    what: &'static str,
    total: usize,
    bar: Option<ProgressBar>,
    last_logged: Instant,
}

impl Progress {
    /// Starts at zero of `total`.
    pub(crate) fn new(what: &'static str, total: usize) -> Self {
        let bar = stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len} {elapsed}");
            ProgressBar::new(total as u64).with_style(style.expect("a valid template")).with_message(what)
        });
        Self { what, total, bar, last_logged: Instant::now() }
    }

    /// Shows that `done` of the total are done.
    pub(crate) fn advance_to(&mut self, done: usize) {
        if let Some(bar) = &self.bar {
            bar.set_position(done as u64);
        } else if self.last_logged.elapsed() >= LOG_INTERVAL {
            self.last_logged = Instant::now();
            info!(done, total = self.total, "{}", self.what);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
