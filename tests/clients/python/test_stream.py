"""A stream is the whole answer in parts: the same request, sent both ways, over a seeded mixture of requests.

Requests are drawn from everything that shapes an answer: sampling, stops, log-probabilities, tools,
structured output, echo, token ids, routing and overrides of it. What the parts of a stream join to must be
the whole answer, bit for bit. Two things may differ: the ids of calls, which are random, and how much of a
prompt was cached. WINDROSE_NUM_REQUESTS says how many are drawn; a failure prints the request.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from itertools import chain

import httpx
from windrose import REPOSITORY, Server

NUM_REQUESTS = int(os.environ.get("WINDROSE_NUM_REQUESTS", "500"))
NUM_AT_ONCE = 8
SEED = 20261127
LONGEST_S = 120

PROMPTS = [
    "Once upon a time",
    "The old man walked down to the river.",
    "def add(a, b):\n    return",
    "Grüße aus Köln, ",
    "東京 🦊 ",
    " 12 + 30 =",
    "{",
    "a",
]
SCHEMAS = [
    {"type": "object", "properties": {"größe": {"type": "integer"}}, "required": ["größe"]},
    {"type": "array", "items": {"enum": ["red", "grün", "日本", 'a "quote"']}, "maxItems": 4},
    {"type": "string", "maxLength": 12},
]


def examples(name: str) -> list[dict]:
    """Held-out conversations of one skill."""
    lines = (REPOSITORY / f"crates/demo/eval/{name}.jsonl").read_text().splitlines()
    return [example for example in map(json.loads, lines) if example.get("messages")]


class Draw:
    """Random requests, each with its path."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.tools = [e for e in examples("tools") if all("tool_calls" not in m for m in e["messages"])]

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def request(self) -> tuple[str, dict]:
        path, body = self.chat() if self.chance(0.6) else self.completion()
        return path, body | self.sampling() | self.ending() | self.format(body) | self.extras(body)

    def chat(self) -> tuple[str, dict]:
        body: dict = {"messages": [{"role": "user", "content": self.random.choice(PROMPTS)}]}
        if self.chance(0.5):
            example = self.random.choice(self.tools)
            body = {"messages": example["messages"], "tools": example["tools"]}
            name = self.random.choice(example["tools"])["function"]["name"]
            named = {"type": "function", "function": {"name": name}}
            body["tool_choice"] = self.random.choice(["auto", "auto", "required", "none", named])
            if self.chance(0.3):
                body["parallel_tool_calls"] = self.chance(0.5)
        elif self.chance(0.3):
            body["messages"].insert(0, {"role": "system", "content": "Answer in one word."})
        if self.chance(0.4):
            body |= {"logprobs": True, "top_logprobs": self.random.randint(0, 5)}
        return "/v1/chat/completions", body

    def completion(self) -> tuple[str, dict]:
        ids = [1, *(self.random.randrange(10, 1536) for _ in range(6))]
        bytes_of_a_run = [1, 300, 236, 162]
        prompts = [*PROMPTS, ids, bytes_of_a_run, self.random.sample(PROMPTS, 2), [ids, bytes_of_a_run]]
        body: dict = {"prompt": self.random.choice(prompts)}
        if self.chance(0.4):
            body["echo"] = True
        if self.chance(0.4):
            body["logprobs"] = self.random.randint(0, 5)
        return "/v1/completions", body

    def sampling(self) -> dict:
        body: dict = {"temperature": self.random.choice([0, 0, 0.7, 1, 1.5, 2])}
        if body["temperature"] > 0:
            body["seed"] = self.random.randrange(1000)
        options = [("top_p", 0.9), ("top_k", 20), ("min_p", 0.02), ("presence_penalty", 1.0)]
        options += [
            ("frequency_penalty", 0.5),
            ("repetition_penalty", 1.2),
            ("logit_bias", {"300": 5, "301": -100}),
        ]
        return body | dict(self.random.sample(options, self.random.randint(0, 2)))

    def ending(self) -> dict:
        body: dict = {"max_tokens": self.random.choice([1, 2, 8, 16, 24, 40])}
        if self.chance(0.4):
            stops = ["e", "\n", ". ", "the", "is ", '"', "an", "xyzzy", "ö", "}", " a"]
            body["stop"] = self.random.sample(stops, self.random.randint(1, 4))
        options: list[tuple[str, object]] = [("min_tokens", 1), ("ignore_eos", True)]
        options += [("stop_token_ids", self.random.sample(range(10, 600), 20))]
        return body | (dict(self.random.sample(options, 1)) if self.chance(0.2) else {})

    def format(self, body: dict) -> dict:
        """Structured output, for what has no calls to make."""
        if "tools" in body or not self.chance(0.3):
            return {}
        formats: list[dict] = [
            {"regex": "(ab|[é-ü]{1,3}|日本)+[0-9]{2}"},
            {"choice": ["yes", "no", "日本", "yes, but"]},
        ]
        if "messages" in body:
            schema = {"name": "answer", "schema": self.random.choice(SCHEMAS), "strict": True}
            formats += [{"response_format": {"type": "json_schema", "json_schema": schema}}]
            formats += [{"response_format": {"type": "json_object"}}, {"response_format": {"type": "text"}}]
        return self.random.choice(formats)

    def extras(self, body: dict) -> dict:
        extras: dict = {}
        scores_prompt = "echo" in body and "logprobs" in body
        if self.chance(0.3) and not scores_prompt:
            extras["n"] = self.random.randint(2, 4)
        if self.chance(0.3):
            extras["return_token_ids"] = True
        if self.chance(0.3):
            options = [True, {"prompt": True}, {"layers": [1, 3]}, {"prompt": True, "layers": [2]}]
            extras["routing"] = self.random.choice(options)
        if self.chance(0.15):
            extras["moe"] = self.random.choice([{"top_k": 1}, {"ban": [7]}, {"random": {"seed": 3}}])
        return extras


def extend(choice: dict, part: dict, names: tuple[str, ...]) -> None:
    """Appends a part's lists and texts."""
    for name in names:
        if part.get(name) is not None:
            choice[name] = choice[name] + part[name] if name in choice else part[name]


def add_routing(choice: dict, record: dict) -> None:
    if "routing" not in choice:
        choice["routing"] = {name: list(v) if isinstance(v, list) else v for name, v in record.items()}
        return
    whole = choice["routing"]
    assert record["start"] == whole["start"] + len(whole["experts"])
    assert record["layers"] == whole["layers"]
    extend(whole, record, ("experts", "weights"))


def add_logprobs(choice: dict, part: dict) -> None:
    """Appends scores; without any, an answer has empty lists of them and a stream has no chunk."""
    if not any(part.values()):
        return
    logprobs = choice.setdefault("logprobs", {})
    extend(logprobs, part, tuple(name for name, value in part.items() if isinstance(value, list)))


def add_calls(choice: dict, parts: list[dict]) -> None:
    calls = choice.setdefault("tool_calls", [])
    for part in parts:
        if part["index"] == len(calls):
            assert part["id"] and part["type"] == "function"
            calls.append({"name": part["function"]["name"], "arguments": ""})
        assert part["index"] == len(calls) - 1, "calls come one after the other"
        calls[-1]["arguments"] += part["function"].get("arguments", "")


def joined(chunks: list[dict]) -> dict:
    """The answer that the chunks of a stream join to."""
    choices: dict[int, dict] = {}
    prompt_token_ids = None
    for chunk in chunks:
        prompt_token_ids = chunk.get("prompt_token_ids", prompt_token_ids)
        for part in chunk["choices"]:
            choice = choices.setdefault(part["index"], {"text": ""})
            assert "finish_reason" not in choice, "nothing comes after the end"
            delta = part.get("delta", {})
            choice["text"] += (delta.get("content") or "") + part.get("text", "")
            extend(choice, part, ("token_ids", "prompt_token_ids"))
            if part.get("routing"):
                add_routing(choice, part["routing"])
            if part.get("logprobs"):
                add_logprobs(choice, part["logprobs"])
            if delta.get("tool_calls"):
                add_calls(choice, delta["tool_calls"])
            if part["finish_reason"]:
                choice["finish_reason"] = part["finish_reason"]
    usage = chunks[-1]["usage"]
    assert not chunks[-1]["choices"]
    return {
        "choices": [choices[index] for index in sorted(choices)],
        "usage": usage,
        "prompt_token_ids": prompt_token_ids,
    }


def plain(answer: dict) -> dict:
    """A whole answer in the form of a joined one."""
    choices = []
    for whole in answer["choices"]:
        message = whole.get("message", {})
        choice = {"text": message.get("content") or whole.get("text") or ""}
        for name in ("token_ids", "prompt_token_ids", "routing", "finish_reason"):
            if whole.get(name) is not None:
                choice[name] = whole[name]
        if whole.get("logprobs"):
            add_logprobs(choice, whole["logprobs"])
        if message.get("tool_calls"):
            functions = [call["function"] for call in message["tool_calls"]]
            choice["tool_calls"] = [{"name": f["name"], "arguments": f["arguments"]} for f in functions]
        choices.append(choice)
    return {
        "choices": choices,
        "usage": answer["usage"],
        "prompt_token_ids": answer.get("prompt_token_ids"),
    }


def without_cached(answer: dict) -> dict:
    usage = {name: value for name, value in answer["usage"].items() if name != "prompt_tokens_details"}
    return answer | {"usage": usage}


def chunks_of(response: httpx.Response) -> list[dict]:
    """The events of a stream, which ends as OpenAI's do."""
    events = response.content.decode().split("\n\n")
    data = [event.removeprefix("data: ") for event in events if event.startswith("data: ")]
    assert data[-1] == "[DONE]", response.text[-1000:]
    chunks = [json.loads(event) for event in data[:-1]]
    assert all("error" not in chunk for chunk in chunks), chunks
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    return chunks


async def both_ways(client: httpx.AsyncClient, path: str, body: dict) -> tuple[dict, dict, int]:
    """The whole answer, the joined stream and how many chunks that had."""
    whole = await client.post(path, json=body)
    assert whole.status_code == 200, f"{whole.text}: {path} {json.dumps(body)}"
    streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
    chunks = chunks_of(await client.post(path, json=streamed))
    return without_cached(plain(whole.json())), without_cached(joined(chunks)), len(chunks)


def features(body: dict, answer: dict) -> list[str]:
    """What of a request and its answer is worth counting."""
    names = ("n", "stop", "logprobs", "tools", "response_format", "regex", "choice", "echo", "routing", "moe")
    found = [name for name in (*names, "return_token_ids", "seed") if name in body]
    choices = answer["choices"]
    found += [f"ended by {reason}" for reason in {choice["finish_reason"] for choice in choices}]
    return found + (["calls"] if any("tool_calls" in choice for choice in choices) else [])


def differences(joined: object, whole: object, path: str = "") -> list[str]:
    """Where two answers differ, by path."""
    if isinstance(joined, dict) and isinstance(whole, dict):
        pairs = [(f"{path}.{name}", joined.get(name), whole.get(name)) for name in joined | whole]
    elif isinstance(joined, list) and isinstance(whole, list) and len(joined) == len(whole):
        pairs = [(f"{path}[{i}]", a, b) for i, (a, b) in enumerate(zip(joined, whole, strict=True))]
    else:
        return [] if joined == whole else [f"{path}: {joined!r} streamed, {whole!r} whole"[:400]]
    return list(chain.from_iterable(differences(a, b, at) for at, a, b in pairs))


def test_streams_join_to_the_whole_answers(server: Server) -> None:
    draw = Draw(SEED)
    requests = [draw.request() for _ in range(NUM_REQUESTS)]
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    gate = asyncio.Semaphore(NUM_AT_ONCE)

    async def check(client: httpx.AsyncClient, path: str, body: dict) -> None:
        async with gate:
            whole, streamed, num_chunks = await both_ways(client, path, body)
        seen.update(["chunks"] * num_chunks + features(body, whole))
        found = differences(streamed, whole)
        if found:
            wrong.append("\n".join([f"{path} {json.dumps(body)[:1500]}", *found[:4]]))

    async def run() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=LONGEST_S) as client:
            await asyncio.gather(*(check(client, path, body) for path, body in requests))

    started = time.monotonic()
    asyncio.run(run())
    print(f"{NUM_REQUESTS} requests of seed {SEED} in {time.monotonic() - started:.1f} s")
    print(dict(sorted(seen.items())))
    assert not wrong, f"{len(wrong)} of {NUM_REQUESTS} differ:\n" + "\n".join(wrong[:6])
