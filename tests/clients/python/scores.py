"""The demo model's held-out prompts, and how many of them a server answers exactly."""

from __future__ import annotations

import asyncio
import json

import openai
from windrose import REPOSITORY, Server

EVAL = REPOSITORY / "crates/demo/eval"
SKILLS = sorted(file.stem for file in EVAL.glob("*.jsonl"))


def examples_of(skill: str) -> list[dict]:
    return [json.loads(line) for line in (EVAL / f"{skill}.jsonl").read_text().splitlines()]


def points_lost(exact: Server, other: Server, name: str, every: int = 1) -> float:
    """Points of a hundred that `other` scores less, on one prompt of `every` of each skill; prints both."""
    counts = []
    for skill in SKILLS:
        examples = examples_of(skill)[::every]
        counts.append((len(examples), num_right(exact, examples), num_right(other, examples)))
        print(f"{skill}: bf16 {counts[-1][1]}, {name} {counts[-1][2]} of {len(examples)}")
    total, num_exact, num_other = map(sum, zip(*counts, strict=True))
    print(f"all: bf16 {num_exact}, {name} {num_other} of {total}")
    return 100 * (num_exact - num_other) / total


def num_right(server: Server, examples: list[dict]) -> int:
    """How many held-out prompts are answered exactly, greedily and all at once."""

    async def answer(client: openai.AsyncOpenAI, example: dict) -> bool:
        completion = await client.completions.create(
            model="windrose-demo",
            prompt=example["prompt_ids"],
            max_tokens=example["max_tokens"],
            temperature=0,
        )
        return completion.choices[0].text.strip() == example["expected"].strip()

    async def run() -> int:
        client = server.async_client()
        return sum(await asyncio.gather(*(answer(client, example) for example in examples)))

    return asyncio.run(run())
