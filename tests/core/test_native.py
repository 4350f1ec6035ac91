"""The native step against the transformer, its slow twin: every axis, every type, every size; and its threads."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcli.core.cache import KVCache
from gptcli.core.model import Transformer
from gptcli.core.native import NativeMatrix, NativeStep, compare
from gptcli.core.native_build import Library, load
from gptcli.errors import LimitError, UnsupportedError
from gptcli.spec.config import ModelConfig, RopeScaling
from tests.conftest import PATIENCE
from tests.core.test_model import CONFIGS, GPT2, LLAMA_LIKE, every_config, some_ids, visible_model

KINDS = ("float32", "bfloat16", "int8", "int4")
# Sizes that no register and no group of columns divides, and a head wider than one and two registers.
ODD = {
    "odd": {**GPT2, "vocab_size": 37, "width": 33, "heads": 1, "kv_heads": 1, "head_dim": 33, "mlp_width": 71},
    "one of everything": {**GPT2, "width": 1, "heads": 1, "kv_heads": 1, "head_dim": 1, "mlp_width": 1, "layers": 1},
    "wide heads": {**LLAMA_LIKE, "width": 40, "heads": 3, "kv_heads": 1, "head_dim": 134, "mlp_width": 100},
    "odd norms": {**LLAMA_LIKE, "width": 33, "qk_norm": "whole", "norm_output": True, "rope_dim": 6, "windows": (1, 3)},
    "wide head norms": {**LLAMA_LIKE, "heads": 2, "kv_heads": 1, "head_dim": 34, "qk_norm": "head", "rope_dim": 18},
    "rounded up": {**GPT2, "width": 64, "heads": 2, "kv_heads": 2, "head_dim": 32, "mlp_width": 160, "vocab_size": 130},
}
ALL = {**CONFIGS, **{name: ModelConfig(**axes) for name, axes in ODD.items()}}


class Quantized(nn.Module):
    """A matrix rounded by the rules of int8 and int4, as the native step is given one; its forward is the slow twin."""

    def __init__(self, linear: nn.Module, kind: str) -> None:
        super().__init__()
        weight = linear.get_parameter("weight").detach().float()
        self.kind, self.bias = kind, getattr(linear, "bias", None)
        self.out_features, self.in_features = linear.get_parameter("weight").shape
        rows, columns = weight.shape
        if kind == "int8":
            self.scale = weight.abs().amax(1) / 127
            self.weight = (weight / self.scale[:, None]).nan_to_num().round().to(torch.int8)
            self.exact = self.weight.float() * self.scale[:, None]
            return
        groups = F.pad(weight, (0, -columns % 32)).view(rows, -1, 32)
        peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        self.scale = (peak[..., 0] / -8).bfloat16()
        numbers = (groups / self.scale.float()[..., None]).nan_to_num().round().clamp(-8, 7)
        self.exact = (numbers * self.scale.float()[..., None]).flatten(1)[:, :columns]
        codes = (numbers + 8).to(torch.uint8).flatten(1)
        self.weight = codes[:, ::2] | codes[:, 1::2] << 4

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.exact, bias).to(x.dtype)


def in_kind(model: Transformer, kind: str) -> Transformer:
    """A copy whose weights are of this kind."""
    model = copy.deepcopy(model)
    if kind == "bfloat16":
        return model.bfloat16()
    if kind != "float32":
        for owner in [module for module in model.modules() if not isinstance(module, Quantized)]:
            for name, child in list(owner.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(owner, name, Quantized(child, kind))
    return model


@pytest.fixture(params=["this CPU's", "untiled", "plain"])
def library(request: pytest.FixtureRequest, built: Path) -> Library:
    if request.param == "this CPU's":
        return load(built)
    other: Library = request.getfixturevalue(request.param)
    return other


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def some_cache(model: Transformer, lengths: list[int], capacity: int, seed: int = 0) -> KVCache:
    """A cache in which each row holds so many tokens, padded as a prefill leaves it."""
    weight = model.embedding.weight
    cache = KVCache(model.config, len(lengths), capacity, device="cpu", dtype=weight.dtype)
    model(some_ids(model.config, len(lengths), max(lengths), seed), cache)
    cache.set_lengths(lengths)
    return cache


def steps_of(
    model: Transformer, step: Callable[[Tensor, KVCache], Tensor], lengths: list[int], count: int
) -> tuple[Tensor, KVCache]:
    """The logits of so many steps, ``[count, B, V]``, and the cache behind them."""
    cache = some_cache(model, lengths, max(lengths) + count)
    ids = some_ids(model.config, len(lengths), count, seed=1)
    return torch.stack([step(ids[:, place], cache).float() for place in range(count)]), cache


def slow(model: Transformer) -> Callable[[Tensor, KVCache], Tensor]:
    return lambda tokens, cache: model(tokens[:, None], cache)[:, 0]


# --- The step and its twin


@pytest.mark.parametrize("config", ALL.values(), ids=ALL.keys())
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_step_is_the_transformers(library: Library, config: ModelConfig, threads: int) -> None:
    """Logits, and what is left in the cache, of rows of different length."""
    model = visible_model(config)
    step = NativeStep(library, model, threads)
    for lengths in ([5], [7, 1, 4], [2] * 11):
        wanted, theirs = steps_of(model, slow(model), lengths, 6)
        made, ours = steps_of(model, step.step, lengths, 6)
        torch.testing.assert_close(made, wanted, atol=1e-4, rtol=0)
        assert ours.lengths == theirs.lengths == [length + 6 for length in lengths]
        for mine, other in zip(ours.keys + ours.values, theirs.keys + theirs.values, strict=True):
            for row, length in enumerate(ours.lengths):
                torch.testing.assert_close(mine[row, :, :length], other[row, :, :length], atol=1e-4, rtol=0)


def test_texts_that_outgrow_the_original_context(built: Path) -> None:
    """A step turns its token as the text's length then wants it, and a few at once are what they are one by one."""
    config = ModelConfig(**{**LLAMA_LIKE, "rope_scaling": RopeScaling("dynamic", 4.0, 6)})
    model = visible_model(config)
    step = NativeStep(load(built), model, 2)
    wanted, made = (steps_of(model, take, [8, 3], 8)[0] for take in (slow(model), step.step))
    torch.testing.assert_close(made, wanted, atol=1e-4, rtol=0)
    ids = some_ids(config, 1, 8, seed=1)
    together = step.verify([ids[0].tolist()], some_cache(model, [3], 16))
    assert torch.equal(together, steps_of(model, step.step, [3], 8)[0][:, 0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", ALL.values(), ids=ALL.keys())
def test_every_type_of_weights_is_within_its_limit(library: Library, config: ModelConfig, kind: str) -> None:
    model = in_kind(visible_model(config), kind)
    compared = compare(NativeStep(library, model, 2), model)
    assert compared.ok, compared
    assert compared.tokens == 8


def test_a_bfloat16_step_is_nearer_to_the_truth_than_pytorchs(library: Library) -> None:
    """The same weights, computed in float32: the native step rounds less on the way."""
    for config in CONFIGS.values():
        model = in_kind(visible_model(config), "bfloat16")
        exact = copy.deepcopy(model).float()
        wanted = steps_of(exact, slow(exact), [6, 3], 5)[0]
        ours = steps_of(model, NativeStep(library, model, 1).step, [6, 3], 5)[0]
        theirs = steps_of(model, slow(model), [6, 3], 5)[0]
        assert (ours - wanted).square().mean() < (theirs - wanted).square().mean()


@every_config
def test_long_caches_to_the_last_position(built: Path, config: ModelConfig) -> None:
    """More positions than fit any block of the attention, up to the end of the context."""
    axes = {**config.__dict__, "context": 300}
    model = visible_model(ModelConfig(**axes))
    step = NativeStep(load(built), model, 2)
    for start in (252, 287, 298):
        lengths, count = [start, start - 11], 300 - start
        torch.testing.assert_close(
            steps_of(model, step.step, lengths, count)[0],
            steps_of(model, slow(model), lengths, count)[0],
            atol=1e-4,
            rtol=0,
        )


def test_a_float32_cache_serves_bfloat16_weights(built: Path) -> None:
    model = in_kind(visible_model(CONFIGS["llama-like"]), "bfloat16")
    exact = copy.deepcopy(model).float()
    caches = [some_cache(exact, [4, 2], 8) for _ in range(2)]
    ids = some_ids(model.config, 2, 1)[:, 0]
    ours, wanted = NativeStep(load(built), model, 2).step(ids, caches[0]), slow(exact)(ids, caches[1])
    assert (ours - wanted).abs().max() < 0.05 * wanted.std()


def test_a_cache_that_was_cut_and_has_grown(built: Path) -> None:
    model = visible_model(CONFIGS["one key-value head"])
    step = NativeStep(load(built), model, 2)
    made = []
    for take in (step.step, slow(model)):
        cache = some_cache(model, [3, 9, 5], 10)
        ids = some_ids(model.config, 3, 4, seed=2)
        first = take(ids[:, 0], cache)
        cache.select([2, 0])
        cache.grow(20)
        made.append([first, *(take(ids[[2, 0], place], cache) for place in range(1, 4))])
    for ours, theirs in zip(*made, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_numbers_that_overflow_show(built: Path) -> None:
    """What is no number stays none; nothing hides it."""
    model = visible_model(CONFIGS["gpt2"])
    model.blocks[0].get_submodule("mlp.down").get_parameter("weight").fill_(float("nan"))
    logits = steps_of(model, NativeStep(load(built), model, 2).step, [3], 1)[0]
    assert torch.isnan(logits).all()


def test_what_the_cache_or_the_model_does_not_have_is_refused(built: Path) -> None:
    model = visible_model(CONFIGS["gpt2"])
    step = NativeStep(load(built), model, 1)
    ids = torch.tensor([1, 2])
    with pytest.raises(LimitError, match="5 tokens"):
        step.step(ids, some_cache(model, [4, 2], 4))
    for wrong in (-1, model.config.vocab_size):
        with pytest.raises(IndexError):
            step.step(torch.tensor([1, wrong]), some_cache(model, [4, 2], 8))
    with pytest.raises(IndexError, match="position 32"):
        step.step(ids, some_cache(model, [32, 2], 40))
    with pytest.raises(ValueError, match="2 tokens for a cache of 1"):
        step.step(ids, some_cache(model, [3], 8))
    step.close()
    with pytest.raises(ValueError, match="closed"):
        step.step(ids, some_cache(model, [3, 1], 8))
    with pytest.raises(UnsupportedError, match="float16"):
        NativeStep(load(built), model.half(), 1)


# --- One matrix


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 32), (17, 33), (50, 100), (5, 257), (130, 64)])
def test_a_product_is_within_what_rounding_may_do(library: Library, kind: str, rows: int, columns: int) -> None:
    """The bound: an input is off by half a step of 127 to the largest of its 32 (int8, int4), or a 512th (bfloat16)."""
    torch.manual_seed(rows * columns)
    linear = nn.Linear(columns, rows)
    matrix: nn.Module = linear.to(torch.bfloat16) if kind == "bfloat16" else linear
    if kind.startswith("int"):
        matrix = Quantized(linear, kind)
    weight = matrix.exact if isinstance(matrix, Quantized) else linear.weight.float()
    assert linear.bias is not None
    x = torch.randn(15, columns) * torch.rand(15, 1)  # 15 is 8 + 4 + 2 + 1: every number of rows at once
    made = NativeMatrix(library, matrix)(x)
    wanted = x.double() @ weight.double().T + linear.bias.double()
    off = torch.zeros_like(x)
    if kind.startswith("int") and "VNNI" in library.features:
        peak = F.pad(x, (0, -columns % 32)).view(15, -1, 32).abs().amax(-1)
        off = (peak / 254).repeat_interleave(32, 1)[:, :columns]
    elif kind == "bfloat16" and "BF16" in library.features:
        off = x.abs() / 256
    bound = off.double() @ weight.double().abs().T + 1e-5 * (1 + wanted.abs())
    assert ((made - wanted).abs() <= bound).all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rounded_inputs_are_the_only_loss(built: Path, kind: str) -> None:
    library = load(built)
    if "VNNI" not in library.features:
        pytest.skip("this CPU's products take inputs as they are")
    torch.manual_seed(1)
    matrix, x = Quantized(nn.Linear(96, 40, bias=False), kind), torch.randn(7, 96)
    groups = x.view(7, 3, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    rounded = ((groups / scale).round() * scale).flatten(1)
    torch.testing.assert_close(NativeMatrix(library, matrix)(x), matrix(rounded), atol=1e-5, rtol=0)


def test_extreme_numbers_do_not_overflow_a_product(library: Library) -> None:
    """The largest weights and inputs in every place, with every sign; and inputs that are all zero."""
    for kind in ("int8", "int4"):
        for sign in (1.0, -1.0):
            matrix = Quantized(nn.Linear(1024, 16, bias=False).requires_grad_(False), kind)
            matrix.weight.fill_(127 if kind == "int8" else 0)
            matrix.scale.fill_(1)
            value = 1024 * sign * (127 if kind == "int8" else -8)
            x = torch.full((3, 1024), sign)
            x[2] = 0
            made = NativeMatrix(library, matrix)(x)
            torch.testing.assert_close(made[:2], torch.full((2, 16), value), rtol=1e-5, atol=0)
            assert made[2].eq(0).all()


# --- Threads


def running() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_threads_end_with_their_step(built: Path) -> None:
    """Whether it is closed or forgotten."""
    model = visible_model(CONFIGS["gpt2"])
    steps_of(model, slow(model), [3], 2)  # PyTorch's own threads are there from then on
    before = running()
    for close in (True, False):
        step = NativeStep(load(built), model, 4)
        steps_of(model, step.step, [3], 2)
        assert running() == before + 3
        if close:
            step.close()
        del step
        assert running() == before


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_idle_threads_sleep(built: Path) -> None:
    """Soon after a step none of them takes any time: their clocks stand still."""
    model = visible_model(CONFIGS["gpt2"])
    steps_of(model, slow(model), [3], 2)
    before = set(os.listdir("/proc/self/task"))
    step = NativeStep(load(built), model, 3)
    steps_of(model, step.step, [3], 2)
    ours = set(os.listdir("/proc/self/task")) - before
    assert len(ours) == 2
    deadline = time.monotonic() + PATIENCE
    while any(not waiting(task) for task in ours):
        assert time.monotonic() < deadline
    step.close()


def waiting(task: str) -> bool:
    return Path(f"/proc/self/task/{task}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def test_a_step_is_the_same_on_any_number_of_threads_and_every_time(built: Path) -> None:
    model = visible_model(CONFIGS["llama-like"])
    library = load(built)
    first = steps_of(model, NativeStep(library, model, 1).step, [9, 4], 5)[0]
    for threads in (1, 2, 3, 8):
        step = NativeStep(library, model, threads)
        for _ in range(20):
            assert torch.equal(steps_of(model, step.step, [9, 4], 5)[0], first)


@pytest.mark.parametrize("rows", [1, 16, 21])
def test_pytorchs_products_are_the_same_around_a_step(built: Path, rows: int) -> None:
    """Both shape the same tiles of a thread, where the CPU has such."""
    model = visible_model(CONFIGS["gpt2"]).bfloat16()
    step, inputs = NativeStep(load(built), model, 2), torch.randn(64, 96).bfloat16()
    weight, found = torch.randn(128, 96).bfloat16(), []
    for _ in range(3):
        found.append((F.linear(inputs, weight), steps_of(model, step.step, [3] * rows, 2)[0]))
    for product, logits in found:
        assert torch.equal(product, found[0][0])
        assert torch.equal(logits, found[0][1])


def test_callers_take_turns(built: Path) -> None:
    """Several threads with caches of their own use one step."""
    model = visible_model(CONFIGS["gpt2"])
    step = NativeStep(load(built), model, 2)
    wanted = steps_of(model, step.step, [5, 2], 20)[0]
    found: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            found.append(steps_of(model, step.step, [5, 2], 20)[0])

    callers = [threading.Thread(target=work) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 4
    assert all(torch.equal(each, wanted) for each in found)


FORKED = """
import os, sys, torch
from pathlib import Path
from gptcli.core.native import NativeStep
from gptcli.core.native_build import load
from tests.core.test_model import CONFIGS, visible_model
from tests.core.test_native import steps_of
torch.set_num_threads(1)
model = visible_model(CONFIGS["gpt2"])
step = NativeStep(load(Path(sys.argv[1])), model, 3)
with torch.inference_mode():
    wanted = steps_of(model, step.step, [3], 3)[0]
    child = os.fork()
    same = torch.equal(steps_of(model, step.step, [3], 3)[0], wanted)
if child:
    assert os.waitpid(child, 0)[1] == 0
sys.exit(0 if same else 1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_may_go_on_with_it(built: Path) -> None:
    """It has none of the threads and takes new ones; and it ends, as its parent does."""
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(built)], env=environment, capture_output=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr.decode()
