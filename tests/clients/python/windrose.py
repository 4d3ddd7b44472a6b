"""The real binary as a test sees it: started on a free port, watched through its endpoints, ended by SIGTERM.

Nothing here sleeps a fixed time and hopes; every wait is for something observable and has a deadline.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import openai

REPOSITORY = Path(__file__).resolve().parents[3]
DEFAULT_BINARY = Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target")) / "release/windrose"
BINARY = Path(os.environ.get("WINDROSE_BINARY", DEFAULT_BINARY))
LISTENING = re.compile(rb"http://127\.0\.0\.1:(\d+)")


def wait_for(what: str, condition: Callable[[], object], timeout_s: float = 10) -> None:
    """Waits until `condition` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain: {what}"
        time.sleep(0.005)


class Server:
    """One `windrose serve` process."""

    def __init__(self, log: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        self.log = log
        self.started_at = time.monotonic()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [BINARY, "serve", "--port", "0", *flags],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | (env or {}),
            )
        wait_for(f"address in {log}", self._listening, timeout_s=30)
        self.url = f"http://127.0.0.1:{self._listening()[1].decode()}"
        wait_for("readiness", lambda: self.get("/readyz").status_code == 200)
        self.ready_after_s = time.monotonic() - self.started_at

    def _listening(self) -> re.Match[bytes] | None:
        assert self.process.poll() is None, f"the server ended early: {self.log.read_text()}"
        return LISTENING.search(self.log.read_bytes())

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=10)

    def client(self, **options: object) -> openai.OpenAI:
        settings = {"base_url": self.url + "/v1", "api_key": "none", "max_retries": 0, "timeout": 120}
        return openai.OpenAI(**(settings | options))

    def async_client(self, **options: object) -> openai.AsyncOpenAI:
        settings = {"base_url": self.url + "/v1", "api_key": "none", "max_retries": 0, "timeout": 300}
        return openai.AsyncOpenAI(**(settings | options))

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's series that carry these labels."""
        total, found = 0.0, False
        for line in self.get("/metrics").text.splitlines():
            series, _, value = line.rpartition(" ")
            if re.split(r"[{ ]", series)[0] == name and all(
                f'{k}="{v}"' in series for k, v in labels.items()
            ):
                total, found = total + float(value), True
        assert found, f"there is no metric {name} {labels}"
        return total

    def cpu_seconds(self) -> float:
        """User and system time of the process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def stop(self, timeout_s: float = 30) -> int:
        """Ends the process and returns its exit status."""
        if self.process.poll() is None:
            self.terminate()
        try:
            return self.process.wait(timeout_s)
        finally:
            self.process.kill()
