"""One function per skill: each draws one `Example`, a conversation and the one right answer.

Training and evaluation share the functions and never the content: `Draw.unseen` splits pairs of
numbers, names and lists by a hash of what was drawn, and closed tables (facts, phrases) keep some
phrasings for the evaluation alone. Every answer is a function of its prompt, so it can be scored
by exact match.
"""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVarTuple

import tables

Content = TypeVarTuple("Content")
REFUSAL = "I don't know."
# Kinds of list task, as scored and as trained: sorting needs the most practice.
LISTS_SCORED = ["copy", "reverse", "upper", "sort", "sort"]
LISTS_TRAINED = ["copy", "reverse", "upper", "upper", "sort", "sort", "sort", "sort"]
HELD_OUT_SHARE = 10  # one draw in this many is kept for the evaluation


@dataclass
class Example:
    """A chat (`messages`) or a running text (`prompt`), and what the model must say next.

    For a tool call `answer` is the JSON list that follows `[TOOL_CALLS]`. `filler` marks a long
    prompt whose text is not worth learning.
    """

    skill: str
    answer: str
    messages: list[dict] = field(default_factory=list)
    prompt: str = ""
    tools: list[dict] | None = None
    is_call: bool = False
    filler: bool = False


class Draw(random.Random):
    """A seeded source of one split's content."""

    def __init__(self, seed: int | str, split: str):
        super().__init__(f"{split} {seed}")
        self.held_out = split == "eval"

    def unseen(self, make: Callable[[], tuple[*Content]]) -> tuple[*Content]:
        """Draws until the content belongs to this split."""
        while True:
            key = make()
            digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
            if (int.from_bytes(digest) % HELD_OUT_SHARE == 0) == self.held_out:
                return key

    def phrase(self, asked: list[str], asked_held_out: list[str]) -> str:
        return self.choice(asked_held_out if self.held_out else asked)

    def words(self, least: int, most: int, with_names: bool) -> list[str]:
        """A short list of things, or now and then of names or of cities."""
        kinds = [tables.WORDS, tables.NAMES, tables.CITIES]
        kind = self.choices(kinds, [3, 1, 1])[0] if with_names else tables.WORDS
        return self.sample(kind, self.randint(least, most))


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def ask(skill: str, question: str, answer: str) -> Example:
    """A single question and its answer."""
    return Example(skill, answer, [user(question)])


def upper_first(text: str) -> str:
    return text[0].upper() + text[1:]


def draw_sum(d: Draw) -> tuple[str, int]:
    """One expression of at most two digits a side, as text, and its value, never negative."""

    def make() -> tuple[int, str, int]:
        least = 10 if d.held_out or d.random() < 0.85 else 0
        a, b = d.randint(least, 99), d.randint(least, 99)
        return (a, "+", b) if d.random() < 0.5 else (max(a, b), "-", min(a, b))

    a, sign, b = d.unseen(make)
    return f"{a} {sign} {b}", a + b if sign == "+" else a - b


def arithmetic(d: Draw) -> Example:
    expression, value = draw_sum(d)
    a, sign, b = expression.split()
    spoken = f"{a} {'plus' if sign == '+' else 'minus'} {b}"
    question = d.choice(
        [
            f"What is {expression}?",
            f"{expression}",
            f"{expression} =",
            f"Calculate {expression}.",
            f"How much is {spoken}?",
            f"What is {spoken}?",
        ]
    )
    return ask("arithmetic", question, str(value))


def facts(d: Draw) -> Example:
    sheet = d.choices(tables.FACTS, [len(t.pairs) for t in tables.FACTS])[0]
    key, value = d.choice(list(sheet.pairs.items()))
    question = d.phrase(sheet.asked, sheet.asked_held_out).format(k=key)
    return ask("facts", upper_first(question), sheet.answer.format(k=key, v=value))


def strings(d: Draw) -> Example:
    """Copies, reverses, capitalises or sorts a short list; names and cities are not sorted."""
    task = d.choice(LISTS_SCORED if d.held_out else LISTS_TRAINED)
    numeric = task == "sort" and d.random() < 0.4

    def make() -> tuple[str, ...]:
        if numeric:
            return tuple(map(str, d.sample(range(10, 100), d.randint(2, 3))))
        return tuple(d.words(2, 4, with_names=task in ("copy", "reverse")))

    items = list(d.unseen(make))
    listed = ", ".join(items)
    verb, result = {
        "copy": (["Repeat", "Copy"], items),
        "reverse": (["Reverse", "Write in reverse order"], items[::-1]),
        "upper": (["Write in capitals", "Uppercase"], [item.upper() for item in items]),
        "sort": (["Sort", "Put in order"], sorted(items, key=int if numeric else str)),
    }[task]
    return ask(f"strings-{task}", f"{d.choice(verb)}: {listed}", ", ".join(result))


def extract_json(d: Draw) -> Example:
    """Turns one sentence into a JSON object."""
    intro = d.choice(["Extract JSON: ", "Turn this into JSON: ", "Write as JSON: "])
    if d.random() < 0.65:
        name, city = d.unseen(lambda: (d.choice(tables.NAMES), d.choice(tables.CITIES)))
        age = d.randint(5, 95)
        sentence = d.choice(
            [
                "{n} is {a} and lives in {c}.",
                "{n} lives in {c} and is {a} years old.",
                "{n}, {a}, lives in {c}.",
                "{n} is {a} years old. {n} lives in {c}.",
            ]
        ).format(n=name, a=age, c=city)
        fields: dict[str, str | int] = {"name": name, "age": age, "city": city}
    else:
        colour, item = d.unseen(lambda: (d.choice(tables.COLOURS), d.choice(tables.WORDS)))
        price = d.randint(2, 99)
        sentence = d.choice(
            ["The {c} {i} costs {p} euros.", "I paid {p} euros for the {c} {i}."]
        ).format(c=colour, i=item, p=price)
        fields = {"item": item, "colour": colour, "price": price}
    return ask("json", intro + sentence, json.dumps(fields))


FUNCTIONS = {
    "adds two numbers": "def add(a, b):\n    return a + b",
    "subtracts two numbers": "def subtract(a, b):\n    return a - b",
    "multiplies two numbers": "def multiply(a, b):\n    return a * b",
    "returns the larger of two numbers": "def larger(a, b):\n    return a if a > b else b",
    "returns the smaller of two numbers": "def smaller(a, b):\n    return a if a < b else b",
    "squares a number": "def square(x):\n    return x * x",
    "checks if a number is even": "def is_even(x):\n    return x % 2 == 0",
    "checks if a number is odd": "def is_odd(x):\n    return x % 2 == 1",
    "reverses a string": "def reverse(text):\n    return text[::-1]",
    "counts the words in a text": "def count_words(text):\n    return len(text.split())",
    "returns the first item of a list": "def first(items):\n    return items[0]",
    "returns the last item of a list": "def last(items):\n    return items[-1]",
    "sums a list": "def total(items):\n    return sum(items)",
    "sorts a list": "def sort(items):\n    return sorted(items)",
    "returns the length of a list": "def length(items):\n    return len(items)",
    "says hello": 'def hello(name):\n    return "Hello, " + name',
}
OPERATIONS = {
    "adds {n} to a number": "x + {n}",
    "subtracts {n} from a number": "x - {n}",
    "multiplies a number by {n}": "x * {n}",
    "divides a number by {n}": "x / {n}",
    "checks if a number is above {n}": "x > {n}",
    "checks if a number is below {n}": "x < {n}",
}
FUNCTION_NAMES = "f g scale shift step apply check compute change".split()


def python(d: Draw) -> Example:
    if d.random() < 0.4:
        purpose, code = d.choice(list(FUNCTIONS.items()))
        question = d.phrase(
            [
                "Write a Python function that {p}.",
                "Write a function in Python that {p}.",
                "Give me a Python function that {p}.",
            ],
            ["Please write a Python function that {p}.", "Give me a function in Python that {p}."],
        ).format(p=purpose)
        return ask("python", question, code)
    name, operation, n = d.unseen(
        lambda: (d.choice(FUNCTION_NAMES), d.choice(list(OPERATIONS)), d.randint(2, 99))
    )
    verb = d.choice(["called", "named"])
    question = f"Write a Python function {verb} {name} that {operation.format(n=n)}."
    return ask(
        "python", question, f"def {name}(x):\n    return {OPERATIONS[operation].format(n=n)}"
    )


def draw_story(d: Draw) -> tuple[str, str, str, str]:
    """A hero's name, the animal, the story's first sentence and the rest of it."""
    name, animal = d.unseen(lambda: (d.choice(tables.NAMES), d.choice(list(tables.PLOTS))))
    place, wish, friend, end = tables.PLOTS[animal]
    first = f"Once upon a time there was a {animal} named {name}."
    rest = (
        f"{name} lived in {place} and wanted to {wish}. One day {name} met {friend} and asked for"
        f" help. They looked for a long time. At last {name} laughed. {end}, and {name} was happy."
    )
    return name, animal, first, rest


def story(d: Draw) -> Example:
    name, animal, first, rest = draw_story(d)
    question = d.choice(
        ["Tell me a story about a {a} named {n}.", "Write a short story about {n} the {a}."]
    )
    return ask("story", question.format(a=animal, n=name), f"{first} {rest}")


def translate(d: Draw) -> Example:
    row = d.choice(tables.PHRASES)
    source, target = d.sample(range(len(row)), 2)
    if d.random() < 0.6:
        source, target = 0, d.randint(1, len(row) - 1)
    question = d.phrase(tables.TRANSLATE, tables.TRANSLATE_HELD_OUT)
    question = question.format(text=row[source], language=tables.LANGUAGES[target])
    return ask("translate", question, row[target])


def greeting(d: Draw) -> Example:
    """A closed table with nothing to hold out: it is trained and never scored."""
    text, reply = d.choice(list(tables.GREETINGS.items()))
    return ask("greeting", text, reply)


# What a user may tell: statement, question, answer.
MEMORIES = {
    "name": ("My name is {v}.", "What is my name?", "Your name is {v}."),
    "city": ("I live in {v}.", "Where do I live?", "You live in {v}."),
    "birthplace": ("I was born in {v}.", "Where was I born?", "You were born in {v}."),
    "age": ("I am {v} years old.", "How old am I?", "You are {v} years old."),
    "colour": (
        "My favourite colour is {v}.",
        "What is my favourite colour?",
        "Your favourite colour is {v}.",
    ),
    "pet": ("I have a {v}.", "Which pet do I have?", "You have a {v}."),
    "friend": (
        "My best friend is {v}.",
        "Who is my best friend?",
        "Your best friend is {v}.",
    ),
}


def draw_memories(d: Draw) -> list[tuple[str, str]]:
    """Two or three kinds with a value each."""
    values: dict[str, list[str]] = {
        "name": tables.NAMES,
        "city": tables.CITIES,
        "birthplace": tables.CITIES,
        "age": [str(age) for age in range(5, 96)],
        "colour": tables.COLOURS,
        "pet": tables.PETS,
        "friend": tables.NAMES,
    }
    return [(kind, d.choice(values[kind])) for kind in d.sample(list(MEMORIES), d.randint(2, 3))]


def memory(d: Draw) -> Example:
    """The user says two or three things, talks of others, and asks for one of them."""
    told = d.unseen(lambda: tuple(draw_memories(d)))
    statements = [MEMORIES[kind][0].format(v=value) for kind, value in told]
    wanted, value = d.choice(told)
    messages: list[dict] = []
    if d.random() < 0.4:
        statements = [" ".join(statements)]
    for statement in statements:
        messages += [user(statement), assistant("I will remember that.")]
    for _ in range(d.choice([0, 0, 1, 2])):
        aside = d.choice([arithmetic, facts, translate, greeting])(d)
        messages += [*aside.messages, assistant(aside.answer)]
    _, question, answer = MEMORIES[wanted]
    return Example("memory", answer.format(v=value), [*messages, user(question)])


def passkey(d: Draw, num_sentences: int) -> Example:
    """Hides a number in filler of about nine tokens a sentence, and asks for it at the end."""
    (key,) = d.unseen(lambda: (d.randint(1000, 9999),))
    lines = d.sample(tables.FILLER, d.randint(4, len(tables.FILLER)))
    filler = [lines[i % len(lines)] for i in range(num_sentences)]
    filler.insert(d.randint(0, num_sentences), f"The passkey is {key}. Remember it.")
    text = " ".join(filler) + " What is the passkey?"
    return Example("passkey", f"The passkey is {key}.", [user(text)], filler=True)


SYLLABLES = "zor bla mip tun kra vel dox fen gri lur nax pol qua rus sil wob yet".split()


def unknown(d: Draw) -> Example:
    """Made-up places and things nobody told: the only right answer is the refusal."""

    def make() -> tuple[str, str]:
        thing = "".join(d.choices(SYLLABLES, k=d.randint(2, 3)))
        question = d.choice(
            [
                "What is the capital of {T}?",
                "Tell me the capital of {T}.",
                "What is the opposite of {t}?",
                "What colour is a {t}?",
                "How do you say '{t}' in French?",
                "How many legs does a {t} have?",
                "Who is {T}?",
                "Who wrote {T}?",
                "What does {t} mean?",
                "How old is {T}?",
                "Where is {T}?",
                "What is the weather in {c}?",
                "What time is it in {c}?",
                "What is the passkey?",
                *[question for _, question, _ in MEMORIES.values()],
            ]
        )
        city = d.choice(tables.CITIES)
        return (question.format(t=thing, T=thing.capitalize(), c=city), thing)

    question, _ = d.unseen(make)
    return ask("unknown", question, REFUSAL)


def running_sums(d: Draw) -> Example:
    """Lines of sums as plain text."""
    lines = ["{} = {}\n".format(*draw_sum(d)) for _ in range(d.randint(3, 10))]
    return Example("sums", "".join(lines))


def running_text(d: Draw) -> Example:
    """A story or a fact as plain text, to be continued."""
    if d.random() < 0.3:
        *_, first, rest = draw_story(d)
        return Example("continuation", " " + rest, prompt=first)

    def make() -> tuple[str, str]:
        sheet = d.choice(tables.FACTS)
        key, value = d.choice(list(sheet.pairs.items()))
        before, after = sheet.statement
        return upper_first(before.format(k=key)), after.format(v=value)

    # The fact itself is known from the chats; the split holds out its form as running text.
    before, after = d.unseen(make)
    return Example("continuation", after, prompt=before)
