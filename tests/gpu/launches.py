"""How each kernel is launched: argument structures, grid and shared memory, with tensors of PyTorch.

This is what a host program must know of `kernels/`, written once; nothing here checks or times.
"""

import ctypes
import math

import torch
from driver import tensor_map

HIDDEN, FFN, EXPERTS, TOP_K = 4096, 14336, 8, 2
# Tokens of a tile: (consumer warpgroups, stages), as kernels/grouped_gemm_wgmma.cu instantiates them.
TILES = {8: (1, 20), 16: (1, 18), 32: (1, 16), 64: (1, 12), 128: (2, 6), 256: (2, 4)}
CHUNK_KEYS = 256
NO_PARTIAL = -1


class GroupedShape(ctypes.Structure):
    _fields_ = [("offsets", ctypes.c_void_p)] + [
        (name, ctypes.c_int)
        for name in ("num_experts", "num_rows", "weight_rows", "stride", "features", "out_stride")
    ]


class NormShape(ctypes.Structure):
    _fields_ = [("features", ctypes.c_int), ("stride", ctypes.c_int), ("eps", ctypes.c_float)]


class RoutingTables(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("topk_ids", "topk_weights", "expert_offsets", "permutation", "rows", "finished_blocks")
    ]


class RouteShape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("num_tokens", "num_experts", "top_k", "stride")]


class KvShape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int)
        for name in ("num_heads", "num_kv_heads", "head_dim", "head_stride", "block_size")
    ]


class AttentionShape(ctypes.Structure):
    _fields_ = [
        ("kv", KvShape),
        ("q_stride", ctypes.c_int),
        ("out_stride", ctypes.c_int),
        ("window", ctypes.c_int),
        ("scale", ctypes.c_float),
    ]


class Placement(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("cols", "stride", "first_row", "interleaved")]


def bf16(*shape):
    return torch.randn(*shape, device="cuda").to(torch.bfloat16)


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


class Launcher:
    """Launches on PyTorch's current stream."""

    def __init__(self, kernels):
        self.kernels = kernels
        self.sms = torch.cuda.get_device_properties(0).multi_processor_count

    def grouped(self, kind, weights, x, out, offsets, features, tokens=None):
        """weights [experts, rows, k] times x [rows, k]; kind f32, bf16 or swiglu.

        `tokens` is the width of a tile; None takes mma.sync instead of wgmma.
        """
        experts, weight_rows, k = weights.shape
        pointer = offsets.data_ptr() if offsets is not None else None
        shape = GroupedShape(pointer, experts, x.shape[0], weight_rows, k, features, out.shape[1])
        if tokens is None:
            tile = 16 if x.shape[0] <= 64 else 64
            self.kernels.launch(
                f"mma_{kind}_{tile}", 4 * self.sms, 128, [weights, x, shape, out], 3 * (64 + tile) * 128
            )
            return
        consumers, stages = TILES[tokens]
        maps = [tensor_map(weights, (64, 64)), tensor_map(x, (64, tokens))]
        shared = stages * (consumers * 64 + tokens) * 128
        self.kernels.launch(
            f"wgmma_{kind}_{tokens}", self.sms, 32 * (4 * consumers + 1), [*maps, shape, out], shared
        )

    def route(self, x, router):
        tokens, experts = x.shape[0], router.shape[0]
        tables = [
            int32([0] * tokens * TOP_K).view(tokens, TOP_K),
            torch.zeros(tokens, TOP_K, device="cuda"),
            int32([0] * (experts + 1)),
            int32([0] * tokens * TOP_K),
            int32([0] * tokens * TOP_K),
            int32([0]),
        ]
        pointers = RoutingTables(*(table.data_ptr() for table in tables))
        shape = RouteShape(tokens, experts, TOP_K, x.shape[1])
        self.kernels.launch("route", max(tokens, 1), 256, [x, router, pointers, shape])
        return tables

    def attend(self, q, cache, table, position, heads, kv_heads, head_dim, window, split):
        """Tokens q [n, heads · head_dim] of one sequence from `position` on."""
        n, block_size = q.shape[0], cache.shape[3]
        shape = AttentionShape(
            KvShape(heads, kv_heads, head_dim, cache.shape[4], block_size),
            q.shape[1],
            q.shape[1],
            window,
            math.log2(math.e) / math.sqrt(head_dim),
        )
        per_tile, items, folds, partials = 64 // (heads // kv_heads), [], [], 0
        for first in range(0, n, per_tile):
            count = min(per_tile, n - first)
            chunks = -(-(position + first + count) // CHUNK_KEYS)
            if not split:
                items.append([0, first, count, position + first, 0, chunks, NO_PARTIAL])
                continue
            for token in range(count):
                folds.append([first + token, partials + token * heads, count * heads, chunks])
            for c in range(chunks):
                items.append([0, first, count, position + first, c, c + 1, partials])
                partials += count * heads
        out = torch.zeros_like(q)
        softmax = torch.full((max(partials, 1), 2), math.nan, device="cuda")
        output = torch.full((max(partials, 1), cache.shape[4]), math.nan, device="cuda")
        shared = 5 * 64 * cache.shape[4] * 2
        args = [q, cache, table, int32(items), shape, out, softmax, output]
        self.kernels.launch(f"attention_{cache.shape[4]}", (len(items), kv_heads), 128, args, shared)
        if split:
            args = [int32(folds), softmax, output, shape, out]
            self.kernels.launch("attention_fold", (len(folds), heads), 128, args)
        return out

    def gather(self, x, permutation, permuted):
        args = [x, permutation, TOP_K, permuted, x.shape[1] // 8]
        self.kernels.launch("gather_rows", permuted.shape[0], 128, args)

    def combine(self, y, rows, weights, out):
        args = [y, rows, weights, TOP_K, out, out.shape[1] // 4]
        self.kernels.launch("combine_experts", out.shape[0], 256, args)
