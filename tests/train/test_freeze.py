"""Freezing by name: what matches, what is refused, and matrices with two names."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from gptcli.core.build import random_model
from gptcli.core.model import Transformer
from gptcli.errors import UsageError
from gptcli.spec.config import ModelConfig
from gptcli.train.freeze import freeze

CONFIG = ModelConfig("gpt2", 40, 8, 12, 16, 2, 2, 8, 32)


def model(*, tied: bool = True, layers: int = 12) -> Transformer:
    return random_model(replace(CONFIG, tied=tied, layers=layers), 0)


def trainable(model: Transformer) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_frozen_is_what_matches_and_nothing_else() -> None:
    some = model()
    everything = trainable(some)
    names = freeze(some, ["blocks.0.*", "positions.weight", "*.attention.*.bias"])
    wanted = [
        name
        for name in dict(some.named_parameters())
        if name.startswith("blocks.0.") or name == "positions.weight" or (".attention." in name and "bias" in name)
    ]
    assert names == wanted
    assert trainable(some) == everything - set(wanted)
    assert "blocks.10.mlp.up.weight" in trainable(some)
    assert freeze(some, []) == []


@pytest.mark.parametrize("pattern", ["embedding.weight", "unembedding.weight", "un*"])
def test_a_tied_matrix_is_frozen_by_either_name(pattern: str) -> None:
    tied = model()
    assert freeze(tied, [pattern]) == ["embedding.weight"]
    assert tied.unembedding.weight is tied.embedding.weight
    assert not tied.unembedding.weight.requires_grad


def test_an_untied_unembedding_is_its_own() -> None:
    untied = model(tied=False)
    assert freeze(untied, ["embedding.weight"]) == ["embedding.weight"]
    assert untied.unembedding.weight.requires_grad


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("blocks.0", r"blocks\.0\.\*"),
        ("embedding", r"embedding\.\*"),
        ("blocks.3.mlp.upp.weight", r"blocks\.3\.mlp\.up\.weight"),
        ("wte.weight", r"\.weight"),
        ("Embedding.weight", r"embedding\.weight"),
        ("@", r"there are: embedding\.\*, .*, blocks\.\*"),
    ],
)
def test_a_pattern_without_a_match_names_what_is_near_and_freezes_nothing(pattern: str, near: str) -> None:
    some = model()
    everything = trainable(some)
    with pytest.raises(UsageError) as caught:
        freeze(some, ["norm.weight", pattern])
    assert pattern in caught.value.message
    assert re.search(near, caught.value.hint)
    assert trainable(some) == everything


@pytest.mark.parametrize("patterns", [["*"], ["embedding.*", "positions.*", "blocks.*", "norm.*"]])
def test_something_must_be_left_to_train(patterns: list[str]) -> None:
    some = model()
    with pytest.raises(UsageError, match="nothing to train"):
        freeze(some, patterns)
    assert all(parameter.requires_grad for parameter in some.parameters())


def test_frozen_parameters_get_no_gradient_and_the_others_their_own() -> None:
    some, whole = model(layers=2), model(layers=2)
    names = set(freeze(some, ["embedding.weight", "blocks.0.*"]))
    ids = torch.arange(8)[None]
    for one in (some, whole):
        one(ids).float().logsumexp(-1).sum().backward()
    for (name, parameter), (_, wanted) in zip(some.named_parameters(), whole.named_parameters(), strict=True):
        assert (parameter.grad is None) == (name in names)
        assert name in names or torch.equal(parameter.grad, wanted.grad)  # type: ignore[arg-type]
