"""Text against Hugging Face's own code, over seeded fuzz: encoding, decoding and chats.

`/tokenize` and `/detokenize` are compared live with the `tokenizers` package on the demo model's own
`tokenizer.json`; chats with what `transformers` recorded (`tests/fixtures/record_templates.py`). Control
tokens named in what users write are where Windrose differs on purpose: in a chat they are text. There the
expectation is Hugging Face's tokenizer with those names unknown to it.
"""

from __future__ import annotations

import json
import random
import re

import httpx
import pytest
from test_text import as_openai_spells_it
from tokenizers import Tokenizer
from windrose import REPOSITORY, Server

MODEL = REPOSITORY / "crates/demo/model"
NUM_TEXTS = 4000
NUM_IDS = 3000
SEED = 20261127
VOCAB_SIZE = 1536
NUM_COMPLETIONS = 60
LIKELY_BYTES = {str(10 + byte): 11 for byte in range(0x80, 0x100)}
BYTE = re.compile(r"<0x([0-9A-F]{2})>")

CONTROL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]"]
CONTROL += ["[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]
ALMOST = ["<0x0A>", "<0xFF>", "<s", "s>", "[INST", "/INST]", "</S>", "< s>", "<|im_end|>", "▁", "▁▁", "▁a"]
SPACES = [" ", "  ", " " * 17, "\n", "\r\n", "\r", "\t", "\v\f", "\x85", "\xa0", "\u2003", "\u2028", "\u3000"]
MARKS = ["e\u0301", "a" + "\u0300\u0323\u035f" * 5, "ﬁ", "ǆ", "가", "\u1100\u1161", "क्षि", "\u0e33", "\u0301"]
HIDDEN = ["\x00", "\x1b[31m", "\x7f", "\u200b", "\u200d", "\u200e", "\u202e", "\u2066", "\ufeff", "\u00ad"]
STRANGE = [
    "\ud7ff",
    "\ue000",
    "\ufdd0",
    "\ufffe",
    "\uffff",
    "\ufffd",
    "\U0001fffe",
    "\U0010ffff",
    "\U000e0041",
]
EMOJI = ["🦊", "👩\u200d👩\u200d👧\u200d👦", "🏳️\u200d🌈", "👍🏽", "🇩🇪", "1️⃣", "\ufe0f"]
WORDS = [
    "the",
    "Hello, world!",
    "schön",
    "Привет",
    "東京",
    "שלום",
    "مرحبا",
    "ไทย",
    "x" * 300,
    "\\ud83d",
    "0" * 40,
]
PARTS = [CONTROL, ALMOST, SPACES, MARKS, HIDDEN, STRANGE, EMOJI, WORDS]
PLANES = [range(plane << 16, (plane + 1) << 16) for plane in range(17)]
SURROGATES = range(0xD800, 0xE000)


class Draw:
    """Random texts and token ids."""

    def __init__(self, *, control: bool = True) -> None:
        self.random = random.Random(SEED)
        self.parts = PARTS if control else PARTS[1:]

    def character(self) -> str:
        low = range(0x250) if self.random.random() < 0.5 else range(0x10000)
        code = self.random.choice(low if self.random.random() < 0.6 else self.random.choice(PLANES))
        return "?" if code in SURROGATES else chr(code)

    def part(self) -> str:
        if self.random.random() < 0.4:
            return self.character() * self.random.choice([1, 1, 1, 1, 2, 9])
        return self.random.choice(self.random.choice(self.parts))

    def text(self) -> str:
        return "".join(self.part() for _ in range(self.random.randint(0, 12)))

    def ids(self) -> list[int]:
        """Any ids, among which bytes are frequent and so are the bytes of characters."""
        ids: list[int] = []
        for _ in range(self.random.randint(0, 12)):
            kind = self.random.randrange(4)
            if kind == 0:
                ids += [10 + byte for byte in self.character().encode()]
            elif kind == 1:
                ids.append(10 + self.random.randrange(256))
            else:
                ids.append(self.random.randrange(VOCAB_SIZE))
        return ids


@pytest.fixture(scope="module")
def oracle() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def guarded() -> Tokenizer:
    """The demo's tokenizer as it is on text that cannot name control tokens: their names are nonsense."""
    renamed = json.loads((MODEL / "tokenizer.json").read_text())
    for token in renamed["added_tokens"]:
        name, token["content"] = token["content"], f"\U0010fff0{token['id']}\U0010fff1"
        renamed["model"]["vocab"][token["content"]] = renamed["model"]["vocab"].pop(name)
    renamed["post_processor"] = None
    renamed["model"]["unk_token"] = "\U0010fff00\U0010fff1"
    return Tokenizer.from_str(json.dumps(renamed))


def tokenize(client: httpx.Client, **body: object) -> list[int]:
    response = client.post("/tokenize", json=body)
    assert response.status_code == 200, (response.text, body)
    tokens = response.json()
    assert tokens["count"] == len(tokens["tokens"])
    return tokens["tokens"]


def detokenize(client: httpx.Client, ids: list[int]) -> str:
    response = client.post("/detokenize", json={"tokens": ids})
    assert response.status_code == 200, (response.text, ids)
    return response.json()["prompt"]


def test_any_text_becomes_the_tokens_of_hugging_face_and_comes_back(
    server: Server, oracle: Tokenizer
) -> None:
    draw = Draw()
    num_bytes = 0
    with httpx.Client(base_url=server.url) as client:
        for index in range(NUM_TEXTS):
            text, special = draw.text(), index % 2 == 0
            num_bytes += len(text.encode())
            expected = oracle.encode(text, add_special_tokens=special).ids
            assert tokenize(client, prompt=text, add_special_tokens=special) == expected, ascii(text)
            assert detokenize(client, expected) == oracle.decode(expected), (ascii(text), expected)
    print(f"{NUM_TEXTS} texts of seed {SEED}, {num_bytes} bytes")


def has_run_that_breaks_late(oracle: Tokenizer, ids: list[int]) -> bool:
    """Whether Hugging Face takes back characters of a run of byte tokens that were complete already.

    `detokenizer.rs` says why Windrose, which streams, does not.
    """
    runs = [bytearray()]
    for token in (oracle.id_to_token(id) for id in ids):
        byte = BYTE.fullmatch(token)
        if byte:
            runs[-1].append(int(byte[1], 16))
        elif token not in CONTROL:
            runs.append(bytearray())
    for run in runs:
        try:
            run.decode()
        except UnicodeDecodeError as error:
            if error.start > 0:
                return True
    return False


def test_any_tokens_become_the_text_of_hugging_face(server: Server, oracle: Tokenizer) -> None:
    draw = Draw()
    num_late = 0
    with httpx.Client(base_url=server.url) as client:
        for _ in range(NUM_IDS):
            ids = draw.ids()
            text = detokenize(client, ids)
            if has_run_that_breaks_late(oracle, ids):
                num_late += 1
                continue
            assert text == oracle.decode(ids), ids
    print(f"{NUM_IDS} lists of seed {SEED}; {num_late} have a run of bytes that breaks after a character")
    assert num_late < NUM_IDS / 2


def test_any_conversation_becomes_the_tokens_of_transformers(server: Server) -> None:
    lines = (REPOSITORY / "tests/fixtures/demo/templates.jsonl").read_text().splitlines()
    with httpx.Client(base_url=server.url) as client:
        for line in lines:
            chat = json.loads(line)
            expected = chat.pop("ids")
            chat["messages"] = [as_openai_spells_it(message) for message in chat["messages"]]
            assert tokenize(client, **chat) == expected, line
    print(f"{len(lines)} conversations")


def test_control_tokens_that_users_write_are_text(server: Server, guarded: Tokenizer) -> None:
    """The template's own `<s>[INST] `, `[/INST]` and no control token between, whatever is written there."""
    draw = Draw()
    start, begin, end = (guarded.id_to_token(id) for id in (1, 3, 4))
    num_named = 0
    with httpx.Client(base_url=server.url) as client:
        for _ in range(NUM_TEXTS // 4):
            text = draw.text() + draw.random.choice(CONTROL) + draw.text()
            num_named += sum(text.count(name) for name in CONTROL)
            ids = tokenize(client, messages=[{"role": "user", "content": text}])
            rendered = f"{start}{begin} {text}{end}"
            assert ids == guarded.encode(rendered).ids, ascii(text)
            assert [id for id in ids if id < len(CONTROL)] == [1, 3, 4], ascii(text)
            assert detokenize(client, ids) == text.replace("▁", " "), ascii(text)
    print(f"{num_named} names of control tokens in {NUM_TEXTS // 4} messages")


def test_control_tokens_in_any_role_are_text(server: Server, guarded: Tokenizer) -> None:
    """In system prompts, answers, calls, results and tools too."""
    every = " ".join(CONTROL)
    function = {
        "name": "f",
        "description": every,
        "parameters": {"type": "object", "properties": {every: {}}},
    }
    call = {
        "id": every,
        "type": "function",
        "function": {"name": "f", "arguments": json.dumps({every: every})},
    }
    messages = [
        {"role": "system", "content": every},
        {"role": "user", "content": every},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": every, "content": every},
        {"role": "assistant", "content": every},
        {"role": "user", "content": every},
    ]
    tools = [{"type": "function", "function": function}]
    with httpx.Client(base_url=server.url) as client:
        ids = tokenize(client, messages=messages, tools=tools)
    # Start; the user's turn; the call and its end; the result; the answer's end; tools and the user's turn.
    assert [id for id in ids if id < len(CONTROL)] == [1, 3, 4, 5, 2, 8, 9, 2, 6, 7, 3, 4]


def test_completions_stream_the_text_of_their_tokens(server: Server, oracle: Tokenizer) -> None:
    """After every chunk, the text so far is a beginning of what Hugging Face makes of the tokens."""
    num_chunks = num_late = num_byte_tokens = 0
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for seed in range(NUM_COMPLETIONS):
            body = {
                "prompt": "東京 🦊 ",
                "temperature": 2,
                "seed": seed,
                "max_tokens": 48,
                "ignore_eos": True,
            }
            body |= {"stream": True, "return_token_ids": True, "logit_bias": LIKELY_BYTES}
            events = client.post("/v1/completions", json=body).text.split("\n\n")
            chunks = [json.loads(event[6:])["choices"][0] for event in events if event.startswith("data: {")]
            prompt = chunks[0]["prompt_token_ids"]
            text, ids, before = "", [], oracle.decode(prompt)
            for chunk in chunks:
                text += chunk["text"]
                ids += chunk.get("token_ids") or []
                if has_run_that_breaks_late(oracle, prompt + ids):
                    num_late += 1
                    continue
                num_chunks += 1
                whole = oracle.decode(prompt + ids)
                missing = whole.removeprefix(before + text)
                assert whole.startswith(before + text) and set(missing) <= {"\ufffd"}, (seed, ids)
            assert len(ids) == 48
            num_byte_tokens += sum(str(id) in LIKELY_BYTES for id in ids)
    print(f"{num_chunks} chunks with {num_byte_tokens} byte tokens; {num_late} after a run that breaks late")
    assert num_byte_tokens > 10 * NUM_COMPLETIONS and num_chunks > num_late
