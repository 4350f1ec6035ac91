"""Layers that stay on the host and come to the device in turn: the same logits, and never more than two at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptcli.core.build import Model, open_model, random_model
from gptcli.core.generate import generate
from gptcli.core.model import Transformer
from gptcli.core.offload import Offload
from gptcli.core.requests import Request
from gptcli.core.settings import Sampling
from gptcli.errors import UsageError
from gptcli.spec.config import ModelConfig
from gptcli.text.tokenizer import Tokenizer

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 250, 13]])


def model(layers: int) -> Transformer:
    return random_model(ModelConfig("gpt2", 301, 16, layers, 24, 4, 4, 6, 90), 1).eval().requires_grad_(False)


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@torch.inference_mode()
def test_the_logits_are_the_same_to_the_bit(layers: int) -> None:
    wanted, offloaded = model(layers), model(layers)
    offload = Offload(offloaded, CPU)
    for _ in range(3):
        assert torch.equal(offloaded(IDS), wanted(IDS))
        assert len(offload.resident) <= 2


@torch.inference_mode()
def test_a_layer_comes_ahead_of_its_turn_and_only_two_are_there() -> None:
    offloaded = model(4)
    offload = Offload(offloaded, CPU)
    seen: list[list[int]] = []
    for block in offloaded.blocks:
        block.attention.register_forward_pre_hook(lambda *given: seen.append(sorted(offload.resident)))
    offloaded(IDS)
    assert seen == [[0, 1], [1, 2], [2, 3], [0, 3]]
    assert offload.fetched == 4  # the first was there, and is again
    offloaded(IDS)
    assert offload.fetched == 8


@torch.inference_mode()
def test_on_the_device_is_room_for_two_blocks_and_no_more() -> None:
    offloaded = model(4)
    before = sum(parameter.nbytes for parameter in offloaded.blocks[0].parameters())
    offload = Offload(offloaded, CPU)
    rooms = {parameter.untyped_storage().data_ptr() for block in offloaded.blocks for parameter in block.parameters()}
    assert len(rooms) == 2
    assert before <= offload.layer_bytes < before + 16 * 256
    assert offload.bytes == 4 * offload.layer_bytes
    assert offload.bandwidth > 0
    assert "4 layers on the host" in offload.told


@torch.inference_mode()
def test_text_is_the_same(tiny_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(tiny_folder)
    texts = []
    for offloads in (False, True):
        opened = open_model(tiny_folder, tokenizer, device="cpu")
        transformer = opened.transformer
        if offloads:
            Offload(transformer, CPU)
        plain = Model("tiny", opened.config, transformer, tokenizer, CPU, torch.float32, plain="a test")
        steps = generate(plain, [Request([1, 2, 3], 0, 12), Request([7], 1, 12)], Sampling())
        texts.append([(step.row, step.token) for step in steps])
    assert texts[0] == texts[1]


def test_on_a_cpu_nothing_is_moved(tiny_folder: Path) -> None:
    opened = open_model(tiny_folder, Tokenizer.from_folder(tiny_folder), device="cpu", offload=True)
    assert (opened.plain, opened.told) == (None, "")


@pytest.mark.parametrize("more", [{"quantize": "int8"}, {"compile": True}], ids=str)
def test_what_does_not_go_together_is_refused(tiny_folder: Path, more: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="--offload"):
        open_model(tiny_folder, Tokenizer.from_folder(tiny_folder), device="cpu", offload=True, **more)  # type: ignore[arg-type]
