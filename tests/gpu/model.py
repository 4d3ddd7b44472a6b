#!/usr/bin/env python3
"""Mixtral 8x7B with random weights on a GPU: every verb right, then decode steps, prompts, a loaded server.

usage: model.py WINDROSE [--conformance BINARY] [--json FILE] [--tiny]

WINDROSE is the binary, built with kernels for the GPU in it; BINARY is the conformance test of crates/cuda,
as `cargo test --release -p windrose-cuda --test conformance --no-run` names it. Neither needs Rust to run.
Layers are left out until the weights in bf16 fit in seven tenths of the memory; shares of limits do not
depend on it. --tiny takes a model that the fake driver of kernels/emulator runs in
seconds, to try this script.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request

MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "sliding_window": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
}
LAYER_BYTES = 2 * (8 * 3 * 4096 * 14336 + 4096 * (4096 + 2 * 1024 + 4096))


def gpu_memory_bytes():
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) << 20


def write_config(directory, tiny):
    config = MIXTRAL_8X7B | (TINY if tiny else {})
    if not tiny:
        # All layers of bf16 fit an H200, and leave 30 GB for the cache.
        fitting = int(gpu_memory_bytes() * 0.7) // LAYER_BYTES
        config["num_hidden_layers"] = min(config["num_hidden_layers"], fitting)
    with open(os.path.join(directory, "config.json"), "w") as file:
        json.dump(config, file)
    return config["num_hidden_layers"]


def bench(windrose, model, weights, tiny):
    """Prompts and decode steps of one format."""
    sizes = ["8", "1,3", "4"] if tiny else ["1024", "1,32,128", "32"]
    options = [
        *("--prompt-len", sizes[0], "--num-seqs", sizes[1], "--output-len", sizes[2]),
        *("--model", model, "--dummy-weights", "--device", "cuda", "--weights", weights, "--json", "-"),
    ]
    done = subprocess.run([windrose, "bench", *options], capture_output=True, text=True)
    print(done.stderr, flush=True)
    return json.loads(done.stdout) if done.returncode == 0 else None


def compute_seconds(url):
    """Seconds that the server's device has computed, by its own clock."""
    with urllib.request.urlopen(f"{url}/metrics") as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("windrose_compute_seconds_total"))


def bench_load(windrose, url, clients, prompt_len, output_len):
    """So many requests at once; with the share of the time that the device computed."""
    load = ["--concurrency", clients, "--num-requests", clients, "--warmup", 0]
    load += ["--prompt-len", prompt_len, "--output-len", output_len]
    before = compute_seconds(url)
    command = [windrose, "bench", "serve", "--url", url, *map(str, load), "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stderr, flush=True)
        return None
    figures = json.loads(done.stdout)
    figures["busy_share"] = (compute_seconds(url) - before) / figures["duration_s"]
    print(f"{done.stderr}the device computed {figures['busy_share']:.1%} of the time\n", flush=True)
    return figures


@contextlib.contextmanager
def serving(windrose, *options):
    """A server of its own, on any port: its address, and the seconds that its start took."""
    begin = time.monotonic()
    command = [windrose, "serve", "--port", "0", *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        words = server.stdout.readline().split()
        if not words:
            raise RuntimeError(f"{' '.join(command)}: did not start")
        yield words[-1].removesuffix("/"), time.monotonic() - begin
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


def bench_server(windrose, model, kv_cache, tiny):
    """What a server of fp8 weights takes to start, and gives one client, and as many as it takes at once."""
    loads = [(1, 16, 300), (32, 1000, 200), (256, 1000, 1000)] if not tiny else [(1, 8, 10), (4, 20, 10)]
    # Of the cache in 8 bits only what tells it from the other.
    loads = loads[-1:] if kv_cache == "q8" else loads
    options = ["--model", model, "--dummy-weights", "--device", "cuda", "--weights", "fp8"]
    options += ["--max-model-len", "4096", "--kv-cache", kv_cache]
    with serving(windrose, *options) as (url, seconds):
        print(f"ready after {seconds:.2f} s, {kv_cache} cache, weights included\n", flush=True)
        figures = {"seconds to ready": seconds}
        for clients, *lens in loads:
            figures[f"{clients} clients"] = bench_load(windrose, url, clients, *lens)
        return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("windrose", help="the binary")
    parser.add_argument("--conformance", metavar="BINARY", help="the conformance test of crates/cuda")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--tiny", action="store_true", help="a model for the fake driver")
    options = parser.parse_args()
    failed = []
    subprocess.run([options.windrose, "doctor"])
    if options.conformance and subprocess.run([options.conformance, "--show-output"]).returncode != 0:
        failed.append("conformance")
    figures = {}
    with tempfile.TemporaryDirectory() as model:
        figures["num_layers"] = write_config(model, options.tiny)
        for weights in ("bf16", "fp8"):
            figures[f"bench {weights}"] = bench(options.windrose, model, weights, options.tiny)
        figures["server fp8"] = bench_server(options.windrose, model, "bf16", options.tiny)
        figures["server fp8, q8 cache"] = bench_server(options.windrose, model, "q8", options.tiny)
    failed += [name for name, figure in figures.items() if figure is None]
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=1)
    print(f"failed: {', '.join(failed) or 'nothing'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
