#!/usr/bin/env python3
"""A checkpoint's way from a disk to a GPU, beside what disk and bus give in the same run.

usage: checkpoint.py WINDROSE [--num-layers N] [--json FILE]

Writes layers of Mixtral 8x7B with random weights to the temporary folder, 2.9 GB each, and loads them by
`windrose bench`: read from the disk anew, where the page cache may be dropped, and out of the page cache.
"""

import argparse
import concurrent.futures
import glob
import json
import os
import subprocess
import tempfile
import time

import torch
from model import MIXTRAL_8X7B
from safetensors.torch import save_file

DROP_CACHES = "/proc/sys/vm/drop_caches"
READ_BYTES = 16 << 20
GIGABYTE = 1e9


def write_checkpoint(directory, num_layers):
    """Returns its bytes."""
    config = MIXTRAL_8X7B | {"num_hidden_layers": num_layers}
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv_width = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    file_of, total = {}, 0

    def weights(*shape):
        return (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02).cpu()

    def norm():
        return torch.ones(hidden, dtype=torch.bfloat16)

    def save(tensors):
        nonlocal total
        file = f"model-{len(set(file_of.values())) + 1:05d}-of-{num_layers + 1:05d}.safetensors"
        save_file(tensors, os.path.join(directory, file), metadata={"format": "pt"})
        file_of.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())

    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        attention, experts = f"{prefix}.self_attn", f"{prefix}.block_sparse_moe.experts"
        tensors = {
            f"{prefix}.input_layernorm.weight": norm(),
            f"{prefix}.post_attention_layernorm.weight": norm(),
            f"{prefix}.block_sparse_moe.gate.weight": weights(config["num_local_experts"], hidden),
            f"{attention}.q_proj.weight": weights(hidden, hidden),
            f"{attention}.k_proj.weight": weights(kv_width, hidden),
            f"{attention}.v_proj.weight": weights(kv_width, hidden),
            f"{attention}.o_proj.weight": weights(hidden, hidden),
        }
        for expert in range(config["num_local_experts"]):
            tensors[f"{experts}.{expert}.w1.weight"] = weights(ffn, hidden)
            tensors[f"{experts}.{expert}.w2.weight"] = weights(hidden, ffn)
            tensors[f"{experts}.{expert}.w3.weight"] = weights(ffn, hidden)
        save(tensors)
    ends = {"model.embed_tokens.weight": weights(vocab, hidden), "lm_head.weight": weights(vocab, hidden)}
    save({**ends, "model.norm.weight": norm()})
    with open(os.path.join(directory, "config.json"), "w") as file:
        json.dump(config, file)
    with open(os.path.join(directory, "model.safetensors.index.json"), "w") as file:
        json.dump({"metadata": {"total_size": total}, "weight_map": file_of}, file)
    return total


def drop_page_cache():
    """False where that is not ours to do."""
    os.sync()
    try:
        with open(DROP_CACHES, "w") as file:
            file.write("3")
    except OSError:
        return False
    return True


def read_file(path):
    buffer = bytearray(READ_BYTES)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def read_seconds(directory):
    """All files, as many threads as there are files."""
    paths = glob.glob(os.path.join(directory, "*.safetensors"))
    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(len(paths)) as pool:
        list(pool.map(read_file, paths))
    return time.monotonic() - begin


def bus_bytes_per_second():
    """From pinned memory."""
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.monotonic()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        best = min(best, time.monotonic() - begin)
    return host.nbytes / best


def load_seconds(windrose, directory, weights):
    """What the program says its loading took."""
    options = ["--prompt-len", "16", "--num-seqs", "1", "--output-len", "2", "--json", "-"]
    command = [windrose, "bench", "--model", directory, "--device", "cuda", "--weights", weights, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)["load_seconds"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("windrose", help="the binary")
    parser.add_argument("--num-layers", type=int, default=4, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    figures = {"bus, pinned": bus_bytes_per_second() / GIGABYTE}
    with tempfile.TemporaryDirectory() as directory:
        begin = time.monotonic()
        total = write_checkpoint(directory, options.num_layers)
        torch.cuda.empty_cache()
        print(f"{total / GIGABYTE:.1f} GB, written in {time.monotonic() - begin:.0f} s", flush=True)

        def measure(name, seconds_of, *arguments):
            figures[name] = total / GIGABYTE / seconds_of(*arguments)
            print(f"{name:<24} {figures[name]:6.2f} GB/s", flush=True)

        print(f"{'bus, pinned':<24} {figures['bus, pinned']:6.2f} GB/s", flush=True)
        if drop_page_cache():
            measure("disk", read_seconds, directory)
            drop_page_cache()
            measure("loaded from the disk", load_seconds, options.windrose, directory, "bf16")
        else:
            print(f"skipped: what the disk gives, since {DROP_CACHES} may not be written", flush=True)
        read_seconds(directory)
        measure("page cache", read_seconds, directory)
        for weights in ("bf16", "fp8"):
            measure(f"loaded as {weights}", load_seconds, options.windrose, directory, weights)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
