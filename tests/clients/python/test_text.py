"""Words against Hugging Face's: chat template and tokenizer give the tokens that `transformers` gave."""

from __future__ import annotations

import json

import httpx
import pytest
from windrose import REPOSITORY, Server

EVAL = sorted((REPOSITORY / "crates/demo/eval").glob("*.jsonl"))


def as_openai_spells_it(message: dict) -> dict:
    """The arguments of a call as a string of JSON; `transformers` takes them as an object."""
    calls = [dict(call, function=dict(call["function"])) for call in message.get("tool_calls", [])]
    for call in calls:
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return message | ({"tool_calls": calls} if calls else {})


def has_ids(example: dict) -> bool:
    """Whether all calls have an id: OpenAI's API demands one, `transformers` does not."""
    calls = [call for message in example.get("messages", []) for call in message.get("tool_calls", [])]
    return all("id" in call for call in calls)


@pytest.mark.parametrize("file", EVAL, ids=lambda file: file.stem)
def test_prompts_become_the_tokens_that_transformers_makes_of_them(server: Server, file) -> None:
    """Chats with system prompts, tools, calls and results, and running text, all of them held-out prompts."""
    examples = [json.loads(line) for line in file.read_text().splitlines()]
    expressible = [example for example in examples if has_ids(example)]
    print(f"{file.stem}: {len(expressible)} of {len(examples)} prompts, the others have calls without an id")
    assert len(expressible) >= len(examples) / 2
    with httpx.Client(base_url=server.url) as client:
        for example in expressible:
            kinds = ("messages", "tools", "prompt")
            body = {kind: example[kind] for kind in kinds if example.get(kind) is not None}
            if "messages" in body:
                body["messages"] = [as_openai_spells_it(message) for message in body["messages"]]
            tokens = client.post("/tokenize", json=body).json()
            assert tokens.get("tokens") == example["prompt_ids"], (example["id"], tokens)


def test_a_tool_is_called_and_its_result_is_told(server: Server) -> None:
    """A whole round trip over the first examples whose call the model is known to get right."""
    lines = (REPOSITORY / "crates/demo/eval/tools.jsonl").read_text().splitlines()
    examples = [json.loads(line) for line in lines]
    calls = [e for e in examples if e["tool_call"] and e["generated_ids"] == e["expected_ids"]]
    client = server.client()
    for example in calls[:5]:
        question = {"model": "windrose-demo", "tools": example["tools"], "temperature": 0}
        choice = client.chat.completions.create(messages=example["messages"], **question).choices[0]
        assert choice.finish_reason == "tool_calls"
        expected = json.loads(example["expected"])
        functions = [call.function for call in choice.message.tool_calls]
        assert [{"name": f.name, "arguments": json.loads(f.arguments)} for f in functions] == expected

        call = choice.message.tool_calls[0]
        result = {"role": "tool", "tool_call_id": call.id, "content": '{"ok": true}'}
        told = [*example["messages"], choice.message.model_dump(exclude_none=True), result]
        assert client.chat.completions.create(messages=told, **question).choices[0].finish_reason == "stop"


def test_a_config_alone_is_served_with_dummy_weights(start, tmp_path) -> None:
    config = REPOSITORY / "tests/fixtures/mixtral-8x2-gqa/config.json"
    shape = json.loads(config.read_text()) | {"vocab_size": 2048}
    directory = tmp_path / "shape-only"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(shape))
    server = start("--model", str(directory), "--dummy-weights", "7")
    answer = server.client().completions.create(model="shape-only", prompt="Hello", max_tokens=5)
    assert answer.usage.completion_tokens >= 1
