"""Weights in 8 and 4 bits: what they lose against the exact ones, and the fast products against the slow twin."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gptcli.core import integers, native_build
from gptcli.core.build import open_model
from gptcli.core.cache import KVCache
from gptcli.core.model import Transformer
from gptcli.core.native import NativeMatrix
from gptcli.core.quantize import GROUP, KINDS, QuantizedLinear, check_quantize, quantize_, quantize_int4, quantize_int8
from gptcli.errors import CorruptError, UsageError
from gptcli.spec.config import ModelConfig
from gptcli.text.tokenizer import Tokenizer
from tests.core.test_model import CONFIGS, GPT2, every_config, some_ids, visible_model

every_kind = pytest.mark.parametrize("kind", KINDS)
SIZES = [(1, 1), (7, 5), (50, 24), (33, 70), (16, 32), (96, 128)]
# Relative error in norm of the fast product against the slow twin, on random values: what int8 loses by rounding what
# is multiplied (under 1 % measured), what int4 loses by computing in bfloat16 (under 0.5 %).
LOST = {"int8": 0.015, "int4": 0.01}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(rows: int, columns: int, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    made = nn.Linear(columns, rows, bias=bias).requires_grad_(False)
    made.weight.copy_(random(rows, columns))
    if bias:
        made.bias.copy_(random(rows, seed=1))
    return made.to(dtype)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def test_int8_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [-1e-3, 2.54e-3, 0.0]])
    values, scale = quantize_int8(weight)
    torch.testing.assert_close(scale[[0, 2]], torch.tensor([2 / 127, 2e-5]))
    assert values.tolist() == [[64, -127, 32], [0, 0, 0], [-50, 127, 0]]
    assert values.dtype == torch.int8
    assert weight[0].tolist() == [1, -2, 0.5]  # what is mapped from a file is not written to


def test_int4_layout_by_hand() -> None:
    """Whole numbers up to -8 are kept exactly, at a scale of 1; the second group is a quarter as large."""
    row = [-8, 7, 3, -1, *[0] * 28, -2, 1.75]
    packed, scale = quantize_int4(torch.tensor([row]))
    assert packed.shape == (1, 32)
    assert scale.tolist() == [[1.0, 0.25]]
    assert scale.dtype == torch.bfloat16
    levels = [8 + round(value) for value in row[:32]] + [0, 15, *[8] * 30]
    assert packed[0].tolist() == [low + 16 * high for low, high in zip(levels[::2], levels[1::2], strict=True)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_no_weight_moves_by_more_than_half_a_level(size: tuple[int, int]) -> None:
    layer = linear(*size)
    moved = (QuantizedLinear.of(layer, "int8").dequantized() - layer.weight).abs()
    assert (moved <= 0.5001 * layer.weight.abs().amax(-1, keepdim=True) / 127).all()
    moved = (QuantizedLinear.of(layer, "int4").dequantized() - layer.weight).abs()
    extremes = torch.stack([part.abs().amax(-1) for part in layer.weight.split(GROUP, -1)], -1)
    # At most, a value as large as the extreme one but of the other sign is cut from 9 to 7 levels.
    assert (moved <= extremes.repeat_interleave(GROUP, -1)[:, : size[1]] * 0.225).all()


def test_the_scales_of_int4_lose_less_than_the_plain_ones() -> None:
    weight = random(64, 32)
    layer = linear(64, 32)
    extreme = weight.gather(1, weight.abs().argmax(1, keepdim=True))
    plain = (extreme / -8).bfloat16().float()
    plainly = (weight / plain).round().clamp(-8, 7) * plain
    assert relative(QuantizedLinear.of(layer, "int4").dequantized(), weight) < 0.085 < relative(plainly, weight) < 0.1
    assert relative(QuantizedLinear.of(layer, "int8").dequantized(), weight) < 0.006


def test_outliers_do_not_reach_other_rows_or_groups() -> None:
    layer = linear(8, 64)
    before = {kind: QuantizedLinear.of(layer, kind).dequantized() for kind in KINDS}
    layer.weight[3, 40] = 1000
    after = {kind: QuantizedLinear.of(layer, kind).dequantized() for kind in KINDS}
    others = [row for row in range(8) if row != 3]
    assert torch.equal(before["int8"][others], after["int8"][others])
    assert torch.equal(before["int4"][others], after["int4"][others])
    assert torch.equal(before["int4"][3, :32], after["int4"][3, :32])
    assert not torch.equal(before["int8"][3], after["int8"][3])


@every_kind
def test_rows_in_pieces_are_the_same_as_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear(33, 70)
    whole = QuantizedLinear.of(layer, kind)
    monkeypatch.setattr("gptcli.core.quantize._CHUNK", 200)
    pieces = QuantizedLinear.of(layer, kind)
    assert torch.equal(whole.weight, pieces.weight)
    assert torch.equal(whole.scale, pieces.scale)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "bias"), [*product(SIZES, [True, False])], ids=str)
def test_the_fast_product_is_the_slow_one(kind: str, dtype: torch.dtype, size: tuple[int, int], bias: bool) -> None:
    layer = QuantizedLinear.of(linear(*size, bias=bias, dtype=dtype), kind)
    for shape in ((1,), (1, 1), (5,), (2, 3), (2, 40)):
        x = random(*shape, size[1], seed=2).to(dtype)
        found, wanted = layer(x), layer.slow(x)
        assert found.shape == wanted.shape == (*shape, size[0])
        assert found.dtype == dtype
        assert relative(found, wanted) < LOST[kind]
        assert torch.equal(found, layer(x))
    assert layer(torch.zeros(3, size[1], dtype=dtype)).isfinite().all()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rows", [[1], [100], [1, 3, 100], [100, 1]], ids=str)
def test_a_matrix_is_held_once_and_the_same_after_it_was_packed(size: tuple[int, int], rows: list[int]) -> None:
    layer = QuantizedLinear.of(linear(*size), "int8")
    plain, held = layer.weight.clone(), layer.nbytes
    for count in rows:
        layer(random(count, size[1]))
    assert torch.equal(layer.weight, plain)
    assert layer.nbytes == held == plain.nbytes + layer.scale.nbytes + 4 * size[0]
    if integers.available():
        assert all(buffer is layer.scale for buffer in layer.buffers())
    x = random(2, size[1])
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@every_kind
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_native_step_takes_a_matrix_over(kind: str, size: tuple[int, int], built: Path) -> None:
    """It comes back to the bit, whatever was packed before, and products go on."""
    layer = QuantizedLinear.of(linear(*size), kind)
    plain, x = layer.weight.clone(), random(100, size[1])
    wanted = layer(x)
    NativeMatrix(native_build.load(built), layer)
    assert all(buffer is layer.scale for buffer in layer.buffers())
    assert torch.equal(layer.weight, plain)
    assert torch.equal(layer(x), wanted)


@every_kind
@pytest.mark.parametrize("first", ["joined", "taken"])
def test_maps_side_by_side_are_taken_over_with_their_parts(kind: str, first: str, built: Path) -> None:
    library, parts = native_build.load(built), [QuantizedLinear.of(linear(rows, 64), kind) for rows in (48, 16, 16)]
    plain, x = [part.weight.clone() for part in parts], random(100, 64)
    if first == "joined":
        whole = parts[0].beside(parts[1:])
        wanted = whole(x)
        assert [torch.equal(part.weight, before) for part, before in zip(parts, plain, strict=True)] == [True] * 3
    for part in parts:
        NativeMatrix(library, part)
    if first == "taken":
        whole = parts[0].beside(parts[1:])
        wanted = torch.cat([part(x) for part in parts], -1)
    for each in (whole, *parts):
        assert all(buffer is each.scale for buffer in each.buffers())
    assert torch.equal(whole.weight, torch.cat(plain))
    torch.testing.assert_close(whole(x), wanted)


@pytest.mark.parametrize("count", [1, integers.MANY - 1, integers.MANY, 300])
def test_many_rows_are_rounded_as_few_are(count: int) -> None:
    """Each row by itself: how many go along, and by which library, is not to be seen but in the last digits."""
    layer = QuantizedLinear.of(linear(50, 64), "int8")
    x = random(300, 64) * torch.logspace(-3, 3, 300)[:, None]
    together, apart = layer(x), torch.cat([layer(part) for part in x.split(count)])
    if count > 1:  # a single one is rounded within the kernel, differently
        close = (together - apart).abs() <= 1e-4 * apart.abs().amax(-1, keepdim=True)
        # A value in the middle between two levels may go either way.
        assert close.all(-1).float().mean() > 0.97
    assert relative(together, apart) < 0.01


@every_kind
def test_rows_do_not_depend_on_their_neighbours(kind: str) -> None:
    layer = QuantizedLinear.of(linear(50, 64), kind)
    x = random(3, 64)
    loud = torch.cat((x, 1000 * random(1, 64)))
    torch.testing.assert_close(layer(loud)[:3], layer(x), atol=1e-5, rtol=0)


@every_kind
@pytest.mark.parametrize("bias", [True, False])
def test_maps_side_by_side_are_one(kind: str, bias: bool) -> None:
    parts = [QuantizedLinear.of(linear(rows, 40, bias=bias), kind) for rows in (8, 24, 5)]
    whole = parts[0].beside(parts[1:])
    x = random(2, 40)
    assert whole.out_features == 37
    assert sum(buffer.nbytes for part in parts for buffer in part.buffers()) == sum(p.scale.nbytes for p in parts)
    whole(random(100, 40))
    for part, alone in zip(
        parts, [QuantizedLinear.of(linear(r, 40, bias=bias), kind) for r in (8, 24, 5)], strict=True
    ):
        assert torch.equal(part.weight, alone.weight)
        torch.testing.assert_close(part(x), alone(x))
    torch.testing.assert_close(whole.slow(x), torch.cat([part.slow(x) for part in parts], -1))


def written_out(model: Transformer) -> Transformer:
    """The slow twin of a quantized model: every matrix as float32 numbers."""
    twin = copy.deepcopy(model).float()
    for parent in [twin, *twin.blocks.modules()]:
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantizedLinear):
                plain = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                plain.weight = nn.Parameter(child.dequantized(), requires_grad=False)
                if child.bias is not None:
                    plain.bias = nn.Parameter(child.bias.float(), requires_grad=False)
                setattr(parent, name, plain)
    return twin


@every_kind
@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_quantized_model_is_its_slow_twin(kind: str, config: ModelConfig, dtype: torch.dtype) -> None:
    model = quantize_(visible_model(config).to(dtype), kind)
    twin = written_out(model)
    ids = some_ids(config)
    wanted = twin(ids)
    assert relative(model(ids), wanted) < 0.05
    cache = KVCache(config, 2, 16, device="cpu", dtype=dtype)
    model(ids[:, :8], cache)
    assert relative(model(ids[:, 8:], cache)[:, 0], wanted[:, 8]) < 0.05


@every_kind
@every_config
def test_only_matrices_are_replaced(kind: str, config: ModelConfig) -> None:
    exact = visible_model(config)
    model = quantize_(visible_model(config), kind)
    left = dict(model.named_parameters())
    kept = {name for name, value in exact.named_parameters() if value.dim() < 2}
    kept |= {"embedding.weight"} | ({"positions.weight"} if config.position == "learned" else set())
    assert left.keys() == kept
    before = dict(exact.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in left.items())
    assert relative(model(some_ids(config)), exact(some_ids(config))) < {"int8": 0.08, "int4": 0.6}[kind]


@every_kind
def test_a_tied_unembedding_is_quantized_and_stays_so(kind: str) -> None:
    model = quantize_(visible_model(CONFIGS["gpt2"]), kind)
    table = model.embedding.weight.clone()
    model.tie()
    assert isinstance(model.unembedding, QuantizedLinear)
    assert torch.equal(
        model.unembedding.weight, QuantizedLinear.of(visible_model(CONFIGS["gpt2"]).unembedding, kind).weight
    )
    assert torch.equal(model.embedding.weight, table)


@pytest.mark.parametrize("name", ["blocks.1.mlp.down.weight", "norm.bias", "embedding.weight"])
@pytest.mark.parametrize("wrong", [float("nan"), float("-inf")])
def test_values_that_are_no_numbers_are_refused(name: str, wrong: float) -> None:
    """An integer product would hide them, and make text of damaged weights."""
    model = visible_model(ModelConfig(**GPT2))
    model.get_parameter(name).view(-1)[3] = wrong
    with pytest.raises(CorruptError, match=name):
        quantize_(model, "int8")


def test_kinds_and_devices_that_can_not_be(tiny_folder: Path) -> None:
    for kind in ("none", *KINDS):
        check_quantize(kind, torch.device("cpu"))
    check_quantize("int4", torch.device("cuda", 1))
    check_quantize("none", torch.device("mps"))
    with pytest.raises(UsageError, match="mps"):
        check_quantize("int8", torch.device("mps"))
    with pytest.raises(UsageError, match="int5") as caught:
        open_model(tiny_folder, Tokenizer.from_folder(tiny_folder), device="cpu", quantize="int5")
    assert "none, int8, int4" in caught.value.hint


@every_kind
def test_open_model_quantizes(kind: str, tiny_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(tiny_folder)
    exact = open_model(tiny_folder, tokenizer, device="cpu", dtype="float32")
    model = open_model(tiny_folder, tokenizer, device="cpu", dtype="float32", quantize=kind)
    assert (exact.quantize, model.quantize) == ("none", kind)
    layer = model.transformer.blocks[1].mlp.up
    assert isinstance(layer, QuantizedLinear)
    assert layer.kind == kind
    ids = some_ids(model.config)
    assert 0 < relative(model.transformer(ids), exact.transformer(ids)) < 0.2
