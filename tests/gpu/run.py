#!/usr/bin/env python3
"""Everything that is to be known on a GPU, in under ten minutes: right first, then fast, then beside others.

usage: run.py CUBIN_DIR WINDROSE CONFORMANCE [--json FILE] [--only PART ..]

CUBIN_DIR is as kernels/check.py leaves it, WINDROSE the binary with those kernels in it, CONFORMANCE the test
of crates/cuda that `cargo test --release -p windrose-cuda --test conformance --no-run` names. Needs PyTorch
and a GPU of compute capability 9.0; no Rust, no CUDA toolkit but for its compute-sanitizer, which is skipped,
and said to be, where there is none. Parts are processes of their own, so that none suffers from another:

  wrappers    every PTX wrapper, bit for bit as on the emulator
  kernels     every kernel against PyTorch in float64, then timed beside the chip's limits
  model       every verb against the reference; Mixtral 8x7B with random weights; a loaded server
  demo        the demo model's held-out prompts, beside the processor's answers
  checkpoint  a checkpoint's way from the disk to the GPU
  sanitizer   memcheck and racecheck of the kernels' checks, memcheck of the verbs, side by side
  peers       what a Triton grouped GEMM, PyTorch and transformers make of the same work
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
SANITIZER = "compute-sanitizer"
LIMIT_SECONDS = 240


def script(name, *arguments):
    return [sys.executable, os.path.join(HERE, name), *arguments]


def sanitize(tool, command, *options):
    # The checks ask every module for a kernel until one has it, which is no error of theirs.
    options = ("--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9", *options)
    return [SANITIZER, *options, *command]


def commands_of_parts(options):
    """By part, its commands; `{json}` is where one leaves its figures."""
    checks = script("kernels.py", options.cubins, "--checks-only")
    return {
        "wrappers": [script("wrappers.py", os.path.join(options.cubins, "wrappers"))],
        "kernels": [script("kernels.py", options.cubins, "--json", "{json}")],
        "model": [
            script("model.py", options.windrose, "--conformance", options.conformance, "--json", "{json}")
        ],
        "demo": [script("demo.py", options.windrose, "--json", "{json}")],
        "checkpoint": [script("checkpoint.py", options.windrose, "--json", "{json}")],
        "sanitizer": [
            sanitize("memcheck", checks),
            # It takes minutes over many launches, and must be told that a lane may arrive for its warp.
            sanitize("racecheck", [*checks, "--brief"], "--racecheck-indirect-barrier-dependency"),
            sanitize("memcheck", [options.conformance]),
        ],
        "peers": [script("peers.py", "--json", "{json}")],
    }


def run_commands(commands, figures):
    """Runs the commands of a part side by side, adds what they measured to `figures`; how each one ended."""
    with concurrent.futures.ThreadPoolExecutor(len(commands)) as pool:
        endings = pool.map(lambda command: run_command(command, figures, quiet=len(commands) > 1), commands)
        return list(endings)


def run_command(command, figures, quiet):
    """How one command ended; a quiet one prints when it has."""
    if shutil.which(command[0]) is None:
        print(f"skipped: there is no {command[0]}", flush=True)
        return "skipped"
    with tempfile.TemporaryDirectory() as directory:
        path, output = os.path.join(directory, "figures.json"), os.path.join(directory, "output")
        command = [path if word == "{json}" else word for word in command]
        with open(output, "w") if quiet else contextlib.nullcontext() as file:
            try:
                ending = subprocess.run(command, stdout=file, stderr=file, timeout=LIMIT_SECONDS).returncode
            except subprocess.TimeoutExpired:
                ending = None
        if quiet:
            with open(output) as file:
                print(f"-- {' '.join(command)}\n{file.read()}", flush=True)
        if os.path.exists(path):
            with open(path) as file:
                figures |= json.load(file)
    if ending is None:
        return f"not done after {LIMIT_SECONDS} s"
    return f"failed with status {ending}" if ending else "ok"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cubins", help="folder of cubins, as kernels/check.py leaves them")
    parser.add_argument("windrose", help="the binary")
    parser.add_argument("conformance", help="the conformance test of crates/cuda")
    parser.add_argument("--json", metavar="FILE", help="write all figures here")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts alone")
    options = parser.parse_args()
    parts = commands_of_parts(options)
    if unknown := set(options.only or []) - set(parts):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    report = {}
    for part in options.only or parts:
        begin, figures = time.monotonic(), {}
        print(f"==== {part}", flush=True)
        endings = run_commands(parts[part], figures)
        report[part] = {"endings": endings, "seconds": time.monotonic() - begin, "figures": figures}
        if options.json:
            with open(options.json, "w") as file:
                json.dump(report, file, indent=1)
    print("==== summary")
    for part, found in report.items():
        print(f"{part:<10} {found['seconds']:6.0f} s   {', '.join(found['endings'])}")
    sys.exit(any(ending not in ("ok", "skipped") for found in report.values() for ending in found["endings"]))


if __name__ == "__main__":
    main()
