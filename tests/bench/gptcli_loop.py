"""gptcli's side of the training benchmarks: the only file here that knows how its loop and its data are called."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common import ROOT

if TYPE_CHECKING:
    from plain_gpt import Size

sys.path.insert(0, str(ROOT))


def gptcli_steps(
    size: Size,
    tokens: Any,
    *,
    rows: int,
    steps: int,
    out: Path,
    dtype: Any,
    compile: bool = False,
    device: str = "cpu",
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> tuple[Any, Iterator[dict[str, Any]]]:
    """A gptcli model of this size, trained in place as its ``step`` events are taken; the model maps ids to logits.

    The loop is ``gptcli.train.loop.train`` with its defaults; ``settings`` are further fields of its Plan by name. It
    neither evaluates nor saves before the end.
    """
    from gptcli.core import runtime
    from gptcli.core.build import random_model
    from gptcli.spec.config import ModelConfig
    from gptcli.train.data import Corpus
    from gptcli.train.loop import Plan, train

    runtime.keep_freed_memory()  # as the command does

    head_dim = size.width // size.heads
    shape = (size.vocab_size, size.context, size.layers, size.width, size.heads, size.heads, head_dim, 4 * size.width)
    model = random_model(ModelConfig("gpt2", *shape), seed).to(device)
    corpus = Corpus(name="the data", tokens=tokens, documents=1, text_bytes=len(tokens))
    given = {"dtype": dtype, "compile": compile, "eval_every": 0, "save_every": 0, **(settings or {})}
    plan = Plan(batch_tokens=rows * size.context, steps=steps, seed=seed, **given)
    events = train(model, corpus, [], plan, out, {})
    return model, (event for event in events if event["event"] == "step")


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """``lr=2e-3 optimizer=adamw`` as fields of a Plan: JSON where it is JSON, else a string."""
    found: dict[str, Any] = {}
    for name, _, value in (pair.partition("=") for pair in pairs):
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def make_tokenizer(source: str, documents: Iterable[str]) -> Any:
    """A model folder's tokenizer, or one trained on the documents: ``source`` is the folder or its number of tokens.

    257 is every byte and the separator: on ASCII text a token a character, as in nanoGPT's shakespeare_char.
    """
    from gptcli.text.tokenizer import Tokenizer
    from gptcli.train.data import train_tokenizer

    if not source.isdigit():
        return Tokenizer.from_folder(Path(source))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_bytes(train_tokenizer(documents, int(source)))
        return Tokenizer.from_folder(Path(folder))


def documents_in(paths: Sequence[str]) -> Iterator[str]:
    """The documents of files as gptcli reads them; a file named twice comes twice."""
    from gptcli.train.documents import documents_of

    return documents_of(paths)


def encode(paths: Sequence[str], tokenizer: Any) -> tuple[np.ndarray, int]:
    """All documents as one stream, each behind the separator, which also ends it; and their bytes of text."""
    from gptcli.train.documents import SEPARATOR

    start = tokenizer.special_tokens[SEPARATOR]
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    pieces, size = [], 0
    for document in documents_in(paths):
        pieces.append(np.array([start, *tokenizer.encode(document)], dtype))
        size += len(document.encode())
    return np.concatenate([*pieces, np.array([start], dtype)]), size
