"""The files beside a tokenizer's vocabulary: which token starts a text, and what special tokens are called."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptcli.errors import CorruptError
from gptcli.text.added import Added
from gptcli.text.patterns import steps_of
from gptcli.text.vocabulary import AGAIN, load_json

# tokenizer_config.json and special_tokens_map.json name tokens by these.
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def token_names(folder: Path) -> dict[str, str]:
    """The special tokens that a folder's files name: ``bos_token``, ``eos_token`` and the like, with their texts.

    tokenizer_config.json counts before special_tokens_map.json. Raises CorruptError when a file can't be read.
    """
    names: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for name, value in _object(folder / file).items():
            text = value.get("content") if isinstance(value, dict) else value
            if name in _NAMES and isinstance(text, str):
                names[name] = text
    return names


def named_tokens(folder: Path, vocab: Mapping[str, int]) -> list[Added]:
    """The added tokens of a folder without tokenizer.json, as the files beside ``vocab.json`` name them.

    Raises CorruptError when a file can't be read.
    """
    config = _object(folder / "tokenizer_config.json")
    ids: dict[str, int] = {}
    found: dict[str, Added] = {}
    try:
        ids |= {text: int(id_) for text, id_ in _object(folder / "added_tokens.json").items()}
        for id_, token in (config.get("added_tokens_decoder") or {}).items():
            found[token["content"]] = Added.read({"special": False, **token, "id": int(id_)})
        for text in token_names(folder).values():
            if text and (text in ids or text in vocab):
                found.setdefault(text, Added(text, ids.get(text, vocab.get(text, -1))))
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise CorruptError(f"the tokenizer's files in {folder} can't be read: {error}", AGAIN) from None
    return [*found.values(), *(Added(text, id_, special=False) for text, id_ in ids.items() if text not in found)]


def start_of(folder: Path, post_processor: Any, special: Mapping[str, int]) -> int | None:
    """The token that is put before every text, if one is: as the post-processor of tokenizer.json has it.

    ``add_bos_token`` in tokenizer_config.json counts where it says no, and where it says yes and nothing else says
    how: without a post-processor, and for Llama's class, which makes its own. Raises CorruptError when a file can't be
    read, LookupError and the like for a post-processor that is none.
    """
    found = _of_post_processor(post_processor)
    config = _object(folder / "tokenizer_config.json")
    asked = config.get("add_bos_token")
    if asked is False:
        return None
    if found is None and asked and (not post_processor or "Llama" in str(config.get("tokenizer_class"))):
        return special.get(token_names(folder).get("bos_token", ""))
    return found


def _of_post_processor(raw: Any) -> int | None:
    """The id of the special token that a post-processor puts before a single text."""
    for step in steps_of(raw, "processors"):
        if step["type"] == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            text = step["single"][0]["SpecialToken"]["id"]
            return int(step["special_tokens"][text]["ids"][0])
        if step["type"] in ("BertProcessing", "RobertaProcessing"):
            return int(step["cls"][1])
    return None


def _object(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    value = load_json(file)
    if not isinstance(value, dict):
        raise CorruptError(f"{file} is not a JSON object", AGAIN)
    return value
