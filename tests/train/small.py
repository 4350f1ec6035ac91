"""A model, data and a plan that train in milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptcli.core.build import random_model
from gptcli.core.model import Transformer
from gptcli.spec.config import from_hf
from gptcli.train.data import Corpus
from gptcli.train.loop import Plan, train
from gptcli.train.ranks import Part
from gptcli.train.state import Checkpoint, checkpoints, load_checkpoint

CONTEXT, VOCAB = 8, 24


def model(seed: int = 1, **more: Any) -> Transformer:
    sizes = {"vocab_size": VOCAB, "n_positions": CONTEXT, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return random_model(from_hf({"model_type": "gpt2", **sizes, **more}), seed)


def corpus(length: int = 200, name: str = "text", seed: int = 0) -> Corpus:
    tokens = np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.uint16)
    return Corpus(name, tokens, 1, 3 * length)


def plan(**more: Any) -> Plan:
    return Plan(**{"batch_tokens": 4 * CONTEXT, "lr": 0.01, "steps": 4, "eval_every": 0, "save_every": 0, **more})


def run(out: Path, one: Transformer | None = None, valid: list[Corpus] | None = None, **more: Any) -> Iterator[Any]:
    """Train ``one``; ``more`` goes to ``train`` where that has an argument of the name, else to the plan."""
    to_train = {name: more.pop(name) for name in ("sampler", "sample_every", "resume", "options") if name in more}
    return train(one or model(), corpus(), valid or [], plan(**more), out, {"extra.txt": b"x"}, **to_train)


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in events]


def weights(one: Transformer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in one.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether the same tensors have the same bits."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def newest(out: Path) -> Checkpoint:
    return next(checkpoints(out))


def stored_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint of one rank."""
    return {
        name.removeprefix("model."): tensor for name, tensor in stored(checkpoint).items() if name.startswith("model.")
    }


def stored(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All tensors in a checkpoint of one rank, by the way that a run reads them."""
    from safetensors import safe_open

    (file,) = checkpoint.folder.glob("*.safetensors")
    with safe_open(file, framework="pt") as stream:
        parts = {name: torch.empty_like(stream.get_tensor(name)) for name in stream.keys()}  # noqa: SIM118
    load_checkpoint(checkpoint, {name: Part(t, 0, len(t) if t.dim() else 1) for name, t in parts.items()})
    return parts
