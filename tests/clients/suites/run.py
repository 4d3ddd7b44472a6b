"""Runs the peers' own server tests, llama.cpp's and those of vLLM's OpenAI entrypoints, against Windrose.

`tests/clients/suites/run.py [SUITE...] [--all] [-- PYTEST OPTIONS]` fetches the suites from the package
registry into target/suites, as the source archives pinned below, and runs in an environment of its own what
`tables/` says applies. No code of theirs is in this repository and none of it is changed: `plugins/` has our
servers where they start theirs. Ends with status 1 if a test that should pass does not, or if a table and
its suite do not match. `--all` also runs what the table sets aside, which decides nothing, to see what
passes meanwhile. The tests of both peers are under the MIT and the Apache 2.0 licence.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
WORK = REPOSITORY / "target/suites"
PYTHON = WORK / "venv/bin/python"
NAMES = {"pass": "passed", "not_applicable": "not applicable", "on_purpose": "on purpose", "to_do": "to do"}


@dataclass
class Peer:
    """A pinned source archive: what is unpacked, where its tests begin, what stands in for the peer."""

    package: str
    version: str
    sha256: str
    prefixes: list[str]
    root: str
    tests: str
    plugin: str


PEERS = {
    "llama.cpp": Peer(
        package="llama-cpp-python",
        version="0.3.36",
        sha256="832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
        prefixes=["vendor/llama.cpp/tools/server/tests/"],
        root="vendor/llama.cpp/tools/server/tests",
        tests="unit",
        plugin="llama_server",
    ),
    "vllm": Peer(
        package="vllm",
        version="0.33.0",
        sha256="f4c33c2503d52bb411146afa9618a4f48bed68912f617e6803ac8d76e4c74112",
        prefixes=[
            "tests/__init__.py",
            "tests/entrypoints/__init__.py",
            "tests/entrypoints/conftest.py",
            "tests/entrypoints/openai/",
        ],
        root=".",
        tests="tests/entrypoints/openai",
        plugin="vllm_server",
    ),
}


def prepare_environment() -> None:
    """Makes the environment, unless it was made for the same pins."""
    pins = (HERE / "requirements.txt").read_text()
    made_for = WORK / "venv/made-for"
    if made_for.exists() and made_for.read_text() == pins:
        return
    venv.create(WORK / "venv", with_pip=True, clear=True)
    subprocess.run([PYTHON, "-m", "pip", "install", "--quiet", "-r", HERE / "requirements.txt"], check=True)
    made_for.write_text(pins)


def fetch(peer: Peer) -> Path:
    """The folder with the peer's tests, fetched unless it is there."""
    into = WORK / f"{peer.package}-{peer.version}"
    complete = into / "complete"
    if not complete.exists():
        pin = [peer.package, peer.version, peer.sha256, str(into)]
        subprocess.run([PYTHON, HERE / "fetch.py", *pin, *peer.prefixes], check=True)
        complete.touch()
    return into / peer.root


def run(name: str, peer: Peer, run_all: bool, options: list[str]) -> dict:
    """One suite under the plugins, and what the table plugin reports of it."""
    root = fetch(peer)
    report = WORK / f"{name}.json"
    report.unlink(missing_ok=True)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, [HERE / "plugins", HERE.parent / "python"])),
        "PYTHONDONTWRITEBYTECODE": "1",
        "SUITE_TABLE": str(HERE / "tables" / f"{name}.toml"),
        "SUITE_REPORT": str(report),
        "SUITE_RUN_ALL": str(int(run_all)),
    }
    plugins = ["-p", "table", "-p", peer.plugin, "-p", "no:cacheprovider"]
    command = [
        PYTHON,
        "-m",
        "pytest",
        "--rootdir",
        ".",
        "--tb",
        "short",
        "-q",
        *plugins,
        *options,
        peer.tests,
    ]
    subprocess.run(command, cwd=root, env=environment, check=False)
    if not report.exists():
        sys.exit(f"{name}: the suite could not be collected")
    return json.loads(report.read_text())


def verdict(name: str, report: dict) -> bool:
    """Prints where a suite and its table do not match, and whether they do."""
    for complaint, key in (
        ("no rule for", "unknown"),
        ("a pattern without a test:", "unused"),
        ("should pass:", "broken"),
    ):
        for test in report[key]:
            print(f"{name}: {complaint} {test}")
    return not (report["unknown"] or report["unused"] or report["broken"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("suites", nargs="*", choices=[*PEERS, []], help="which suites; all by default")
    parser.add_argument("--all", action="store_true", help="run also what the table sets aside")
    own, _, options = (sys.argv[1:], None, [])
    if "--" in own:
        own, options = own[: own.index("--")], own[own.index("--") + 1 :]
    arguments = parser.parse_args(own)
    prepare_environment()
    reports = {name: run(name, PEERS[name], arguments.all, options) for name in arguments.suites or PEERS}
    held = [verdict(name, report) for name, report in reports.items()]
    # The number comes last on each line: `.ci/run` counts tests by the number before the word.
    for name, report in reports.items():
        for group, title in NAMES.items():
            print(f"{name:10} {title:15} {report['counts'].get(group, 0):5}")
    sys.exit(not all(held))


if __name__ == "__main__":
    main()
