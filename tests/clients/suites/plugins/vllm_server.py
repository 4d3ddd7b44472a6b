"""Windrose in the place of `vllm serve`, for vLLM's OpenAI entrypoint tests, without vLLM and PyTorch.

`tests.utils` is a module of ours, whose `RemoteOpenAIServer` starts our binary under the name of the model
that a test wants, with the settings nearest to what it passes. Its tokenizer and its vocabulary are those of
our model. All else of `vllm` and `torch` that a test module imports is a placeholder, enough to be imported
and to fail when it is used.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import httpx
import windrose

logs = Path(tempfile.mkdtemp(prefix="vllm-"))
PLACEHOLDERS = ("vllm", "torch", "pybase64")


class Placeholder(type):
    """A class for every name: it can be imported, subclassed and annotated with, but not made."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Placeholder(name, (), {"__module__": cls.__module__})

    def __call__(cls, *arguments: object, **options: object) -> object:
        raise NotImplementedError(f"{cls.__module__}.{cls.__name__} is a placeholder")


class PlaceholderModule(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Placeholder(name, (), {"__module__": self.__name__})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a placeholder for every module below PLACEHOLDERS."""

    def find_spec(self, name: str, path: object, target: object = None) -> object:
        if name.partition(".")[0] in PLACEHOLDERS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return PlaceholderModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        for name, value in REAL.get(module.__name__, {}).items():
            setattr(module, name, value)


class RemoteOpenAIServer:
    """Theirs as far as tests use it: a context in which the server runs, its addresses and its clients."""

    DUMMY_API_KEY = "token-abc123"
    current: RemoteOpenAIServer

    def __init__(
        self,
        model: str,
        vllm_serve_args: list[str],
        *,
        env_dict: dict[str, str] | None = None,
        **ignored: object,
    ) -> None:
        log = logs / str(len(list(logs.iterdir())))
        key = (env_dict or {}).get("VLLM_API_KEY")
        keys = ["--api-keys", key] if key else []
        self.server = windrose.Server(log, "--served-model-name", model, *flags(vllm_serve_args), *keys)
        RemoteOpenAIServer.current = self

    def __enter__(self) -> RemoteOpenAIServer:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.server.stop() == 0

    def url_for(self, *parts: str) -> str:
        return "/".join([self.server.url, *(part.strip("/") for part in parts if part)])

    def get_client(self, **options: object) -> object:
        return self.server.client(api_key=self.DUMMY_API_KEY, **options)

    def get_async_client(self, **options: object) -> object:
        return self.server.async_client(api_key=self.DUMMY_API_KEY, **options)


def flags(arguments: list[str]) -> list[str]:
    """The nearest settings of ours; what has none (dtypes, eager mode, parsers of tool calls) is left out."""
    chosen = ["--drain-grace-s", "0"]
    for name, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if name in ("--max-model-len", "--max_model_len"):
            chosen += ["--max-model-len", str(min(int(value), 4096))]
        elif name in ("--max-num-seqs", "--max-num-batched-tokens"):
            chosen += [name, value]
    return chosen


class Tokenizer:
    """Our model's, as the running server has it."""

    def encode(self, text: str) -> list[int]:
        return self._ask("tokenize", {"prompt": text})["tokens"]

    def decode(self, tokens: list[int]) -> str:
        return self._ask("detokenize", {"tokens": tokens})["prompt"]

    def _ask(self, path: str, body: dict) -> dict:
        answer = httpx.post(RemoteOpenAIServer.current.url_for(path), json=body)
        answer.raise_for_status()
        return answer.json()


class ModelConfig:
    def __init__(self, **ignored: object) -> None:
        pass

    def get_vocab_size(self) -> int:
        report = subprocess.run([windrose.BINARY, "inspect"], capture_output=True, text=True, check=True)
        return int(next(line.split()[1] for line in report.stdout.splitlines() if "vocabulary" in line))


REAL = {
    "vllm.tokenizers": {"get_tokenizer": lambda *names, **options: Tokenizer()},
    "vllm.config": {"ModelConfig": ModelConfig},
    "vllm.transformers_utils.repo_utils": {
        "hf_api": lambda: types.SimpleNamespace(snapshot_download=lambda **repository: "nothing-downloaded")
    },
    "torch": {"long": "int64", "iinfo": lambda kind: types.SimpleNamespace(min=-(2**63), max=2**63 - 1)},
}

sys.meta_path.insert(0, Finder())
utils = types.ModuleType("tests.utils")
utils.RemoteOpenAIServer = RemoteOpenAIServer
utils.ROCM_EXTRA_ARGS, utils.ROCM_ENV_OVERRIDES = [], {}
sys.modules["tests.utils"] = utils
