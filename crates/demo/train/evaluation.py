"""What is scored: one drawer of held-out examples per skill, and exact match by teacher forcing.

A greedy decoder emits the expected answer exactly if each expected token is the most likely one
after the expected tokens before it. So one forward pass scores an answer; `score.py` confirms the
final model by really generating, through transformers.
"""

from collections.abc import Callable

import numpy as np
import torch

import data
import skills
import toolcalls
from data import Renderer
from model import Mixtral
from skills import Draw, Example

PASSKEY_SENTENCES = 121  # a prompt of about 1,000 tokens


def passkey_long(d: Draw) -> Example:
    return skills.passkey(d, PASSKEY_SENTENCES + d.randint(-3, 3))


SKILLS: dict[str, Callable[[Draw], Example]] = {
    "arithmetic": skills.arithmetic,
    "facts": skills.facts,
    "strings": skills.strings,
    "json": skills.extract_json,
    "python": skills.python,
    "story": skills.story,
    "translate": skills.translate,
    "memory": skills.memory,
    "passkey": passkey_long,
    "tools": toolcalls.tools,
    "unknown": skills.unknown,
    "continuation": skills.running_text,
}


@torch.no_grad()
def num_exact(model: Mixtral, renderer: Renderer, examples: list[Example]) -> int:
    """How many answers greedy decoding would emit exactly."""
    right = 0
    for start in range(0, len(examples), 20):
        batch = data.pack([renderer.graded(example) for example in examples[start : start + 20]])
        graded = batch.weights > 0
        hidden, _ = model(torch.from_numpy(batch.tokens), batch.groups)
        emitted = model.lm_head(hidden[torch.from_numpy(graded)]).argmax(-1).numpy()
        wrong = emitted != batch.targets[graded]
        owners = batch.owners[graded]
        right += len(np.unique(owners)) - len(np.unique(owners[wrong]))
    return right
