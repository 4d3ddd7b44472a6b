//! Where results go: a table for people, JSON for programs.

use std::io::{Write, stderr, stdout};

use anyhow::{Context, Result};
use serde::Serialize;

/// Prints `table`; writes `report` as JSON to the file named, or for "-" to standard output, which is then its alone.
pub(super) fn write(json: Option<&str>, table: &str, report: &impl Serialize) -> Result<()> {
    let to_stdout = json == Some("-");
    match to_stdout {
        true => stderr().write_all(table.as_bytes())?,
        false => stdout().write_all(table.as_bytes())?,
    }
    let Some(path) = json else { return Ok(()) };
    let text = serde_json::to_string_pretty(report)? + "\n";
    if to_stdout {
        stdout().write_all(text.as_bytes())?;
        return Ok(());
    }
    std::fs::write(path, text).with_context(|| format!("cannot write {path}"))
}
