"""Start, idleness and the end: ready at once, idle when idle, and a rolling update drops nobody."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from windrose import Server, wait_for

READY_WITHIN_S = 1.0
FIRST_TOKEN_WITHIN_S = 0.3
IDLE_SECONDS = 5.0
LONG = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 600, "ignore_eos": True}


def test_it_is_ready_at_once_and_answers_at_once(start) -> None:
    server: Server = start()
    began = time.monotonic()
    stream = server.client().chat.completions.create(
        model="windrose-demo", messages=[{"role": "user", "content": "Hello!"}], stream=True
    )
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    first_token_s = time.monotonic() - began
    print(f"ready after {server.ready_after_s:.3f} s, first token {first_token_s:.3f} s later")
    assert server.ready_after_s < READY_WITHIN_S
    assert first_token_s < FIRST_TOKEN_WITHIN_S


def test_an_idle_server_uses_no_processor(start) -> None:
    server: Server = start()
    server.client().models.list()
    before, began = server.cpu_seconds(), time.monotonic()
    time.sleep(IDLE_SECONDS)  # The one sleep of the suite: idleness is measured over time.
    share = (server.cpu_seconds() - before) / (time.monotonic() - began)
    print(f"idle share of one processor: {share:.4f}")
    assert share < 0.01


@contextmanager
def long_stream(server: Server) -> Iterator[Iterator[str]]:
    """A long answer under way: its events after the first."""
    body = LONG | {"stream": True}
    with httpx.stream("POST", server.url + "/v1/chat/completions", json=body, timeout=60) as stream:
        events = (line for line in stream.iter_lines() if line.startswith("data:"))
        next(events)
        yield events


def test_sigterm_lets_streams_finish(start) -> None:
    server: Server = start("--drain-grace-s", "0")
    with long_stream(server) as events:
        server.terminate()
        rest = list(events)
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2].replace(" ", "")
    assert server.process.wait(10) == 0


def test_a_leaving_server_is_live_but_not_ready(start) -> None:
    server: Server = start("--drain-grace-s", "1")
    with long_stream(server) as events:
        server.terminate()
        wait_for("readiness off", lambda: server.get("/readyz").status_code == 503)
        assert server.get("/livez").status_code == 200
        assert list(events)[-1] == "data: [DONE]"
    assert server.process.wait(10) == 0


def test_a_taken_port_is_a_clear_error(server: Server, start) -> None:
    port = server.url.rpartition(":")[2]
    with pytest.raises(AssertionError, match="--port"):
        start("--port", port)
