"""Models to talk with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from gptcli.text.tokenizer import Tokenizer
from tests.conftest import tiny_tokenizer


def save_talker(folder: Path, context: int, files: Mapping[str, bytes] | None = None, eos: int | None = None) -> Path:
    """A tiny random model with room for a conversation; without ``eos`` its answers do not end by themselves."""
    from gptcli.core.build import random_model
    from gptcli.core.checkpoint import save_folder
    from gptcli.core.runtime import DTYPES
    from gptcli.spec.config import from_hf

    shape = {"vocab_size": 300, "n_positions": context, "n_embd": 8, "n_layer": 1, "n_head": 1}
    config = from_hf({"model_type": "gpt2", **shape, "bos_token_id": 0, "eos_token_id": eos})
    own = {"tokenizer.json": tiny_tokenizer(), **(files or {})}
    save_folder(random_model(config, seed=7), folder, dtype=DTYPES["float32"], files=own)
    return folder


def always(folder: Path, text: str = "m") -> tuple[str, ...]:
    """Options that have every token be this one."""
    (id_,) = Tokenizer.from_folder(folder).encode(text, special=True)
    return ("--logit-bias", f"{id_}:1000", "--seed", "1")


def template_file(source: str, **marks: str) -> dict[str, bytes]:
    """A tokenizer_config.json with a chat template."""
    return {"tokenizer_config.json": json.dumps({"chat_template": source, **marks}).encode()}
