"""The plugin that holds a peer's suite to the table: which of its tests run, and why the others do not.

A rule of `tables/NAME.toml` is a group with a list of patterns, in which `*` stands for anything and
everything else for itself. The first rule that matches a test decides. A pattern without `::` is a whole
file, which is not even imported; its test functions are counted as they are written. A test that no rule
matches is an error, and so is a pattern that matches nothing: the table says all that there is, and nothing
that there is not.

Groups: `pass` runs and has to pass. `not_applicable` asks for what Windrose does not have by design, or for
the text of a model that is not ours. `on_purpose` asks for what Windrose does otherwise, and the reason says
why. `to_do` asks for what Windrose should have.

With SUITE_RUN_ALL=1 tests of every group run: what passes although it is not in `pass` is then seen.
"""

from __future__ import annotations

import ast
import collections
import json
import os
import re
import tomllib
from pathlib import Path

import pytest

GROUPS = ("pass", "not_applicable", "on_purpose", "to_do")


class Table:
    """Rules in their order, and which patterns have matched."""

    def __init__(self, path: Path) -> None:
        self.rules: list[tuple[dict, str, re.Pattern[str]]] = []
        for rule in tomllib.loads(path.read_text())["rule"]:
            assert rule["group"] in GROUPS, rule
            assert rule["group"] == "pass" or rule.get("reason"), rule
            for pattern in rule["tests"]:
                regex = ".*".join(map(re.escape, pattern.split("*")))
                self.rules.append((rule, pattern, re.compile(regex, re.DOTALL)))
        self.unused = {pattern for _, pattern, _ in self.rules}

    def rule(self, test: str) -> dict | None:
        """The first rule for this id or file."""
        for rule, pattern, regex in self.rules:
            if ("::" in pattern) == ("::" in test) and regex.fullmatch(test):
                self.unused.discard(pattern)
                return rule
        return None


class Suite:
    """Hooks of one run; `report` is what run.py reads."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.run_all = os.environ.get("SUITE_RUN_ALL") == "1"
        self.counts: collections.Counter[str] = collections.Counter()
        self.unknown: list[str] = []
        self.group_of: dict[str, str] = {}
        self.outcomes: dict[str, str] = {}

    def pytest_ignore_collect(self, collection_path: Path, config: pytest.Config) -> bool | None:
        if not re.fullmatch(r"test_.*\.py", collection_path.name):
            return None
        rule = self.table.rule(collection_path.relative_to(config.rootpath).as_posix())
        if rule is None:
            return None
        self.counts[rule["group"]] += num_test_functions(collection_path)
        return True

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept, others = [], []
        for item in items:
            rule = self.table.rule(item.nodeid)
            group = rule["group"] if rule else "unknown"
            self.group_of[item.nodeid] = group
            if rule is None:
                self.unknown.append(item.nodeid)
            elif group != "pass":
                self.counts[group] += 1
            if rule and rule.get("any_text"):
                item.add_marker("any_text")
            (kept if group == "pass" or self.run_all else others).append(item)
        config.hook.pytest_deselected(items=others)
        items[:] = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            worst = self.outcomes.get(report.nodeid, "passed")
            self.outcomes[report.nodeid] = report.outcome if worst == "passed" else worst

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        ran = {test: self.outcomes[test] for test, group in self.group_of.items() if test in self.outcomes}
        self.counts["pass"] += sum(
            outcome == "passed" and self.group_of[test] == "pass" for test, outcome in ran.items()
        )
        report = {
            "counts": self.counts,
            "unknown": self.unknown,
            "unused": sorted(self.table.unused),
            "broken": [t for t, o in ran.items() if o != "passed" and self.group_of[t] == "pass"],
            "outcomes": {f"{self.group_of[test]}: {test}": outcome for test, outcome in ran.items()},
        }
        Path(os.environ["SUITE_REPORT"]).write_text(json.dumps(report, indent=1))


def num_test_functions(path: Path) -> int:
    """Functions and methods named as tests, however often each is parametrised."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = ast.walk(ast.parse(path.read_text()))
    return sum(isinstance(node, functions) and node.name.startswith("test") for node in nodes)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "any_text: text of the peer's model may be any text")
    config.pluginmanager.register(Suite(Table(Path(os.environ["SUITE_TABLE"]))))
