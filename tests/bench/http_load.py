"""Streams chat completions from a server at several concurrencies and prints what users feel.

Per row: output tokens per second of all streams together, time to first token (TTFT) and time between two
tokens of one stream (ITL). Every stream asks something else, so that routing differs. The client is a bare
asyncio socket reader that notes when each read came and parses after the clock has stopped, so that it takes
little of a small machine from the server.

usage: python tests/bench/http_load.py [--url http://127.0.0.1:8000] [--streams 1,8,32] [--tokens 128]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from urllib.parse import urlsplit

WORDS = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "thing",
    "world",
    "school",
    "state",
    "family",
    "country",
    "week",
]
PROMPT_WORDS = 40
ROUNDS = 4


@dataclass
class Stream:
    """One answered request: when it was sent, and what was read when."""

    sent_at: float
    reads: list[tuple[float, bytes]]

    def token_times(self) -> list[float]:
        """When each token's text arrived."""
        times: list[float] = []
        unread = b""
        for read_at, data in self.reads:
            unread += data
            *events, unread = unread.split(b"\n\n")
            times += [read_at for event in events if b'"content":"' in event and b'"content":""' not in event]
        return times


async def ask(host: str, port: int, num_tokens: int, rng: random.Random) -> Stream:
    content = " ".join(rng.choices(WORDS, k=PROMPT_WORDS))
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": num_tokens, "temperature": 0}
    payload = json.dumps(body | {"stream": True, "ignore_eos": True}).encode()
    reader, writer = await asyncio.open_connection(host, port)
    sent_at = time.perf_counter()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(payload)}\r\n\r\n".encode() + payload)
    reads = []
    while data := await reader.read(1 << 16):
        reads.append((time.perf_counter(), data))
    writer.close()
    assert b" 200 " in reads[0][1][:15], reads[0][1][:500]
    return Stream(sent_at, reads)


async def measure(host: str, port: int, num_streams: int, num_tokens: int) -> str:
    rng = random.Random(num_streams)

    async def client() -> list[Stream]:
        return [await ask(host, port, num_tokens, rng) for _ in range(ROUNDS)]

    await ask(host, port, num_tokens, rng)
    began = time.perf_counter()
    streams = [
        s for streams in await asyncio.gather(*(client() for _ in range(num_streams))) for s in streams
    ]
    seconds = time.perf_counter() - began
    times = [stream.token_times() for stream in streams]
    gaps = sorted(1e3 * (later - earlier) for arrived in times for earlier, later in pairwise(arrived))
    first = sorted(1e3 * (arrived[0] - s.sent_at) for s, arrived in zip(streams, times, strict=True))
    rate = len(streams) * num_tokens / seconds
    cells = [
        f"{num_streams}",
        f"{rate:.0f}",
        f"{statistics.median(first):.1f}",
        f"{first[int(0.99 * (len(first) - 1))]:.1f}",
        f"{statistics.median(gaps):.2f}",
        f"{gaps[int(0.99 * (len(gaps) - 1))]:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    url = urlsplit(arguments.url)
    print("| streams | tokens/s | TTFT p50 ms | p99 | ITL p50 ms | p99 |\n|---|---|---|---|---|---|")
    for num_streams in map(int, arguments.streams.split(",")):
        print(await measure(url.hostname, url.port, num_streams, arguments.tokens), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
