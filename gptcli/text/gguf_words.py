"""A tokenizer as llama.cpp keeps it in a GGUF: byte-level BPE (its model "gpt2") or SentencePiece's BPE ("llama").

llama.cpp splits text by patterns that are built in and have names; a vocabulary whose pattern has none is refused,
since it would cut text otherwise there. Source: llama.cpp's ``llama-vocab.cpp`` and the GGUF specification.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptcli.errors import CheckError, CorruptError, NotFoundError, UnsupportedError
from gptcli.text.added import Added
from gptcli.text.folder import named_tokens, start_of, token_names
from gptcli.text.patterns import steps_of
from gptcli.text.vocabulary import AGAIN, added_tokens, load_json, merges_of

# Kinds of tokens, by the numbers of the GGUF specification.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_GPT2 = "GPT-2"
_DIGITS = "each digit"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_MORE_CASES = rf"{_UPPER}+{_LOWER}*"
_REST_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# How a text is split, one step after the other, and llama.cpp's name for it.
_NAMES: dict[tuple[str, ...], str] = {
    (_GPT2,): "gpt-2",
    (_DIGITS, _GPT2): "smollm",
    (_WORDS + r"\p{N}{1,3}" + _REST,): "dbrx",  # "llama-bpe" where whole words go before merges
    (_WORDS + r"\p{N}" + _REST,): "qwen2",
    (_CASES + _ENDING + _MORE_CASES + r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}" + _REST_SLASH,): "gpt-4o",
    (_CASES + r"|[^\r\n\p{L}\p{N}]?" + _MORE_CASES + r"|\p{N}" + _REST_SLASH,): "tekken",
}
_ROUGHLY = ("gpt-4o", "tekken")
_WHOLE_WORDS = {"dbrx": "llama-bpe"}
_END = "<|endoftext|>"
_ELSEWHERE = "export it with --to hf"
_SPACE = "\u2581"  # what SentencePiece writes for a space


@dataclass(frozen=True)
class GgufWords:
    """The vocabulary of a GGUF.

    Attributes:
        model: llama.cpp's kind of tokenizer, ``gpt2`` or ``llama``.
        pattern: its name for how text is split; "" where there is no splitting.
        tokens, kinds: every id's text, in the file's own spelling, and kind.
        merges: ``left right`` in their order; of ``gpt2``.
        scores: the higher, the earlier a token is merged; of ``llama``.
        ids: tokens with a role (``bos``, ``eos``, ``eot``, ``unknown``, ``padding``) where there is one.
        add_start: every text begins with the token ``bos``.
        add_space: every text begins with a space.
        notes: where llama.cpp may make other ids of a text.
    """

    model: str
    pattern: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    ids: Mapping[str, int]
    add_start: bool
    add_space: bool
    notes: tuple[str, ...] = ()


def read_gguf_words(folder: Path, vocab_size: int, *, start_id: int | None, end_ids: Sequence[int]) -> GgufWords:
    """The vocabulary of a model folder as llama.cpp keeps it.

    Args:
        folder: with ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``.
        vocab_size: rows of the model's table; ids without a token are filled up.
        start_id, end_ids: the tokens that start and end a text, as the configuration has them.

    Raises NotFoundError without these files, CorruptError when they can't be read, UnsupportedError for a tokenizer
    that llama.cpp lacks, CheckError when it has more tokens than the model.
    """
    where = str(folder)
    try:
        raw, added = _read(folder)
        model = raw["model"]
        kind = model.get("type", "BPE")
        if kind != "BPE":
            raise UnsupportedError(f"{where} has a tokenizer of the kind {kind}", _ELSEWHERE)
        by_text: dict[str, int] = {**model["vocab"], **{token.text: token.id for token in added}}
        merges = merges_of(model)
        pieces = bool(model.get("byte_fallback"))
        unknown = model.get("unk_token")
        tokens, kinds = _tokens(by_text, added, unknown, pieces, vocab_size, where)
        placed = start_of(folder, raw.get("post_processor"), {token.text: token.id for token in added})
        ids = _roles(by_text, token_names(folder), unknown, start_id if placed is None else placed, end_ids)
        notes = list(_flags(added))
        if pieces:
            scores, told = _scores(by_text, kinds, merges, vocab_size)
            space, more = _leading_space(raw, where)
            notes += [*told, *more]
            return GgufWords(
                "llama", "default", tokens, kinds, (), scores, ids, placed is not None, space, tuple(notes)
            )
        pattern, told = _split(raw, bool(model.get("ignore_merges")), where)
        if not merges:
            raise UnsupportedError(f"{where} merges nothing, and llama.cpp wants merges", _ELSEWHERE)
        notes += [*told, *_whole_words(by_text, kinds, merges, pattern)]
        joined = tuple(" ".join(merge) for merge in merges)
        return GgufWords("gpt2", pattern, tokens, kinds, joined, (), ids, placed is not None, False, tuple(notes))
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise CorruptError(f"{where}: the tokenizer can't be read: {type(error).__name__} {error}", AGAIN) from None


def _read(folder: Path) -> tuple[dict[str, Any], list[Added]]:
    """The folder's tokenizer in the shape of ``tokenizer.json``, and its added tokens."""
    file = folder / "tokenizer.json"
    if file.is_file():
        raw = load_json(file)
        if not isinstance(raw, dict):
            raise CorruptError(f"{file} holds {type(raw).__name__}, not an object", AGAIN)
        return raw, added_tokens(raw, file)
    if not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
        raise NotFoundError(
            f"{folder} has no tokenizer.json, and no vocab.json with merges.txt",
            "copy the model's tokenizer files into the folder: llama.cpp has them inside the GGUF",
        )
    vocab = load_json(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    added = {token.text: token for token in named_tokens(folder, vocab)}
    if _END in vocab:
        added.setdefault(_END, Added(_END, vocab[_END]))
    level = {"type": "ByteLevel", "add_prefix_space": False}
    return {"model": {"vocab": vocab, "merges": merges}, "pre_tokenizer": level}, list(added.values())


def _tokens(
    by_text: Mapping[str, int],
    added: Sequence[Added],
    unknown: str | None,
    pieces: bool,
    vocab_size: int,
    where: str,
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Every id's text and kind; ids without a token get one that nothing makes."""
    if any(type(id_) is not int or id_ < 0 for id_ in by_text.values()):
        raise ValueError("an id is not a number from 0 on")
    size = max(by_text.values()) + 1
    if size > vocab_size:
        raise CheckError(
            f"the tokenizer of {where} has {size:,} tokens, and the model has room for {vocab_size:,}",
            "the tokenizer belongs to another model",
        )
    tokens = [_filler(id_, by_text) for id_ in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for text, id_ in by_text.items():
        if "\0" not in text:  # llama.cpp would read the text up to there, and takes no text twice
            tokens[id_], kinds[id_] = text, NORMAL
    if pieces:
        for byte in range(256):
            if (place := by_text.get(f"<0x{byte:02X}>")) is not None:
                kinds[place] = BYTE
    for token in added:
        kinds[token.id] = CONTROL if token.special else USER_DEFINED
    if pieces and unknown is not None and unknown in by_text:
        kinds[by_text[unknown]] = UNKNOWN
    return tuple(tokens), tuple(kinds)


def _filler(id_: int, by_text: Collection[str]) -> str:
    """A text for an id without one, which no token has."""
    text = f"[PAD{id_}]"
    while text in by_text:
        text += "]"
    return text


def _roles(
    by_text: Mapping[str, int],
    names: Mapping[str, str],
    unknown: str | None,
    start_id: int | None,
    end_ids: Sequence[int],
) -> dict[str, int]:
    named = {key: by_text.get(names.get(f"{key}_token", "")) for key in ("bos", "eos", "pad", "unk")}
    ends = list(dict.fromkeys([*end_ids, *([] if named["eos"] is None else [named["eos"]])]))
    roles = {
        "bos": start_id if start_id is not None else named["bos"],
        "eos": ends[0] if ends else None,
        "eot": ends[1] if len(ends) > 1 else None,  # generation ends there as well
        "unknown": by_text.get(unknown) if unknown else named["unk"],
        "padding": named["pad"],
    }
    return {role: id_ for role, id_ in roles.items() if id_ is not None}


def _flags(added: Sequence[Added]) -> Iterator[str]:
    """What llama.cpp does not look at in added tokens."""
    greedy = sum(token.lstrip or token.rstrip or token.single_word for token in added)
    if greedy:
        yield f"{greedy} added tokens take the space beside them along, or are whole words, and in llama.cpp do not"


def _split(raw: Mapping[str, Any], ignore_merges: bool, where: str) -> tuple[str, tuple[str, ...]]:
    """llama.cpp's name for how text is split before merging, and where it does otherwise than the file."""
    steps = tuple(_steps(raw.get("pre_tokenizer"), where))
    name = _NAMES.get(steps)
    if name is None:
        how = " then ".join(steps) or "not at all"
        raise UnsupportedError(f"llama.cpp has no name for how the tokenizer of {where} splits text: {how}", _ELSEWHERE)
    notes = []
    for step in steps_of(raw.get("normalizer"), "normalizers"):
        if step["type"] != "NFC":
            raise UnsupportedError(f"llama.cpp has no normalizer {step['type']}", _ELSEWHERE)
        notes.append(
            "llama.cpp does not compose accents (NFC) as the tokenizer does: ids differ where they stand apart"
        )
    if name in _ROUGHLY:
        notes.append(f"llama.cpp's pattern {name} is the tokenizer's for English: ids may differ beyond")
    return (_WHOLE_WORDS.get(name, name) if ignore_merges else name), tuple(notes)


def _steps(raw: Any, where: str) -> list[str]:
    steps = []
    for step in steps_of(raw, "pretokenizers"):
        if step["type"] == "ByteLevel":
            if step.get("add_prefix_space", True):
                raise UnsupportedError(
                    f"the tokenizer of {where} adds a space before every text, and llama.cpp does not",
                    _ELSEWHERE,
                )
            if step.get("use_regex", True):
                steps.append(_GPT2)
        elif step["type"] == "Digits" and step.get("individual_digits"):
            steps.append(_DIGITS)
        elif step["type"] == "Split" and "Regex" in step["pattern"]:
            kept = step["behavior"] == "Isolated" or (step["behavior"] == "Removed" and step.get("invert"))
            how = "" if kept else f" ({step['behavior']})"
            steps.append(str(step["pattern"]["Regex"]) + how)
        else:
            steps.append(str(step["type"]))
    return steps


def _whole_words(
    by_text: Mapping[str, int], kinds: Sequence[int], merges: Sequence[Sequence[str]], pattern: str
) -> Iterator[str]:
    """Tokens that the file takes where they are a whole word, and llama.cpp never makes."""
    made = {"".join(merge) for merge in merges}
    lost = sum(len(text) > 1 and kinds[id_] == NORMAL and text not in made for text, id_ in by_text.items())
    if lost and pattern not in (*_WHOLE_WORDS.values(), "tekken"):
        yield f"{lost:,} tokens that no merge makes are never made by llama.cpp"


def _scores(
    by_text: Mapping[str, int], kinds: Sequence[int], merges: Sequence[Sequence[str]], vocab_size: int
) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """Each token's score, the higher the earlier its merge; and where llama.cpp, merging by text, makes others."""
    scores = [0.0] * vocab_size
    never = -float(len(merges) + 1)
    for text, id_ in by_text.items():
        if len(text) > 1:
            scores[id_] = never
    for place in range(len(merges) - 1, -1, -1):
        scores[by_text["".join(merges[place])]] = -float(place)
    notes = []
    if lost := sum(scores[id_] == never and kinds[id_] == NORMAL for id_ in by_text.values()):
        notes.append(f"{lost:,} tokens that no merge makes are merged by llama.cpp where they fit")
    controls = [text for text, id_ in by_text.items() if kinds[id_] == CONTROL and _has_halves(text, by_text)]
    if controls:
        notes.append(f"llama.cpp takes {', '.join(controls)} for the token also where a text has it as plain text")
    if nuls := sum("\0" in text for text in by_text):
        notes.append(f"{nuls:,} tokens that hold a NUL are not in the file: llama.cpp reads no text beyond one")
    return tuple(scores), tuple(notes)


def _has_halves(text: str, by_text: Collection[str]) -> bool:
    return any(text[:cut] in by_text and text[cut:] in by_text for cut in range(1, len(text)))


def _leading_space(raw: Mapping[str, Any], where: str) -> tuple[bool, tuple[str, ...]]:
    """Whether a SentencePiece-like tokenizer puts a space before a text, and where llama.cpp does otherwise."""
    space = False
    notes: tuple[str, ...] = ()
    for step in steps_of(raw.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend" and step.get("prepend") == _SPACE:
            space = True
        elif not (step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == _SPACE):
            raise UnsupportedError(f"llama.cpp has no normalizer {step['type']} as {where} has", _ELSEWHERE)
    for step in steps_of(raw.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] != "Metaspace" or step.get("split", True):
            raise UnsupportedError(f"llama.cpp has no pre-tokenizer {step['type']} as {where} has", _ELSEWHERE)
        scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
        space = scheme != "never"
        if space:
            notes = ("llama.cpp puts a space also before a text that begins with one, and the tokenizer does not",)
    return space, notes
