"""Routing through the API: recorded as `transformers` routes, steered, replayed, analysed, counted."""

from __future__ import annotations

import base64
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file
from windrose import REPOSITORY, Server

CHAT = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
TEXTS = {"prose": "The old man walked down to the river.", "sums": "12 + 30 = 42. 7 + 8 = 15."}
NUM_LAYERS, NUM_EXPERTS = 4, 8


def post(server: Server, path: str, **body: object) -> dict:
    response = httpx.post(server.url + path, json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def chat(server: Server, **extra: object) -> dict:
    return post(server, "/v1/chat/completions", **CHAT, **extra)["choices"][0]


def refused(server: Server, **extra: object) -> dict:
    response = httpx.post(server.url + "/v1/chat/completions", json=CHAT | extra, timeout=10)
    assert response.status_code == 400, response.text
    return response.json()["error"]


def unpack(routing: dict) -> dict:
    """The JSON form of a record in base64."""
    shape = routing["shape"]
    experts = np.frombuffer(base64.b64decode(routing["experts"]), "<u2").reshape(shape)
    weights = np.frombuffer(base64.b64decode(routing["weights"]), "<f4").reshape(shape)
    chosen = experts != 0xFFFF
    rows = range(shape[0]), range(shape[1])

    def entries(values: np.ndarray) -> list:
        return [[values[t, layer][chosen[t, layer]].tolist() for layer in rows[1]] for t in rows[0]]

    return {"start": routing["start"], "layers": routing["layers"]} | {
        "experts": entries(experts),
        "weights": entries(weights),
    }


def by_id(experts: object, weights: object) -> tuple[np.ndarray, np.ndarray]:
    """Experts in ascending order, and their weights."""
    order = np.argsort(np.array(experts))
    return np.take_along_axis(np.array(experts), order, -1), np.take_along_axis(np.array(weights), order, -1)


def test_routing_is_that_of_transformers(server: Server) -> None:
    """In every layer, for every token: its experts in f32, or with bf16 operands where that decides."""
    recorded = load_file(REPOSITORY / "tests/fixtures/demo/routing.safetensors")
    num_choices = num_rounded = num_others = 0
    worst_weight = 0.0
    for index in range(sum(name.endswith(".tokens") for name in recorded)):
        tokens = recorded[f"{index}.tokens"].tolist()
        options = {"prompt": True, "encoding": "base64"}
        choice = post(server, "/v1/completions", prompt=tokens, max_tokens=1, routing=options)["choices"][0]
        routing = unpack(choice["routing"])
        assert (routing["start"], routing["layers"]) == (0, list(range(NUM_LAYERS)))
        got, got_weights = by_id(routing["experts"], routing["weights"])
        same, errors = [], []
        for oracle in (f"{index}.", f"{index}.rounded."):
            experts, weights = by_id(recorded[oracle + "experts"], recorded[oracle + "weights"])
            assert got.shape == experts.shape
            same.append((got == experts).all(-1))
            errors.append(np.where(same[-1], np.abs(got_weights - weights).max(-1), np.inf))
        num_choices += same[0].size
        num_rounded += int((~same[0] & same[1]).sum())
        num_others += int((~same[0] & ~same[1]).sum())
        error = np.minimum(*errors)
        worst_weight = max(worst_weight, float(error[np.isfinite(error)].max()))
    print(f"{num_choices} choices, {num_rounded} as rounded operands decide, {num_others} between equals")
    print(f"gate weights within {worst_weight:.4f}")
    assert num_rounded <= num_choices / 100 and num_others <= num_choices / 1000
    assert worst_weight < 0.03


def test_streams_carry_the_same_routing_beside_their_tokens(server: Server) -> None:
    for options in (True, {"prompt": True}, {"layers": [1, 3], "encoding": "base64"}):
        whole = chat(server, routing=options, max_tokens=24)["routing"]
        stream = server.client().chat.completions.create(
            model="windrose-demo", stream=True, max_tokens=24, extra_body={"routing": options}, **CHAT
        )
        records = [
            c.choices[0].model_extra["routing"] for c in stream if c.choices[0].model_extra.get("routing")
        ]
        if "shape" in whole:
            whole, records = unpack(whole), [unpack(record) for record in records]
        assert len(records) > 3
        next_position = whole["start"]
        for record in records:
            assert record["start"] == next_position and record["layers"] == whole["layers"]
            next_position += len(record["experts"])
        for name in ("experts", "weights"):
            assert list(chain.from_iterable(record[name] for record in records)) == whole[name]
        assert all(abs(sum(weights) - 1) < 1e-6 for token in whole["weights"] for weights in token)


def test_a_record_has_an_entry_for_each_token_that_was_read(server: Server) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 7, "temperature": 0, "return_token_ids": True}
    choice = post(server, "/v1/completions", routing=True, **body)["choices"][0]
    prompt_len = len(choice["prompt_token_ids"])
    assert choice["routing"]["start"] == prompt_len - 1
    assert len(choice["routing"]["experts"]) == len(choice["token_ids"])
    prompted = post(server, "/v1/completions", routing={"prompt": True}, **body)["choices"][0]["routing"]
    assert (prompted["start"], prompted["experts"][prompt_len - 1 :]) == (0, choice["routing"]["experts"])
    assert "routing" not in post(server, "/v1/completions", **body)["choices"][0]


def test_choices_and_prefix_hits_are_recorded_too(server: Server) -> None:
    body = CHAT | {"temperature": 1.0, "seed": 3, "n": 3, "max_tokens": 8, "routing": {"prompt": True}}
    first = post(server, "/v1/chat/completions", **body)
    again = post(server, "/v1/chat/completions", **body)
    assert [c["routing"] for c in first["choices"]] == [c["routing"] for c in again["choices"]]
    assert [c["routing"]["start"] == 0 for c in first["choices"]] == [True, False, False]
    cached = chat(server, routing=True, max_tokens=4)
    assert cached["routing"]["start"] == first["usage"]["prompt_tokens"] - 1


@pytest.mark.parametrize("encoding", ["json", "base64"])
def test_a_replayed_routing_gives_the_same_tokens(server: Server, encoding: str) -> None:
    plain = chat(server, max_tokens=32)
    options = {"prompt": True, "encoding": encoding}
    scored = {"logprobs": True, "max_tokens": 32}
    random = chat(server, routing=options, moe={"random": {"seed": 11}, "top_k": 3}, **scored)
    assert random["message"]["content"] != plain["message"]["content"], "random routers change the text"
    replayed = chat(server, routing=options, moe={"replay": random["routing"]}, **scored)
    assert replayed == random, "text, log-probabilities and routing, bit for bit"


def test_overrides_do_what_they_say(server: Server) -> None:
    def experts(**moe: object) -> np.ndarray:
        routing = chat(server, max_tokens=12, routing={"prompt": True}, moe=moe)["routing"]
        return np.array(routing["experts"])

    assert experts(top_k=1).shape[-1] == 1
    assert experts(top_k=4).shape[-1] == 4
    banned = experts(ban=[0, 3, 4])
    assert not np.isin(banned, [0, 3, 4]).any()
    assert (experts(force=[5]) == 5).any(-1).all()
    assert (experts(force=[5, 6], top_k=2).reshape(-1, 2).sum(-1) == 11).all()
    drawn = experts(random={"seed": 1})
    shares = np.bincount(drawn.ravel(), minlength=NUM_EXPERTS) / drawn.size
    assert shares.max() < 0.25, shares
    assert (drawn == experts(random={"seed": 1})).all()

    options = {"max_tokens": 12, "routing": {"prompt": True}}
    apart = chat(server, moe=[{"layers": [2], "top_k": 1}], **options)["routing"]
    assert [len(ids) for ids in apart["experts"][0]] == [2, 2, 1, 2]
    flat = chat(server, moe={"temperature": 100}, **options)["routing"]
    assert abs(np.array(flat["weights"]) - 0.5).max() < 0.1


def test_overrides_leave_their_neighbours_alone(server: Server) -> None:
    """Plain and steered requests at the same time, each as it is alone."""
    overrides = [None, {"top_k": 1}, None, {"ban": [7, 4]}, {"random": {"seed": 5}}, None, {"top_k": 6}, {}]
    bodies = [{"logprobs": True, "max_tokens": 40, "moe": moe} for moe in overrides]
    alone = [chat(server, **body) for body in bodies]
    assert alone[0] == alone[7], "no override at all is no change at all"
    with ThreadPoolExecutor(len(bodies)) as pool:
        for _ in range(3):
            assert list(pool.map(lambda body: chat(server, **body), bodies)) == alone


def test_nonsense_is_refused_by_path(server: Server) -> None:
    for extra, param in [
        ({"routing": "yes"}, "routing"),
        ({"routing": {"layers": [9]}}, "routing.layers"),
        ({"moe": {"ban": list(range(8))}}, "moe.ban"),
        ({"moe": {"top_k": 9}}, "moe.top_k"),
        ({"moe": {"force": [1], "ban": [1]}}, "moe.force"),
        ({"moe": {"unknown": 1}}, "moe.unknown"),
        ({"moe": {"replay": {"experts": [[[0]]], "weights": [[[1.0]]]}}}, "moe.replay.experts[0]"),
        (
            {"moe": {"replay": {"shape": [1, 4, 2], "encoding": "base64", "experts": "?"}}},
            "moe.replay.experts",
        ),
    ]:
        assert refused(server, **extra)["param"] == param, extra


def test_texts_are_analysed(server: Server) -> None:
    texts = [{"name": name, "text": text} for name, text in TEXTS.items()]
    texts.append({"name": "chat", "messages": CHAT["messages"]})
    overrides = {"random": {"random": {"seed": 0}}, "top-1": {"top_k": 1}, "none": {}}
    ablations = [{"name": name, "moe": moe} for name, moe in overrides.items()]
    analysis = post(server, "/v1/routing/analyze", texts=texts, tokens=True, ablations=ablations)
    assert (analysis["num_experts"], analysis["top_k"]) == (NUM_EXPERTS, 2)
    for text in analysis["texts"]:
        assert [layer["layer"] for layer in text["layers"]] == list(range(NUM_LAYERS))
        for layer in text["layers"]:
            assert math.isclose(sum(layer["shares"]), 1) and math.isclose(sum(layer["gate_shares"]), 1)
            assert 1 <= layer["entropy_bits"] <= 3 and 1 <= layer["imbalance"] <= 4
            assert 0 <= layer["first_choice_repetition"] <= layer["any_choice_repetition"] <= 1
            pairs = np.array(layer["co_activation"])
            assert (pairs == pairs.T).all() and math.isclose(np.trace(pairs), 2)
        losses = [token["loss"] for token in text["tokens"]]
        assert losses[0] is None and math.isclose(text["loss"], np.mean(losses[1:]), rel_tol=1e-6)
        by_name = {ablation["name"]: ablation["loss"] for ablation in text["ablations"]}
        assert by_name["none"] == text["loss"], "overrides of nothing change no bit"
        assert by_name["random"] > text["loss"]
    for layer in analysis["divergence"]:
        bits = np.array(layer["bits"])
        assert (bits == bits.T).all() and (np.diag(bits) == 0).all() and bits[0, 1] > 0

    # The same losses as a completion's, and the same shares as its record's.
    body = {
        "prompt": TEXTS["prose"],
        "max_tokens": 1,
        "echo": True,
        "logprobs": 0,
        "routing": {"prompt": True},
    }
    choice = post(server, "/v1/completions", **body)["choices"][0]
    prose = analysis["texts"][0]
    scores = choice["logprobs"]["token_logprobs"][1 : prose["num_tokens"]]
    assert np.allclose([token["loss"] for token in prose["tokens"]][1:], -np.array(scores))
    experts = np.array(choice["routing"]["experts"])[:, 0]
    shares = np.bincount(experts.ravel(), minlength=NUM_EXPERTS) / experts.size
    assert np.allclose(shares, prose["layers"][0]["shares"])

    single = post(server, "/v1/routing/analyze", text="Hi", layers=[2])
    assert [layer["layer"] for layer in single["texts"][0]["layers"]] == [2] and single["divergence"] == []


def test_routers_are_counted(start) -> None:
    server = start()
    prompt = "A quiet morning in the village."
    num_tokens = post(server, "/tokenize", prompt=prompt)["count"]
    post(server, "/v1/completions", prompt=prompt, max_tokens=1, routing={"prompt": True})
    for layer in map(str, range(NUM_LAYERS)):
        assert server.metric("windrose_expert_tokens_total", layer=layer) == 2 * num_tokens
        assert math.isclose(
            server.metric("windrose_expert_gate_weight_total", layer=layer), num_tokens, rel_tol=1e-4
        )
        assert server.metric("windrose_routing_steps_total", layer=layer) == 1
        assert 2 <= server.metric("windrose_routing_distinct_experts_total", layer=layer) <= NUM_EXPERTS
        assert 1 <= server.metric("windrose_routing_imbalance_total", layer=layer) <= 4
        assert 1 <= server.metric("windrose_routing_entropy_bits_total", layer=layer) <= 3
