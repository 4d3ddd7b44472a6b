"""Quantised weights: what they cost in answers, and the file that spares the next start the work."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from scores import points_lost
from windrose import REPOSITORY, Server

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.mark.parametrize(("weights", "points"), [("q8", 0.5), ("q4", 2.0)])
def test_scores_are_kept(server: Server, start, weights: str, points: float) -> None:
    """All skills together lose at most so many points of a hundred against bf16."""
    assert points_lost(server, start("--weights", weights), weights) <= points


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The demo model as a directory of its own."""
    return shutil.copytree(REPOSITORY / "crates/demo/model", tmp_path / "model")


def answer_and_log(start, *flags: str) -> tuple[str, str]:
    """What a fresh server says, with the log-probabilities of its tokens, and what it logged."""
    server: Server = start(*flags)
    choice = (
        server.client()
        .chat.completions.create(model="model", messages=QUESTION, temperature=0, logprobs=True)
        .choices[0]
    )
    assert server.stop() == 0
    return choice.model_dump_json(), server.log.read_text()


def test_the_second_start_takes_the_first_ones_weights(start, model: Path) -> None:
    flags = ("--model", str(model), "--weights", "q8")
    file = model / "windrose-q8.packed"
    first, log = answer_and_log(start, *flags)
    assert "quantised weights written" in log and file.exists()
    made = file.read_bytes()

    second, log = answer_and_log(start, *flags)
    assert "quantised weights found" in log and "written" not in log
    assert second == first

    half = len(made) // 2
    for damaged in (made[:half], made[:half] + bytes([made[half] ^ 1]) + made[half + 1 :], b""):
        file.write_bytes(damaged)
        again, log = answer_and_log(start, *flags)
        assert "made anew" in log and file.read_bytes() == made
        assert again == first
    assert [path.name for path in model.glob(".*")] == []


def test_weights_of_another_model_are_not_taken(start, model: Path, tmp_path: Path) -> None:
    flags = ("--model", str(model), "--weights", "q4", "--packed-dir", str(tmp_path / "packed"))
    answer_and_log(start, *flags)
    file = tmp_path / "packed/model.windrose-q4.packed"
    weights = model / "model.safetensors"
    contents = bytearray(weights.read_bytes())
    half = len(contents) // 2
    contents[half::2] = bytes(byte ^ 1 for byte in contents[half::2])
    stale = file.read_bytes()
    weights.write_bytes(contents)
    _, log = answer_and_log(start, *flags)
    assert "made anew" in log and file.read_bytes() != stale
