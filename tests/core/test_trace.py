"""The trace: every number in it against a forward that is written out step by step, and against Python's arithmetic."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gptcli.core.attention import attention_pattern, gather
from gptcli.core.build import Model, open_model
from gptcli.core.generate import generate
from gptcli.core.predict import distribution, next_logits
from gptcli.core.requests import Request
from gptcli.core.rope import rotate, rotation
from gptcli.core.settings import Sampling
from gptcli.core.trace import Trace, head_outputs, trace
from gptcli.errors import CorruptError, LimitError, UsageError
from gptcli.spec.config import ModelConfig
from gptcli.text.tokenizer import Tokenizer
from tests.core.test_model import CONFIGS, every_config, visible_model

IDS = [7, 3, 40, 3, 11, 29]


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_folder)


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path, tokenizer: Tokenizer) -> Model:
    return open_model(tiny_folder, tokenizer, device="cpu", dtype="float32")


def model_of(config: ModelConfig, tokenizer: Tokenizer) -> Model:
    return Model("a model", config, visible_model(config), tokenizer, torch.device("cpu"), torch.float32)


def written_out(model: Model, ids: Sequence[int]) -> dict[str, Tensor]:
    """Every step of a forward by its name, without a tap, from the modules and the slow attention."""
    transformer, config = model.transformer, model.config
    steps: dict[str, Tensor] = {"tokens": torch.tensor([list(ids)])}
    x = steps["embedding"] = transformer.embedding(steps["tokens"])
    places = torch.arange(len(ids))[None]
    turn = None
    if transformer.positions is not None:
        x = steps["positions"] = x + transformer.positions(places + config.position_offset)
    else:
        dim = config.rope_dim or config.head_dim
        turn = rotation(places, dim, config.rope_theta, x.dtype, config.rope_scaling)
    for layer, block in enumerate(transformer.blocks):
        came_in = x
        normed = x if config.norm_output else block.attention_norm(x)
        parts = [part(normed) for part in (block.attention.query, block.attention.key, block.attention.value)]
        if config.qk_norm != "none":
            parts[:2] = block.attention.query_norm(parts[0]), block.attention.key_norm(parts[1])
        query, key, value = (part.unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for part in parts)
        if turn is not None and layer not in config.unrotated:
            query, key = rotate(query, turn), rotate(key, turn)
        pattern = attention_pattern(query, key, (config.windows[layer] if config.windows else None) or "causal")
        attention = block.attention.output(gather(pattern, value).transpose(1, 2).flatten(2))
        attention = block.attention_norm(attention) if config.norm_output else attention
        x = x + attention
        into = came_in if config.parallel else x
        into = into if config.norm_output else block.mlp_norm(into)
        hidden = block.mlp.activation((block.mlp.gate or block.mlp.up)(into))
        if block.mlp.gate is not None:
            hidden = hidden * block.mlp.up(into)
        mlp = block.mlp.down(hidden)
        mlp = block.mlp_norm(mlp) if config.norm_output else mlp
        x = x + mlp
        names = ("query", "key", "value", "pattern", "attention", "hidden", "mlp")
        values = (query, key, value, pattern, attention, hidden, mlp)
        steps |= {f"blocks.{layer}.{name}": each for name, each in zip(names, values, strict=True)}
        steps[f"blocks.{layer}"] = x
    steps["norm"] = transformer.norm(x)
    steps["logits"] = transformer.unembedding(steps["norm"])
    return steps


def length(vector: Sequence[float]) -> float:
    return math.sqrt(sum(x * x for x in vector))


def degrees(one: Sequence[float], other: Sequence[float]) -> float:
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return math.degrees(math.acos(max(-1.0, min(1.0, product / length(one) / length(other)))))


def near(value: Any) -> Any:
    return pytest.approx(value, rel=1e-4, abs=1e-4)


@every_config
def test_stages_are_what_a_plain_forward_computes(config: ModelConfig, tokenizer: Tokenizer) -> None:
    model = model_of(config, tokenizer)
    told, steps = trace(model, IDS), written_out(model, IDS)
    assert [stage.name for stage in told.stages] == [*steps, "probabilities", "draw"]
    before = steps["embedding"][0].tolist()
    for stage in told.stages[:-2]:
        value, summary = steps[stage.name], stage.summary
        assert stage.shape == tuple(value.shape), stage.name
        assert stage.dtype == str(value.dtype).removeprefix("torch."), stage.name
        rows: Any = value[0].tolist()
        if stage.symbols == "B T C":
            assert summary["norms"] == near([length(row) for row in rows]), stage.name
            assert summary["vector"] == near(rows[-1][:8]), stage.name
        if stage.kind in ("attention", "mlp"):
            after = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(before, rows, strict=True)]
            turned = [degrees(*pair) for pair in zip(before, after, strict=True)]
            assert summary["turned_degrees"] == pytest.approx(turned, abs=1e-2), stage.name
            before = after
        elif stage.kind in ("embedding", "positions"):
            before = rows
        elif stage.kind in ("query", "key", "value"):
            assert summary == {"norms": near([length(head[-1]) for head in rows])}, stage.name
        elif stage.kind == "hidden":
            best = sorted(range(config.mlp_width), key=lambda i: -rows[-1][i])[:5]
            assert [one["neuron"] for one in summary["neurons"]] == best
            assert [one["value"] for one in summary["neurons"]] == near([rows[-1][i] for i in best])
            assert summary["active"] == pytest.approx(sum(x > 0 for x in rows[-1]) / config.mlp_width)
        elif stage.kind == "logits":
            assert summary["max"] == near(max(rows[-1]))
            assert summary["min"] == near(min(rows[-1]))
            assert summary["mean"] == near(sum(rows[-1]) / len(rows[-1]))
            assert summary["top"][0]["id"] == rows[-1].index(max(rows[-1]))


@every_config
def test_a_block_turns_the_stream_by_both_of_its_parts(config: ModelConfig, tokenizer: Tokenizer) -> None:
    model = model_of(config, tokenizer)
    told, steps = trace(model, IDS), written_out(model, IDS)
    before = steps.get("positions", steps["embedding"])[0].tolist()
    for layer in range(config.layers):
        after = steps[f"blocks.{layer}"][0].tolist()
        turned = [degrees(*pair) for pair in zip(before, after, strict=True)]
        assert told.stage(f"blocks.{layer}").summary["turned_degrees"] == pytest.approx(turned, abs=1e-2)
        before = after


@every_config
def test_heads_tell_where_they_look_and_how_much_they_add(config: ModelConfig, tokenizer: Tokenizer) -> None:
    model = model_of(config, tokenizer)
    told, steps = trace(model, IDS), written_out(model, IDS)
    for layer in range(config.layers):
        heads = told.stage(f"blocks.{layer}.pattern").summary["heads"]
        assert [one["head"] for one in heads] == list(range(config.heads))
        value = steps[f"blocks.{layer}.value"][0]
        weights = steps[f"blocks.{layer}.pattern"][0, :, -1]
        parts = head_outputs(model.transformer, layer, weights, value)
        output = model.transformer.blocks[layer].get_submodule("attention.output")
        bias = output.bias if isinstance(output.bias, Tensor) else torch.zeros(config.width)
        added = steps[f"blocks.{layer}.attention"][0, -1]
        if config.norm_output:  # the norm stretches every dimension by something, and the bias of the output too
            norm: Any = model.transformer.blocks[layer].get_submodule("attention_norm")
            made = output(gather(weights[None, :, None], value[None])[0, :, 0].flatten())
            own, less = (norm.bias, Tensor.mean) if config.norm == "layernorm" else (0.0, lambda vector: 0.0)
            bias = own + (added - own) / (made - less(made)) * (bias - less(bias))
        torch.testing.assert_close(parts.sum(0) + bias, added, atol=1e-4, rtol=1e-4)
        for head, one in enumerate(heads):
            row = weights[head].tolist()
            places = sorted(range(len(IDS)), key=lambda place: -row[place])[:3]
            assert [looked["position"] for looked in one["top"]] == places
            assert [looked["weight"] for looked in one["top"]] == near([row[place] for place in places])
            assert [looked["id"] for looked in one["top"]] == [IDS[place] for place in places]
            assert one["entropy_bits"] == near(-sum(p * math.log2(p) for p in row if p > 0))
            assert one["norm"] == near(length(parts[head].tolist()))


@every_config
def test_symbols_stand_for_the_sizes_of_the_model(config: ModelConfig, tokenizer: Tokenizer) -> None:
    sizes = {"B": 1, "T": len(IDS), "S": len(IDS), "C": config.width, "H": config.heads, "K": config.kv_heads}
    sizes |= {"D": config.head_dim, "F": config.mlp_width, "V": config.vocab_size}
    stages = trace(model_of(config, tokenizer), IDS).stages
    assert [stage.shape for stage in stages] == [tuple(sizes[one] for one in stage.symbols.split()) for stage in stages]
    assert {stage.layer for stage in stages} == {None, *range(config.layers)}


@every_config
def test_patterns_are_kept_where_asked_for_and_their_rows_sum_to_1(config: ModelConfig, tokenizer: Tokenizer) -> None:
    model = model_of(config, tokenizer)
    told, steps = trace(model, IDS, patterns=[1]), written_out(model, IDS)
    assert set(told.patterns) == {1}
    for head in (None, *range(config.heads)):
        rows = told.pattern(1, head)
        assert [sum(row) for row in rows] == near([1.0] * len(IDS))
        assert all(weight == 0 for t, row in enumerate(rows) for weight in row[t + 1 :])
        wanted = steps["blocks.1.pattern"][0]
        torch.testing.assert_close(torch.tensor(rows), wanted.mean(0) if head is None else wanted[head])


@every_config
def test_the_lens_on_the_last_layer_is_the_prediction(config: ModelConfig, tokenizer: Tokenizer) -> None:
    model = model_of(config, tokenizer)
    told, steps = trace(model, IDS), written_out(model, IDS)
    rows = told.lens()
    names = ["positions" if config.position == "learned" else "embedding"]
    names += [f"blocks.{layer}" for layer in range(config.layers)]
    assert len(rows) == len(names)
    for row, name in zip(rows, names, strict=True):
        chances = model.transformer.unembedding(model.transformer.norm(steps[name]))[0].double().softmax(-1)
        assert [guess.id for guess in row] == chances.argmax(-1).tolist()
        assert [guess.probability for guess in row] == near(chances.amax(-1).tolist())
    assert rows[-1][-1].id == told.next.top[0].id
    assert rows[-1][-1].probability == pytest.approx(told.next.top[0].probability, rel=1e-5)


def test_it_predicts_what_a_plain_forward_does(tiny: Model) -> None:
    told = trace(tiny, IDS, temperature=0.7, top=4)
    logits = next_logits(tiny, IDS)
    torch.testing.assert_close(told.logits, logits, atol=1e-6, rtol=0)
    wanted = distribution(logits, 0.7, 4)
    assert [one.id for one in told.next.top] == [one.id for one in wanted.top]
    assert told.next.entropy_bits == pytest.approx(wanted.entropy_bits)
    summary = told.stage("probabilities").summary
    assert summary["temperature"] == 0.7
    assert summary["sum"] == pytest.approx(1, abs=1e-6)
    assert [one["probability"] for one in summary["top"]] == [one.probability for one in told.next.top]


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 3.0])
def test_it_draws_what_generate_draws(tiny: Model, temperature: float) -> None:
    seen = set()
    for seed in range(12):
        drawn = trace(tiny, IDS, temperature=temperature, seed=seed).drawn
        request = Request(IDS, seed, max_tokens=1, ignore_eos=True)
        assert [step.token for step in generate(tiny, [request], Sampling(temperature))] == [drawn.id]
        assert drawn.seed == seed
        seen.add(drawn.id)
    assert len(seen) == 1 if temperature == 0 else len(seen) > 6


def test_the_rank_of_the_draw_counts_what_was_likelier(tiny: Model) -> None:
    told = trace(tiny, IDS, temperature=2, seed=3, top=tiny.config.vocab_size)
    assert told.next.top[told.drawn.rank].id == told.drawn.id
    assert told.next.top[told.drawn.rank].probability == told.drawn.probability
    assert told.drawn.rank > 0
    assert trace(tiny, IDS, temperature=0).drawn.rank == 0


def test_among_equal_logits_the_rank_is_the_place_in_the_list(tiny: Model) -> None:
    flat = dataclasses.replace(tiny, transformer=copy.deepcopy(tiny.transformer))
    for parameter in flat.transformer.norm.parameters():
        parameter.data.zero_()
    told = trace(flat, IDS, seed=3, top=tiny.config.vocab_size)
    assert len({one.logit for one in told.next.top}) == 1
    assert told.drawn.rank > 0
    assert told.next.top[told.drawn.rank].id == told.drawn.id


def test_one_token_is_enough(tiny: Model) -> None:
    told = trace(tiny, [5], patterns=range(2))
    assert told.pattern(0, 0) == [[1.0]]
    assert told.stage("blocks.0.pattern").summary["heads"][0]["entropy_bits"] == 0


def test_bfloat16_is_told_of_as_such(tiny_folder: Path, tokenizer: Tokenizer) -> None:
    model = open_model(tiny_folder, tokenizer, device="cpu", dtype="bfloat16")
    stages: dict[str, str] = {stage.name: stage.dtype for stage in trace(model, IDS).stages}
    assert stages["embedding"] == stages["blocks.1"] == stages["logits"] == "bfloat16"
    assert stages["blocks.0.pattern"] == "float32"
    assert stages["probabilities"] == "float64"


def test_what_is_not_there_is_refused_by_name(tiny: Model) -> None:
    told: Trace = trace(tiny, IDS, patterns=range(2))
    with pytest.raises(UsageError, match="no layer 2: tiny has 2 of them"):
        told.pattern(2)
    with pytest.raises(UsageError, match="no head 4: tiny has 4 of them"):
        told.pattern(1, 4)
    with pytest.raises(KeyError):
        told.stage("blocks.7")
    with pytest.raises(LimitError):
        trace(tiny, [5] * 65)


def test_damaged_weights_are_told_of(tiny_folder: Path, tokenizer: Tokenizer) -> None:
    model = open_model(tiny_folder, tokenizer, device="cpu", dtype="float32")
    model.transformer.norm.weight = torch.nn.Parameter(torch.full((32,), math.nan), requires_grad=False)
    with pytest.raises(CorruptError):
        trace(model, IDS)


class _Operations(TorchDispatchMode):
    """Writes down every operation that runs within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_without_a_tap_the_model_runs_nothing_more() -> None:
    """The operations of a forward are those that the parts make when they are called by hand, attention fused."""
    config = CONFIGS["gpt2"]
    model = visible_model(config)
    ids = torch.tensor([IDS])
    with _Operations() as plain:
        model(ids)
    with _Operations() as by_hand:
        x = model.embedding(ids)
        x = x + model.positions(torch.arange(len(IDS))[None])  # type: ignore[misc]
        for block in model.blocks:
            attention, mlp = block.attention, block.mlp
            normed = block.attention_norm(x)
            parts = (attention.query, attention.key, attention.value)
            query, key, value = (part(normed).view(1, len(IDS), -1, 8).transpose(1, 2) for part in parts)
            gathered = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + attention.output(gathered.transpose(1, 2).flatten(2))
            x = x + mlp.down(mlp.activation(mlp.up(block.mlp_norm(x))))
        model.unembedding(model.norm(x))
    assert sorted(plain.names) == sorted(by_hand.names)
