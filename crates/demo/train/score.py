"""The evaluation through transformers: prompts, what was generated, exact match, expert shares.

`draw_prompts` draws the held-out prompts once per seed; `generate` lets `MixtralForCausalLM`
answer them greedily, and stores its tokens beside the expected ones, so that the files in `eval/`
are an oracle for right answers and for agreement with transformers. Weights are bf16, computed in
f32.

    python score.py            # scores the model as committed, and rewrites the table
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import MixtralForCausalLM

import export
from data import Renderer
from evaluation import SKILLS
from skills import Draw, Example

HERE = Path(__file__).parent
MODEL, EVAL, SCORES = HERE.parent / "model", HERE.parent / "eval", HERE / "scores.json"
EVAL_SEED = 1
NUM_PROMPTS, NUM_LONG_PROMPTS = 100, 40
SPARE_TOKENS = 8  # granted beyond the expected answer
DRAWS_PER_PROMPT = 20
NUM_TOGETHER = 20  # prompts generated together, left-padded
README_MARKS = ("<!-- scores -->\n", "<!-- /scores -->")


@dataclass
class Prompt:
    """One held-out prompt as a line of `eval/<skill>.jsonl`."""

    line: dict
    tokens: list[int]
    expected: list[int]


def draw_prompts(renderer: Renderer) -> dict[str, list[Prompt]]:
    """Draws every skill's prompts, each once."""
    prompts: dict[str, list[Prompt]] = {}
    for skill, draw in SKILLS.items():
        d = Draw(EVAL_SEED, "eval")
        wanted = NUM_LONG_PROMPTS if skill == "passkey" else NUM_PROMPTS
        found: dict[str, Prompt] = {}
        for _ in range(DRAWS_PER_PROMPT * wanted):  # a closed table may hold fewer than wanted
            example = draw(d)
            text = renderer.prompt_text(example)
            if text not in found:
                found[text] = make_prompt(f"{skill}-{len(found):03}", example, renderer)
            if len(found) == wanted:
                break
        prompts[skill] = list(found.values())
    return prompts


def make_prompt(name: str, example: Example, renderer: Renderer) -> Prompt:
    line: dict = {"id": name, "skill": example.skill}
    if example.messages:
        line["messages"] = example.messages
        if example.tools:
            line |= {"tools": example.tools, "tool_call": example.is_call}
    else:
        line["prompt"] = example.prompt
    tokens, expected = renderer.prompt_ids(example), renderer.answer_ids(example)
    line |= {
        "expected": example.answer,
        "max_tokens": len(expected) + SPARE_TOKENS,
        "prompt_ids": tokens,
        "expected_ids": expected,
    }
    return Prompt(line, tokens, expected)


@torch.no_grad()
def generate(model: MixtralForCausalLM, prompts: list[Prompt], eos: int) -> None:
    """Fills `generated_ids` of each line: greedy, up to and with the end token."""
    ordered = sorted(prompts, key=lambda prompt: len(prompt.tokens))
    for start in range(0, len(ordered), NUM_TOGETHER):
        group = ordered[start : start + NUM_TOGETHER]
        width = max(len(prompt.tokens) for prompt in group)
        rows = torch.tensor([[eos] * (width - len(p.tokens)) + p.tokens for p in group])
        mask = torch.tensor([[0] * (width - len(p.tokens)) + [1] * len(p.tokens) for p in group])
        limit = max(prompt.line["max_tokens"] for prompt in group)
        out = model.generate(
            rows, attention_mask=mask, max_new_tokens=limit, do_sample=False, pad_token_id=eos
        )
        for prompt, row in zip(group, out[:, width:].tolist(), strict=True):
            end = row.index(eos) + 1 if eos in row else len(row)
            prompt.line["generated_ids"] = row[: min(end, prompt.line["max_tokens"])]


@torch.no_grad()
def expert_shares(model: MixtralForCausalLM, prompts: list[Prompt]) -> list[list[float]]:
    """Per layer, the share of (token, choice) pairs each expert got on the held-out documents."""
    counts: Tensor | int = 0
    for prompt in prompts:
        rows = torch.tensor([prompt.tokens + prompt.expected])
        layers = model(rows, output_router_logits=True).router_logits
        chosen = torch.stack([logits.topk(2, dim=-1).indices.flatten() for logits in layers])
        num_experts = layers[0].shape[-1]
        counts = counts + torch.nn.functional.one_hot(chosen, num_experts).sum(1)
    shares = counts / counts.sum(-1, keepdim=True)
    return [[round(share, 4) for share in layer] for layer in shares.tolist()]


def exact_match(prompts: list[Prompt]) -> dict[str, float]:
    """Right answers as a share, for a skill or, where its lines name parts, for each part."""
    right, seen = Counter[str](), Counter[str]()
    for prompt in prompts:
        part = prompt.line["skill"]
        seen[part] += 1
        right[part] += prompt.line["generated_ids"] == prompt.expected
    return {part: round(right[part] / seen[part], 4) for part in sorted(seen)}


def score(directory: Path = MODEL) -> dict:
    """Generates all answers, writes `eval/`, and returns scores and expert shares."""
    model, tokenizer = export.load(directory)
    prompts = draw_prompts(Renderer(tokenizer))
    scores = {}
    EVAL.mkdir(exist_ok=True)
    for skill, group in prompts.items():
        generate(model, group, tokenizer.eos_token_id)
        right = sum(prompt.line["generated_ids"] == prompt.expected for prompt in group)
        scores[skill] = {"prompts": len(group), "exact_match": round(right / len(group), 4)}
        parts = exact_match(group)
        if len(parts) > 1:
            scores[skill]["parts"] = parts
        lines = [json.dumps(prompt.line, ensure_ascii=False) + "\n" for prompt in group]
        (EVAL / f"{skill}.jsonl").write_text("".join(lines))
        print(skill, scores[skill], flush=True)
    shares = expert_shares(model, [prompt for group in prompts.values() for prompt in group])
    return {
        "scores": scores,
        "expert_share_min": [min(layer) for layer in shares],
        "expert_shares": shares,
    }


def markdown_table(report: dict) -> str:
    """The table of `README.md`."""
    rows = ["| skill | prompts | exact match |", "|---|---|---|"]
    for skill, result in report["scores"].items():
        rows.append(f"| {skill} | {result['prompts']} | {100 * result['exact_match']:.0f}% |")
    least = ", ".join(f"{100 * share:.1f}%" for share in report["expert_share_min"])
    rows += ["", f"Least used expert per layer: {least}."]
    if training := report.get("training"):
        rows.append(
            f"Trained {training['minutes']:.0f} minutes, {training['steps']} steps,"
            f" {training['tokens'] / 1e6:.1f} M tokens at {training['tokens_per_second']} a second;"
            f" last loss {training['loss']:.3f}, seed {training['seed']},"
            f" prompts of seed {EVAL_SEED}."
        )
    return "\n".join(rows) + "\n"


def publish(report: dict) -> None:
    """Writes `scores.json` and the table between the marks of `README.md`."""
    SCORES.write_text(json.dumps(report, indent=2) + "\n")
    readme = HERE / "README.md"
    before, rest = readme.read_text().split(README_MARKS[0])
    after = rest.split(README_MARKS[1])[1]
    readme.write_text(before + README_MARKS[0] + markdown_table(report) + README_MARKS[1] + after)


def main() -> None:
    torch.set_num_threads(2)
    old = json.loads(SCORES.read_text()) if SCORES.exists() else {}
    publish(old | score())


if __name__ == "__main__":
    main()
