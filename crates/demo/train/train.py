"""One command from nothing to the demo model: tokenizer, training, export, evaluation, scores.

    python train.py --minutes 110 --seed 0

The learning rate follows the clock, so a run ends on time on any machine and its result depends on
the machine's speed; the data, the tokenizer and the initial weights depend on the seed alone.
"""

import argparse
import ctypes
import json
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

import data
import export
import score
import tokenizer
from data import Batch, Renderer
from evaluation import SKILLS, num_exact
from model import Mixtral, Routing, Shape
from optimizer import make_optimizers
from skills import Draw, Example
from workers import agreed, average_gradients, run, summed

HERE = Path(__file__).parent
CHECKPOINT, REPORT = "checkpoint.pt", "training.json"
COUNTERS = ["num_tokens", "num_steps", "loss", "elapsed"]
NUM_WORKERS = 2
TOKENS_PER_STEP = (4096, 8192)  # at the start and at the end
MUON_LR, ADAM_LR = 0.02, 0.004
WARM_UP, DECAY_FROM = 0.01, 0.4
BALANCE_WEIGHT, ROUTER_Z_WEIGHT = 0.02, 1e-4
NUM_CORPUS_DOCUMENTS = 20_000
REPORT_SECONDS, SAVE_SECONDS, SCORE_SECONDS = 30, 180, 300
NUM_WATCHED, NUM_WATCHED_LONG = 40, 10  # examples per skill scored during training
WATCH_SEED = 1_000_000  # apart from the seed of the committed evaluation


def learning_rate(progress: float) -> float:
    """Warm-up, a plateau, then a line to zero, as a share of the peak."""
    return min(1.0, progress / WARM_UP, (1 - progress) / (1 - DECAY_FROM))


def answer_loss(model: Mixtral, hidden: Tensor, batch: Batch) -> Tensor:
    """Cross entropy of the targets that weigh something, averaged by weight."""
    weights = torch.from_numpy(batch.weights)
    used = weights.nonzero()[:, 0]
    logits = model.lm_head(hidden.index_select(0, used))
    losses = F.cross_entropy(logits, torch.from_numpy(batch.targets)[used], reduction="none")
    return (losses * weights[used]).sum() / weights[used].sum()


def router_loss(routings: list[Routing], real: Tensor) -> Tensor:
    """Load balance as in transformers (taken per layer), and small router logits."""
    total = torch.zeros(())
    for routing in routings:
        logits, expert_ids = routing.logits[real], routing.expert_ids[real]
        num_experts = logits.shape[-1]
        share = F.one_hot(expert_ids, num_experts).float().sum(1).mean(0)
        total = total + BALANCE_WEIGHT * num_experts * (share * logits.softmax(-1).mean(0)).sum()
        total = total + ROUTER_Z_WEIGHT * logits.logsumexp(-1).square().mean()
    return total / len(routings)


@dataclass
class Run:
    """One worker's part of a training run, and the counters it reports."""

    model: Mixtral
    renderer: Renderer
    seed: int
    minutes: float
    work: Path
    num_tokens: int = 0
    num_steps: int = 0
    loss: float = 0.0
    elapsed: float = 0.0  # seconds

    def train(self) -> dict:
        """Trains for a fixed time and returns what is worth reporting."""
        rank, num_workers = dist.get_rank(), dist.get_world_size()
        d = Draw(f"{self.seed} worker {rank} from step {self.num_steps}", "train")
        watched = draw_watched(self.seed)
        optimizers = make_optimizers(self.model, MUON_LR, ADAM_LR)
        peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        start = time.monotonic() - self.elapsed
        next_report = next_save = next_score = self.elapsed
        while (elapsed := agreed(time.monotonic() - start)) < 60 * self.minutes:
            self.elapsed = elapsed
            progress = elapsed / (60 * self.minutes)
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                optimizer.param_groups[0]["lr"] = peak * learning_rate(progress)
            least, most = TOKENS_PER_STEP
            num_tokens = int(least + (most - least) * progress) // num_workers
            self.step(data.draw_batch(d, self.renderer, num_tokens, progress), optimizers)
            if rank == 0 and elapsed >= next_report:
                next_report = elapsed + REPORT_SECONDS
                self.report()
            if rank == 0 and elapsed >= next_save:
                next_save = elapsed + SAVE_SECONDS
                self.save()
            if elapsed >= next_score:
                next_score = elapsed + SCORE_SECONDS
                self.watch(watched)
        if rank == 0:
            self.save()
        return {
            "seed": self.seed,
            "minutes": round(self.minutes, 1),
            "steps": self.num_steps,
            "tokens": self.num_tokens,
            "tokens_per_second": round(self.num_tokens / (60 * self.minutes)),
            "loss": round(self.loss, 4),
        }

    def step(self, batch: Batch, optimizers: list[torch.optim.Optimizer]) -> None:
        """One update from one batch on each worker."""
        real = torch.from_numpy(batch.owners) >= 0
        hidden, routings = self.model(torch.from_numpy(batch.tokens), batch.groups)
        loss = answer_loss(self.model, hidden, batch)
        (loss + router_loss(routings, real)).backward()
        average_gradients(self.model)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        num_tokens, losses = summed(int(real.sum()), loss.item())
        self.num_tokens += int(num_tokens)
        self.num_steps += 1
        mean = losses / dist.get_world_size()
        self.loss = mean if self.num_steps == 1 else 0.98 * self.loss + 0.02 * mean

    def report(self) -> None:
        print(
            f"{self.elapsed / 60:5.1f} min  step {self.num_steps}"
            f"  {self.num_tokens / 1e6:.2f} M tokens"
            f"  {self.num_tokens / (self.elapsed + 1):.0f} tokens/s  loss {self.loss:.4f}",
            flush=True,
        )

    def watch(self, watched: dict[str, list[Example]]) -> None:
        """Prints the exact match in percent of each skill, the work shared among the workers."""
        rank, num_workers = dist.get_rank(), dist.get_world_size()
        right = summed(
            *(
                num_exact(self.model, self.renderer, ex[rank::num_workers])
                for ex in watched.values()
            )
        )
        if rank == 0:
            shares = zip(watched.items(), right, strict=True)
            print(*(f"{name} {100 * n / len(ex):.0f}" for (name, ex), n in shares), flush=True)

    def save(self) -> None:
        """Writes beside the target first, so that a cut leaves the older file whole."""
        partial = self.work / "checkpoint.partial"
        counters = {name: getattr(self, name) for name in COUNTERS}
        torch.save({"model": self.model.state_dict(), "counters": counters}, partial)
        partial.replace(self.work / CHECKPOINT)

    def load(self) -> None:
        """Goes on where a cut run left off. The optimizers' averages are soon made again."""
        checkpoint = torch.load(self.work / CHECKPOINT)
        self.model.load_state_dict(checkpoint["model"])
        for name, value in checkpoint["counters"].items():
            setattr(self, name, value)


def draw_watched(seed: int) -> dict[str, list[Example]]:
    """Held-out examples to watch during training; others than the committed prompts."""
    d = Draw(seed + WATCH_SEED, "eval")
    return {
        name: [make(d) for _ in range(NUM_WATCHED_LONG if name == "passkey" else NUM_WATCHED)]
        for name, make in SKILLS.items()
    }


def train_worker(seed: int, minutes: float, work: Path, resume: bool) -> None:
    """What each worker does; the first one leaves the checkpoint and a report in `work`."""
    keep_freed_memory()
    torch.manual_seed(seed)
    words = AutoTokenizer.from_pretrained(work / "tokenizer")
    model = Mixtral(Shape(vocab_size=len(words)))
    this = Run(model, Renderer(words), seed, minutes, work)
    if resume:
        this.load()
    report = this.train()
    if dist.get_rank() == 0:
        (work / REPORT).write_text(json.dumps(report, indent=2) + "\n")


def keep_freed_memory() -> None:
    """Asks glibc not to return memory between steps: page faults cost a quarter of the time."""
    m_trim_threshold, m_mmap_max = -1, -4
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=110, help="to train, without evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("/tmp/windrose-demo"), help="checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)

    if not arguments.resume:
        make_tokenizer(arguments.seed, arguments.work)
    worker_arguments = arguments.seed, arguments.minutes, arguments.work, arguments.resume
    run(train_worker, NUM_WORKERS, *worker_arguments)
    finish(arguments.work)


def make_tokenizer(seed: int, work: Path) -> None:
    corpus = data.corpus(seed, NUM_CORPUS_DOCUMENTS)
    words = tokenizer.build(corpus, (HERE / "chat_template.jinja").read_text())
    tokenizer.check(words, [*tokenizer.ODD_TEXTS, *corpus[:2000]])
    words.save_pretrained(work / "tokenizer", save_jinja_files=False)


def finish(work: Path) -> None:
    """Exports and verifies the model, scores it through transformers, and writes the table."""
    words = AutoTokenizer.from_pretrained(work / "tokenizer")
    model = Mixtral(Shape(vocab_size=len(words)))
    model.load_state_dict(torch.load(work / CHECKPOINT)["model"])
    renderer = Renderer(words)
    export.export(model, words, score.MODEL)
    d = Draw(score.EVAL_SEED, "eval")
    sample = data.pack([renderer.document(data.draw_example(d)) for _ in range(10)])
    difference = export.verify(model, score.MODEL, sample)
    packages = ["torch", "transformers", "tokenizers", "safetensors", "numpy", "jinja2"]
    score.publish(
        {
            "training": json.loads((work / REPORT).read_text()),
            "largest_logit_difference": difference,
            "versions": {name: version(name) for name in packages},
        }
        | score.score()
    )


if __name__ == "__main__":
    main()
