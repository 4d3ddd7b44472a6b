"""Writes a Mixtral of random weights as GGUF, for measuring shapes that are too large to have at hand.

    slice    the widths of Mixtral 8x7B, two layers: 3.16 B parameters, 6.3 GB
    tiny     hidden size 256, four layers

Its words are made of syllables, so that random prompts are text and random answers too. Weights are
those of one seed: routing spreads as a router of random weights spreads it.

usage: python random_model.py slice|tiny FILE    (pip install gguf==0.19.0 numpy==2.4.6)
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice, product
from pathlib import Path

import gguf
import numpy as np

VOCAB_SIZE, NUM_EXPERTS, TOP_K = 32_000, 8, 2
CONTEXT, ROPE_THETA, RMS_NORM_EPS = 32_768, 1e6, 1e-5
BF16 = gguf.GGMLQuantizationType.BF16


@dataclass(frozen=True)
class Shape:
    hidden: int
    ffn: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    std: float


SHAPES = {
    "slice": Shape(4096, 14336, 2, 32, 8, 128, std=0.02),
    "tiny": Shape(256, 512, 4, 8, 2, 32, std=0.08),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    write(SHAPES[options.shape], options.shape, options.file)


def write(shape: Shape, name: str, file: Path) -> None:
    """Writes beside the target first, so that a cut leaves no half of a model."""
    part = file.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_name(name)
    add_config(writer, shape)
    add_words(writer)
    for tensor, dims in tensors(shape):
        num_values = int(np.prod(dims))
        if is_f32(tensor):
            writer.add_tensor_info(f"{tensor}.weight", dims, np.dtype(np.float32), 4 * num_values)
        else:
            # The writer counts the columns of raw types in bytes.
            stored = (*dims[:-1], 2 * dims[-1])
            writer.add_tensor_info(f"{tensor}.weight", stored, np.dtype(np.uint8), 2 * num_values, BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    generator = np.random.default_rng(1)
    for tensor, dims in tensors(shape):
        print(tensor, *dims, flush=True)
        writer.write_tensor_data(random_values(generator, tensor, dims, shape.std))
    writer.close()
    part.rename(file)


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and sizes, the columns last."""
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    yield "token_embd", (VOCAB_SIZE, shape.hidden)
    yield "output_norm", (shape.hidden,)
    yield "output", (VOCAB_SIZE, shape.hidden)
    for layer in range(shape.num_layers):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm", (shape.hidden,)
        yield f"{block}.attn_q", (queries, shape.hidden)
        yield f"{block}.attn_k", (keys, shape.hidden)
        yield f"{block}.attn_v", (keys, shape.hidden)
        yield f"{block}.attn_output", (shape.hidden, queries)
        yield f"{block}.ffn_norm", (shape.hidden,)
        yield f"{block}.ffn_gate_inp", (NUM_EXPERTS, shape.hidden)
        yield f"{block}.ffn_gate_exps", (NUM_EXPERTS, shape.ffn, shape.hidden)
        yield f"{block}.ffn_up_exps", (NUM_EXPERTS, shape.ffn, shape.hidden)
        yield f"{block}.ffn_down_exps", (NUM_EXPERTS, shape.hidden, shape.ffn)


def is_f32(tensor: str) -> bool:
    """Norms and routers, as llama.cpp's converter has it."""
    return tensor.endswith(("_norm", "ffn_gate_inp"))


def random_values(
    generator: np.random.Generator,
    tensor: str,
    dims: tuple[int, ...],
    std: float,
) -> np.ndarray:
    """Normal values, of a norm around 1; bf16 is the upper half of their bits, in bytes."""
    values = generator.standard_normal(dims, np.float32)
    if tensor.endswith("_norm"):
        return 1 + np.float32(0.1) * values
    values *= np.float32(std)
    return values if is_f32(tensor) else values.view(np.uint16)[..., 1::2].copy().view(np.uint8)


def add_config(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(RMS_NORM_EPS)
    writer.add_vocab_size(VOCAB_SIZE)
    writer.add_expert_count(NUM_EXPERTS)
    writer.add_expert_used_count(TOP_K)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def add_words(writer: gguf.GGUFWriter) -> None:
    """A vocabulary in SentencePiece's manner, of which every piece is made of two shorter ones."""
    control, by_byte = ["<unk>", "<s>", "</s>"], [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = list(islice(words(), VOCAB_SIZE - len(control) - len(by_byte)))
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*control, *by_byte, *pieces])
    writer.add_token_scores([0.0] * (len(control) + len(by_byte)) + [-float(i) for i in range(len(pieces))])
    writer.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256, *[kinds.NORMAL] * len(pieces)]
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)


def words() -> Iterator[str]:
    """Letters, syllables, a syllable after a space, and words of two and three syllables after one."""
    syllables = ["".join(pair) for pair in product("bcdfghjklmnpqrstvwxyz", "aeiou")]
    twos = ["▁" + "".join(pair) for pair in product(syllables, repeat=2)]
    threes = ("".join(pair) for pair in product(twos, syllables))
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    return chain(["▁", *letters], syllables, ("▁" + syllable for syllable in syllables), twos, threes)


if __name__ == "__main__":
    main()
