"""Whether each kernel is right: against PyTorch in float64 on fresh inputs, and to the bit where promised."""

import copy
import ctypes
import math

import torch
from bench import ExpertLayer, captured_chain
from launches import (
    EXPERTS,
    FFN,
    HIDDEN,
    TILES,
    TOP_K,
    KvShape,
    Launcher,
    NormShape,
    Placement,
    Quantized,
    SampleRow,
    Sampling,
    bf16,
    int32,
)

MASK = (1 << 64) - 1


def error(got, expected):
    """Frobenius norm of the difference, relative; NaN never passes."""
    expected = expected.double()
    return ((got.double() - expected).norm() / expected.norm()).item()


def mix64(x):
    """As backend::sampling::mix64."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def dummy_values(seed, count, mean, deviation):
    """As backend::weights::dummy_value, in f32 step by step."""
    bits = [mix64(seed ^ (index * 0x9E3779B97F4A7C15 & MASK)) for index in range(count)]
    sums = torch.tensor([sum(b >> 16 * i & 0xFFFF for i in range(4)) for b in bits], dtype=torch.float32)
    centred = (sums - 131070.0) * (torch.tensor(1.7320508) / 65536.0)
    return (mean + deviation * centred).to(torch.bfloat16)


class Checks:
    """Runs all checks and counts what failed."""

    def __init__(self, kernels, brief=False):
        """`brief` checks run every kernel, but leave out what needs many launches."""
        self.kernels, self.launch, self.brief, self.failures = kernels, Launcher(kernels), brief, 0

    def run(self):
        """The number of failures."""
        checks = [
            self.check_norms,
            self.check_route,
            self.check_sample,
            self.check_small,
            self.check_weights,
            self.check_rope,
            self.check_attention,
            self.check_grouped,
            self.check_e4m3,
        ]
        if not self.brief:
            checks.append(self.check_dependent_launches)
        for check in checks:
            check()
            torch.cuda.synchronize()
        return self.failures

    def expect(self, what, deviation, tolerance):
        ok = deviation <= tolerance
        self.failures += not ok
        print(f"{'ok  ' if ok else 'FAIL'} {what:<58} {deviation:.2e} (at most {tolerance:.0e})", flush=True)

    def expect_equal(self, what, got, expected):
        self.expect(what, 0.0 if torch.equal(got, expected) else math.inf, 0.0)

    def check_grouped(self):
        for name, counts in [("ragged", [5, 0, 64, 1, 70, 3, 128, 33]), ("one", [0, 0, 0, 7, 0, 0, 0, 0])]:
            offsets = int32([0, *torch.tensor(counts).cumsum(0).tolist()])
            rows, k, features = sum(counts), 320, 200
            x, weights = bf16(rows, k), bf16(EXPERTS, features, k)
            expert_of = torch.repeat_interleave(torch.arange(EXPERTS), torch.tensor(counts)).tolist()
            expected = torch.stack([x[r].double() @ weights[e].double().T for r, e in enumerate(expert_of)])
            first = None
            for tokens in [*TILES, None]:
                out = torch.full((rows, 256), math.nan, device="cuda")
                self.launch.grouped("f32", weights, x, out, offsets, features, tokens)
                self.expect(f"grouped {name} f32, tile {tokens}", error(out[:, :features], expected), 1e-5)
                if not out[:, features:].isnan().all():
                    self.expect(f"grouped {name} f32, tile {tokens}: padding untouched", math.inf, 0)
                first = out if first is None else first
                if tokens is not None:
                    what = f"grouped {name} f32, tile {tokens}: bits of tile 8"
                    self.expect_equal(what, out[:, :features], first[:, :features])
                else:
                    same = torch.equal(out[:, :features], first[:, :features])
                    print(f"note {name}: mma.sync equals wgmma to the bit: {same}")
                out16 = torch.zeros(rows, 256, device="cuda", dtype=torch.bfloat16)
                self.launch.grouped("bf16", weights, x, out16, offsets, features, tokens)
                self.expect(f"grouped {name} bf16, tile {tokens}", error(out16[:, :features], expected), 4e-3)
                act = torch.zeros(rows, 128, device="cuda", dtype=torch.bfloat16)
                self.launch.grouped("swiglu", weights, x, act, offsets, features // 2, tokens)
                padded = torch.nn.functional.pad(expected, (0, -features % 16))
                pairs = padded.view(rows, -1, 2, 8)
                silu = torch.nn.functional.silu(pairs[:, :, 0]) * pairs[:, :, 1]
                self.expect(
                    f"grouped {name} swiglu, tile {tokens}",
                    error(act[:, :96], silu.reshape(rows, -1)[:, :96]),
                    4e-3,
                )

    def check_e4m3(self):
        """Against the products of the rounded numbers; a tensor core keeps fewer bits of a sum than f32."""
        x = bf16(40, 192)
        quantized = Quantized.empty(20, 256)
        indices = torch.randperm(40).cuda().int()[:20]
        self.launch.quantize(x, quantized, indices, 2)
        gathered = x[indices.long() // 2]
        self.expect("quantize_rows", error(quantized.double()[:, :192], gathered), 0.03)
        self.expect("quantize_rows: padding", quantized.double()[:, 192:].abs().max().item(), 0.0)
        scales = gathered.float().abs().amax(1) / 448
        self.expect("quantize_rows: scales", error(quantized.scales, scales), 1e-6)

        counts = [5, 0, 64, 1, 70, 3, 128, 33]
        offsets = int32([0, *torch.tensor(counts).cumsum(0).tolist()])
        rows, k, features = sum(counts), 384, 200
        x, weights = Quantized.of(bf16(rows, k)), Quantized.of(bf16(EXPERTS, features, k))
        expert_of = torch.repeat_interleave(torch.arange(EXPERTS), torch.tensor(counts)).cuda()
        expected = torch.einsum("rk,rfk->rf", x.double(), weights.double()[expert_of])
        first = None
        for tokens in [*TILES, None]:
            out = torch.zeros(rows, 256, device="cuda")
            self.launch.grouped("f32", weights, x, out, offsets, features, tokens)
            self.expect(f"grouped e4m3 f32, tile {tokens}", error(out[:, :features], expected), 5e-3)
            first = out if first is None else first
            if tokens is not None:
                self.expect_equal(f"grouped e4m3 f32, tile {tokens}: bits of tile 8", out, first)
            else:
                print(f"note e4m3: mma.sync equals wgmma to the bit: {torch.equal(out, first)}")

    def check_dependent_launches(self):
        """Two inputs in turn through the same buffers of a layer: what is read too early is the other's."""
        gate_up, down = bf16(EXPERTS, 2 * FFN, HIDDEN), bf16(EXPERTS, HIDDEN, FFN)
        router = bf16(EXPERTS, HIDDEN)
        for name, weights in (
            ("bf16", (gate_up, down)),
            ("e4m3", (Quantized.of(gate_up), Quantized.of(down))),
        ):
            for num_tokens, tile in ((1, 8), (8, 16), (32, 16), (300, 128)):
                layer = ExpertLayer(self.launch, *weights, router, bf16(num_tokens, HIDDEN))
                other = copy.copy(layer)
                other.x, other.out = bf16(num_tokens, HIDDEN), torch.zeros_like(layer.out)
                layers = [layer, other]

                def run(layers=layers, tile=tile):
                    for layer in layers:
                        layer.route()
                        layer.run(tile)

                run()
                expected = torch.stack([layer.out for layer in layers])
                graph, is_equal = captured_chain(self.kernels, run), True
                for _ in range(20):
                    for layer in layers:
                        layer.out.zero_()
                    graph.replay()
                    is_equal &= torch.equal(torch.stack([layer.out for layer in layers]), expected)
                what = f"dependent launches {name}, {num_tokens} tokens: bits of launches in turn"
                self.expect(what, 0.0 if is_equal else math.inf, 0.0)

    def check_norms(self):
        x, delta, weight = (torch.randn(s, HIDDEN, device="cuda") for s in (5, 5, 1))
        out = torch.zeros(5, HIDDEN, device="cuda", dtype=torch.bfloat16)
        shape = NormShape(HIDDEN, HIDDEN, 1e-5)
        total = x + delta
        self.kernels.launch("add_rms_norm", 5, 256, [x, delta, weight, out, shape], HIDDEN * 4)
        wide = total.double()
        expected = wide / (wide.pow(2).mean(1, keepdim=True) + 1e-5).sqrt() * weight.double()
        self.expect_equal("add_rms_norm: residual", x, total)
        self.expect("add_rms_norm", error(out, expected), 4e-3)
        plain = torch.zeros_like(out)
        self.kernels.launch("rms_norm", 5, 256, [x, weight, plain, shape], HIDDEN * 4)
        self.expect_equal("rms_norm: bits of add_rms_norm", plain, out)

    def check_route(self):
        for tokens in (1, 33, 500):
            x, router = bf16(tokens, HIDDEN), bf16(EXPERTS, HIDDEN)
            for _ in range(2):
                ids, weights, offsets, sums, permutation, rows, _ = self.launch.route(x, router)
            logits = x.double() @ router.double().T
            top = logits.topk(TOP_K, dim=1)
            self.expect_equal(f"route {tokens}: experts", ids, top.indices.int())
            self.expect(f"route {tokens}: weights", error(weights, top.values.softmax(1)), 1e-5)
            order = torch.argsort(ids.flatten(), stable=True).int()
            self.expect_equal(f"route {tokens}: permutation", permutation, order)
            in_order = torch.arange(2 * tokens).cuda().int()
            self.expect_equal(f"route {tokens}: inverse", rows[order.long()], in_order)
            counts = torch.bincount(ids.flatten(), minlength=EXPERTS).cumsum(0).int()
            self.expect_equal(f"route {tokens}: offsets", offsets[1:], counts)
            gates = torch.zeros(len(sums), device="cuda").index_add_(0, ids.flatten(), weights.flatten())
            self.expect(f"route {tokens}: gate sums", error(sums, gates), 1e-5)

    def check_sample(self):
        logits = 3 * torch.randn(9, 32000, device="cuda")
        logits[1, 77] = logits[1, 99] = 50.0
        logits[2, 5] = math.nan
        expected = logits.argmax(1).int()
        expected[1], expected[2] = 77, -1
        sampling = Sampling(self.launch, logits, [SampleRow.of(num_top=2)] * 9)
        sampling.run()
        self.expect_equal("sample: the likeliest", sampling.tokens, expected)
        sound = torch.tensor([0, 1, 3, 4, 5, 6, 7, 8]).cuda()
        # Of equals the one that comes first.
        values, tokens = logits[sound].double().log_softmax(1).sort(dim=1, descending=True, stable=True)
        self.expect_equal("sample: top tokens", sampling.top_tokens()[sound, 1:3], tokens[:, :2].int())
        self.expect("sample: log-probabilities", error(sampling.logprobs()[sound, 1:3], values[:, :2]), 1e-6)

        for name, kept in (("", 32000), (", top-k 40", 40)):
            uniforms = torch.rand(8, dtype=torch.float64).tolist()
            top_k = 0 if kept == 32000 else kept
            rows = [SampleRow.of(temperature=0.8, uniform=u, top_k=top_k) for u in uniforms]
            sampling = Sampling(self.launch, logits[3:4].repeat(8, 1), rows)
            sampling.run()
            tokens = sampling.tokens.long()
            wide = logits[3].double() / 0.8
            wide[wide < wide.topk(kept).values[-1]] = -math.inf
            ends = wide.softmax(0).cumsum(0)
            drawn = torch.tensor(uniforms, dtype=torch.float64).cuda()
            # The draw falls into the token's part of the sum, but for what rounding to 2^-30 moves.
            begins = torch.cat([ends.new_zeros(1), ends])[tokens]
            beside = torch.maximum(begins - drawn, drawn - ends[tokens]).clamp(min=0.0)
            self.expect(f"sample: draws{name}", beside.max().item(), 1e-5)

    def check_small(self):
        table, ids = bf16(100, HIDDEN), int32([7, 99, 0, 7])
        embedded = torch.zeros(4, HIDDEN, device="cuda")
        self.launch.embed(ids, table, embedded)
        self.expect_equal("embed", embedded, table[ids.long()].float())
        x, y = torch.randn(5, HIDDEN, device="cuda"), torch.randn(5, HIDDEN, device="cuda")
        expected = x + y
        self.kernels.launch("add", x.numel() // 4 // 256, 256, [x, y, ctypes.c_int64(x.numel() // 4)])
        self.expect_equal("add", x, expected)
        y, weights = torch.randn(12, HIDDEN, device="cuda"), torch.rand(6, 2, device="cuda")
        token_rows = torch.randperm(12).cuda().int().view(6, 2)
        out = torch.zeros(6, HIDDEN, device="cuda")
        self.launch.combine(y, token_rows, weights, out)
        expected = (y[token_rows.long()].double() * weights.double()[:, :, None]).sum(1)
        self.expect("combine_experts", error(out, expected), 1e-6)

    def check_weights(self):
        matrix = torch.zeros(64, 128, device="cuda", dtype=torch.bfloat16)
        rows = bf16(24, 100)
        self.kernels.launch("place_rows", 24, 256, [rows, 0, matrix, Placement(100, 128, 8, 1)])
        self.expect_equal("place_rows, interleaved", matrix[24:32, :100], rows[8:16])
        dummy = torch.zeros(3, 128, device="cuda", dtype=torch.bfloat16)
        args = [ctypes.c_uint64(1 << 63 | 5), 0.5, 0.02, dummy, Placement(100, 128, 0, 0)]
        self.kernels.launch("place_dummy", 3, 256, args)
        expected = dummy_values(1 << 63 | 5, 300, 0.5, 0.02).view(3, 100).cuda()
        self.expect_equal("place_dummy: the host's values", dummy[:, :100], expected)

    def check_rope(self):
        heads, kv_heads, head_dim, block_size, tokens = 8, 2, 64, 16, 5
        width, half = (heads + 2 * kv_heads) * head_dim, head_dim // 2
        qkv, angles = torch.randn(tokens, width, device="cuda"), torch.rand(100, half, device="cuda")
        positions, slots = int32([3, 99, 0, 41, 42]), int32([19, 64, 33, 5, 6])
        queries = torch.zeros(tokens, heads * head_dim, device="cuda", dtype=torch.bfloat16)
        cache = torch.zeros(5, 2, kv_heads, block_size, head_dim, device="cuda", dtype=torch.bfloat16)
        shape = KvShape(heads, kv_heads, head_dim, head_dim, block_size)
        tables = [angles.cos(), angles.sin()]
        self.launch.rope_store_kv(qkv, tables, positions, slots, queries, cache, shape)
        q, k, v = qkv.view(tokens, -1, head_dim).double().split([heads, kv_heads, kv_heads], 1)
        cos, sin = (table[positions.long()].double()[:, None] for table in tables)

        def turned(x):
            return torch.cat(
                [x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1
            )

        stored = cache[slots.long() // block_size, :, :, slots.long() % block_size]
        self.expect("rope_store_kv: queries", error(queries, turned(q).reshape(tokens, -1)), 4e-3)
        self.expect("rope_store_kv: keys", error(stored[:, 0], turned(k)), 4e-3)
        self.expect_equal("rope_store_kv: values", stored[:, 1], v.to(torch.bfloat16))
        self.expect_equal("rope_store_kv: other slots", cache.count_nonzero(), stored.count_nonzero())

        quantized = Quantized(
            torch.zeros_like(cache).to(torch.float8_e4m3fn), torch.zeros(cache.shape[:-1]).cuda()
        )
        e4m3_queries = torch.zeros_like(queries)
        self.launch.rope_store_kv(qkv, tables, positions, slots, e4m3_queries, quantized, shape)
        self.expect_equal("rope_store_kv_e4m3: queries", e4m3_queries, queries)
        # A row is off by 2.6% on average, and its largest element by nothing but the scale's rounding.
        wide = quantized.double()
        block, offset = slots.long() // block_size, slots.long() % block_size
        stored, scales = wide[block, :, :, offset], quantized.scales[block, :, :, offset]
        for part, what, x in ((0, "keys", turned(k)), (1, "values", v)):
            self.expect(f"rope_store_kv_e4m3: {what}", error(stored[:, part], x), 0.03)
            self.expect(
                f"rope_store_kv_e4m3: scales of {what}", error(scales[:, part], x.abs().amax(-1) / 448), 1e-6
            )
        self.expect_equal("rope_store_kv_e4m3: other slots", wide.count_nonzero(), stored.count_nonzero())

    def check_attention(self):
        for heads, kv_heads, head_dim, window, length in [
            (32, 8, 128, 1 << 30, 700),
            (32, 8, 128, 300, 900),
            (3, 1, 128, 1 << 30, 1100),
            (4, 2, 64, 100, 300),
            (6, 6, 64, 1 << 30, 800),
            (8, 1, 32, 1 << 30, 130),
            (2, 2, 12, 1 << 30, 530),
        ]:
            stride = 16 if head_dim == 12 else head_dim
            blocks, block_size = -(-length // 16) + 1, 16
            keys, values = (bf16(length, kv_heads, head_dim) for _ in range(2))
            table = torch.randperm(blocks - 1)[: blocks - 1].cuda().int() + 1
            cache = torch.zeros(blocks, 2, kv_heads, block_size, stride, device="cuda", dtype=torch.bfloat16)
            at = torch.arange(length)
            block, offset = table.cpu()[at // block_size].long(), at % block_size
            cache[block, 0, :, offset, :head_dim] = keys
            cache[block, 1, :, offset, :head_dim] = values
            q = bf16(length, heads * head_dim)
            args = (table, (heads, kv_heads, head_dim, window))
            windowed = f", window {window}" if window < length else ""
            name = f"attention {heads}/{kv_heads} x {head_dim}, {length} tokens{windowed}"
            self.check_attention_over(name, q, cache, cache.double()[block, :, :, offset], *args)
            quantized = Quantized.of(cache)
            # What was not written has scale 0.
            quantized.rows.view(torch.uint8)[quantized.scales == 0] = 0
            wide = quantized.double()[block, :, :, offset]
            self.check_attention_over(f"{name}, e4m3", q, quantized, wide, *args)

    def check_attention_over(self, name, q, cache, wide, table, args):
        """`wide` [tokens, 2, kv heads, stride] is what the cache holds."""
        heads, kv_heads, head_dim, window = args
        length, group, at = len(q), heads // kv_heads, torch.arange(len(q))
        keys, values = wide[..., :head_dim].repeat_interleave(group, 2).unbind(1)
        whole = self.launch.attend(q, cache, table, 0, *args, False)
        queries = q.view(length, heads, head_dim).double()
        scores = torch.einsum("qhd,khd->hqk", queries, keys) / math.sqrt(head_dim)
        distance = at[:, None] - at[None]
        mask = ((distance < 0) | (distance >= window)).cuda()
        weights = scores.masked_fill(mask, -math.inf).softmax(-1)
        expected = torch.einsum("hqk,khd->qhd", weights, values)
        self.expect(name, error(whole, expected.reshape(length, -1)), 4e-3)
        self.expect_equal(f"{name}: split", self.launch.attend(q, cache, table, 0, *args, True), whole)
        for split in (True, False):
            last = self.launch.attend(q[-1:].contiguous(), cache, table, length - 1, *args, split)
            way = "split" if split else "whole"
            self.expect_equal(f"{name}: last token alone, {way}", last, whole[-1:])
        if cache.shape[-1] >= 64:
            self.check_wgmma_attention(name, q, cache, table, args, whole)
        cut = length - 70
        chunked = self.launch.attend(q[cut:].contiguous(), cache, table, cut, *args, False)
        self.expect_equal(f"{name}: last 70 tokens", chunked, whole[cut:])

    def check_wgmma_attention(self, name, q, cache, table, args, whole):
        """All tokens, and last ones from several places of a tile on."""
        for num_last in (len(q), *range(1, 130, 100 if self.brief else 17)):
            last, position = q[-num_last:].contiguous(), len(q) - num_last
            for split in (False, True):
                got = self.launch.attend(last, cache, table, position, *args, split, wgmma=True)
                way = "split" if split else "whole"
                self.expect_equal(f"{name}: wgmma, last {num_last} tokens, {way}", got, whole[-num_last:])
