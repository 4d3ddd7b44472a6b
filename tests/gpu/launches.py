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
NO_TOKEN, MAX_TOP = 0xFFFFFFFF, 32


class GroupedShape(ctypes.Structure):
    _fields_ = (
        [("offsets", ctypes.c_void_p)]
        + [
            (name, ctypes.c_int)
            for name in ("num_experts", "num_rows", "weight_rows", "stride", "features", "out_stride")
        ]
        + [("weight_scales", ctypes.c_void_p), ("row_scales", ctypes.c_void_p)]
    )


class NormShape(ctypes.Structure):
    _fields_ = [("features", ctypes.c_int), ("stride", ctypes.c_int), ("eps", ctypes.c_float)]


class RoutingTables(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            "topk_ids",
            "topk_weights",
            "expert_offsets",
            "gate_sums",
            "permutation",
            "rows",
            "finished_blocks",
        )
    ]


class RouteShape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("num_tokens", "num_experts", "top_k", "width", "stride")]


class StepSteering(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("token_rows", "rules", "given_ids", "given_weights")),
        *((name, ctypes.c_int) for name in ("num_token_rows", "num_layers")),
    ]


class KvShape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int)
        for name in ("num_heads", "num_kv_heads", "head_dim", "head_stride", "block_size")
    ]


class KvCache(ctypes.Structure):
    _fields_ = [("rows", ctypes.c_void_p), ("scales", ctypes.c_void_p)]

    @classmethod
    def of(cls, cache):
        """A cache [blocks, 2, kv heads, block size, stride] in bf16, or Quantized."""
        if isinstance(cache, Quantized):
            return cls(cache.rows.data_ptr(), cache.scales.data_ptr())
        return cls(cache.data_ptr(), None)


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


class RowStrides(ctypes.Structure):
    _fields_ = [("x", ctypes.c_int), ("out", ctypes.c_int)]


class Quantized:
    """Rows of e4m3 `[.., rows, k]`, each with the scale that brings its largest element to 448."""

    def __init__(self, rows, scales):
        self.rows, self.scales = rows, scales

    @classmethod
    def of(cls, x):
        scales = x.float().abs().amax(-1) / 448
        return cls((x.float() / scales[..., None]).to(torch.float8_e4m3fn), scales)

    @classmethod
    def empty(cls, rows, k):
        scales = torch.zeros(rows, device="cuda")
        return cls(torch.zeros(rows, k, dtype=torch.float8_e4m3fn, device="cuda"), scales)

    @property
    def shape(self):
        return self.rows.shape

    def double(self):
        return self.rows.float().double() * self.scales.double()[..., None]

    def units(self):
        """The same bytes in units of two, in which the products count."""
        return self.rows.view(torch.bfloat16)


class SampleRow(ctypes.Structure):
    _fields_ = [
        ("top_p", ctypes.c_double),
        ("uniform", ctypes.c_double),
        ("scale", ctypes.c_float),
        ("top_k", ctypes.c_uint32),
        ("least_weight", ctypes.c_uint32),
        ("forced", ctypes.c_uint32),
        ("first_edit", ctypes.c_int),
        ("num_edits", ctypes.c_int),
        ("num_top", ctypes.c_int),
        ("first_mask_word", ctypes.c_int),
    ]

    @classmethod
    def of(cls, temperature=0.0, uniform=0.0, top_k=0, top_p=1.0, num_top=-1):
        scale = math.log2(math.e) / temperature if temperature else 0.0
        return cls(top_p, uniform, scale, top_k, 1, NO_TOKEN, 0, 0, num_top, -1)


class Sampling:
    """The sampling of rows of logits, with everything it needs on the device, so that it can be timed."""

    def __init__(self, launch, logits, rows):
        self.kernels, self.logits = launch.kernels, logits
        words = b"".join(map(bytes, rows))
        self.rows = torch.frombuffer(bytearray(words), dtype=torch.uint8).cuda()
        self.tokens = int32([0] * len(rows))
        self.reported = int32([[[0] * 3] * (1 + MAX_TOP)] * len(rows))

    def run(self):
        num_rows, vocab = self.logits.shape
        edits = masks = originals = None
        args = [self.logits, vocab, self.logits.stride(0), self.rows, edits, masks, originals]
        self.kernels.launch("sample", num_rows, 1024, [*args, self.tokens, self.reported])

    def top_tokens(self):
        """Of each row the taken token, then the likeliest ones."""
        return self.reported[..., 0]

    def logprobs(self):
        return self.reported.view(torch.float32)[..., 1]


def bf16(*shape):
    return torch.randn(*shape, device="cuda").to(torch.bfloat16)


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


DECODE_ROWS = 16
# Query rows of an item of prompts, by whether wgmma attends to it.
PREFILL_ROWS = {False: 64, True: 128}


class AttentionPlan:
    """Items and folds for sequences of (block table start, tokens, position), as crates/cuda plans them.

    Split, every chunk of keys is an item of its own; otherwise an item walks all that its tokens see.
    """

    def __init__(self, sequences, heads, kv_heads, split, wgmma=False):
        group, self.wgmma = heads // kv_heads, wgmma
        per_tile, first_token = PREFILL_ROWS[wgmma] // group, 0
        self.decode_items, self.prefill_items, self.folds, self.num_partials = [], [], [], 0
        for table_start, num_tokens, position in sequences:
            for first in range(0, num_tokens, per_tile):
                count = min(per_tile, num_tokens - first)
                items = self.decode_items if count * group <= DECODE_ROWS else self.prefill_items
                tile = [table_start, first_token + first, count, position + first]
                chunks = -(-(position + first + count) // CHUNK_KEYS)
                if not split:
                    items.append([*tile, 0, chunks, NO_PARTIAL])
                    continue
                for token in range(count):
                    partial = self.num_partials + token * heads
                    self.folds.append([first_token + first + token, partial, count * heads, chunks])
                for c in range(chunks):
                    items.append([*tile, c, c + 1, self.num_partials])
                    self.num_partials += count * heads
            first_token += num_tokens
        self.prefill_items.sort(key=lambda item: item[4] - item[5])


class Attention:
    """One planned attention, with everything it needs on the device, so that it can be timed."""

    def __init__(self, launch, q, cache, table, plan, heads, kv_heads, head_dim, window):
        self.kernels, self.heads, self.kv_heads = launch.kernels, heads, kv_heads
        block_size, self.stride = cache.shape[3:]
        self.cache, self.is_quantized = cache, isinstance(cache, Quantized)
        kv = KvShape(heads, kv_heads, head_dim, self.stride, block_size)
        scale = math.log2(math.e) / math.sqrt(head_dim)
        self.shape = AttentionShape(kv, q.shape[1], q.shape[1], window, scale)
        self.inputs = [q, KvCache.of(cache), table]
        self.decode_items, self.prefill_items = int32(plan.decode_items), int32(plan.prefill_items)
        self.folds = int32(plan.folds)
        self.out = torch.zeros_like(q)
        self.wgmma, partials = plan.wgmma, max(plan.num_partials, 1)
        self.softmax = torch.full((partials, 2), math.nan, device="cuda")
        self.output = torch.full((partials, self.stride), math.nan, device="cuda")

    def run(self):
        suffix, row_bytes = ("_e4m3", self.stride + 4) if self.is_quantized else ("", self.stride * 2)
        prefill, prefill_shared = ("prefill", 128), 4 * 64 * row_bytes
        if self.wgmma:
            # Four stages of bf16; rows of e4m3 arrive in three tiles of their own, and stages have scales.
            arriving = 2 * (3 * 64 * row_bytes + 4 * 64 * 4) if self.is_quantized else 0
            prefill, prefill_shared = ("prefill_wgmma", 384), 2 * 4 * 64 * self.stride * 2 + arriving
        for (name, threads), kv_bytes, items, q_rows in (
            (("decode", 32), 2 * 64 * row_bytes, self.decode_items, DECODE_ROWS),
            (prefill, prefill_shared, self.prefill_items, PREFILL_ROWS[self.wgmma]),
        ):
            if len(items):
                grid = (len(items), self.kv_heads)
                args = [*self.inputs, items, self.shape, self.out, self.softmax, self.output]
                shared = kv_bytes + q_rows * self.stride * 2
                self.kernels.launch(f"attention_{name}{suffix}_{self.stride}", grid, threads, args, shared)
        if len(self.folds):
            args = [self.folds, self.softmax, self.output, self.shape, self.out]
            self.kernels.launch("attention_fold", (len(self.folds), self.heads), 128, args)
        return self.out


class Launcher:
    """Launches on PyTorch's current stream."""

    def __init__(self, kernels):
        self.kernels = kernels
        self.sms = torch.cuda.get_device_properties(0).multi_processor_count

    def grouped(self, kind, weights, x, out, offsets, features, tokens=None):
        """weights [experts, rows, k] times x [rows, k], bf16 or Quantized; kind f32, bf16 or swiglu.

        `tokens` is the width of a tile; None takes mma.sync instead of wgmma.
        """
        scales = []
        if isinstance(weights, Quantized):
            scales, kind = [weights.scales.data_ptr(), x.scales.data_ptr()], f"e4m3_{kind}"
            weights, x = weights.units(), x.units()
        experts, weight_rows, k = weights.shape
        pointer = offsets.data_ptr() if offsets is not None else None
        shape = GroupedShape(pointer, experts, x.shape[0], weight_rows, k, features, out.shape[1], *scales)
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

    def quantize(self, x, out, indices=None, divisor=1):
        """Rows of x, or those that `indices` divided by `divisor` name, into `out`."""
        strides = RowStrides(x.shape[1], out.shape[1])
        args = [x, indices, divisor, out.rows, out.scales, strides]
        # A thread for each load of eight elements, or as few as take the same number of turns.
        num_loads = out.shape[1] // 8
        threads = -(-num_loads // -(-num_loads // 1024))
        self.kernels.launch("quantize_rows", out.shape[0], -(-threads // 32) * 32, args)

    def route(self, x, router):
        tokens, experts = x.shape[0], router.shape[0]
        tables = [
            int32([0] * tokens * TOP_K).view(tokens, TOP_K),
            torch.zeros(tokens, TOP_K, device="cuda"),
            int32([0] * (experts + 1)),
            torch.zeros(experts, device="cuda"),
            int32([0] * tokens * TOP_K),
            int32([0] * tokens * TOP_K),
            int32([0]),
        ]
        self.route_into(x, router, tables)
        return tables

    def route_into(self, x, router, tables):
        pointers = RoutingTables(*(table.data_ptr() for table in tables))
        shape = RouteShape(x.shape[0], router.shape[0], TOP_K, TOP_K, x.shape[1])
        arguments = [x, router, pointers, shape, StepSteering()]
        self.kernels.launch("route", max(x.shape[0], 1), 256, arguments)

    def attend(self, q, cache, table, position, heads, kv_heads, head_dim, window, split, wgmma=False):
        """Tokens q [n, heads · head_dim] of one sequence from `position` on."""
        plan = AttentionPlan([(0, q.shape[0], position)], heads, kv_heads, split, wgmma)
        return Attention(self, q, cache, table, plan, heads, kv_heads, head_dim, window).run()

    def over_rows(self, num_rows, num_items, threads):
        """A grid with a block for each row, or several where rows alone would leave the device idle."""
        return num_rows, min(-(-4 * self.sms // max(num_rows, 1)), -(-num_items // threads))

    def embed(self, ids, table, out):
        grid = self.over_rows(out.shape[0], table.shape[1] // 8, 256)
        args = [ids, table, out, table.shape[1], table.shape[1], out.shape[1]]
        self.kernels.launch("embed", grid, 256, args)

    def rope_store_kv(self, qkv, tables, positions, slots, queries, cache, shape):
        """`cache` as KvCache takes it; a warp has a head."""
        num_lanes = 32 * (shape.num_heads + 2 * shape.num_kv_heads)
        grid = self.over_rows(qkv.shape[0], num_lanes, 256)
        args = [qkv, qkv.shape[1], *tables, positions, slots, queries, queries.shape[1]]
        name = "rope_store_kv_e4m3" if isinstance(cache, Quantized) else "rope_store_kv"
        self.kernels.launch(name, grid, 256, [*args, KvCache.of(cache), shape])

    def gather(self, x, permutation, permuted):
        row_quads = x.shape[1] // 8
        grid = self.over_rows(permuted.shape[0], row_quads, 128)
        self.kernels.launch("gather_rows", grid, 128, [x, permutation, TOP_K, permuted, row_quads])

    def combine(self, y, rows, weights, out):
        row_quads = out.shape[1] // 4
        grid = self.over_rows(out.shape[0], row_quads, 256)
        self.kernels.launch("combine_experts", grid, 256, [y, rows, weights, TOP_K, out, row_quads])
