#!/usr/bin/env python3
"""The demo model's held-out prompts on a GPU, all at once, beside what the processor answers.

usage: demo.py WINDROSE [--every N] [--json FILE]

Fails if a GPU loses more points of a hundred to the processor than rounding explains.
"""

import argparse
import concurrent.futures
import json
import pathlib
import sys
import time
import urllib.request

from model import serving

EVAL = pathlib.Path(__file__).resolve().parents[2] / "crates/demo/eval"
CLIENTS = 128
# Points that may be lost, as in tests/clients/python/test_gpu.py.
ALLOWED_POINTS = {"bf16": 1.0, "fp8": 3.0}


def read_examples(every):
    files = sorted(EVAL.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()[::every]]


def is_right(url, example):
    body = {"prompt": example["prompt_ids"], "max_tokens": example["max_tokens"], "temperature": 0}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as response:
        text = json.load(response)["choices"][0]["text"]
    return text.strip() == example["expected"].strip()


def score(windrose, examples, *options):
    """Seconds to ready and to all answers, and how many were right."""
    with serving(windrose, *options) as (url, ready), concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        begin = time.monotonic()
        right = sum(pool.map(lambda example: is_right(url, example), examples))
        figures = {"ready": ready, "seconds": time.monotonic() - begin, "right": right}
    print(f"{' '.join(options):<30} {right} of {len(examples)} right, {figures}", flush=True)
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("windrose", help="the binary")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one prompt of N")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    examples = read_examples(options.every)
    figures = {"cpu": score(options.windrose, examples, "--device", "cpu")}
    failed = False
    for weights, points in ALLOWED_POINTS.items():
        figures[weights] = score(options.windrose, examples, "--device", "cuda", "--weights", weights)
        lost = 100 * (figures["cpu"]["right"] - figures[weights]["right"]) / len(examples)
        failed |= lost > points
        print(f"{weights}: {lost:.1f} points lost, {points} allowed", flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=1)
    sys.exit(failed)


if __name__ == "__main__":
    main()
