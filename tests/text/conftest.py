"""Small trained tokenizers in every form that gptcli reads, and the texts on which tokenizers go wrong."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gptcli.text.tokenizer import Tokenizer
from gptcli.train.data import train_tokenizer

# The pattern that Llama 3's tokenizer.json holds; cl100k_base's, but for the quantifiers.
WORDS_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
EOT = "<|endoftext|>"

TEXTS = {
    "empty": "",
    "space": " ",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈👍🏽 🇪🇺🇪🇺 1️⃣ 🤷🏿‍♀️\n🫠🫠🫠  😀",
    "chinese": "你好，世界。今天天气很好！我们去公园吧。\n第二行。\n\n　全角空格",
    "japanese": "吾輩は猫である。名前はまだ無い。ﾊﾝｶｸ カタカナ ー々",
    "korean": "안녕하세요 세계, ㅋㅋㅋ",
    "devanagari": "नमस्ते दुनिया, क्षत्रिय ज्ञान १२३ स्त्री",
    "arabic": "السَّلَامُ عَلَيْكُمْ ١٢٣ \u202bالعالم\u202c ﷽",
    "hebrew, thai": "שָׁלוֹם עוֹלָם สวัสดีชาวโลก",
    "controls": "a\x01\x02\x1b[31mred\x1b[0m\x7f\x80\x85\x9f \x0b\x0c\x1c\x1d\x1e\x1f b",
    "nul": "\0\0a\0 \0\n\0",
    "crlf": "one\r\ntwo\r\n\r\nthree\rfour\r\r\n \r\n",
    "newlines": "a\n\n\n\nb\n \n  \n\t\n\tc\n\n" + "\n" * 500 + "d" + "\n" * 500,
    "spaces": " " * 100_000,
    "spaces and a word": " " * 5_000 + "word" + " " * 5_000,
    "one letter": "a" * 100_000,
    "one sign": "=" * 5_000 + "\n" + "-" * 5_000 + "!",
    "end of text": f"one{EOT}two {EOT} three<|endoftext|{EOT}\n{EOT}{EOT}<|endoftext",
    "contractions": "I'm you're he's it'd we'll they've don't DON'T I'M 'S 'tis rock'n'roll ''s ' s l’été",
    "digits": "1 12 123 1234 12345678 3.14159 1,000,000 ½ ² ٣ Ⅷ ① x1y22z333 007",
    "nbsp": "a\u00a0b\u00a0\u00a0c \u00a0d\u2003e\u2028f\u2029g\u200bh\ufeffi\u3000j\u00adk",
    "combining": "e\u0301e\u0301 a\u0308\u0323 Z\u0334\u0335\u0336\u0337 ﬁ ǆ İı ſ ß ẞ",
    "planes": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𠜎𠜱 \U0010fffd \ufffd\ufffe",
    "code": 'def f(x):\n\tif x:  # no\n        return {"a": [1, 2]}  \n\n\n@x\n/* */ \\n $HOME//x/\n///\n',
    "mixed": "Ünïcödé—“quoted” naïve café 日本語text混在 x=1;y=2\t\t\tÀÉ٢z👍🏽!?!?  end ",
}


@pytest.fixture(params=TEXTS.values(), ids=TEXTS.keys())
def nasty(request: pytest.FixtureRequest) -> str:
    """Each of the texts in turn."""
    return str(request.param)


@pytest.fixture
def texts() -> dict[str, str]:
    """All of the texts."""
    return TEXTS


class Peer:
    """Hugging Face's tokenizer of the same files."""

    def __init__(self, theirs: tokenizers.Tokenizer) -> None:
        self._theirs = theirs

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        self._theirs.encode_special_tokens = not special
        ids: list[int] = self._theirs.encode(text, add_special_tokens=False).ids
        return ids


class Pair:
    """One folder, read by both."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ours = Tokenizer.from_folder(folder)
        if (folder / "tokenizer.json").exists():
            theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            theirs = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
            theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            theirs.add_special_tokens([EOT])
        self.theirs = Peer(theirs)


def corpus() -> list[str]:
    """The texts, each long one cut, and some English so that there are words to merge."""
    english = "the quick brown fox isn't lazy, and the other 123 foxes weren't there. \n\n    return the value\r\n" * 4
    return [text[:2_000] for text in TEXTS.values()] * 3 + [english]


def write(folder: Path, raw: Any) -> Path:
    """A folder with this ``tokenizer.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    return folder


def _words() -> Any:
    trainable = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(WORDS_PATTERN), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainable.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    trainable.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False)
    trainable.train_from_iterator(corpus(), trainer)
    return json.loads(trainable.to_str())


def _permuted(raw: Any) -> Any:
    """The same tokenizer with its ids shuffled, so that they no longer grow with the merges."""
    raw = copy.deepcopy(raw)
    vocab = raw["model"]["vocab"]
    ids = list(vocab.values())
    random.Random(0).shuffle(ids)
    raw["model"]["vocab"] = dict(zip(vocab, ids, strict=True))
    for token in raw["added_tokens"]:
        token["id"] = raw["model"]["vocab"][token["content"]]
    return raw


def added_token(id_: int, content: str, **changes: bool) -> dict[str, Any]:
    """An entry of ``added_tokens``, not special unless told so."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": id_, "content": content, **flags, **changes}


@pytest.fixture(scope="session")
def trained() -> Any:
    """The tokenizer.json, as data, of a tokenizer that gptcli's own training made; change a copy."""
    return json.loads(train_tokenizer(corpus(), 700))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory, trained: Any) -> dict[str, Pair]:
    """Every kind of tokenizer, ours and Hugging Face's."""
    root = tmp_path_factory.mktemp("tokenizers")
    words = _words()
    added = copy.deepcopy(trained)
    size = len(trained["model"]["vocab"])
    added["added_tokens"] += [added_token(size, "<two"), added_token(size + 1, "ee<|")]
    pair = root / "vocab and merges"
    pair.mkdir()
    (pair / "vocab.json").write_text(json.dumps(trained["model"]["vocab"]), encoding="utf-8")
    merges = [" ".join(merge) for merge in trained["model"]["merges"]]
    (pair / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    folders = {
        "trained": write(root / "trained", trained),
        "words": write(root / "words", words),
        "vocab and merges": pair,
        "permuted": write(root / "permuted", _permuted(trained)),
        "permuted words": write(root / "permuted words", _permuted(words)),
        "added": write(root / "added", added),
    }
    return {name: Pair(folder) for name, folder in folders.items()}


KINDS = ("trained", "words", "vocab and merges", "permuted", "permuted words", "added")


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, pairs: dict[str, Pair]) -> Pair:
    """Each kind of tokenizer in turn."""
    return pairs[request.param]
