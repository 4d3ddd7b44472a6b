#!/usr/bin/env python3
"""Compiles every kernel for every GPU it is meant for, without a GPU, and checks what came out.

usage: check.py NVIDIA_DIR [OUT_DIR]

NVIDIA_DIR is where `pip install --no-deps --target` put the packages of kernels/requirements.txt. Fails on
register spills, stack frames, warnings, serialised wgmma and missing tensor-core instructions; prints the
registers and static shared memory of each kernel. Leaves the cubins in OUT_DIR, by default kernels/cubins,
and in OUT_DIR/wrappers that of the kernels which tests/gpu/wrappers.py runs.
"""

import ctypes
import glob
import os
import re
import subprocess
import sys
import time

TARGETS = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120"]
E4M3_TARGETS = TARGETS[2:]
OPTIONS = ["--std=c++17", "--ptxas-options=-v", "--ptxas-options=--warn-on-spills"]
SUSPICIOUS = re.compile(r"spill|Performance Loss|C75\d\d|warning|ignored", re.IGNORECASE)
# Instructions that machine code must contain: (pattern of the kernel's name, targets, names).
EXPECTED_SASS = [
    (r"wgmma_(f32|bf16|swiglu)_\d+", ["sm_90a"], ["HGMMA", "UTMALDG"]),
    (r"wgmma_e4m3_\w+", ["sm_90a"], ["QGMMA", "UTMALDG"]),
    (r"mma_(f32|bf16|swiglu)_\d+", TARGETS, ["HMMA", "LDSM", "LDGSTS"]),
    (r"mma_e4m3_\w+", ["sm_89"], ["QMMA", "LDSM", "LDGSTS"]),
    (r"attention_(prefill|decode)_\d+", TARGETS, ["HMMA", "LDSM", "LDGSTS"]),
    (r"attention_(prefill|decode)_e4m3_\d+", E4M3_TARGETS, ["HMMA", "LDSM", "LDGSTS", "BF16_V2"]),
    (r"attention_prefill_wgmma_(e4m3_)?\d+", ["sm_90a"], ["HGMMA", "tnspB", "LDGSTS", "USETMAXREG"]),
    (r"rope_store_kv_e4m3", E4M3_TARGETS, ["F2FP"]),
    (r"wgmma_gemm_\d+", ["sm_90a"], ["HGMMA", "UTMALDG"]),
    (r"wgmma_gemm_e4m3_\d+", ["sm_90a"], ["QGMMA", "UTMALDG"]),
    (r"wgmma_transposed_\d+", ["sm_90a"], ["HGMMA", "tnspB"]),
    (r"register_budget", ["sm_90a"], ["USETMAXREG"]),
]
# Every kernel waits for the one before it and lets the next one start: the rule in device.cuh.
DEPENDENT_SASS = (r"\w+", ["sm_90a", "sm_100a", "sm_120"], ["ACQBULK", "PREEXIT"])


def load_nvrtc(nvidia_dir):
    libraries = glob.glob(f"{nvidia_dir}/nvidia/*/lib/libnvrtc-builtins.so.*")
    libraries += glob.glob(f"{nvidia_dir}/nvidia/*/lib/libnvrtc.so.*")
    if len(libraries) < 2:
        install = f"pip install --no-deps --target {nvidia_dir} -r kernels/requirements.txt"
        sys.exit(f"no NVRTC under {nvidia_dir}: {install}")
    # The first is found by its name once it is loaded; the last is the compiler.
    return [ctypes.CDLL(path) for path in libraries][-1]


def strings(values):
    return (ctypes.c_char_p * len(values))(*values)


def output(nvrtc, program, what):
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value or 1)
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw[: size.value]


def compile_kernel(nvrtc, path, headers, target):
    """The cubin, or None; and the compiler's log."""
    program = ctypes.c_void_p()
    with open(path, "rb") as source:
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program),
            source.read(),
            os.path.basename(path).encode(),
            len(headers),
            strings(list(headers.values())),
            strings(list(headers)),
        )
    options = [option.encode() for option in [f"--gpu-architecture={target}", *OPTIONS]]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), strings(options))
    log = output(nvrtc, program, "ProgramLog").decode(errors="replace")
    cubin = None if failed else output(nvrtc, program, "CUBIN")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin, log


def read_log(log):
    """Registers and static shared memory by kernel, and what the compiler complained of."""
    kernels, complaints, kernel = {}, [], None
    for line in log.splitlines():
        if entry := re.search(r"entry function '(\w+)'", line):
            kernel = entry[1]
        elif "bytes stack frame" in line:
            if any(int(count) for count in re.findall(r"(\d+) bytes", line)):
                complaints.append(f"{kernel}: {line.strip()}")
        elif used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[kernel] = (int(used[1]), int(shared[1]) if shared else 0)
        elif SUSPICIOUS.search(line):
            complaints.append(f"{kernel}: {line.strip()}")
    return kernels, complaints


def missing_instructions(disassembler, cubin_path, target, expected):
    sass = subprocess.run([disassembler, cubin_path], capture_output=True, text=True, check=True).stdout
    sections = re.split(r"^\s*\.section\s+\.text\.(\w+).*$", sass, flags=re.MULTILINE)
    for kernel, code in zip(sections[1::2], sections[2::2], strict=True):
        for pattern, targets, instructions in expected:
            if re.fullmatch(pattern, kernel) and target in targets:
                yield from (f"{kernel}: no {name} in its SASS" for name in instructions if name not in code)


def main():
    nvidia_dir = sys.argv[1]
    kernels_dir = os.path.dirname(os.path.abspath(__file__))
    out_dir = sys.argv[2] if len(sys.argv) > 2 else os.path.join(kernels_dir, "cubins")
    nvrtc = load_nvrtc(nvidia_dir)
    disassembler = glob.glob(f"{nvidia_dir}/nvidia/*/bin/nvdisasm")[0]
    headers = {}
    for path in sorted(glob.glob(f"{kernels_dir}/*.cuh")):
        with open(path, "rb") as header:
            headers[os.path.basename(path).encode()] = header.read()

    expected = [*EXPECTED_SASS, DEPENDENT_SASS]
    builds = [(path, TARGETS, out_dir, expected) for path in sorted(glob.glob(f"{kernels_dir}/*.cu"))]
    # Apart from the others: a binary embeds all cubins that lie in OUT_DIR itself.
    test_kernels, test_dir = f"{kernels_dir}/emulator/test_kernels.cu", os.path.join(out_dir, "wrappers")
    builds.append((test_kernels, ["sm_90a"], test_dir, EXPECTED_SASS))
    table, complaints, started, total_bytes = {}, [], time.monotonic(), 0
    for path, targets, folder, expected in builds:
        name = os.path.splitext(os.path.basename(path))[0]
        os.makedirs(folder, exist_ok=True)
        for target in targets:
            cubin, log = compile_kernel(nvrtc, path, headers, target)
            if cubin is None:
                sys.exit(f"{name} for {target}:\n{log}")
            cubin_path = os.path.join(folder, f"{name}.{target}.cubin")
            with open(cubin_path, "wb") as file:
                file.write(cubin)
            total_bytes += len(cubin)
            kernels, found = read_log(log)
            found += missing_instructions(disassembler, cubin_path, target, expected)
            complaints += [f"{target} {complaint}" for complaint in found]
            for kernel, usage in kernels.items():
                table.setdefault(kernel, {})[target] = usage

    print(f"{'kernel':<22}" + "".join(f"{target:>16}" for target in TARGETS))
    for kernel, usages in table.items():
        cells = (f"{usages[t][0]} r {usages[t][1]} B" if t in usages else "-" for t in TARGETS)
        print(f"{kernel:<22}" + "".join(f"{cell:>16}" for cell in cells))
    num_kernels = sum(len(usages) for usages in table.values())
    print(
        f"{num_kernels} kernels, {total_bytes / 1024:.0f} KiB of cubins, {time.monotonic() - started:.0f} s"
    )
    print("\n".join(complaints) or "no spills, no stack frames, no warnings, all instructions as meant")
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
