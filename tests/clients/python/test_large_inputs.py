"""Large inputs: done in linear time or refused, and nothing else waits for them."""

from __future__ import annotations

import threading
import time

import httpx
from windrose import Server

MEGABYTE = 1 << 20
MAX_S_PER_MEGABYTE = 10
LONGEST_S = 120


def large_inputs(num_bytes: int) -> dict[str, str]:
    """Texts of this size that are hard on one or the other part of a tokenizer."""
    inputs = {"word": "a", "spaces": " ", "marks": "\u0301", "control tokens": "</s>", "merges": "the"}
    inputs |= {"private use": "\U0010fff0", "text": "The cat sat. "}
    return {name: text * (num_bytes // len(text.encode())) for name, text in inputs.items()}


class Pulse:
    """Asks for `/livez` again and again while it is entered."""

    def __init__(self, server: Server) -> None:
        self.server, self.slowest_s, self.count = server, 0.0, 0
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self.beat)

    def beat(self) -> None:
        with httpx.Client(base_url=self.server.url, timeout=60) as client:
            while not self.is_over.is_set():
                started = time.monotonic()
                assert client.get("/livez").status_code == 200
                self.slowest_s = max(self.slowest_s, time.monotonic() - started)
                self.count += 1
                self.is_over.wait(0.01)

    def __enter__(self) -> Pulse:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        self.thread.join()


def timed(client: httpx.Client, path: str, body: dict) -> tuple[float, httpx.Response]:
    started = time.monotonic()
    response = client.post(path, json=body)
    return time.monotonic() - started, response


def test_large_inputs_take_linear_time_or_are_refused(start) -> None:
    """Four times the text takes four times as long, with room for noise, and `/livez` never waits for it."""
    flags = ("--max-prompt-bytes", str(12 * MEGABYTE), "--max-body-bytes", str(80 * MEGABYTE))
    server: Server = start(*flags)
    with httpx.Client(base_url=server.url, timeout=LONGEST_S) as client, Pulse(server) as pulse:
        small, large = large_inputs(MEGABYTE // 4), large_inputs(MEGABYTE)
        for name in small:
            seconds = []
            for text in (small[name], large[name]):
                took_s, response = timed(client, "/tokenize", {"prompt": text})
                assert response.status_code == 200, response.text[:500]
                seconds.append(took_s)
            chat = {"messages": [{"role": "user", "content": large[name]}], "max_tokens": 1}
            chat_s, response = timed(client, "/v1/chat/completions", chat)
            assert response.status_code == 400, response.text[:500]
            assert response.json()["error"]["code"] == "context_length_exceeded"
            print(f"{name}: {seconds[0] * 4:.2f} and {seconds[1]:.2f} s per MB, chat {chat_s:.2f}")
            assert seconds[1] < MAX_S_PER_MEGABYTE and chat_s < MAX_S_PER_MEGABYTE, name
            assert seconds[1] < 4 * 3 * seconds[0] + 0.2, name
        took_s, response = timed(client, "/tokenize", {"prompt": "a" * (10 * MEGABYTE)})
        assert response.status_code == 200 and took_s < 10 * MAX_S_PER_MEGABYTE
        print(f"10 MB: {took_s:.2f} s")
    print(f"/livez answered {pulse.count} times, the slowest in {pulse.slowest_s:.3f} s")
    assert pulse.count > 10 and pulse.slowest_s < 1


def test_inputs_beyond_the_limits_are_refused_at_once(server: Server) -> None:
    """By default a text may have 1 MiB, a conversation as rendered too, and a body 8 MiB."""
    with httpx.Client(base_url=server.url, timeout=LONGEST_S) as client:
        for num_bytes, status, words in [
            (MEGABYTE, 400, "rendered conversation is longer than 1048576 bytes"),
            (4 * MEGABYTE, 400, "string too long"),
            (10 * MEGABYTE, 413, "body is larger than 8388608 bytes"),
        ]:
            body = {"messages": [{"role": "user", "content": "a" * num_bytes}]}
            took_s, response = timed(client, "/v1/chat/completions", body)
            assert response.status_code == status and words in response.text, response.text[:500]
            assert took_s < 2, f"{num_bytes} bytes took {took_s:.2f} s"
