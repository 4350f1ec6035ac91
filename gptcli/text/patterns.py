"""Pre-tokenizers as one regular expression, where that is possible: how a text is split into words before merging."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

# How GPT-2 splits text into words before merging (Radford et al. 2019, the released code), written with possessive
# quantifiers where backing off can't help, which is what makes it linear on long runs.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# The same in what is left between single digits (StarCoder, SmolLM): a digit ends a word as the end of the text does,
# so white space before one is not parted, and no space goes with it.
DIGITS_PATTERN = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?![^\s\p{N}])|\s"

# Patterns in which a match that began before a space or newline ends there, if a letter or digit stood before it, and
# in which nothing looks behind: GPT-2's, and OpenAI's and Llama's later ones that are built from the same parts.
_KNOWN_PARTS = ("\\p{L}", "\\p{N}", "\\s")


class InexactError(Exception):
    """tiktoken would not make the same tokens; the message says why."""


class Splitting(NamedTuple):
    """How a text is split: the ``pattern`` of its words, and whether ``safe_cut`` holds for it."""

    pattern: str
    streams: bool


def splitting(raw: Any) -> Splitting:
    """What a ``pre_tokenizer`` that ends in bytes splits by. Raises InexactError where one pattern can't say it."""
    steps = steps_of(raw, "pretokenizers")
    if not steps or steps[-1]["type"] != "ByteLevel":
        raise InexactError("its pre-tokenizer does not end in bytes")
    *before, level = steps
    if level.get("add_prefix_space", True):
        raise InexactError("it puts a space before a text")
    words = level.get("use_regex", True)
    if not before:
        if not words:
            raise InexactError("it splits text by no pattern")
        return Splitting(GPT2_PATTERN, True)
    if len(before) == 1 and before[0]["type"] == "Digits" and words and before[0].get("individual_digits"):
        return Splitting(DIGITS_PATTERN, True)
    if len(before) == 1 and before[0]["type"] == "Split" and not words:
        return _of_split(before[0])
    raise InexactError(f"it splits text in {len(before) + words} steps ({', '.join(step['type'] for step in steps)})")


def _of_split(step: Any) -> Splitting:
    if "Regex" not in step["pattern"]:
        raise InexactError("it splits text by a plain string")
    pattern, behavior = str(step["pattern"]["Regex"]), step["behavior"]
    if behavior == "Removed" and step.get("invert"):
        return Splitting(pattern, pattern_streams(pattern))  # what is between matches goes, as with tiktoken itself
    if behavior != "Isolated":
        raise InexactError(f"it splits text in the manner {behavior}")
    # What stands between two matches is a word, too. The patterns of published models leave nothing there; others are
    # told to.
    rest = "" if pattern_streams(pattern) else rf"|(?:(?!{pattern})[\s\S])+"
    return Splitting(pattern + rest, pattern_streams(pattern))


def pattern_streams(pattern: str) -> bool:
    """Whether ``safe_cut`` holds for a pattern."""
    return "(?<" not in pattern and all(part in pattern for part in _KNOWN_PARTS) and "\\s+(?!\\S)" in pattern


def steps_of(raw: Any, key: str) -> Sequence[Any]:
    """The steps of a part of tokenizer.json: those of a Sequence, held under ``key``, the one, or none."""
    if not raw:
        return []
    steps = raw[key] if raw["type"] == "Sequence" else [raw]
    # A sequence may hold others.
    return [own for step in steps for own in (steps_of(step, key) if step["type"] == "Sequence" else [step])]


def safe_cut(text: str, *, blanks: bool = True, lines: bool = True) -> int:
    """The last place where ``text`` may be cut, whatever follows, without moving a token border; 0 if there is none.

    With ``blanks`` that is between a letter or digit and a space or newline: the match before ends there with or
    without the cut (words and numbers hold no white space, and only white space looks ahead), and the next one starts
    there. Without such a place it is, with ``lines``, behind a single newline: what follows is neither white space nor
    ``/``, which some patterns take along with line ends.
    """
    for blank in (" ", "\n") if blanks else ():
        place = text.rfind(blank, 1)
        for _ in range(1000):
            if place < 1:
                break
            if text[place - 1].isalpha() or text[place - 1].isdecimal():
                return place
            place = text.rfind(blank, 1, place)
    place = len(text) - 1
    for _ in range(1000) if lines else ():
        place = text.rfind("\n", 1, place)
        if place < 1:
            break
        if not text[place - 1].isspace() and not text[place + 1].isspace() and text[place + 1] != "/":
            return place + 1
    return 0
