"""Mixtral as a plain module that trains fast on a CPU.

It holds the same parameters under the same names as `MixtralForCausalLM` of transformers, so that
exporting is `load_state_dict`. It differs in how it computes: tokens of many documents lie flat,
`[tokens, hidden]`, are gathered per expert (one matrix product each, nothing padded), and attention
runs once per group of equally long documents. There is no cache and no decoding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The sizes, named as in `MixtralConfig`."""

    vocab_size: int
    hidden_size: int = 192
    intermediate_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 32
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    max_position_embeddings: int = 4096
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5


Groups = list[tuple[int, int]]  # (documents, length) of consecutive tokens


class RmsNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Permute(torch.autograd.Function):
    """`x[order]` for a permutation: the gradient is a gather too, where autograd scatters."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class Spread(torch.autograd.Function):
    """`x[order // copies]`: each token goes to `copies` experts; the gradient sums them."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = len(order) // len(x)
        return x.index_select(0, order // ctx.copies)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.index_select(0, ctx.saved_tensors[0])
        return grad.view(-1, ctx.copies, grad.shape[-1]).sum(1), None, None


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        q_size = shape.num_attention_heads * shape.head_dim
        kv_size = shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], groups: Groups) -> Tensor:
        head_dim = self.shape.head_dim
        q = rotate(self.q_proj(x).view(len(x), -1, head_dim), rope)
        k = rotate(self.k_proj(x).view(len(x), -1, head_dim), rope)
        v = self.v_proj(x).view(len(x), -1, head_dim)
        repeats = self.shape.num_attention_heads // self.shape.num_key_value_heads
        k, v = (t.repeat_interleave(repeats, dim=1) for t in (k, v))
        sizes = [documents * length for documents, length in groups]
        mixed = []
        for (documents, _), *qkv in zip(
            groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True
        ):
            heads = [t.unflatten(0, (documents, -1)).transpose(1, 2) for t in qkv]
            attended = F.scaled_dot_product_attention(*heads, is_causal=True)
            mixed.append(attended.transpose(1, 2).reshape(-1, self.o_proj.in_features))
        return self.o_proj(torch.cat(mixed))


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding in the half-split layout of Hugging Face; x `[tokens, heads, head_dim]`."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Experts(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        num, hidden, inner = shape.num_local_experts, shape.hidden_size, shape.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(num, hidden, inner))

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """x `[tokens, hidden]` sorted by expert, `counts[e]` rows for expert e."""
        outputs = []
        for rows, gate_up, down in zip(
            x.split(counts), self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True
        ):
            gate, up = (rows @ gate_up.T).chunk(2, dim=-1)
            outputs.append((F.silu(gate) * up) @ down.T)
        return torch.cat(outputs)


@dataclass
class Routing:
    """What a layer's router decided, for the losses and for the statistics."""

    logits: Tensor  # [tokens, experts]
    expert_ids: Tensor  # [tokens, k]


class SparseMoe(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.gate = nn.Linear(shape.hidden_size, shape.num_local_experts, bias=False)
        self.experts = Experts(shape)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        k = self.shape.num_experts_per_tok
        logits = self.gate(x)
        weights, expert_ids = logits.softmax(-1).topk(k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        order = expert_ids.flatten().argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        counts = torch.bincount(expert_ids.flatten(), minlength=self.shape.num_local_experts)
        sorted_out = self.experts(Spread.apply(x, order, inverse), counts.tolist())
        out = Permute.apply(sorted_out, inverse, order).view(len(x), k, -1)
        return torch.einsum("tkh,tk->th", out, weights), Routing(logits, expert_ids)


class Layer(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.input_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = SparseMoe(shape)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], groups: Groups
    ) -> tuple[Tensor, Routing]:
        x = x + self.self_attn(self.input_layernorm(x), rope, groups)
        out, routing = self.mlp(self.post_attention_layernorm(x))
        return x + out, routing


class Body(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)


class Mixtral(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        # Tied: the model lives by copying, and a head that shares the table learns to copy a token
        # it has rarely said from all the others. Untied, it never learnt to copy the cities.
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight
        frequency = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = torch.outer(torch.arange(shape.max_position_embeddings), frequency)[:, None]
        self.register_buffer("rope_cos", angles.cos(), persistent=False)
        self.register_buffer("rope_sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                nn.init.normal_(
                    parameter, std=0.02 if "embed" in name else parameter.shape[-1] ** -0.5
                )
            if "down_proj" in name or "o_proj" in name:
                parameter.data *= (2 * shape.num_hidden_layers) ** -0.5

    def forward(self, tokens: Tensor, groups: Groups) -> tuple[Tensor, list[Routing]]:
        """Hidden states `[tokens, hidden]` before the head, and each layer's routing."""
        positions = torch.cat(
            [torch.arange(length).repeat(documents) for documents, length in groups]
        )
        rope = self.rope_cos[positions], self.rope_sin[positions]
        x = self.model.embed_tokens(tokens)
        routings = []
        for layer in self.model.layers:
            x, routing = layer(x, rope, groups)
            routings.append(routing)
        return self.model.norm(x), routings
