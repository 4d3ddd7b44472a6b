"""The server on the fake driver of kernels/emulator, in the folder that WINDROSE_FAKE_DRIVER names."""

from __future__ import annotations

import os

import pytest
from scores import points_lost
from windrose import Server

# The emulator answers some hundred times as slowly as a processor.
ONE_PROMPT_OF = 5


@pytest.fixture(scope="session")
def gpu() -> dict[str, str]:
    """The environment in which there is a GPU."""
    folder = os.environ.get("WINDROSE_FAKE_DRIVER")
    if not folder:
        pytest.skip("WINDROSE_FAKE_DRIVER names no folder with a fake driver")
    return {"LD_LIBRARY_PATH": folder, "FAKE_CUDA_CAPABILITY": "90", "FAKE_CUDA_MULTIPROCESSORS": "4"}


@pytest.mark.parametrize(("weights", "points"), [("bf16", 1.0), ("fp8", 3.0)])
def test_scores_are_kept(server: Server, start, gpu: dict[str, str], weights: str, points: float) -> None:
    """Many requests at once are answered as the processor does, but for what rounding moves."""
    on_gpu: Server = start("--device", "cuda", "--weights", weights, env=gpu)
    assert points_lost(server, on_gpu, f"{weights} on a GPU", every=ONE_PROMPT_OF) <= points
