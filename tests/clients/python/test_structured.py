"""Structured output and forced tools against the real binary: whatever comes to its end is what was asked.

Schemas are drawn from a seed; WINDROSE_NUM_SCHEMAS says how many, and a failure prints the schema.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re

import jsonschema
import openai
import pytest
from windrose import REPOSITORY, Server

MODEL = "windrose-demo"
NUM_SCHEMAS = int(os.environ.get("WINDROSE_NUM_SCHEMAS", "300"))
ASK = [{"role": "user", "content": "What is 76 plus 68?"}]


class Draw:
    """Random schemas of bounded size, from all keywords that are served."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def schema(self) -> dict:
        schema = self.object(2)
        if self.random.random() < 0.2:
            schema["$defs"] = {"part": self.any(1)}
            schema["properties"]["ref"] = {"$ref": "#/$defs/part"}
        return schema

    def any(self, depth: int) -> dict:
        kinds = [self.string, self.integer, self.number, self.words, self.simple]
        nested = [self.object, self.array, self.one_of] if depth else []
        return self.random.choice(kinds + 2 * nested)(depth - 1)

    def string(self, _: int) -> dict:
        least = self.random.randint(0, 3)
        bounds = {"minLength": least, "maxLength": least + self.random.randint(0, 6)}
        pattern = self.random.choice(["^[a-f]{2,5}$", "^\\d{3}-[x-z]+[0-9]$", "^(ab|c)*d$"])
        form = self.random.choice(["date", "uuid", "ipv4", "time"])
        return {"type": "string"} | self.random.choice(
            [bounds, bounds, {"pattern": pattern}, {"format": form}]
        )

    def integer(self, _: int) -> dict:
        low = self.random.randint(-200, 200)
        return {"type": "integer", "minimum": low, "maximum": low + self.random.randint(0, 5000)}

    def number(self, _: int) -> dict:
        low = self.random.randint(-10, 10)
        return {"type": "number", "minimum": low, "exclusiveMaximum": low + self.random.randint(1, 100)}

    def words(self, _: int) -> dict:
        words = ["red", "grün", 'a "quote"', "back\\slash", " ", "", None, True, 1.5, -3, "日本"]
        return {"enum": self.random.sample(words, self.random.randint(1, 4))}

    def simple(self, _: int) -> dict:
        return self.random.choice(
            [{"type": "boolean"}, {"type": "null"}, {"const": "é"}, {"type": ["boolean", "null"]}]
        )

    def object(self, depth: int) -> dict:
        names = self.random.sample(
            ["a", "b", "name", "größe", "x y", 'q"', "long_property_name"], self.random.randint(0, 4)
        )
        return {
            "type": "object",
            "properties": {name: self.any(depth) for name in names},
            "required": [name for name in names if self.random.random() < 0.7],
            "additionalProperties": False,
        }

    def array(self, depth: int) -> dict:
        least = self.random.randint(0, 2)
        return {
            "type": "array",
            "items": self.any(depth),
            "minItems": least,
            "maxItems": least + self.random.randint(0, 2),
        }

    def one_of(self, depth: int) -> dict:
        return {"anyOf": [self.any(depth), self.any(depth)]}


async def answer(client: openai.AsyncOpenAI, is_streamed: bool, **body: object) -> list[tuple[str, str]]:
    """Text and finish reason of each choice."""
    if not is_streamed:
        choices = (await client.chat.completions.create(**body)).choices
        return [(choice.message.content, choice.finish_reason) for choice in choices]
    texts, reasons = {}, {}
    async for chunk in await client.chat.completions.create(stream=True, **body):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    return [(texts[index], reasons[index]) for index in sorted(texts)]


def test_every_answer_validates_at_any_temperature_in_any_batch(server: Server) -> None:
    async def one(client: openai.AsyncOpenAI, seed: int, turn: asyncio.Semaphore) -> tuple[int, int]:
        schema = Draw(seed).schema()
        form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
        body = {"model": MODEL, "messages": ASK, "response_format": form, "seed": seed, "max_tokens": 300}
        async with turn:
            choices = await answer(
                client, seed % 2 == 0, temperature=[2.0, 1.0, 0.0][seed % 3], n=1 + seed % 2, **body
            )
        ended = [text for text, reason in choices if reason == "stop"]
        assert all(reason in ("stop", "length") for _, reason in choices)
        for text in ended:
            try:
                jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)
            except Exception as error:
                raise AssertionError(f"seed {seed}: {text!r} for {json.dumps(schema)}") from error
        return len(ended), len(choices)

    async def run() -> None:
        turn = asyncio.Semaphore(32)
        async with server.async_client() as client:
            counts = await asyncio.gather(*(one(client, seed, turn) for seed in range(NUM_SCHEMAS)))
        num_ended, num_choices = map(sum, zip(*counts, strict=True))
        print(f"{num_ended} of {num_choices} answers came to their end")
        assert num_ended > 0.7 * num_choices

    asyncio.run(run())


def test_an_answer_is_the_same_alone_and_streamed_among_others(server: Server) -> None:
    async def run() -> None:
        async with server.async_client() as client:
            for seed in range(4):
                form = {"type": "json_schema", "json_schema": {"name": "x", "schema": Draw(seed).schema()}}
                body = {
                    "model": MODEL,
                    "messages": ASK,
                    "response_format": form,
                    "seed": seed,
                    "max_tokens": 200,
                }
                alone = await answer(client, False, temperature=1.0, **body)
                among = await asyncio.gather(
                    *(answer(client, True, temperature=1.0, **body) for _ in range(8))
                )
                assert all(other == alone for other in among)

    asyncio.run(run())


def test_regex_choice_grammar_and_any_object(server: Server) -> None:
    client = server.client()

    def say(**extra: object) -> list[str]:
        texts = []
        for seed in range(5):
            settings = {"temperature": 2.0, "seed": seed, "max_tokens": 100, "extra_body": extra}
            chat = client.chat.completions.create(model=MODEL, messages=ASK, **settings).choices[0]
            plain = client.completions.create(model=MODEL, prompt="The colour is", **settings).choices[0]
            texts += [
                c
                for c, end in [(chat.message.content, chat.finish_reason), (plain.text, plain.finish_reason)]
                if end == "stop"
            ]
        assert texts
        return texts

    assert all(re.fullmatch(r" ?[a-c]{3}\d{1,2}", text) for text in say(regex=r" ?[a-c]{3}\d{1,2}"))
    assert all(text in (" red", "green") for text in say(choice=[" red", "green"]))
    assert all(
        re.fullmatch(r"(\(\d\))+", text) for text in say(grammar='start: item item?\nitem: "(" /[0-9]/ ")"')
    )
    form = {"type": "json_object"}
    for seed in range(5):
        settings = {"temperature": 1.0, "seed": seed, "response_format": form, "max_tokens": 300}
        choice = client.chat.completions.create(model=MODEL, messages=ASK, **settings).choices[0]
        assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


def tool_examples() -> list[dict]:
    lines = (REPOSITORY / "crates/demo/eval/tools.jsonl").read_text().splitlines()
    examples = [json.loads(line) for line in lines]
    return [e for e in examples if e["tool_call"] and e["generated_ids"] == e["expected_ids"]][:4]


def strict(tool: dict) -> dict:
    parameters = tool["function"]["parameters"] | {"additionalProperties": False}
    return tool | {"function": tool["function"] | {"strict": True, "parameters": parameters}}


def check_call(call: object, tools: list[dict]) -> None:
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])


def test_the_model_calls_the_same_tools_when_they_are_strict_or_required(server: Server) -> None:
    client = server.client()
    for example in tool_examples():
        tools = [strict(tool) for tool in example["tools"]]
        expected = json.loads(example["expected"])
        for choice in ("auto", "required"):
            body = {"model": MODEL, "messages": example["messages"], "temperature": 0, "tool_choice": choice}
            answer = client.chat.completions.create(tools=tools, **body).choices[0]
            assert answer.finish_reason == "tool_calls"
            functions = [call.function for call in answer.message.tool_calls]
            assert [{"name": f.name, "arguments": json.loads(f.arguments)} for f in functions] == expected


def test_a_model_that_calls_of_its_own_accord_calls_what_is_offered(server: Server) -> None:
    client = server.client()
    tools = [{"type": "function", "function": {"name": name}} for name in ("red_one", "blue_one")]
    # The conversation has a call of a tool that is not offered any more, and is forced to call again.
    called = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "Add 1."},
        {"role": "assistant", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "1"},
        {"role": "assistant", "content": "1"},
        *ASK,
    ]
    vocabulary = json.loads((REPOSITORY / "crates/demo/model/tokenizer.json").read_text())["added_tokens"]
    calls_token = next(token["id"] for token in vocabulary if token["content"] == "[TOOL_CALLS]")
    body = {"model": MODEL, "messages": messages, "tools": tools, "logit_bias": {calls_token: 100}}
    num_calls = 0
    for temperature in (0, 1, 2):
        settings = {"temperature": temperature, "n": 8, "seed": 5, "max_tokens": 60}
        for choice in client.chat.completions.create(**body, **settings).choices:
            calls = choice.message.tool_calls or []
            assert {call.function.name for call in calls} <= {"red_one", "blue_one"}
            assert choice.finish_reason == "length" or calls
            num_calls += len(calls)
    assert num_calls > 8


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_forced_calls_fit_their_tools_whole_and_streamed(server: Server, temperature: float) -> None:
    client = server.client()
    for seed, example in enumerate(tool_examples()):
        tools = example["tools"]
        named = {"type": "function", "function": {"name": tools[0]["function"]["name"]}}
        for tool_choice, end in (("required", "tool_calls"), (named, "stop")):
            body = {"model": MODEL, "messages": ASK, "tools": tools, "tool_choice": tool_choice, "seed": seed}
            body |= {"temperature": temperature, "max_tokens": 300, "parallel_tool_calls": False}
            choice = client.chat.completions.create(**body).choices[0]
            calls = {}
            for chunk in client.chat.completions.create(stream=True, **body):
                for part in chunk.choices[0].delta.tool_calls or []:
                    call = calls.setdefault(part.index, {"name": part.function.name, "arguments": ""})
                    call["arguments"] += part.function.arguments
                reason = chunk.choices[0].finish_reason
            whole = [call.function for call in choice.message.tool_calls]
            assert list(calls.values()) == [{"name": f.name, "arguments": f.arguments} for f in whole]
            assert reason == choice.finish_reason
            if choice.finish_reason != "length":
                assert choice.finish_reason == end and len(choice.message.tool_calls) == 1
                check_call(choice.message.tool_calls[0], tools)
                assert tool_choice == "required" or whole[0].name == named["function"]["name"]


def test_what_cannot_be_compiled_is_refused_while_others_are_served(server: Server) -> None:
    async def run() -> None:
        async with server.async_client() as client:

            async def bad(extra: dict) -> None:
                with pytest.raises(openai.BadRequestError):
                    await client.chat.completions.create(model=MODEL, messages=ASK, extra_body=extra)

            async def good() -> None:
                body = {"model": MODEL, "messages": ASK, "extra_body": {"regex": "[ab]{3}"}}
                choice = (await client.chat.completions.create(**body)).choices[0]
                assert re.fullmatch("[ab]{3}", choice.message.content)

            refused = [{"regex": "(" * 50}, {"grammar": "start: x"}, {"regex": "a", "choice": ["a"]}]
            await asyncio.gather(*(work for extra in refused for work in (bad(extra), good(), good())))

    asyncio.run(run())
