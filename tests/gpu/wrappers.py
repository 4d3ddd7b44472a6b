#!/usr/bin/env python3
"""Every PTX wrapper of kernels/device.cuh and wgmma.cuh on a GPU, bit for bit as on the emulator.

usage: wrappers.py CUBIN_DIR [--save FILE | --against FILE | --record]

CUBIN_DIR is the folder `wrappers` that kernels/check.py leaves beside its cubins. What the emulator gives is
recorded as digests in wrappers.json; --record does that, on the fake driver (kernels/emulator/build.sh
test-driver). --save keeps the outputs that differ from it, and --against shows, again on the fake driver,
where they do. Approximate instructions, and sums whose order is the hardware's, are held to a bound instead.
Lines that begin with "note" say what the hardware does where nothing is promised. Needs numpy, nothing else.
"""

import argparse
import glob
import hashlib
import json
import os
import sys
import time
from functools import partial

import numpy as np
from driver import SWIZZLE_128B, SWIZZLE_NONE, Kernels, tensor_map
from formats import BF16, E4M3, E4M3_VALUES, random_words
from memory import Array, use_device

RECORDED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "wrappers.json")
WGMMA_COLUMNS = (8, 16, 32, 64, 128, 256)
TRANSPOSED_COLUMNS = (64, 128)
# Rank, swizzle, box and start: inside, across each edge, and outside of a tensor [3, 10, 72].
BOXES = [
    (2, SWIZZLE_128B, (64, 8), (0, 0)),
    (2, SWIZZLE_128B, (64, 16), (40, 5)),
    (2, SWIZZLE_NONE, (64, 8), (-8, -3)),
    (2, SWIZZLE_NONE, (256, 2), (0, 9)),
    (3, SWIZZLE_128B, (64, 10, 1), (8, 0, 2)),
    (3, SWIZZLE_128B, (64, 4, 1), (64, 9, 1)),
    (2, SWIZZLE_128B, (64, 256), (-8, -100)),
    (3, SWIZZLE_NONE, (16, 3, 2), (8, 8, 2)),
    (3, SWIZZLE_128B, (64, 8, 1), (0, -8, 1)),
    (3, SWIZZLE_128B, (64, 8, 1), (0, 0, -1)),
    (3, SWIZZLE_128B, (64, 8, 3), (16, 4, 0)),
]


def canonical(values):
    """One NaN and one zero: which of them a tensor core gives is not promised."""
    return np.where(np.isnan(values), np.float32(np.nan), values + np.float32(0))


def floats_to_round():
    """Around every bf16 and every e4m3 number, their ties among them, and random bits."""
    high = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    magnitudes = np.append(E4M3_VALUES[:127], [464.0, 480.0, 512.0]).astype(np.float32)
    around = np.concatenate([magnitudes, (magnitudes[1:] + magnitudes[:-1]) / 2])
    around = np.concatenate(
        [around, np.nextafter(around, np.float32(0)), np.nextafter(around, np.float32(1e9))]
    )
    # The kernel rounds an eighth of a number to e4m3, and the number with its sign turned.
    around = np.concatenate([around, 8 * around])
    bits = [(high | low).ravel(), around.view(np.uint32), (-around).view(np.uint32)]
    bits = np.concatenate([*bits, random_words(1, 1 << 14).astype(np.uint32)])
    return np.resize(bits, -(-len(bits) // 256) * 256).view(np.float32)


def exp2_error(x, got):
    """In units in the last place; results too small to be normal are 0, those too large infinite."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        exact = np.exp2(x.astype(np.float64))
        value = np.where(np.isinf(got) & (got > 0), 2.0**128, got.astype(np.float64))
        flushed = np.where(exact < 2.0**-126, 0.0, np.minimum(exact, 2.0**128))
        unit = np.exp2(np.floor(np.log2(np.clip(exact, 2.0**-126, 2.0**127))) - 23)
        error = np.minimum(np.abs(value - flushed), np.abs(value - exact)) / unit
    return np.where(np.isnan(x), np.where(np.isnan(got), 0.0, np.inf), np.where(np.isnan(got), np.inf, error))


class Wrappers:
    """Runs all checks, counts them, and keeps every output that is compared by its bits.

    `recorded` has the digest of each such output, or is None while they are recorded.
    """

    def __init__(self, kernels, recorded):
        self.kernels, self.recorded = kernels, recorded
        self.outputs, self.digests, self.differing = {}, {}, set()
        self.passed = self.failed = 0

    def run(self):
        for check in (
            self.check_warps,
            self.check_numbers,
            self.check_matrices,
            self.check_copies,
            self.check_barriers,
            self.check_boxes,
            self.check_products,
            self.note_special_numbers,
            self.note_chains,
            self.note_precision,
            # The last: a multiprocessor that had too few registers would wait for ever.
            self.check_register_budget,
        ):
            try:
                check()
            except (RuntimeError, KeyError) as error:
                self.expect(check.__name__, False, f"{type(error).__name__}: {error}")

    # ---- reporting

    def expect(self, what, passed, found):
        self.passed += bool(passed)
        self.failed += not passed
        print(f"{'ok  ' if passed else 'FAIL'} {what:<58} {found}", flush=True)

    def expect_bits(self, what, got):
        assert what not in self.outputs, what
        self.outputs[what] = got
        self.digests[what] = hashlib.sha256(np.ascontiguousarray(got).tobytes()).hexdigest()
        same = self.recorded is None or self.recorded.get(what) == self.digests[what]
        if not same:
            self.differing.add(what)
        self.expect(what, same, "same bits" if same else "not the bits that the emulator gives")

    def expect_near(self, what, error, bound):
        self.expect(what, error <= bound, f"{error:.3g} (at most {bound:g})")

    def note(self, what, found):
        print(f"note {what:<58} {found}", flush=True)

    # ---- warps, numbers, copies, barriers

    def check_warps(self):
        values = (random_words(2, 64) % np.uint64(1000)).astype(np.int32) - 500
        source, out, halves = Array(values), Array.filled((13, 32), np.int32), Array.filled(64, np.int32)
        self.kernels.launch("warp_operations", 1, 32, [source, out])
        self.expect_bits("shuffles, votes, reductions", out.numpy())
        self.kernels.launch("half_warps", 1, 64, [source, halves])
        self.expect_bits("shuffles and reductions of half warps", halves.numpy())

    def check_numbers(self):
        x = floats_to_round()
        types = (np.uint32, np.uint16, np.uint32, np.float32)
        source, outputs = Array(x), [Array.filled(len(x), dtype) for dtype in types]
        self.kernels.launch("numbers", len(x) // 256, 256, [source, len(x), *outputs])
        packed, eighths, rounded, powers = (output.numpy() for output in outputs)
        self.expect_bits(f"pack_bf16, {len(x)} numbers", packed)
        self.expect_bits("to_bf16, the same", rounded)
        self.expect_bits("pack_e4m3, the same", eighths)
        error = exp2_error(x, powers)
        self.expect_near("exp2_approx, the same, units in the last place", error.max(), 2.0)
        # Random numbers, and what widens e4m3: all that it has, subnormal ones too, by 2^120.
        a, b = (random_words(seed, 1 << 14).astype(np.uint32) & 0xBFFFBFFF for seed in (13, 14))
        magnitudes = np.arange(128, dtype=np.uint32) << 4
        widened = np.concatenate(
            [magnitudes << 16 | 0x8000 | magnitudes, 0x80000000 | magnitudes << 16 | magnitudes]
        )
        a, b = np.concatenate([a, widened]), np.concatenate([b, np.full(256, 0x7B807B80, np.uint32)])
        left, right, products = Array(a), Array(b), Array.filled(len(a), np.uint32)
        self.kernels.launch("bf16_products", len(a) // 256, 256, [left, right, len(a), products])
        self.expect_bits(f"multiply_bf16, {2 * len(a)} numbers", products.numpy())

    def check_matrices(self):
        source, out = Array(random_words(3, 64)), Array.filled((32, 8), np.uint32)
        self.kernels.launch("matrices", 1, 32, [source, out])
        plain, transposed = out.numpy()[:, :4], out.numpy()[:, 4:]
        self.expect_bits("ldmatrix_x4", plain)
        # The kernel inverts what transpose_8x8 would have given differently.
        self.expect_bits("ldmatrix_x4_trans, transpose_8x8", transposed)

    def check_copies(self):
        source, out = Array(random_words(4, 512)), Array.filled(512, np.uint64)
        self.kernels.launch("async_copies", 1, 32, [source, out])
        self.expect_bits("cp_async_16, groups, copies that are not valid", out.numpy())
        source, out = Array(random_words(15, 64).astype(np.uint32)), Array.filled(64, np.uint32)
        self.kernels.launch("word_copies", 1, 32, [source, out])
        self.expect_bits("cp_async_4, groups, copies that are not valid", out.numpy())
        a, b = BF16.integers(5, (100, 160)), BF16.integers(6, (56, 160))
        left, right, c = Array(a), Array(b), Array.filled((100, 56), np.float32)
        self.kernels.launch("mma_gemm_right", (2, 2), 128, [left, right, c, 100, 56, 160], 2 * 96 * 64)
        self.expect_product("cp_async_16, ldmatrix_x4, mma_m16n8k16", BF16, a, b, c.numpy())

    def check_barriers(self):
        out = Array.filled(128, np.int32)
        self.kernels.launch("named_barriers", 1, 128, [out, 9])
        self.expect_bits("named_barrier_sync", out.numpy())
        out = Array.filled(64, np.int32)
        self.kernels.launch("mbarrier_phases", 1, 64, [out, 1000])
        self.expect_bits("mbarrier_arrive, mbarrier_wait, 1000 rounds", out.numpy())

    def check_boxes(self):
        values = np.arange(1, 1 + 3 * 10 * 72, dtype=np.uint16).reshape(3, 10, 72)
        for rank, swizzle, box, start in BOXES:
            tensor = Array(values if rank == 3 else values[0])
            out = Array.filled((int(np.prod(box[1:])), box[0]), np.uint16)
            x, y, z = (*start, 0)[:3]
            args = [tensor_map(tensor, box, swizzle), rank, x, y, z, out.num_bytes, out]
            self.kernels.launch("copy_box", 1, 64, args, -(-out.num_bytes // 1024) * 1024)
            swizzled = ", swizzled" if swizzle else ""
            self.expect_bits(f"tma_load_{rank}d, box {box} at {start}{swizzled}", out.numpy())

    def check_register_budget(self):
        source, out = Array(np.arange(384, dtype=np.int32)), Array.filled(384, np.int32)
        self.kernels.launch("register_budget", 1, 384, [source, out])
        self.expect_bits("registers_release, registers_acquire", out.numpy())

    # ---- products

    def multiply_mma(self, form, a, b):
        """a [rows, k] · b [columns, k]ᵀ in chains of mma.sync."""
        left, right, c = Array(a), Array(b), Array.filled((len(a), len(b)), np.float32)
        grid = (len(b) // 8, len(a) // 16)
        self.kernels.launch(form.mma, grid, 32, [left, right, c, len(b), a.shape[1] * a.itemsize])
        return c.numpy()

    def multiply_wgmma(self, form, a, b, n):
        """The same in chains of wgmma of n columns, fed by bulk tensor copies; zeros fill the last box."""
        a, b = (np.pad(codes, ((0, 0), (0, -codes.shape[1] % (1024 // form.bits)))) for codes in (a, b))
        left, right = Array(a.view(np.uint16)[None]), Array(b.view(np.uint16))
        c = Array.filled((len(a), len(b)), np.float32)
        args = [tensor_map(left, (64, 64)), tensor_map(right, (64, n)), c, len(b), right.shape[1]]
        shared = 2 * (64 * 128 + -(-n * 128 // 1024) * 1024)
        self.kernels.launch(f"{form.wgmma}_{n}", (len(b) // n, len(a) // 64), 160, args, shared)
        return c.numpy()

    def multiply_transposed(self, a, b, n):
        """The same of bf16 with a from registers and b as rows of k."""
        left, right, c = Array(a), Array(b.T), Array.filled((len(a), len(b)), np.float32)
        args = [left, right, c, len(b), a.shape[1]]
        self.kernels.launch(f"wgmma_transposed_{n}", (len(b) // n, len(a) // 64), 128, args, n * 128)
        return c.numpy()

    def expect_product(self, what, form, a, b, c):
        """Of numbers whose sums are exact in any order."""
        self.expect_bits(what, canonical(c))
        exact = form.decode(a).astype(np.float64) @ form.decode(b).astype(np.float64).T
        if np.any(c != exact):
            self.expect(
                f"{what}: exact", False, f"{np.count_nonzero(c != exact)} of {c.size} elements differ"
            )

    def expect_near_product(self, what, form, a, b, c):
        self.expect_near(f"{what}, difference / Σ|a·b|", errors(form, a, b, c)[0], form.tolerance)

    def check_products(self):
        """Integers, single elements, and random numbers; 320 units of two bytes along k."""
        for form in (BF16, E4M3):
            k = 320 * 16 // form.bits
            instruction = f"mma_m16n8k{256 // form.bits}"
            self.check_product(instruction, form, k, 64, partial(self.multiply_mma, form))
            for n in WGMMA_COLUMNS:
                what = f"wgmma_m64k{256 // form.bits}<{n}>"
                self.check_product(what, form, k, 2 * n, partial(self.multiply_wgmma, form, n=n))

        for n in TRANSPOSED_COLUMNS:
            what = f"wgmma_m64k16_transposed<{n}>"
            self.check_product(what, BF16, 320, 2 * n, partial(self.multiply_transposed, n=n))

    def check_product(self, what, form, k, columns, multiply):
        a, b = form.integers(7, (128, k)), form.integers(8, (columns, k))
        self.expect_product(f"{what}, integers", form, a, b, multiply(a, b))
        a, b = form.any_numbers(9, (128, k)), form.selectors((columns, k))
        self.expect_product(f"{what}, single products", form, a, b, multiply(a, b))
        a, b = form.normal(10, (128, k)), form.normal(11, (columns, k))
        self.expect_near_product(f"{what}, random", form, a, b, multiply(a, b))

    # ---- what is promised nowhere

    def note_special_numbers(self):
        for form in (BF16, E4M3):
            a, b = form.special_numbers(12, (64, 64)), form.selectors((64, 64))
            with np.errstate(invalid="ignore"):
                exact = canonical(
                    (form.decode(a).astype(np.float64) @ form.decode(b).astype(np.float64).T).astype("f4")
                )
            for name, c in (
                ("mma", self.multiply_mma(form, a, b)),
                ("wgmma", self.multiply_wgmma(form, a, b, 64)),
            ):
                differ = np.count_nonzero(canonical(c).view(np.uint32) != exact.view(np.uint32))
                negative = np.count_nonzero((c == 0) & np.signbit(c))
                found = f"{differ} of {c.size} differ from IEEE products, {negative} zeros are -0"
                self.note(f"{form.name} {name}, subnormal numbers, infinities, NaN", found)

    def note_chains(self):
        """Whether the tensor cores of a warp sum as those of a warpgroup."""
        for form in (BF16, E4M3):
            for k in (256 // form.bits, 64, 128, 256, 4096):
                a, b = form.normal(k, (64, k)), form.normal(k + 1, (256, k))
                chain = self.multiply_mma(form, a, b)
                forms = {f"n={n}": partial(self.multiply_wgmma, form, n=n) for n in (8, 256)}
                if form is BF16 and k % 64 == 0:
                    forms["n=128, transposed"] = partial(self.multiply_transposed, n=128)
                for name, multiply in forms.items():
                    c = multiply(a, b)
                    differ = np.count_nonzero(c.view(np.uint32) != chain.view(np.uint32))
                    largest = np.abs(c - chain).max()
                    found = f"{differ == 0}: {differ} of {c.size} differ, by {largest:.2g} at most"
                    self.note(f"{form.name} K={k}: mma.sync equals wgmma {name} to the bit", found)

    def note_precision(self):
        """How far long sums are from float64: of e4m3 products Hopper keeps fewer bits than f32 has."""
        for form in (BF16, E4M3):
            for k in (4096, 14336):
                for kind, draw in (("normal", form.normal), ("positive", form.positive)):
                    a, b = draw(k, (64, k)), draw(k + 1, (128, k))
                    results = {
                        "mma": self.multiply_mma(form, a, b),
                        "wgmma": self.multiply_wgmma(form, a, b, 128),
                    }
                    for name, c in results.items():
                        largest, mean, norm = errors(form, a, b, c)
                        found = (
                            f"{largest:.2e} of Σ|a·b| at most, {mean:+.2e} on average, {norm:.2e} of the norm"
                        )
                        self.note(f"{form.name} {name} K={k}, {kind}: error", found)


def errors(form, a, b, c):
    """Of a product: the largest and the mean error as shares of Σ|a·b|, and the norm of errors, relative."""
    a, b = form.decode(a).astype(np.float64), form.decode(b).astype(np.float64)
    exact, magnitude = a @ b.T, np.abs(a) @ np.abs(b).T
    shares = (c - exact) / magnitude
    largest = np.abs(shares).max() if np.all(np.isfinite(c)) else np.inf
    # Towards zero is below zero.
    return largest, np.mean(shares * np.sign(exact)), np.linalg.norm(c - exact) / np.linalg.norm(exact)


def compare(outputs, path):
    """Where the outputs of `path`, saved on another device, differ from these."""
    with np.load(path) as saved:
        for what in saved.files:
            here, there = outputs[what].ravel(), saved[what].ravel()
            unsigned = f"uint{8 * here.itemsize}"
            differ = np.flatnonzero(here.view(unsigned) != there.view(unsigned))
            print(f"{what}: {len(differ)} of {len(here)} differ; index, here, there:")
            for i in differ[:20]:
                bits = f"{here.view(unsigned)[i]:#x} {there.view(unsigned)[i]:#x}"
                print(f"  {i:>8} {here[i]!s:>16} {there[i]!s:>16}  {bits}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cubins", help="the folder `wrappers` that kernels/check.py leaves")
    parser.add_argument("--record", action="store_true", help="write wrappers.json, on the fake driver")
    parser.add_argument("--save", metavar="FILE", help="keep the outputs that differ here (.npz)")
    parser.add_argument("--against", metavar="FILE", help="show where saved outputs differ")
    options = parser.parse_args()
    if not glob.glob(os.path.join(options.cubins, "test_kernels.sm_90a.cubin")):
        print(f"skipped: no test_kernels.sm_90a.cubin in {options.cubins}; kernels/check.py compiles it")
        return
    started, device = time.monotonic(), use_device()
    print(f"wrappers on {device}, numpy {np.__version__}", flush=True)
    if options.record and not device.startswith("emulated"):
        sys.exit("only what the emulator gives is recorded")
    recorded = None
    if not options.record:
        with open(RECORDED) as file:
            recorded = json.load(file)
    wrappers = Wrappers(Kernels(options.cubins), recorded)
    wrappers.run()
    if options.record:
        with open(RECORDED, "w") as file:
            json.dump(wrappers.digests, file, indent=1)
            file.write("\n")
    if options.save:
        np.savez_compressed(options.save, **{what: wrappers.outputs[what] for what in wrappers.differing})
    if options.against:
        compare(wrappers.outputs, options.against)
    seconds = time.monotonic() - started
    print(f"wrappers: {wrappers.passed} passed, {wrappers.failed} failed, {seconds:.1f} s")
    sys.exit(wrappers.failed > 0)


if __name__ == "__main__":
    main()
