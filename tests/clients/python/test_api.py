"""The official OpenAI client against the real binary: shapes, parameters, errors."""

from __future__ import annotations

import math
import re

import httpx
import openai
import pytest
from windrose import REPOSITORY, Server

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]


def ask(server: Server, **options: object) -> openai.types.chat.ChatCompletion:
    settings = {"model": "windrose-demo", "messages": CAPITAL, "temperature": 0}
    return server.client().chat.completions.create(**(settings | options))


def test_a_question_is_answered(server: Server) -> None:
    answer = ask(server)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model == "windrose-demo"
    assert answer.system_fingerprint


def test_a_stream_is_the_same_answer(server: Server) -> None:
    whole = ask(server)
    chunks = list(ask(server, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        "stop"
    ]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert not chunks[-1].choices
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({(c.id, c.created, c.model) for c in chunks}) == 1


def test_models_are_listed(server: Server) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["windrose-demo"]
    assert client.models.retrieve("windrose-demo").id == "windrose-demo"


@pytest.mark.parametrize(
    "prompt",
    ["Once upon a time", ["Once upon a time", "def add(a, b):"], [1, 300, 301], [[1, 300], [1, 301]]],
    ids=["text", "texts", "tokens", "token lists"],
)
def test_completions_take_every_kind_of_prompt(server: Server, prompt: object) -> None:
    answer = server.client().completions.create(
        model="windrose-demo", prompt=prompt, max_tokens=5, temperature=0
    )
    num_prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    assert [choice.index for choice in answer.choices] == list(range(num_prompts))
    assert answer.usage.completion_tokens <= 5 * num_prompts


def test_echo_and_logprobs_score_the_prompt(server: Server) -> None:
    answer = server.client().completions.create(
        model="windrose-demo", prompt="Once upon a time", max_tokens=3, echo=True, logprobs=2, temperature=0
    )
    choice = answer.choices[0]
    assert choice.text.startswith("Once upon a time")
    logprobs = choice.logprobs
    # The beginning of the sequence is a token of the prompt, though not of its text; nothing precedes it.
    assert "".join(logprobs.tokens) == "<s>" + choice.text
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert all(len(top) >= 2 for top in logprobs.top_logprobs[1:])


def test_chat_logprobs_are_sorted_and_spell_the_answer(server: Server) -> None:
    choice = ask(server, logprobs=True, top_logprobs=4).choices[0]
    spelled = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
    assert spelled.decode() == choice.message.content
    for entry in choice.logprobs.content:
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert len(values) == 4
        # Greedy: the token taken is the likeliest.
        assert entry.token == entry.top_logprobs[0].token


def test_n_choices_differ_and_seeds_repeat(server: Server) -> None:
    story = [{"role": "user", "content": "Tell me a short story."}]
    first = ask(server, messages=story, temperature=1.5, n=4, seed=7, max_tokens=24)
    again = ask(server, messages=story, temperature=1.5, n=4, seed=7, max_tokens=24)
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) > 1
    assert texts == [choice.message.content for choice in again.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]


def test_stop_strings_end_the_answer_and_are_not_shown(server: Server) -> None:
    whole = ask(server).choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]
    expected = whole[: whole.index(stop)]
    assert ask(server, stop=[stop]).choices[0].message.content == expected
    streamed = ask(server, stop=stop, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed if c.choices) == expected


def test_max_tokens_min_tokens_and_bans(server: Server) -> None:
    short = ask(server, max_tokens=2)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 2)
    forced = ask(server, max_tokens=40, extra_body={"min_tokens": 40})
    assert forced.usage.completion_tokens == 40
    endless = ask(server, max_tokens=60, extra_body={"ignore_eos": True})
    assert endless.usage.completion_tokens == 60


def test_logit_bias_bans_a_token(server: Server) -> None:
    tokenize = httpx.post(server.url + "/tokenize", json={"prompt": "Paris", "add_special_tokens": False})
    bias = {str(token): -100 for token in tokenize.json()["tokens"]}
    assert "Paris" not in ask(server, logit_bias=bias, max_tokens=20).choices[0].message.content


def test_tokenize_and_detokenize_are_inverse(server: Server) -> None:
    text = "Grüße aus Köln, café à la crème — 東京 🦊"
    tokens = httpx.post(server.url + "/tokenize", json={"prompt": text}).json()
    assert tokens["count"] == len(tokens["tokens"])
    back = httpx.post(server.url + "/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert back["prompt"] == text


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
        ({"extra_body": {"no_such_field": 1}}, "no_such_field"),
    ],
)
def test_bad_parameters_are_refused_by_name(server: Server, options: dict, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(server, **options)
    assert refused.value.body["type"] == "invalid_request_error"
    assert refused.value.body["param"].replace("/", ".") == param


def test_the_context_is_bounded(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(server, messages=[{"role": "user", "content": "word " * 9000}])
    assert refused.value.code == "context_length_exceeded"
    assert refused.value.body["message"].startswith("This model's maximum context length is")


def test_unknown_models_routes_and_methods(server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        ask(server, model="gpt-9")
    assert missing.value.code == "model_not_found"
    assert server.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    wrong_method = server.get("/v1/chat/completions")
    assert wrong_method.status_code == 405
    assert "POST" in wrong_method.headers["allow"]


def test_api_keys_guard_the_api(start, tmp_path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first-key\nsecond-key\n")
    server = start("--api-keys-file", str(keys))
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="wrong").models.list()
    assert list(server.client(api_key="second-key").models.list())
    assert server.get("/livez").status_code == 200


def test_logprobs_are_probabilities(server: Server) -> None:
    first = ask(server, logprobs=True, top_logprobs=20).choices[0].logprobs.content[0]
    total = sum(math.exp(top.logprob) for top in first.top_logprobs)
    assert 0.5 < total <= 1.0001


def documented_parameters() -> list[tuple[str, str]]:
    """Every parameter of the README's table with each endpoint that it is ticked for."""
    rows = re.findall(
        r"^\| `(\w+)` \| (✓?) ?\| (✓?) ?\|", (REPOSITORY / "README.md").read_text(), re.MULTILINE
    )
    chat = [(name, "/v1/chat/completions") for name, in_chat, _ in rows if in_chat]
    return chat + [(name, "/v1/completions") for name, _, in_completions in rows if in_completions]


@pytest.mark.parametrize(("name", "path"), documented_parameters())
def test_every_documented_parameter_is_known(server: Server, name: str, path: str) -> None:
    """An object is a wrong value for most of them, but no known parameter is called unknown."""
    required = {"messages": CAPITAL} if "chat" in path else {"prompt": "Hello"}
    answer = httpx.post(server.url + path, json=required | {"max_tokens": 1} | {name: {}})
    assert answer.status_code in (200, 400)
    assert answer.json().get("error", {}).get("code") != "unknown_parameter", answer.text
