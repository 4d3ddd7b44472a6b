#!/usr/bin/env python3
"""What the same GPU does without us: Triton, torch's grouped product, and transformers, with random weights.

usage: peers.py [--only triton|torch|transformers] [--num-layers N] [--json FILE] [--device cpu --tiny]

The first two multiply the experts of one Mixtral 8x7B layer, in bf16 and in e4m3: rows that are sorted by
expert already, times gate and up, SiLU, times down. Neither gathers nor combines, as bench.py's expert layer
does. transformers decodes one token of each sequence with the whole model, its greedy choice included.
Products are held to float32 before they are timed, and replayed as CUDA graphs. Of transformers, which runs
eagerly, only that logits are finite is checked.

Needs PyTorch with Triton, and transformers 5. A part runs in a process of its own and fails alone; any
failure makes the exit non-zero. Layers that would not fit in seven tenths of the memory are left out. To try
it without a GPU: TRITON_INTERPRET=1 peers.py --device cpu --tiny, which times nothing worth reading.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from typing import NamedTuple

import torch

EXPERTS, TOP_K = 8, 2
PARTS = ("triton", "torch", "transformers")
PART_LIMIT_SECONDS = {"cuda": 150, "cpu": 1800}
# Largest `worst_error`: four roundings to bf16 make 0.008, a missing row 1; sums of e4m3 keep few bits.
TOLERANCES = {"bf16": 0.02, "e4m3": 0.1}


class Sizes(NamedTuple):
    hidden: int = 4096
    ffn: int = 14336
    # (tokens, whether one expert gets half of the rows)
    routings: tuple = ((1, False), (8, False), (32, False), (128, False), (8192, False), (8192, True))
    batches: tuple = (1, 32)
    context: int = 1024
    config: dict | None = None


TINY = Sizes(
    hidden=512,
    ffn=512,
    routings=((1, False), (8, False), (200, True)),
    batches=(1, 3),
    context=20,
    config={"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500},
)


class Report:
    """Prints figures as they come and keeps them, and what failed, in a file."""

    def __init__(self, path, device):
        self.path, self.figures, self.failures = path, {}, {}
        self.figures["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        self.figures["torch"] = torch.__version__

    def line(self, name, seconds, **shares):
        self.figures[name] = {"microseconds": seconds * 1e6, **shares}
        shown = "  ".join(
            f"{key} {value if isinstance(value, str) else f'{value:.3g}'}" for key, value in shares.items()
        )
        print(f"     {name:<58} {seconds * 1e6:10.1f} us  {shown}", flush=True)
        self.save()

    @contextlib.contextmanager
    def attempt(self, name):
        """Goes on after an exception, which is recorded under `name`."""
        try:
            yield
        except Exception as error:
            self.failures[name] = f"{type(error).__name__}: {error}"
            frame = traceback.extract_tb(error.__traceback__)[-1]
            reason = self.failures[name].splitlines()[0]
            print(f"FAIL {name}: {reason} ({frame.filename}:{frame.lineno})", flush=True)
            self.save()

    def save(self):
        if self.path:
            with open(self.path, "w") as file:
                json.dump(self.figures | {"failures": self.failures}, file, indent=1)


def median_seconds(work, repetitions=20, warm_up=2, limit_seconds=2.0):
    """Of single runs, fewer if `limit_seconds` are over, but at least three; without a GPU, of one run."""
    if not torch.cuda.is_available():
        return seconds_of(work)
    for _ in range(warm_up):
        work()
    times, begin = [], time.perf_counter()
    while len(times) < repetitions and (len(times) < 3 or time.perf_counter() - begin < limit_seconds):
        times.append(seconds_of(work))
    return sorted(times)[len(times) // 2]


def seconds_of(work):
    """By events, if there is a GPU to record them."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def replayed(work):
    """What replays `work` as a CUDA graph; `work` itself where that cannot be."""
    if not torch.cuda.is_available():
        return work
    work()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    try:
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
            work()
    except RuntimeError as error:
        print(f"     launched from Python, not captured: {str(error).splitlines()[0]}", flush=True)
        return work
    return graph.replay


class Rows(NamedTuple):
    """A matrix `[.., rows, k]` of bf16, or of e4m3 with a scale for every row."""

    values: torch.Tensor
    scales: torch.Tensor | None = None

    def float(self, index=slice(None)):
        values = self.values[index].float()
        return values if self.scales is None else values * self.scales[index][..., None]


def quantized(x):
    """Rows of e4m3 with the scales that bring their largest elements to 448, by torch's own operators."""
    scales = x.abs().amax(-1).float().clamp(min=1e-30) / 448
    return Rows((x.float() / scales[..., None]).to(torch.float8_e4m3fn), scales)


def random_half(device, *shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device=device).to(dtype)


def routed_offsets(num_tokens, skewed, device):
    """Where each expert's rows start, `[experts + 1]`: two experts a token, one of them 0 if skewed."""
    preferences = torch.rand(num_tokens, EXPERTS, device=device)
    if skewed:
        preferences[:, 0] = 2
    chosen = preferences.topk(TOP_K).indices
    counts = (chosen.flatten()[:, None] == torch.arange(EXPERTS, device=device)).sum(0)
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


def reference(x, weights, offsets, pair):
    """The grouped product in float32, `silu(gate) * up` of a pair."""
    results = []
    for expert, (start, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
        y = x.float(slice(start, end)) @ weights.float(expert).T
        if pair:
            gate, up = y.chunk(2, dim=-1)
            y = torch.nn.functional.silu(gate) * up
        results.append(y)
    return torch.cat(results)


def worst_error(got, wanted):
    """Largest rms error of a row or a column, as a share of its rms, or of the whole's if that is larger."""
    whole, error = wanted.square().mean().sqrt(), got.float() - wanted

    def worst(dim):
        return (error.square().mean(dim).sqrt() / wanted.square().mean(dim).sqrt().clamp(min=whole)).max()

    return torch.stack([worst(0), worst(1)]).max().item()


class TorchProducts:
    """What torch has: the activation and, for e4m3, the quantisation are operators of their own."""

    name, half = "torch grouped_mm", torch.bfloat16
    formats = ("bf16", "e4m3") if torch.cuda.is_available() else ("bf16",)

    def tiles(self, num_rows, pair):
        return (None,)

    def product(self, x, weights, offsets, out, pair, tile):
        operands, ends = (x.values, weights.values.transpose(-2, -1)), offsets[1:]
        if x.scales is None:
            public = getattr(torch.nn.functional, "grouped_mm", None)
            y = (public or torch._grouped_mm)(*operands, offs=ends)
        else:
            scales = (x.scales, weights.scales)
            options = {"offs": ends, "out_dtype": torch.bfloat16, "use_fast_accum": True}
            y = torch._scaled_grouped_mm(*operands, *scales, **options)
        if not pair:
            return y
        gate, up = y.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def quantize(self, x):
        return quantized(x)


class ExpertLayer:
    """Rows, weights and routing of one case, and its products by a peer."""

    def __init__(self, peer, x, gate_up, down, offsets, dtype):
        self.peer, self.x, self.gate_up, self.down = peer, x, gate_up, down
        self.offsets, self.dtype = offsets, dtype
        num_rows, (_, hidden, ffn) = x.values.shape[0], down.values.shape
        self.act = torch.empty(num_rows, ffn, dtype=peer.half, device=offsets.device)
        self.y = torch.empty(num_rows, hidden, dtype=peer.half, device=offsets.device)
        used = int((offsets[1:] > offsets[:-1]).sum())
        self.weight_bytes = used * 3 * hidden * ffn * down.values.element_size()
        self.flops = 2 * num_rows * 3 * hidden * ffn
        self.repetitions = 8 if num_rows > 1024 else 20

    def as_input(self, act):
        return Rows(act) if self.dtype == "bf16" else Rows(*self.peer.quantize(act))

    def time(self, report, case):
        gate_up_tile, act = self.fastest(report, "gate_up", case, (self.x, self.gate_up, self.act, True))
        act = self.as_input(act)
        down_tile, _ = self.fastest(report, "down", case, (act, self.down, self.y, False))

        def layer():
            act = self.peer.product(self.x, self.gate_up, self.offsets, self.act, True, gate_up_tile)
            self.peer.product(self.as_input(act), self.down, self.offsets, self.y, False, down_tile)

        seconds = median_seconds(replayed(layer), self.repetitions)
        self.report(report, f"{self.peer.name} layer, {case}", seconds)

    def fastest(self, report, name, case, operands):
        """The fastest tile of a product, and the result."""
        x, weights, out, pair = operands
        wanted = reference(x, weights, self.offsets, pair)
        seconds = {}
        for tile in self.peer.tiles(x.values.shape[0], pair):

            def work(tile=tile):
                return self.peer.product(x, weights, self.offsets, out, pair, tile)

            tried = f"{self.peer.name} {name}, {case}" + (f", {tuple(tile)}" if tile else "")
            with report.attempt(tried):
                out.fill_(torch.nan)
                error = worst_error(work(), wanted)
                assert error <= TOLERANCES[self.dtype], f"error {error:.3g}"
                seconds[tile] = median_seconds(replayed(work), self.repetitions), error
        if not seconds:
            raise RuntimeError(f"no tile of {name} works")
        tile = min(seconds, key=seconds.get)
        figures = {"error": seconds[tile][1]} | ({"tile": str(tuple(tile))} if tile else {})
        share = 2 / 3 if pair else 1 / 3
        self.report(report, f"{self.peer.name} {name}, {case}", seconds[tile][0], share, **figures)
        return tile, self.peer.product(x, weights, self.offsets, out, pair, tile)

    def report(self, report, name, seconds, share=1.0, **figures):
        bandwidth, rate = self.weight_bytes / seconds / 1e12, self.flops / seconds / 1e12
        report.line(name, seconds, TBps=share * bandwidth, TFLOPs=share * rate, **figures)


def time_experts(report, peer, sizes, device):
    gate_up = Rows(random_half(device, EXPERTS, 2 * sizes.ffn, sizes.hidden, dtype=peer.half))
    down = Rows(random_half(device, EXPERTS, sizes.hidden, sizes.ffn, dtype=peer.half))
    for dtype in peer.formats:
        if dtype == "e4m3":
            gate_up, down = quantized(gate_up.values), quantized(down.values)
        for num_tokens, skewed in sizes.routings:
            case = f"{dtype}, {num_tokens} tokens" + (", skewed" if skewed else "")
            with report.attempt(f"{peer.name} layer, {case}"):
                x = random_half(device, num_tokens * TOP_K, sizes.hidden, dtype=peer.half)
                x = Rows(x) if dtype == "bf16" else quantized(x)
                offsets = routed_offsets(num_tokens, skewed, device)
                ExpertLayer(peer, x, gate_up, down, offsets, dtype).time(report, case)


def random_mixtral(sizes, num_layers, device):
    """MixtralForCausalLM in bf16 of normal weights, made on the device."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=num_layers,
        sliding_window=None,
        **(sizes.config or {}),
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0) if "norm" in name else parameter.normal_(std=0.02)
    # Its frequencies are buffers, which to_empty leaves as they were found.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    return model


def fitting_layers(sizes, wanted, device):
    if device == "cpu":
        return min(wanted, 2)
    layer_bytes = 2 * (EXPERTS * 3 * sizes.hidden * sizes.ffn + 2.5 * sizes.hidden**2)
    return min(wanted, int(torch.cuda.get_device_properties(0).total_memory * 0.7 / layer_bytes))


class Decoding:
    """Sequences of one length with random keys and values, which grow by a token a step."""

    def __init__(self, model, num_seqs, context):
        from transformers import DynamicCache

        config, device = model.config, model.device
        self.model, self.cache = model, DynamicCache(config=config)
        head_dim = config.hidden_size // config.num_attention_heads
        shape = (num_seqs, config.num_key_value_heads, context, head_dim)
        for layer in range(config.num_hidden_layers):
            self.cache.update(random_half(device, *shape), random_half(device, *shape), layer)
        self.tokens = torch.randint(config.vocab_size, (num_seqs, 1), device=device)

    def step(self):
        output = self.model(self.tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.tokens = output.logits.argmax(-1)
        return output.logits


def time_decoding(report, model, num_seqs, context, case):
    decoding = Decoding(model, num_seqs, context)
    assert decoding.step().isfinite().all(), "logits are not finite"
    assert decoding.cache.get_seq_length() == context + 1, "the cache did not grow"
    seconds = median_seconds(decoding.step, repetitions=10, warm_up=3)
    report.line(f"transformers decode step, {case}", seconds, tokens_per_s=num_seqs / seconds)


@torch.inference_mode()
def time_transformers(report, sizes, num_layers, device):
    """Every pair of implementations; asked for grouped_mm, `generate` takes batched_mm to decode."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    report.figures["transformers"] = transformers.__version__
    begin = time.perf_counter()
    report.figures["num_layers"] = fitting_layers(sizes, num_layers, device)
    model = random_mixtral(sizes, report.figures["num_layers"], device)
    default = model.config._experts_implementation
    report.figures["default experts"] = default
    print(
        f"     transformers {transformers.__version__}, {report.figures['num_layers']} layers in"
        f" {time.perf_counter() - begin:.1f} s, default experts {default}, attention"
        f" {model.config._attn_implementation}",
        flush=True,
    )
    for experts in dict.fromkeys([default, "grouped_mm", "eager", "batched_mm"]):
        for attention in ("sdpa", "eager"):
            for num_seqs in sizes.batches:
                case = f"{num_seqs} x {sizes.context}, {attention}, experts {experts}"
                with report.attempt(f"transformers decode step, {case}"):
                    model.set_attn_implementation(attention)
                    model.set_experts_implementation(experts)
                    time_decoding(report, model, num_seqs, sizes.context, case)


def run_part(part, options, report):
    """One part, in this process."""
    sizes, device = TINY if options.tiny else Sizes(), options.device
    with report.attempt(part):
        if part == "transformers":
            time_transformers(report, sizes, options.num_layers, device)
        elif part == "torch":
            time_experts(report, TorchProducts(), sizes, device)
        else:
            from peers_triton import TritonProducts

            time_experts(report, TritonProducts(), sizes, device)
    report.save()


def run_apart(part, options):
    """Figures and failures of one part in a process of its own, which takes its memory and faults along."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "figures.json")
        command = [sys.executable, os.path.abspath(__file__), "--only", part, "--json", path]
        command += ["--device", options.device, "--num-layers", str(options.num_layers)]
        command += ["--tiny"] if options.tiny else []
        try:
            status = subprocess.run(command, timeout=PART_LIMIT_SECONDS[options.device]).returncode
        except subprocess.TimeoutExpired as error:
            status = f"a timeout of {error.timeout} s"
        figures = {}
        if os.path.exists(path):
            with open(path) as file:
                figures = json.load(file)
    failures = figures.pop("failures", {})
    if status != 0 and not failures:
        failures[part] = f"its process ended with {status}"
    return figures, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="this part alone")
    parser.add_argument("--num-layers", type=int, default=32, help="of the model that transformers runs")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes to try this script with")
    options = parser.parse_args()
    report, begin = Report(options.json, options.device), time.perf_counter()
    print(f"{report.figures['device']}, torch {torch.__version__}: {options.only or 'all'}", flush=True)
    if options.only:
        run_part(options.only, options, report)
    else:
        for part in PARTS:
            part_begin = time.perf_counter()
            figures, failures = run_apart(part, options)
            report.figures |= figures
            report.failures |= failures
            report.figures[f"{part} seconds"] = time.perf_counter() - part_begin
            print(f"     {part}: {report.figures[f'{part} seconds']:.1f} s", flush=True)
            report.save()
    for name, reason in report.failures.items():
        print(f"failed: {name}: {reason.splitlines()[0]}")
    print(f"{len(report.failures)} failures, {time.perf_counter() - begin:.1f} s")
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
