"""Small tokenizers in the manner of published models: their real settings, trained on a few texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tests.text.conftest import EOT, TEXTS, added_token, write

# The patterns as the models' tokenizer.json files hold them.
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

MORE_TEXTS = {
    "nfc and nfd": "Ångström A\u030angstro\u0308m ﬁnd \u1e9b\u0323 \u212b \u2126 q\u0307\u0323"
    " 한글 \u1112\u1161\u11ab\u1100",
    "marks alone": "\u0301a \u0301 \u0338> =\u0338 <|endoftext|>\u0338 \n\u0308x",
    "digits of other scripts": "१२३४ ٣٤٥٦ ๑๒๓ 𝟘𝟙𝟚 ⅷ Ⅻ ½¾ ①②③ 一二三 x१y 1१2",
    "runs of spaces": "a" + " " * 3 + "b" + " " * 24 + "c" + " " * 90 + "d  12   34 \t  \t 5 " + " " * 7,
    "spaces and digits": "a 1  2   3 a1 a  1a  \n1\n 2 \n\n3",
    "one space": " a",
    "two spaces": "  a b",
    "ends in spaces": "a  ",
    "metaspace": "▁a ▁b▁c ▁▁ d▁",
    "bytes": "<0x0A><0x41> <0x> \\x0a",
    "marks in text": "<s>a</s> <unk><|im_start|>user\nb<|im_end|>\n<think>c</think>"
    " [INST] d [/INST]<|user|> e <|end|>\n f",
    "joined": "a<s>b</s>c <s> d <|endoftext|>e <|endoftext|> f<|endoftext|>\n\ng",
    "pads": "|||IP_ADDRESS|||a |||EMAIL_ADDRESS||| b<|padding|>c",
    "right to left": "שלום hello עולם! \u200fمرحبا\u200e 123 \u202e",
    "long word": "aaaabaaabaabab" * 200,
    "repeats": "aaa aaaa aaaaa aaaaaa     ====== ------- \n\n\n \n \n\t\t\t 0000000 1111",
}
ALL_TEXTS = {name: text[:4_000] for name, text in {**TEXTS, **MORE_TEXTS}.items()}


def byte_level(
    split: Sequence[Any],
    *,
    special: Sequence[str] = (EOT,),
    normalizer: Any = None,
    size: int = 600,
    use_regex: bool = False,
    prefix: bool = False,
) -> Any:
    """A trained tokenizer.json of byte-level BPE whose text is split by these steps first."""
    trainable = tokenizers.Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=use_regex)
    trainable.pre_tokenizer = pre_tokenizers.Sequence([*split, level]) if split else level
    if normalizer is not None:
        trainable.normalizer = normalizer
    trainable.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    trainable.train_from_iterator(_corpus(), trainer)
    return json.loads(trainable.to_str())


def sentencepiece(*, special: Sequence[str] = (), size: int = 700) -> Any:
    """A trained tokenizer.json of BPE with byte fall-back, as Llama 2's: no pre-tokenizer, spaces by a normalizer."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainable = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trainable.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", "<s>", "</s>", *bytes_],
        limit_alphabet=90,
        show_progress=False,
    )
    # No line ends: SentencePiece trains on lines, so they are always bytes.
    trainable.train_from_iterator([line for text in _corpus() for line in text.splitlines()], trainer)
    raw = json.loads(trainable.to_str())
    raw["added_tokens"] = [{**token, "normalized": False} for token in raw["added_tokens"][:3]]
    # Runs of spaces are words there.
    vocab, merges = raw["model"]["vocab"], raw["model"]["merges"]
    for width in (2, 4, 8):
        merges.append(["▁" * (width // 2)] * 2)
        vocab.setdefault("▁" * width, len(vocab))
    raw["model"]["merges"] = [list(merge) for merge in dict.fromkeys(map(tuple, merges))]
    raw["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    raw["pre_tokenizer"] = None
    raw["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    raw["post_processor"] = starting("<s>", 1)
    return with_added(raw, *((text, {"special": True}) for text in special))


def starting(text: str, id_: int) -> Any:
    """A post-processor that puts this token before a text."""
    token = {"SpecialToken": {"id": text, "type_id": 0}}
    single = [token, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {text: {"id": text, "ids": [id_], "tokens": [text]}},
    }


def with_added(raw: Any, *tokens: tuple[str, dict[str, bool]]) -> Any:
    """With more added tokens behind the vocabulary, each with its flags."""
    for text, flags in tokens:
        known = [*raw["model"]["vocab"].values(), *(token["id"] for token in raw["added_tokens"])]
        raw["added_tokens"].append(added_token(max(known) + 1, text, **flags))
    return raw


def every_merge(raw: Any) -> Any:
    """All pairs that make a token listed, as the step from tiktoken's ranks to tokenizer.json leaves them."""
    vocab = raw["model"]["vocab"]
    merges = []
    for token in sorted(vocab, key=vocab.__getitem__):
        pairs = [(token[:end], token[end:]) for end in range(1, len(token))]
        own = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(own, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    raw["model"]["merges"] = [list(merge) for merge in merges]
    raw["model"]["ignore_merges"] = True
    return raw


def split(pattern: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre_tokenizers.Split(tokenizers.Regex(pattern), behavior, invert)


def neox() -> Any:
    raw = byte_level([], special=(EOT, "<|padding|>"), normalizer=normalizers.NFC(), use_regex=True)
    return with_added(raw, *((" " * width, {"normalized": True}) for width in range(24, 1, -1)))


def llama3() -> Any:
    raw = every_merge(byte_level([split(GPT4)], special=()))
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    with_added(raw, *((name, {"special": True}) for name in names))
    raw["post_processor"] = {
        "type": "Sequence",
        "processors": [
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
            starting("<|begin_of_text|>", raw["added_tokens"][0]["id"]),
        ],
    }
    return raw


def qwen(*more: str) -> Any:
    raw = byte_level([split(QWEN)], special=(), normalizer=normalizers.NFC())
    names = (EOT, "<|im_start|>", "<|im_end|>")
    with_added(raw, *((name, {"special": True}) for name in names))
    return with_added(raw, *((name, {}) for name in more))


def olmo2() -> Any:
    raw = byte_level([split(GPT4)], special=())
    with_added(raw, ("|||IP_ADDRESS|||", {}), ("<|padding|>", {"special": True}), (EOT, {"special": True}))
    return with_added(raw, ("|||EMAIL_ADDRESS|||", {}), ("   ", {"normalized": True}))


def phi4() -> Any:
    raw = byte_level([split(GPT4, "removed", invert=True)], special=())
    flags = {"special": True, "lstrip": True, "rstrip": True}
    return with_added(raw, ("<|im_start|>", flags), ("<|im_end|>", flags), (EOT, flags))


def deepseek() -> Any:
    steps = [
        split(r"\p{N}{1,3}"),
        split("[一-龥\u3040-ゟ゠-ヿ]+"),
        split(
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
    ]
    return byte_level(steps)


def mistral(scheme: str) -> Any:
    """Mistral's later versions: the space before a text by the pre-tokenizer, instructions as special tokens."""
    raw = sentencepiece(special=("[INST]", "[/INST]"))
    raw["normalizer"] = None
    raw["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    return raw


def phi3() -> Any:
    raw = sentencepiece()
    flags = {"special": True, "rstrip": True}
    return with_added(raw, ("<|user|>", flags), ("<|assistant|>", flags), ("<|end|>", flags), (EOT, {"special": True}))


def gemma() -> Any:
    """No space before a text at all."""
    raw = sentencepiece()
    raw["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    raw["decoder"]["decoders"].pop()
    return raw


def old_metaspace() -> Any:
    """As early conversions had it."""
    raw = sentencepiece()
    raw["normalizer"] = None
    raw["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    raw["decoder"] = {
        "type": "Sequence",
        "decoders": [{"type": "ByteFallback"}, {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}],
    }
    return raw


def words_no_merge_makes() -> Any:
    raw = byte_level([split(GPT4)])
    raw["model"]["ignore_merges"] = True
    raw["model"]["vocab"]["xyzzy"] = 600
    return raw


def two_merges() -> Any:
    raw = byte_level([], use_regex=True)
    merges, vocab = raw["model"]["merges"], raw["model"]["vocab"]
    left, right = next(merge for merge in merges if len(merge[0]) > 1 and merge[0][1:] + merge[1] in vocab)
    merges.append([left[0], left[1:] + right])
    return raw


# Name -> (how it is made, what does its work).
FAMILIES: dict[str, tuple[Callable[[], Any], str]] = {
    "gpt2": (lambda: byte_level([], use_regex=True), "tiktoken"),
    "neox": (neox, "tiktoken"),
    "olmo2": (olmo2, "tiktoken"),
    "llama3": (llama3, "tiktoken"),
    "qwen2": (qwen, "tiktoken"),
    "qwen3": (lambda: qwen("<tool_call>", "</tool_call>", "<think>", "</think>"), "tiktoken"),
    "smollm2": (lambda: byte_level([pre_tokenizers.Digits(individual_digits=True)], use_regex=True), "tiktoken"),
    "nemo": (lambda: every_merge(byte_level([split(TEKKEN)], special=("<unk>", "<s>", "</s>", "[INST]"))), "tiktoken"),
    "gpt4o": (lambda: byte_level([split(O200K)]), "tiktoken"),
    "phi4": (phi4, "tiktoken"),
    "letters": (lambda: byte_level([split(r"\p{L}+")]), "tiktoken"),
    "deepseek": (deepseek, "tokenizers"),
    "digits in runs": (lambda: byte_level([pre_tokenizers.Digits()], use_regex=True), "tokenizers"),
    "space before": (lambda: byte_level([], use_regex=True, prefix=True), "tokenizers"),
    "merged with previous": (lambda: byte_level([split(r"[.,!?]", "merged_with_previous")]), "tokenizers"),
    "words no merge makes": (words_no_merge_makes, "tokenizers"),
    "two merges": (two_merges, "tokenizers"),
    "llama2": (sentencepiece, "tokenizers"),
    "mistral": (lambda: mistral("first"), "tokenizers"),
    "mistral always": (lambda: mistral("always"), "tokenizers"),
    "phi3": (phi3, "tokenizers"),
    "gemma": (gemma, "tokenizers"),
    "old metaspace": (old_metaspace, "tokenizers"),
}


def folder_of(name: str, root: Path) -> Path:
    """A folder with the tokenizer.json of a family."""
    return write(root / name, FAMILIES[name][0]())


def _corpus() -> list[str]:
    english = "the quick brown fox isn't lazy, and the other 123 foxes weren't there. \n\n    return the value\r\n" * 4
    # Of texts with what are added tokens for some no tokenizer is to learn that they are words.
    short = [text[:1_500] for name, text in ALL_TEXTS.items() if name not in ("end of text", "joined", "pads")]
    return [*short, *short, english]
