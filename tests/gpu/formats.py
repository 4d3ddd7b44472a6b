"""bf16 and e4m3 in numpy: codes to values and back, and inputs that are the same on every machine."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


def random_words(seed, count):
    """splitmix64: numpy promises no stream for ever, and what these give is compared with records."""
    x = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def decode_bf16(codes):
    return (codes.astype(np.uint32) << 16).view(np.float32)


def encode_bf16(values):
    """Of finite numbers, to nearest, ties to even."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def e4m3_table():
    codes = np.arange(128)
    exponent, mantissa = codes >> 3, codes & 7
    values = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8.0 + mantissa, exponent - 10))
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


E4M3_VALUES = e4m3_table()
E4M3_MIDPOINTS = (E4M3_VALUES[:126] + E4M3_VALUES[1:127]) / 2


def decode_e4m3(codes):
    return E4M3_VALUES[codes]


def encode_e4m3(values):
    """Of finite numbers, to nearest, 448 at most. Ties go down: no input here is one."""
    codes = np.searchsorted(E4M3_MIDPOINTS, np.abs(values)).astype(np.uint8)
    return codes | np.where(np.signbit(values), 128, 0).astype(np.uint8)


@dataclass(frozen=True)
class Format:
    """A format of operands, and what tests/gpu/wrappers.py must know of products in it."""

    name: str
    bits: int
    encode: Callable
    decode: Callable
    # 640 products of integers up to this one add up to what fits the 14 bits that Hopper keeps of e4m3 sums.
    largest_integer: int
    # Of |difference| / Σ|a·b| of random sums.
    tolerance: float
    # Kernels of kernels/emulator/test_kernels.cu, the first without its number of columns.
    wgmma: str
    mma: str

    def integers(self, seed, shape):
        span = 2 * self.largest_integer + 1
        words = random_words(seed, int(np.prod(shape))) % np.uint64(span)
        return self.encode(words.astype(np.float64) - self.largest_integer).reshape(shape)

    def normal(self, seed, shape):
        """Normally distributed. numpy's stream: what these give is not recorded."""
        return self.encode(np.random.default_rng(seed).standard_normal(shape))

    def positive(self, seed, shape):
        return self.encode(np.abs(self.decode(self.normal(seed, shape))))

    def any_numbers(self, seed, shape):
        """Every code of numbers that products with 1/2, 1 and 2 leave normal."""
        words = random_words(seed, int(np.prod(shape))).reshape(shape)
        if self.bits == 8:
            codes = words.astype(np.uint8)
            return np.where(codes & 0x7F == 0x7F, 0, codes).astype(np.uint8)
        codes = words.astype(np.uint16)
        exponent = codes >> 7 & 0xFF
        return np.where((exponent < 2) | (exponent > 252), codes & 0x807F | 0x3F80, codes).astype(np.uint16)

    def special_numbers(self, seed, shape):
        """Subnormal numbers, and a few infinities (bf16 alone has them) and NaN."""
        codes = random_words(seed, int(np.prod(shape))).reshape(shape)
        codes = (codes & np.uint64(0x8007 if self.bits == 16 else 0x87)).astype(f"uint{self.bits}")
        codes[3, 5], codes[7, 0] = (0x7F80, 0x7FC0) if self.bits == 16 else (0x7F, 0xFF)
        codes[9, 1] = 0xFF80 if self.bits == 16 else 0x7F
        return codes

    def selectors(self, shape):
        """Rows that pick one element each of what they are multiplied with: 1, -1, 1/2 or -2 among zeros."""
        columns, depth = shape
        values = np.zeros(shape)
        index = np.arange(columns)
        values[index, (index * 37 + 5) % depth] = np.resize([1.0, -1.0, 0.5, -2.0], columns)
        return self.encode(values)


BF16 = Format("bf16", 16, encode_bf16, decode_bf16, 8, 1e-5, "wgmma_gemm", "mma_chain_bf16")
E4M3 = Format("e4m3", 8, encode_e4m3, decode_e4m3, 2, 5e-3, "wgmma_gemm_e4m3", "mma_chain_e4m3")
