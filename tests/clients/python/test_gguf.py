"""A GGUF file served: its name, its vocabulary and its chat template, with dummy weights of its shapes."""

from __future__ import annotations

import json

import httpx
from windrose import REPOSITORY, Server

FILE = REPOSITORY / "tests/fixtures/gguf/demo-words.gguf"
PROMPTS = REPOSITORY / "crates/demo/eval/facts.jsonl"


def test_words_come_from_the_file(start) -> None:
    server: Server = start("--model", str(FILE), "--dummy-weights")
    client = server.client()
    assert [model.id for model in client.models.list()] == ["demo-words"]

    prompt = json.loads(PROMPTS.read_text().splitlines()[0])
    answer = httpx.post(server.url + "/tokenize", json={"messages": prompt["messages"]}).json()
    assert answer["tokens"] == prompt["prompt_ids"]

    chat = client.chat.completions.create(model="demo-words", messages=prompt["messages"], max_tokens=3)
    assert chat.usage.prompt_tokens == len(prompt["prompt_ids"])
    assert chat.usage.completion_tokens >= 1
