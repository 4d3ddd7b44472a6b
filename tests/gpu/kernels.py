#!/usr/bin/env python3
"""Every kernel on a GPU: right first, then timed beside the chip's limits.

usage: kernels.py CUBIN_DIR [--checks-only] [--brief] [--json FILE]

CUBIN_DIR is as kernels/check.py leaves it. Needs PyTorch and a GPU of compute capability 9.0. Exits non-zero
if a kernel is wrong; a slow one is only reported.
"""

import argparse
import json
import sys
import time

import torch
from bench import Bench
from checks import Checks
from driver import Kernels


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cubins", help="folder of cubins, as kernels/check.py leaves them")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--checks-only", action="store_true", help="time nothing, as under compute-sanitizer")
    parser.add_argument(
        "--brief", action="store_true", help="every kernel, but few launches, as under racecheck"
    )
    options = parser.parse_args()
    torch.manual_seed(time.time_ns() % 2**32)
    torch.zeros(1, device="cuda")
    kernels = Kernels(options.cubins, stream=lambda: torch.cuda.current_stream().cuda_stream)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, seed {torch.initial_seed()}", flush=True
    )
    failures = Checks(kernels, options.brief).run()
    if not options.checks_only:
        bench = Bench(kernels)
        bench.run()
        if options.json:
            with open(options.json, "w") as file:
                json.dump(bench.figures, file, indent=1)
    print(f"{failures} failures")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
