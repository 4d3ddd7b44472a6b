"""What the race measures, what it is to reach, and the page that says so.

A column is a figure that everyone may have, such as "decode 8"; a record is one contender's in one
round. Nothing here runs anything: `race.py` does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import median

WINDROSE, LLAMA, IK, SERVER = "Windrose", "llama.cpp", "ik_llama.cpp", "llama-server"
WEIGHTS = ("BF16", "Q8_0", "Q4_0", "Q4_K_M")
# What a format of ours is compared with: equal or more bits per weight.
RIVALS = {"bf16": ("BF16",), "q8": ("BF16", "Q8_0"), "q4": WEIGHTS}

READ, DOT = "GB/s read", {False: "GFLOP/s of bf16", True: "GOP/s of 8-bit integers"}
OUTPUT, REQUESTS, TTFT = "output tokens/s", "requests/s", "TTFT p50 ms"
PROMPT = "tokens of a prompt"


@dataclass(frozen=True)
class Contender:
    """An engine in one configuration."""

    engine: str
    weights: str
    packing: str = ""
    flash: bool = True

    def __str__(self) -> str:
        flash = "" if self.flash else "no flash attention"
        return ", ".join(filter(None, (f"{self.engine} {self.weights}", self.packing, flash)))


SERVERS = (Contender(WINDROSE, "q8"), Contender(SERVER, "Q8_0"))


@dataclass(frozen=True)
class Job:
    """Prompts of a length and sequences that decode from them together; one phase of it counts."""

    phase: str
    prompt_len: int
    output_len: int
    num_seqs: tuple[int, ...] = (1,)
    suffix: str = ""

    def column(self, num_seqs: int) -> str:
        figure = self.prompt_len if self.phase == "prefill" else num_seqs
        return f"{self.phase} {figure}{self.suffix}"

    @property
    def columns(self) -> list[str]:
        return [self.column(num_seqs) for num_seqs in self.num_seqs]


PREFILL = Job("prefill", 512, 1)
DECODE = Job("decode", 96, 32, (1, 8, 16, 32))
LONG = Job("decode", 8192, 32, suffix=" at 8k")


@dataclass(frozen=True)
class Load:
    """Requests to a server, so many streams at a time; lengths are in tokens."""

    model: str
    streams: int
    output_len: int
    requests_per_stream: int
    metrics: tuple[str, ...]
    prompt_len: int = 64

    def column(self, metric: str) -> str:
        return f"{self.model}, {self.streams} streams, answers of {self.output_len}: {metric}"


SLICE_8, SLICE_32 = (Load("slice", streams, 32, 2, (OUTPUT, TTFT, PROMPT)) for streams in (8, 32))
TINY = Load("tiny", 32, 64, 16, (OUTPUT, TTFT, PROMPT))
TINY_ONE = Load("tiny", 32, 1, 64, (REQUESTS, PROMPT))
LOADS = (SLICE_8, SLICE_32, TINY, TINY_ONE)


def share(column: str) -> str:
    """The column of a column's part of what the machine could read at best."""
    return f"{column}, of the read bandwidth"


@dataclass(frozen=True)
class Goal:
    """Ours over the best of `against`, or over the machine's limit; the reverse of a latency."""

    column: str
    ours: str
    against: tuple[str, ...]
    must: float
    aim: float

    @property
    def is_latency(self) -> bool:
        return self.column.endswith(TTFT)


GOALS = (
    *(Goal("prefill 512", ours, (IK,), 1.0, 1.2) for ours in ("q8", "q4")),
    Goal("prefill 512", "bf16", (IK,), 1.1, 1.5),
    *(Goal("decode 1", ours, (LLAMA, IK), 1.0, 1.15) for ours in RIVALS),
    *(Goal(share("decode 1"), ours, (), 0.85, 0.95) for ours in RIVALS),
    Goal("decode 8", "q8", (LLAMA,), 2.0, 2.5),
    Goal("decode 16", "q8", (LLAMA,), 2.8, 4.0),
    Goal("decode 32", "q8", (LLAMA,), 3.5, 6.0),
    Goal("decode 8", "q4", (LLAMA,), 1.7, 2.5),
    Goal("decode 16", "q4", (LLAMA,), 2.2, 3.5),
    Goal("decode 32", "q4", (LLAMA,), 2.8, 5.0),
    *(Goal("decode 8", ours, (IK,), 1.1, 1.4) for ours in RIVALS),
    *(Goal("decode 32", ours, (IK,), 1.2, 1.8) for ours in RIVALS),
    *(Goal(LONG.column(1), ours, (LLAMA, IK), 1.2, 1.8) for ours in RIVALS),
    Goal(SLICE_8.column(OUTPUT), "q8", (SERVER,), 2.5, 4.0),
    Goal(SLICE_32.column(OUTPUT), "q8", (SERVER,), 3.5, 6.0),
    *(Goal(load.column(TTFT), "q8", (SERVER,), 2.0, 2.0) for load in (SLICE_8, SLICE_32)),
    Goal(TINY.column(OUTPUT), "q8", (SERVER,), 8.0, 20.0),
    Goal(TINY_ONE.column(REQUESTS), "q8", (SERVER,), 8.0, 20.0),
)


@dataclass(frozen=True)
class Record:
    """A figure of one round."""

    round: int
    contender: Contender
    column: str
    value: float


class Results:
    """Everything that was measured, and what could not be."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.failures: dict[tuple[str, str], str] = {}
        # Right answers of the demo model, and prompts, by format of ours.
        self.exact_answers: dict[str, tuple[int, int]] = {}

    def note(self, round_index: int, contender: Contender, figures: dict[str, float]) -> None:
        self.records += [Record(round_index, contender, *figure) for figure in figures.items()]

    def contenders(self) -> list[Contender]:
        """Everyone with a figure, in the order of formats and engines."""
        ran = {record.contender for record in self.records}
        formats = [*RIVALS, *WEIGHTS]
        return sorted(ran, key=lambda one: (formats.index(one.weights), str(one)))

    def rounds(self, contender: Contender, column: str) -> dict[int, float]:
        return {
            record.round: record.value
            for record in self.records
            if (record.contender, record.column) == (contender, column)
        }

    def median(self, contender: Contender, column: str) -> float:
        """Of the rounds; 0 without any."""
        return median(self.rounds(contender, column).values() or [0.0])

    def ratios(self, goal: Goal) -> tuple[list[float], str]:
        """The ratio of every round that both ran; over whom, or why there is none."""
        ours = self.rounds(Contender(WINDROSE, goal.ours), goal.column)
        if not goal.against:
            return list(ours.values()), "the limit"
        rivals = [
            one
            for one in self.contenders()
            if one.engine in goal.against and one.weights in RIVALS[goal.ours]
            if self.rounds(one, goal.column)
        ]
        ran = {one.engine for one in rivals}
        missing = " or ".join(engine for engine in goal.against if engine not in ran)
        missing = missing and f"no figure of {missing}"
        if not rivals:
            return [], missing
        sign = -1 if goal.is_latency else 1
        best = max(rivals, key=lambda one: sign * self.median(one, goal.column))
        theirs = self.rounds(best, goal.column)
        ratios = [(ours[index] / theirs[index]) ** sign for index in ours if index in theirs]
        return ratios, f"{best}; {missing}" if missing else str(best)

    def page(self, heading: str, jobs: Iterable[Job]) -> str:
        """Markdown that says it all."""
        columns = [column for job in jobs for column in job.columns]
        engines = [one for one in self.contenders() if any(self.rounds(one, c) for c in columns)]
        metrics = [load.column(metric) for load in LOADS for metric in load.metrics]
        blocks = [
            f"{heading} Measured beside it: {self.limits()}.",
            "Tokens/s: median of the rounds and spread, (max - min) / median; no spread: ran in one"
            " round, after which others were far ahead; a dash: not run, or failed.",
            table(["", *columns], (self.row(str(one), [one], columns) for one in engines)),
            "Ours over the best peer of equal or more bits, by rounds (TTFT: theirs over ours):",
            table(
                ["", "ours", "over", "median", "rounds", "must", "aim", "reached"],
                map(self.verdict, GOALS),
            ),
            "Over HTTP, prompts of about 64 tokens as each server counts them:",
            table(["", *map(str, SERVERS)], (self.row(m, SERVERS, [m]) for m in metrics)),
            "Held-out prompts that the demo model answers exactly: " + self.answers() + ".",
        ]
        failures = [f"- {who}, {what}: {why}" for (who, what), why in self.failures.items()]
        return "\n\n".join(blocks + (["Failed:", "\n".join(failures)] if failures else []))

    def limits(self) -> str:
        """The machine's limits, of all rounds."""
        values = {
            column: [record.value for record in self.records if record.column == column]
            for column in (READ, *DOT.values())
        }
        return ", ".join(f"{summary(of)} {column}" for column, of in values.items())

    def answers(self) -> str:
        """What each format of ours costs in answers."""
        counts = self.exact_answers.items()
        return ", ".join(f"{weights} {right} of {total}" for weights, (right, total) in counts)

    def row(self, name: str, contenders: Iterable[Contender], columns: list[str]) -> list[str]:
        figures = (self.rounds(one, column).values() for one in contenders for column in columns)
        return [name, *(summary(list(values)) for values in figures)]

    def verdict(self, goal: Goal) -> list[str]:
        """A line of the table of ratios."""
        ratios, peer = self.ratios(goal)
        start, end = [goal.column, goal.ours, peer], [f"{goal.must:.2f}", f"{goal.aim:.2f}"]
        if not ratios:
            return [*start, "-", "-", *end, "not measured"]
        middle = median(ratios)
        reached = "aim" if middle >= goal.aim else "must" if middle >= goal.must else "**no**"
        extremes = f"{min(ratios):.2f} to {max(ratios):.2f}"
        return [*start, f"{middle:.2f}", extremes, *end, reached]

    def raw(self) -> dict[str, object]:
        """Every number, for programs."""
        failures = [{"of": key, "why": why} for key, why in self.failures.items()]
        goals = []
        for goal in GOALS:
            ratios, over = self.ratios(goal)
            goals.append(asdict(goal) | {"over": over, "ratios": ratios})
        records = [asdict(one) | {"contender": str(one.contender)} for one in self.records]
        answers = self.exact_answers
        return {"goals": goals, "records": records, "answers": answers, "failures": failures}


def summary(values: list[float]) -> str:
    """A median with three digits or more, and the spread around it."""
    if not values:
        return "-"
    middle = median(values)
    digits = 0 if middle >= 100 else 1 if middle >= 10 else 2
    spread = f" ({(max(values) - min(values)) / middle:.0%})" if len(values) > 1 else ""
    return f"{middle:.{digits}f}{spread}"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
