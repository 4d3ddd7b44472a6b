"""Schemathesis on the served /openapi.json: no request that it draws, valid or not, gets a 5xx.

Cases are drawn from a seed until WINDROSE_NUM_SCHEMATHESIS of them were sent; a failure prints the smallest
request that shows it. Half are drawn to be valid, and most of these are mended where a schema cannot say what
goes together or what a text must hold, so that they get beyond the checks; the table of statuses at the end
says how many did. Answers are held to a few tokens, or the time would go to the model. Whether an answer has
the described shape is not judged here: the server's own tests do that.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable

import pytest
from windrose import Server

schemathesis = pytest.importorskip("schemathesis", reason="needs requirements-ecosystem.txt")
hypothesis = pytest.importorskip("hypothesis", reason="needs requirements-ecosystem.txt")

NUM_CASES = int(os.environ.get("WINDROSE_NUM_SCHEMATHESIS", "1000"))
SEED = 20
# Of all cases, those that must be answered with what was asked for.
MIN_ACCEPTED_SHARE = 0.25
# What makes an answer long, and the most that is asked for.
LIMITS = {"max_tokens": 4, "max_completion_tokens": 4, "max_output_tokens": 4, "n": 2, "best_of": 2}
# Where an answer without a limit is as long as the context.
DEFAULTS = {"/v1/chat/completions": {"max_tokens": 4}, "/v1/responses": {"max_output_tokens": 4}}
# What is open to a schema and not to the server.
JSON_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
GRAMMAR = 'start: "a" | /[0-9]+/'


def bound(case: schemathesis.Case) -> None:
    """Lowers what is a number and asks for a long answer; leaves what is wrong as it was drawn."""
    if not isinstance(case.body, dict):
        return
    lowered = {
        name: min(case.body[name], limit)
        for name, limit in LIMITS.items()
        # 17.0 is an integer too.
        if type(case.body.get(name)) in (int, float)
    }
    case.body = DEFAULTS.get(case.operation.path, {}) | case.body | lowered


def mend(path: str, body: dict) -> None:
    """Makes of a body that its schema allows one that the server should accept."""
    if path == "/v1/responses":
        mend_response(body)
    mend_conversation(body)
    mend_sampling(path, body)
    mend_routing(body)
    match path:
        case "/v1/routing/analyze" if "texts" in body:
            keep(body, "texts", "model", "layers", "tokens", "ablations")
        case "/v1/routing/analyze" if "text" in body or "messages" not in body:
            body.setdefault("text", "Once upon a time")
            keep(body, "text", "model", "layers", "tokens", "ablations")
        case "/tokenize" if "prompt" in body or "messages" not in body:
            body.setdefault("prompt", "Hello")
            keep(body, "prompt", "model", "add_special_tokens")
        case "/tokenize":
            body.pop("add_special_tokens", None)
    for text in body.get("texts", []) + body.get("ablations", []):
        mend_conversation(text)
        mend_routing(text)
        if "text" in text:
            keep(text, "text", "name")
        elif "moe" not in text and "messages" not in text:
            text["text"] = "Once"


def keep(body: dict, *names: str) -> None:
    for name in set(body) - set(names):
        del body[name]


def mend_conversation(body: dict) -> None:
    """Speakers take turns, arguments are objects, chosen tools are offered, schemas are schemas."""
    for name in ["messages", "input"]:
        if isinstance(body.get(name), list):
            body[name] = in_turn(body[name])
    functions = [tool.get("function", tool) for tool in body.get("tools", [])]
    for function in functions:
        function.update(dict.fromkeys({"parameters", "input_schema"} & set(function), JSON_SCHEMA))
    names = [function["name"] for function in functions]
    match body.get("tool_choice"):
        case "required" | {"type": "any"} if not names:
            del body["tool_choice"]
        case {"type": "function"} | {"type": "allowed_tools"} | {"type": "tool"} if not names:
            del body["tool_choice"]
        case {"type": "function", "function": function}:
            function["name"] = names[0]
        case {"type": "allowed_tools", "allowed_tools": {"tools": tools}}:
            tools[:] = [{"type": "function", "function": {"name": names[0]}}]
        case {"type": "tool"} as choice:
            choice["name"] = names[0]
        case {"type": _} as choice:
            choice.pop("name", None)


def in_turn(messages: list[dict]) -> list[dict]:
    """Of messages those that a chat template takes: one of the system, then user and assistant in turn."""
    kept = []
    for message in messages:
        last = kept[-1]["role"] if kept else None
        follows = {None: ["system", "developer", "user"], "user": ["assistant"]}.get(last, ["user"])
        if message.get("role") in follows:
            kept.append(message)
            message["content"] = message.get("content") or "Hello"
            for call in message.get("tool_calls", []):
                call["function"]["arguments"] = "{}"
    has_user = any(message["role"] == "user" for message in kept)
    return kept if has_user else [{"role": "user", "content": "Hello"}]


def mend_sampling(path: str, body: dict) -> None:
    """Fields that go only with others, or not with others."""
    if not body.get("stream"):
        for name in ["stream_options", "return_progress", "sse_ping_interval"]:
            body.pop(name, None)
    else:
        for name in ["prompt_logprobs", "best_of"]:
            body.pop(name, None)
    if body.get("sse_ping_interval") == 0:
        body["sse_ping_interval"] = 1
    if "stream_options" in body:
        body["stream_options"]["include_usage"] = True
    if "top_logprobs" in body and path == "/v1/chat/completions":
        body["logprobs"] = True
    if "max_completion_tokens" in body:
        body.pop("max_tokens", None)
    if "min_tokens" in body:
        body["min_tokens"] = min(body["min_tokens"], 1)
        body["max_tokens" if path != "/v1/responses" else "max_output_tokens"] = 4
        body.pop("max_completion_tokens", None)
    if "best_of" in body:
        body["best_of"] = max(body["best_of"], body.get("n", 1))
    if body.get("echo") and "logprobs" in body and body.get("stream"):
        body["echo"] = False
    if "logit_bias" in body:
        body["logit_bias"] = {str(index): bias for index, bias in enumerate(body["logit_bias"].values())}
    forms = [name for name in ["response_format", "regex", "choice", "grammar"] if name in body]
    for name in forms[1:]:
        del body[name]
    if "grammar" in body:
        body["grammar"] = GRAMMAR
    if "json_schema" in body.get("response_format", {}):
        body["response_format"]["json_schema"]["schema"] = JSON_SCHEMA


def mend_routing(body: dict) -> None:
    """Layers ascend, and a router is left enough experts to choose from."""
    overrides = body.get("moe", [])
    overrides = overrides if isinstance(overrides, list) else [overrides]
    for holder in [body, body.get("routing"), *overrides]:
        if isinstance(holder, dict) and "layers" in holder:
            holder["layers"] = sorted(holder["layers"]) or [0]
    for index, override in enumerate(overrides):
        override.pop("replay", None)
        override["ban"] = override.get("ban", [])[:2]
        allowed = [expert for expert in override.get("force", []) if expert not in override["ban"]]
        override["force"] = allowed[:1]
        override["top_k"] = min(override.get("top_k", 2), 4)
        if len(overrides) > 1:
            override["layers"] = [index]


def mend_response(body: dict) -> None:
    body.pop("previous_response_id", None)
    body.get("text", {}).pop("format", None)
    function = {"type": "function", "name": "f", "parameters": JSON_SCHEMA}
    body["tools"] = [function] if body.get("tools") else []
    if isinstance(body.get("tool_choice"), dict) or not body["tools"]:
        body.pop("tool_choice", None)


def draw(cases: object, num_cases: int, seed: int, probe: Callable[..., None]) -> None:
    """Probes this many cases, then smaller ones if one failed."""
    settings = hypothesis.settings(
        max_examples=num_cases,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    is_mended = hypothesis.strategies.sampled_from([True, True, True, False])
    hypothesis.seed(seed)(settings(hypothesis.given(cases, is_mended)(probe)))()


class Statuses:
    """How many cases of each operation were answered with which status."""

    def __init__(self) -> None:
        self.by_operation: defaultdict[str, Counter[int]] = defaultdict(Counter)

    def total(self) -> int:
        return sum(statuses.total() for statuses in self.by_operation.values())

    def accepted(self) -> int:
        counts = [statuses.items() for statuses in self.by_operation.values()]
        return sum(count for pairs in counts for status, count in pairs if status < 300)

    def table(self) -> str:
        lines = [f"{self.total()} cases, {self.accepted()} of them accepted"]
        for label, statuses in self.by_operation.items():
            split = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
            lines.append(f"{label:40} {split}")
        return "\n".join(lines)


def test_nothing_that_the_description_allows_or_forbids_is_a_server_error(server: Server) -> None:
    schema = schemathesis.openapi.from_dict(server.get("/openapi.json").json())
    schema.config.update(base_url=server.url)
    operations = [operation.ok() for operation in schema.get_all_operations()]
    statuses = Statuses()
    failures = []

    def probe_valid(case: schemathesis.Case, is_mended: bool) -> None:
        if is_mended and isinstance(case.body, dict):
            mend(case.operation.path, case.body)
        probe(case, is_mended)

    def probe(case: schemathesis.Case, _: bool) -> None:
        bound(case)
        answer = case.call(timeout=60)
        statuses.by_operation[case.operation.label][answer.status_code] += 1
        assert answer.status_code < 500, f"{case.as_curl_command()}\n{answer.status_code} {answer.text}"

    def draw_both(operation: object, num_cases: int, seed: int) -> None:
        for mode in schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE:
            is_valid = mode == schemathesis.GenerationMode.POSITIVE
            cases = operation.as_strategy(generation_mode=mode)
            try:
                draw(cases, num_cases // 2, seed, probe_valid if is_valid else probe)
            except hypothesis.errors.Unsatisfiable:
                pass  # Without a body and parameters, nothing is wrong.
            except AssertionError as failure:
                failures.append(f"{operation.label}: {failure}")

    # What has a body is worth drawing more than once in a while.
    weights = [10 if operation.body else 1 for operation in operations]
    for operation, weight in zip(operations, weights, strict=True):
        draw_both(operation, max(2, NUM_CASES * weight // sum(weights)), SEED)
    # Some operations have fewer cases than their share; others make up for them.
    with_body = [operation for operation in operations if operation.body]
    for seed in range(SEED + 1, SEED + 20):
        missing = NUM_CASES - statuses.total()
        if missing <= 0 or failures:
            break
        for operation in with_body:
            draw_both(operation, 2 * (missing // (2 * len(with_body)) + 1), seed)
    print(statuses.table())
    assert not failures, "\n\n".join(failures)
    assert statuses.total() >= NUM_CASES
    assert statuses.accepted() >= MIN_ACCEPTED_SHARE * statuses.total()
