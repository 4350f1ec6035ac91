"""What a model's folder says of itself beside its configuration: the card's front matter, and its kind of tokenizer."""

from __future__ import annotations

import json
import re
from pathlib import Path

_FIELDS = ("license", "license_name", "base_model", "language", "pipeline_tag", "datasets")


def read_card(folder: Path) -> dict[str, list[str]]:
    """The facts in the front matter of a folder's README.md that say what a model is; empty without one.

    A card is for people: of its YAML plain values and lists of them are read, and whatever else stands there is left.
    """
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    front = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    facts: dict[str, list[str]] = {}
    name = ""
    for line in front[1].splitlines() if front else ():
        if field := re.match(r"(\w+):\s*(.*)", line):
            name = field[1]
            written = field[2].strip()
            values = written[1:-1].split(",") if re.fullmatch(r"\[.*\]", written) else [written]
        elif item := re.match(r"\s*-\s+(.*)", line):
            values = [item[1]]
        else:
            continue
        plain = [_plain(value) for value in values]
        if name in _FIELDS and (known := [value for value in plain if value]):
            facts.setdefault(name, []).extend(known)
    return {field: facts[field] for field in _FIELDS if field in facts}


def tokenizer_kind(folder: Path) -> str | None:
    """What the tokenizer in a folder is, for a person: ``byte-level BPE``, ``SentencePiece``, ...; None without one."""
    try:
        raw = json.loads((folder / "tokenizer.json").read_bytes())
        kind, steps = str(raw["model"].get("type") or "BPE"), json.dumps([raw.get("pre_tokenizer"), raw.get("decoder")])
    except OSError:
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return "byte-level BPE"
        return "SentencePiece" if (folder / "tokenizer.model").is_file() else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "unreadable"
    if kind == "BPE" and "ByteLevel" in steps:
        return "byte-level BPE"
    return "BPE with bytes to fall back on" if kind == "BPE" and raw["model"].get("byte_fallback") else kind


def _plain(value: str) -> str:
    """A YAML scalar without its quotes and the comment behind it; nothing for what is none."""
    value = re.sub(r"(^|\s+)#.*", "", value.strip())
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1]
    return "" if value.startswith(("{", "&", "|", ">")) else value
