"""Counts how many of the demo model's held-out prompts a server answers exactly, greedily.

    python3 tests/bench/exact_answers.py http://127.0.0.1:8000

What a format of weights costs in answers belongs beside what it gains in speed. The prompts go as
token ids, many at a time. The client suites ask the same through OpenAI's packages.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen

EVAL = Path(__file__).parents[2] / "crates/demo/eval"
STREAMS = 32
TIMEOUT_S = 120


def count(url: str) -> dict[str, tuple[int, int]]:
    """By skill, the answers that are right and the prompts."""
    counts = {}
    with ThreadPoolExecutor(STREAMS) as pool:
        for file in sorted(EVAL.glob("*.jsonl")):
            examples = [json.loads(line) for line in file.read_text().splitlines()]
            right = pool.map(lambda example: is_right(url, example), examples)
            counts[file.stem] = (sum(right), len(examples))
    return counts


def is_right(url: str, example: dict) -> bool:
    body = {
        "model": "windrose-demo",
        "prompt": example["prompt_ids"],
        "max_tokens": example["max_tokens"],
        "temperature": 0,
    }
    text = post(f"{url}/v1/completions", body)["choices"][0]["text"]
    return text.strip() == example["expected"].strip()


def post(url: str, body: dict) -> dict:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=TIMEOUT_S) as response:
        return json.load(response)


def in_all(counts: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """The same of all skills together."""
    right, total = zip(*counts.values(), strict=True)
    return sum(right), sum(total)


def main() -> None:
    counts = count(sys.argv[1])
    for skill, (right, total) in [*counts.items(), ("all", in_all(counts))]:
        print(f"{skill:<14}{right:>5} of {total}")


if __name__ == "__main__":
    main()
