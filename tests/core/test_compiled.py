"""Steps that torch compiles: the same text, and the transformer's own step where the compiler fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptcli.core.compiled import Compiled
from gptcli.core.decode import Decoder
from gptcli.core.graphs import DeviceLoop
from gptcli.core.model import Transformer
from gptcli.core.settings import Sampling
from gptcli.core.stepping import Stepping
from gptcli.spec.config import ModelConfig
from tests.core.test_model import GPT2, visible_model


@pytest.fixture
def transformer() -> Transformer:
    return visible_model(ModelConfig(**{**GPT2, "layers": 1}))


def text(transformer: Transformer, stepping: Stepping, count: int = 12) -> list[list[int]]:
    decoder = Decoder(transformer, stepping)
    logits = decoder.prefill([[1, 2, 3], [4]], 3 + count)
    loop = decoder.draw_on_device(logits, Sampling(temperature=0), [0, 1], [3, 1], None, ahead=True)
    assert loop is not None
    return [loop.next() for _ in range(count)]


def plainly(transformer: Transformer) -> list[list[int]]:
    stepping = Stepping(transformer)
    stepping.compiled = Compiled(transformer)
    stepping.compiled.failed = "not tried"
    return text(transformer, stepping)


def test_compiled_text_is_the_plain_one(transformer: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by torch's compiler, without generating code, which takes its time and needs a C++ compiler."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="aot_eager"))
    stepping = Stepping(transformer, compile=True)
    assert text(transformer, stepping) == plainly(transformer)
    assert stepping.tell().startswith("compiled steps")
    assert not stepping.fell_back


@pytest.mark.parametrize("late", [False, True])
def test_a_compiler_that_fails_is_no_requirement(
    transformer: Transformer, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even one that fails when half of the step is done."""

    def broken(function: Any, **options: object) -> Any:
        def call(*args: Any) -> None:
            if late:
                function(*args)
            raise RuntimeError("no compiler here\nand much more")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    stepping = Stepping(transformer, compile=True)
    assert text(transformer, stepping) == plainly(transformer)
    assert stepping.fell_back
    assert stepping.tell().startswith("steps could not be compiled: no compiler here, ")


def test_each_variant_is_compiled_once(transformer: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    def noted(function: Any, **options: Any) -> Any:
        made.append(options)
        return function

    monkeypatch.setattr(torch, "compile", noted)
    stepping = Stepping(transformer, compile=True)
    for _ in range(2):
        text(transformer, stepping)
    assert len(made) == 1
    assert made[0]["dynamic"] is False
    assert isinstance(stepping._loop, DeviceLoop)
