//! The README's table of metrics is what the server exposes; on a difference the right table is printed.

use std::fmt::Write;

const README: &str = include_str!("../../../README.md");
const HEADER: &str = "| metric | type | what |\n|---|---|---|\n";

#[test]
fn the_readme_lists_every_metric() {
    let mut table = HEADER.to_owned();
    for (name, kind, help) in server::metric_names() {
        writeln!(table, "| `{name}` | {kind} | {help} |").expect("writing to a string");
    }
    assert!(README.contains(&table), "README.md should have this table:\n\n{table}");
}
