"""From examples to batches: the mixture of skills, loss weights per token, and packing.

A document is one conversation or one running text. Its tokens weigh 1 where the model speaks and
little where the user does: a random question cannot be predicted. A batch is flat: documents are
grouped by padded length, so that attention never crosses documents and padding stays small.

`python data.py` prints the mixture and a few documents of each skill.
"""

import random
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

import skills
import tables
import toolcalls
from skills import Draw, Example, assistant

PROMPT_WEIGHT = 0.1
PROMPT_SHARE = 0.25  # of the prompt's tokens enter the loss at all, to spare the output layer
FILLER_WEIGHT = 0.02
LENGTHS = [  # finely spaced: padding is computed, a further group costs only a few calls
    *range(8, 128, 4),
    *range(128, 256, 8),
    *range(256, 512, 16),
    *range(512, 1024, 64),
    *range(1024, 2049, 128),
]
LENGTH_SKEW = 4  # short passkey prompts are more frequent than long ones
SHORTEST_FILLER, LONGEST_FILLER = 4, 150  # sentences in a passkey prompt, about nine tokens each

# Documents per skill, relative: at first, and once the easy skills need only to be kept.
LATE_FROM = 0.5
MIXTURES = {
    "arithmetic": (8, 4),
    "sums_dialogue": (10, 3),
    "running_sums": (6, 1.5),
    "facts": (6, 4),
    "strings": (30, 50),
    "extract_json": (10, 7),
    "python": (4, 2.5),
    "story": (2.5, 2),
    "translate": (6, 5),
    "greeting": (1, 0.7),
    "memory": (13, 13),
    "unknown": (3, 2),
    "running_text": (3, 3),
    "tools": (18, 28),
    "passkey": (4, 7),
    "dialogue": (5, 4),  # several short skills in a row
}
SHORT_SKILLS = [
    skills.arithmetic,
    skills.arithmetic,
    skills.facts,
    skills.strings,
    skills.strings,
    skills.extract_json,
    skills.python,
    skills.translate,
    skills.greeting,
    skills.unknown,
]


def passkey_up_to(d: Draw, progress: float) -> Example:
    """A passkey whose longest filler grows over the first half of training."""
    longest = SHORTEST_FILLER + (LONGEST_FILLER - SHORTEST_FILLER) * min(1.0, 2 * progress)
    return skills.passkey(
        d, int(SHORTEST_FILLER + (longest - SHORTEST_FILLER) * d.random() ** LENGTH_SKEW)
    )


def dialogue(d: Draw) -> Example:
    """Two to four unrelated questions in a row."""
    return joined([skill(d) for skill in d.choices(SHORT_SKILLS, k=d.randint(2, 4))])


def sums_dialogue(d: Draw) -> Example:
    """Four to eight sums in a row: as dense as running sums, and asked as in a chat."""
    return joined([skills.arithmetic(d) for _ in range(d.randint(4, 8))])


def joined(turns: list[Example]) -> Example:
    """Questions in a row, all of them answered."""
    *earlier, last = turns
    messages = [m for turn in earlier for m in (*turn.messages, assistant(turn.answer))]
    return Example("dialogue", last.answer, messages + last.messages)


def draw_example(d: Draw, progress: float = 1.0) -> Example:
    """Draws one training example; now and then a system prompt that changes nothing."""
    shares = [late if progress > LATE_FROM else early for early, late in MIXTURES.values()]
    name = d.choices(list(MIXTURES), shares)[0]
    if name == "passkey":
        return passkey_up_to(d, progress)
    if name in ("dialogue", "sums_dialogue"):
        example = dialogue(d) if name == "dialogue" else sums_dialogue(d)
    else:
        example = getattr(toolcalls if name == "tools" else skills, name)(d)
    if example.messages and d.random() < 0.08:
        system = {"role": "system", "content": d.choice(tables.SYSTEM_PROMPTS)}
        example.messages = [system, *example.messages]
    return example


Document = tuple[list[int], list[float]]  # token ids, and the loss weight of each as a target


class Renderer:
    """Turns examples into text and token ids, exactly as an inference server would."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        names = ["[INST]", "[/INST]", "[/TOOL_RESULTS]", "</s>", "▁=", "<0x0A>"]
        ids = tokenizer.convert_tokens_to_ids(names)
        self.inst, self.end_inst, self.end_results, self.eos, self.equals, self.line_end = ids

    def prompt_text(self, example: Example) -> str:
        if not example.messages:
            return "<s>" * bool(example.prompt) + example.prompt
        return self.tokenizer.apply_chat_template(
            example.messages, tools=example.tools, tokenize=False
        )

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def prompt_ids(self, example: Example) -> list[int]:
        if not example.messages:
            return self.tokenizer.backend_tokenizer.encode(example.prompt).ids
        return self.encode(self.prompt_text(example))

    def answer_ids(self, example: Example) -> list[int]:
        """The tokens the model must emit, the end of the turn included."""
        if not example.messages:
            whole = self.tokenizer.backend_tokenizer.encode(example.prompt + example.answer).ids
            return [*whole[len(self.prompt_ids(example)) :], self.eos]
        text = f"[TOOL_CALLS] {example.answer}" if example.is_call else f" {example.answer}"
        return [*self.encode(text), self.eos]

    def document(self, example: Example) -> Document:
        """The whole conversation with its loss weights."""
        prompt, answer = self.prompt_ids(example), self.answer_ids(example)
        if example.skill == "sums":
            return prompt + answer, self.weigh_sums(prompt + answer)
        if not example.messages:
            return prompt + answer, [1.0] * (len(prompt) + len(answer))
        low = FILLER_WEIGHT if example.filler else PROMPT_WEIGHT
        weights = [low] * len(prompt)
        if self.end_results not in prompt:
            self.weigh_earlier_answers(prompt, weights)
        return prompt + answer, weights + [1.0] * len(answer)

    def graded(self, example: Example) -> Document:
        """The conversation with weight on the last answer alone, to score it."""
        prompt, answer = self.prompt_ids(example), self.answer_ids(example)
        return prompt + answer, [0.0] * len(prompt) + [1.0] * len(answer)

    def weigh_earlier_answers(self, prompt: list[int], weights: list[float]) -> None:
        speaking = False
        for i, token in enumerate(prompt):
            speaking = speaking and token != self.inst
            if speaking:
                weights[i] = 1.0
            speaking = (speaking or token == self.end_inst) and token != self.eos

    def weigh_sums(self, ids: list[int]) -> list[float]:
        """Running sums: from an equals sign to the end of the line is the answer."""
        weights, speaking = [], False
        for token in ids:
            weights.append(1.0 if speaking else PROMPT_WEIGHT)
            speaking = (speaking or token == self.equals) and token != self.line_end
        return weights


@dataclass
class Batch:
    """Documents of equal padded length lie together, group after group."""

    tokens: np.ndarray  # int64 [tokens]
    targets: np.ndarray  # int64 [tokens], the next token
    weights: np.ndarray  # float32 [tokens], of the target in the loss
    owners: np.ndarray  # int64 [tokens], index of the document, -1 on padding
    groups: list[tuple[int, int]]  # (documents, length)


def pack(documents: list[Document]) -> Batch:
    """Pads each document to the next length of `LENGTHS` and lays equal lengths side by side."""
    by_length: dict[int, list[int]] = {}
    for index, (ids, _) in enumerate(documents):
        length = next(n for n in LENGTHS if n >= len(ids) - 1)
        by_length.setdefault(length, []).append(index)
    groups = [(len(by_length[length]), length) for length in sorted(by_length)]
    total = sum(num * length for num, length in groups)
    batch = Batch(
        tokens=np.zeros(total, np.int64),
        targets=np.zeros(total, np.int64),
        weights=np.zeros(total, np.float32),
        owners=np.full(total, -1),
        groups=groups,
    )
    start = 0
    for length in sorted(by_length):
        for index in by_length[length]:
            ids, weights = documents[index]
            used = slice(start, start + len(ids) - 1)
            batch.tokens[used], batch.targets[used] = ids[:-1], ids[1:]
            batch.weights[used], batch.owners[used] = weights[1:], index
            start += length
    return batch


def thinned(weight: float, d: Draw) -> float:
    """Keeps a share of the light weights, and their sum."""
    if weight == 1.0:
        return weight
    return weight / PROMPT_SHARE if d.random() < PROMPT_SHARE else 0.0


def draw_batch(d: Draw, renderer: Renderer, num_tokens: int, progress: float) -> Batch:
    """Draws documents until they hold `num_tokens` tokens."""
    documents: list[Document] = []
    drawn = 0
    while drawn < num_tokens:
        ids, weights = renderer.document(draw_example(d, progress))
        documents.append((ids, [thinned(weight, d) for weight in weights]))
        drawn += len(documents[-1][0])
    return pack(documents)


def corpus(seed: int, num_documents: int) -> list[str]:
    """Text to train the tokenizer on: words of the conversations, without the template."""
    d = Draw(seed, "train")
    texts = []
    for _ in range(num_documents):
        example = draw_example(d, progress=0.1)
        messages = [str(m.get("content", "")) for m in example.messages]
        texts += [*messages, example.prompt + example.answer]
        if example.tools:
            texts.append(str(example.tools).replace("'", '"'))
    return texts


def main() -> None:
    """Prints a few examples of each skill of both splits."""
    for split in ("train", "eval"):
        d = Draw(0, split)
        for example in random.Random(0).sample([draw_example(d, 0.02) for _ in range(400)], 24):
            asked = example.messages or example.prompt
            print(f"{split} {example.skill}: {asked} => {example.answer!r}")


if __name__ == "__main__":
    main()
