"""From a checkpoint to a Hugging Face model directory, written and read back by transformers.

The plain module and `MixtralForCausalLM` share parameter names; `save_pretrained` then writes the
names of the published Mixtral checkpoints (`block_sparse_moe.experts.N.w1`). `verify` reloads the
directory and compares logits with the plain module.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from data import Batch
from model import Mixtral, Shape

LOGIT_TOLERANCE = 1e-3


def hugging_face_config(shape: Shape) -> MixtralConfig:
    return MixtralConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        num_local_experts=shape.num_local_experts,
        num_experts_per_tok=shape.num_experts_per_tok,
        max_position_embeddings=shape.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        rms_norm_eps=shape.rms_norm_eps,
        sliding_window=None,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.02,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        dtype="bfloat16",
    )


def export(model: Mixtral, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Writes config, bf16 weights, generation config and tokenizer."""
    published = MixtralForCausalLM(hugging_face_config(model.shape))
    published.load_state_dict(model.state_dict())
    published.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, do_sample=False)
    published.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory, save_jinja_files=False)
    write_rope_theta(directory / "config.json", model.shape.rope_theta)


def write_rope_theta(path: Path, rope_theta: float) -> None:
    """Adds the key where published Mixtral configs have it; transformers 5 nests it."""
    config = json.loads(path.read_text())
    config["rope_theta"] = rope_theta
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load(directory: Path) -> tuple[MixtralForCausalLM, PreTrainedTokenizerFast]:
    """Reads the exported model: bf16 weights, computed in f32."""
    model = MixtralForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(directory)


@torch.no_grad()
def verify(trained: Mixtral, directory: Path, batch: Batch) -> float:
    """Checks names and logits of the exported model; returns the largest logit difference."""
    with safe_open(directory / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert "model.layers.0.block_sparse_moe.experts.7.w2.weight" in names, sorted(names)[:20]
        assert all(weights.get_tensor(name).dtype == torch.bfloat16 for name in names)
    published, _ = load(directory)
    rounded = Mixtral(trained.shape)
    state = {name: value.bfloat16().float() for name, value in trained.state_dict().items()}
    rounded.load_state_dict(state)
    (num, length), tokens = batch.groups[-1], torch.from_numpy(batch.tokens)
    rows = tokens[-num * length :]
    hidden, _ = rounded(rows, [(num, length)])
    expected = published(rows.view(num, length)).logits.flatten(0, 1)
    difference = (rounded.lm_head(hidden) - expected).abs().max().item()
    assert difference < LOGIT_TOLERANCE, f"logits differ by {difference}"
    return difference
