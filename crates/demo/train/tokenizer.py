"""The tokenizer: byte-fallback BPE in the manner of Llama and Mistral, trained on our own text.

Merges are learnt inside words, inside runs of punctuation and never across digits, by splitting the
training text. The shipped tokenizer does not split: as no merge contains a border between the
classes, whole text encodes exactly as the pieces would (`check` proves it on a corpus).
"""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 1536
SPECIAL_TOKENS = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
PRINTABLE_ASCII = [chr(code) for code in range(33, 127)]
MAX_POSITIONS = 4096
ODD_TEXTS = [
    "one  two   three\n    four\t5",
    "naïve café, größer, ¿qué?",
    "日本語 🙂👍🏽 ∑ Ωμέγα",
    "12+34=46, [x for x in y]",
    "line\r\nend\n",
]

# Letters with the space before them; punctuation likewise; one digit; one space.
PIECE = Regex(r"▁?\p{L}+|▁?[^\p{L}\p{N}\s▁]+|\p{N}|▁|\s")
SPACES = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)


def learn_merges(corpus: Iterable[str]) -> Tokenizer:
    """Trains on pieces. Line ends are left out, so that they stay bytes, as in Mistral."""
    split = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True))
    split.pre_tokenizer = pre_tokenizers.Sequence(
        [
            SPACES,
            pre_tokenizers.Split(Regex(r"[\n\t]"), "removed"),
            pre_tokenizers.Split(PIECE, "isolated"),
        ]
    )
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS + BYTE_TOKENS,
        initial_alphabet=[*PRINTABLE_ASCII, "▁"],
        min_frequency=10,
        show_progress=False,
    )
    split.train_from_iterator(corpus, trainer)
    return split


def build(corpus: Iterable[str], chat_template: str) -> PreTrainedTokenizerFast:
    """Trains the merges and dresses them as Mistral's `tokenizer.json`."""
    learnt = learn_merges(corpus)
    tokenizer = Tokenizer(learnt.model)
    tokenizer.pre_tokenizer = SPACES
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in SPECIAL_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        add_bos_token=True,
        add_eos_token=False,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        chat_template=chat_template,
    )


def check(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> None:
    """Asserts that whole text encodes as its pieces would, and decodes to itself."""
    shipped = tokenizer.backend_tokenizer
    pieces = Tokenizer(shipped.model)
    pieces.pre_tokenizer = pre_tokenizers.Sequence(
        [SPACES, pre_tokenizers.Split(PIECE, "isolated")]
    )
    for text in texts:
        ids = shipped.encode(text, add_special_tokens=False).ids
        assert ids == pieces.encode(text, add_special_tokens=False).ids, text
        assert shipped.decode(ids) == text, text
