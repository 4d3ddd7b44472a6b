"""How fast the kernels are, beside limits measured in the same run: a read sweep and cuBLAS.

Times are medians by events. Layers are replayed as CUDA graphs, as a server would; single kernels are
launched from Python, so anything under 30 us shows the launch.
"""

import ctypes

import torch
from launches import (
    EXPERTS,
    FFN,
    HIDDEN,
    TILES,
    TOP_K,
    Attention,
    AttentionPlan,
    Launcher,
    Quantized,
    SampleRow,
    Sampling,
    bf16,
)

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
NUM_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 8192)
# Steps that are timed with each launch in its turn, too.
IN_TURN_NUM_TOKENS = (1, 8, 32)


def median_seconds(work, repetitions=20):
    """Of single runs, after two to warm up."""
    for _ in range(2):
        work()
    times = []
    for _ in range(repetitions):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def tiles_for(num_tokens):
    """The tiles worth a look: not far too narrow for an expert's share, nor far too wide."""
    if num_tokens >= 1024:
        return [128, 256]
    return [tile for tile in TILES if num_tokens <= 4 * tile and tile <= max(8, 2 * num_tokens)]


class ExpertLayer:
    """Activations and weights of one Mixtral layer's experts, and the launches that multiply them."""

    def __init__(self, launch, gate_up, down, router, x):
        self.launch, self.gate_up_weights, self.down_weights = launch, gate_up, down
        self.x, self.router = x, router
        self.tables = launch.route(self.x, router)
        _, self.weights, self.offsets, _, self.permutation, self.rows, _ = self.tables
        num_tokens, num_rows = len(x), len(x) * TOP_K
        self.is_quantized = isinstance(gate_up, Quantized)
        if self.is_quantized:
            self.permuted, self.quantized_act = (
                Quantized.empty(num_rows, HIDDEN),
                Quantized.empty(num_rows, FFN),
            )
        else:
            self.permuted = torch.zeros(num_rows, HIDDEN, device="cuda", dtype=torch.bfloat16)
        self.act = torch.zeros(num_rows, FFN, device="cuda", dtype=torch.bfloat16)
        self.y = torch.zeros(num_rows, HIDDEN, device="cuda")
        self.out = torch.zeros(num_tokens, HIDDEN, device="cuda")
        used = int((self.offsets[1:] > self.offsets[:-1]).sum())
        self.flops = 2 * num_rows * 3 * HIDDEN * FFN
        self.weight_bytes = used * 3 * HIDDEN * FFN * (1 if self.is_quantized else 2)

    def route(self):
        self.launch.route_into(self.x, self.router, self.tables)

    def gate_up(self, tile):
        self.launch.grouped("swiglu", self.gate_up_weights, self.permuted, self.act, self.offsets, FFN, tile)

    def down(self, tile):
        act = self.quantized_act if self.is_quantized else self.act
        self.launch.grouped("f32", self.down_weights, act, self.y, self.offsets, HIDDEN, tile)

    def gather(self):
        if self.is_quantized:
            self.launch.quantize(self.x, self.permuted, self.permutation, TOP_K)
        else:
            self.launch.gather(self.x, self.permutation, self.permuted)

    def quantize_act(self):
        if self.is_quantized:
            self.launch.quantize(self.act, self.quantized_act)

    def combine(self):
        self.launch.combine(self.y, self.rows, self.weights, self.out)

    def run(self, tile):
        self.gather()
        self.gate_up(tile)
        self.quantize_act()
        self.down(tile)
        self.combine()


def captured(work):
    """A graph of what `work` launches, each kernel in its turn."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        work()
    return graph


def captured_chain(kernels, work):
    """A graph of what `work` launches, kernels of ours alone; each starts while the one before runs."""

    def chain():
        with kernels.dependent_launches():
            work()

    return captured(chain)


def planned_attention(launch, num_seqs, num_tokens, position, split, quantized=False, wgmma=False):
    """Sequences of one length, blocks scattered over the cache; a short one stays in the L2 between runs."""
    table_len = -(-(position + num_tokens) // BLOCK_SIZE)
    num_blocks = num_seqs * table_len
    cache = torch.randn(num_blocks, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM, device="cuda").bfloat16()
    cache = Quantized.of(cache) if quantized else cache
    table = torch.randperm(num_blocks, device="cuda").int()
    sequences = [(index * table_len, num_tokens, position) for index in range(num_seqs)]
    plan = AttentionPlan(sequences, HEADS, KV_HEADS, split, wgmma)
    q = bf16(num_seqs * num_tokens, HEADS * HEAD_DIM)
    return Attention(launch, q, cache, table, plan, HEADS, KV_HEADS, HEAD_DIM, 1 << 30)


class Bench:
    """Times everything; `figures` has what was printed."""

    def __init__(self, kernels):
        self.kernels, self.launch, self.figures = kernels, Launcher(kernels), {}
        self.figures["device"] = torch.cuda.get_device_name()

    def run(self):
        self.measure_limits()
        self.time_experts()
        self.time_dense()
        self.time_attention()
        self.time_sampling()

    def report(self, name, seconds, **shares):
        self.figures[name] = {"microseconds": seconds * 1e6, **shares}
        shown = "  ".join(f"{key} {value:.3g}" for key, value in shares.items())
        print(f"     {name:<44} {seconds * 1e6:10.1f} us  {shown}", flush=True)

    def measure_limits(self):
        buffer = torch.randint(0, 1 << 30, (1 << 30,), dtype=torch.int32, device="cuda")
        blocks = self.launch.sms * 8
        args = [buffer, ctypes.c_int64(buffer.numel() // 4), torch.zeros(blocks, device="cuda")]
        seconds = median_seconds(lambda: self.kernels.launch("read_sweep", blocks, 256, args))
        self.read_bandwidth = buffer.numel() * 4 / seconds
        self.report("read 4 GiB", seconds, TBps=self.read_bandwidth / 1e12)
        a, b = bf16(2 * 8192, HIDDEN), bf16(2 * FFN, HIDDEN)
        seconds = median_seconds(lambda: a @ b.T)
        self.dense = 2 * a.shape[0] * HIDDEN * 2 * FFN / seconds
        self.report("cuBLAS bf16, 16384 x 4096 x 28672", seconds, TFLOPs=self.dense / 1e12)
        a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        one = torch.ones((), device="cuda")
        scaled = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16}
        seconds = median_seconds(lambda: torch._scaled_mm(a, b.T, **scaled))
        self.dense_e4m3 = 2 * a.shape[0] * HIDDEN * 2 * FFN / seconds
        self.report("cuBLAS e4m3, the same", seconds, TFLOPs=self.dense_e4m3 / 1e12)

    def report_share(self, name, seconds, weight_bytes, flops, dense):
        self.report(
            name,
            seconds,
            of_read=weight_bytes / seconds / self.read_bandwidth,
            of_dense=flops / seconds / dense,
            TFLOPs=flops / seconds / 1e12,
        )

    def time_experts(self):
        """In bf16 and in e4m3, with uneven routes last."""
        gate_up, down = bf16(EXPERTS, 2 * FFN, HIDDEN), bf16(EXPERTS, HIDDEN, FFN)
        self.time_layers(gate_up, down, "", self.dense)
        self.time_layers(Quantized.of(gate_up), Quantized.of(down), "e4m3, ", self.dense_e4m3)

    def time_layers(self, gate_up, down, form, dense):
        router = bf16(EXPERTS, HIDDEN)
        for num_tokens in NUM_TOKENS:
            layer = ExpertLayer(self.launch, gate_up, down, router, bf16(num_tokens, HIDDEN))
            for name in ("gather", "combine", "quantize_act")[: 3 if form else 2]:
                self.report(f"{name}, {form}{num_tokens} tokens", median_seconds(getattr(layer, name)))
            for tile in tiles_for(num_tokens):
                self.time_layer(layer, f"{form}{num_tokens} tokens, tile {tile}", tile, dense)
        # One expert gets half of the rows.
        x = bf16(NUM_TOKENS[-1], HIDDEN)
        x[:, 0], router[:, 0], router[0, 0] = 32, 0, 32
        layer = ExpertLayer(self.launch, gate_up, down, router, x)
        for tile in tiles_for(len(x)):
            self.time_layer(layer, f"{form}{len(x)} tokens, skewed, tile {tile}", tile, dense)

    def time_layer(self, layer, case, tile, dense):
        repetitions = 8 if layer.x.shape[0] >= 1024 else 20
        for name, share, work in [("gate_up", 2 / 3, layer.gate_up), ("down", 1 / 3, layer.down)]:
            seconds = median_seconds(lambda work=work: work(tile), repetitions)
            self.report_share(
                f"{name}, {case}", seconds, share * layer.weight_bytes, share * layer.flops, dense
            )
        graphs = {"": captured_chain(self.kernels, lambda: layer.run(tile))}
        if layer.x.shape[0] in IN_TURN_NUM_TOKENS:
            graphs[", each launch in its turn"] = captured(lambda: layer.run(tile))
        for how, graph in graphs.items():
            seconds = median_seconds(graph.replay, repetitions)
            self.report_share(f"expert layer, {case}{how}", seconds, layer.weight_bytes, layer.flops, dense)

    def time_dense(self):
        """The other products of a layer, whose weights stay in the L2 cache from one run to the next."""
        for rows, name in ((6144, "qkv"), (HIDDEN, "o"), (32000, "lm_head")):
            weights = bf16(1, rows, HIDDEN)
            for num_tokens, tile in ((1, 8), (32, 32), (128, 64)):
                x, out = bf16(num_tokens, HIDDEN), torch.zeros(num_tokens, rows, device="cuda")

                def product(weights=weights, x=x, out=out, rows=rows, tile=tile):
                    self.launch.grouped("f32", weights, x, out, None, rows, tile)

                seconds = median_seconds(product)
                bandwidth = weights.numel() * 2 / seconds / 1e12
                self.report(f"{name}, {num_tokens} tokens, L2 warm", seconds, TBps=bandwidth)

    def time_sampling(self):
        logits = 3 * torch.randn(128, 32000, device="cuda")
        for name, row in (
            ("likeliest", SampleRow.of()),
            ("temperature", SampleRow.of(0.7, 0.5)),
            ("top-k 50, top-p 0.9", SampleRow.of(0.7, 0.5, 50, 0.9)),
        ):
            for num_rows in (1, 128):
                sampling = Sampling(self.launch, logits[:num_rows], [row] * num_rows)
                seconds = median_seconds(captured(sampling.run).replay)
                self.report(f"sampling {num_rows} rows, {name}", seconds)

    def report_attention(self, name, attention, kv_bytes):
        seconds = median_seconds(captured(attention.run).replay)
        self.report(name, seconds, of_read=kv_bytes / seconds / self.read_bandwidth)

    def time_attention(self):
        """Single tokens of many sequences, in chunks and whole, and one prompt."""
        for num_seqs, context in ((1, 1024), (32, 1024), (128, 1024), (1, 8192), (32, 8192), (1, 32768)):
            for split in (True, False):
                attention = planned_attention(self.launch, num_seqs, 1, context - 1, split)
                kv_rows = num_seqs * context * 2 * KV_HEADS
                name = f"attention, {num_seqs} x {context} keys, {'split' if split else 'whole'}"
                self.report_attention(name, attention, kv_rows * HEAD_DIM * 2)
                if split:
                    attention = planned_attention(self.launch, num_seqs, 1, context - 1, split, True)
                    self.report_attention(f"e4m3 {name}", attention, kv_rows * (HEAD_DIM + 4))
        flops = 4 * HEADS * HEAD_DIM * 8192 * 8193 / 2
        for name, quantized, wgmma in (
            ("attention", False, False),
            ("wgmma attention", False, True),
            ("e4m3 attention", True, False),
            ("e4m3 wgmma attention", True, True),
        ):
            attention = planned_attention(self.launch, 1, 8192, 0, False, quantized, wgmma)
            seconds = median_seconds(attention.run)
            self.report(f"{name}, prompt of 8192", seconds, TFLOPs=flops / seconds / 1e12)
        q, k, v = (
            torch.randn(1, h, 8192, HEAD_DIM, device="cuda").bfloat16() for h in (HEADS, KV_HEADS, KV_HEADS)
        )

        def oracle():
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        seconds = median_seconds(oracle)
        self.report("PyTorch's attention, same prompt", seconds, TFLOPs=flops / seconds / 1e12)
