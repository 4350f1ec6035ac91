"""The transformer: its parameters, its fast attention against two slow twins, its taps, and that it sees no future."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gptcli.core.attention import attention_pattern, gather
from gptcli.core.build import new_transformer, random_model
from gptcli.core.cache import KVCache
from gptcli.core.model import Transformer
from gptcli.errors import UnsupportedError
from gptcli.spec.config import ModelConfig, RopeScaling
from gptcli.spec.params import tensors

GPT2: dict[str, Any] = {
    "family": "gpt2",
    "vocab_size": 50,
    "context": 32,
    "layers": 2,
    "width": 24,
    "heads": 3,
    "kv_heads": 3,
    "head_dim": 8,
    "mlp_width": 40,
}
# Every axis in its other position, and a head width that is not width / heads.
LLAMA_LIKE: dict[str, Any] = {
    **GPT2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 10,
    "activation": "silu",
    "gated": True,
    "norm": "rmsnorm",
    "norm_eps": 1e-6,
    "position": "rope",
    "rope_theta": 500.0,
    "qkv_bias": False,
    "output_bias": False,
    "mlp_bias": False,
    "tied": False,
}
CONFIGS = {
    "gpt2": ModelConfig(**GPT2),
    "untied, relu": ModelConfig(**{**GPT2, "tied": False, "activation": "relu", "layers": 3}),
    "qkv bias alone": ModelConfig(**{**GPT2, "output_bias": False, "mlp_bias": False, "activation": "gelu"}),
    "one key-value head": ModelConfig(**{**GPT2, "kv_heads": 1}),
    "llama-like": ModelConfig(**LLAMA_LIKE),
    "head norms, llama3": ModelConfig(
        **{**LLAMA_LIKE, "qk_norm": "head", "tied": True, "rope_scaling": RopeScaling("llama3", 8.0, 32)}
    ),
    "norms of what was made, yarn": ModelConfig(
        **{**LLAMA_LIKE, "norm_output": True, "qk_norm": "whole", "rope_scaling": RopeScaling("yarn", 4.0, 32)}
    ),
    "parallel, partly rotated, linear": ModelConfig(
        **{**GPT2, "position": "rope", "rope_dim": 4, "parallel": True, "rope_scaling": RopeScaling("linear", 2.5, 32)}
    ),
    "windows, unrotated": ModelConfig(**{**LLAMA_LIKE, "layers": 3, "windows": (4, None, 2), "unrotated": (1,)}),
    "window, positions from the third row": ModelConfig(
        **{**GPT2, "activation": "relu", "position_offset": 2, "windows": (3, 3), "parallel": True, "norm_output": True}
    ),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def visible_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model in which every parameter is random, of a size that shows."""
    model = random_model(config, seed).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        centre = float(parameter.dim() < 2 and name.endswith("norm.weight"))
        parameter.copy_(centre + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def some_ids(config: ModelConfig, rows: int = 2, count: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(config.vocab_size, (rows, count), generator=torch.Generator().manual_seed(seed))


def turns_twin(dim: int, theta: float, scaling: RopeScaling | None, length: int) -> tuple[list[float], float]:
    """By what each pair turns from a position to the next in a text so long, and by what it grows: pair by pair."""
    turns = []
    for i in range(dim // 2):
        base = theta
        if scaling and scaling.kind == "dynamic" and length > scaling.original_context:
            stretched = scaling.factor * length / scaling.original_context - (scaling.factor - 1)
            base = theta * stretched ** (dim / (dim - 2))
        turn = base ** (-2 * i / dim)
        around = 2 * math.pi / turn  # positions
        times = scaling.original_context / around if scaling else 0.0
        if scaling and scaling.kind == "linear":
            turn /= scaling.factor
        elif scaling and scaling.kind == "llama3":
            share = (times - scaling.low_frequency_factor) / (
                scaling.high_frequency_factor - scaling.low_frequency_factor
            )
            share = min(1.0, max(0.0, share))
            turn = share * turn + (1 - share) * turn / scaling.factor
        elif scaling and scaling.kind == "yarn":
            # The pair, as a fraction, that turns so many times: solve original / (2 pi theta^(2i/dim)) = times for i.
            low, high = (
                dim / 2 * math.log(scaling.original_context / (2 * math.pi * times), theta)
                for times in (scaling.beta_fast, scaling.beta_slow)
            )
            if scaling.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, dim - 1)
            share = min(1.0, max(0.0, (i - low) / (high - low if high > low else 0.001)))
            turn = share * turn / scaling.factor + (1 - share) * turn
        turns.append(turn)
    size = 1.0
    if scaling and scaling.kind == "yarn":
        size = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1
    return turns, size


# A twin written with Python numbers and loops, one token and one head at a time.


def loop_twin(model: Transformer, ids: list[int]) -> list[list[float]]:
    """Logits after each token of one row, in float64, from the parameters by name and nothing else of the model."""
    c = model.config
    p = {name: parameter.double().tolist() for name, parameter in model.named_parameters()}

    def linear(name: str, x: list[float]) -> list[float]:
        out = [sum(w * v for w, v in zip(row, x, strict=True)) for row in p[f"{name}.weight"]]
        return [o + b for o, b in zip(out, p[f"{name}.bias"], strict=True)] if f"{name}.bias" in p else out

    def norm(name: str, x: list[float], kind: str = c.norm) -> list[float]:
        mean = sum(x) / len(x) if kind == "layernorm" else 0.0
        scale = 1 / math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + c.norm_eps)
        bias = p.get(f"{name}.bias", [0.0] * len(x))
        return [(v - mean) * scale * w + b for v, w, b in zip(x, p[f"{name}.weight"], bias, strict=True)]

    def before(name: str, x: list[float]) -> list[float]:
        return x if c.norm_output else norm(name, x)

    def behind(name: str, x: list[float]) -> list[float]:
        return norm(name, x) if c.norm_output else x

    def heads_normed(name: str, x: list[float]) -> list[float]:
        size = {"none": 0, "head": c.head_dim, "whole": len(x)}[c.qk_norm]
        parts = [x[i : i + size] for i in range(0, len(x), size)] if size else []
        return [v for part in parts for v in norm(name, part, "rmsnorm")] if size else x

    def act(v: float) -> float:
        return {
            "relu": lambda: max(v, 0.0),
            "silu": lambda: v / (1 + math.exp(-v)),
            "gelu": lambda: v * 0.5 * (1 + math.erf(v / math.sqrt(2))),
            "gelu_tanh": lambda: v * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
        }[c.activation]()

    def head(x: list[float], index: int, turn_by: int | None) -> list[float]:
        part = x[index * c.head_dim : (index + 1) * c.head_dim]
        if turn_by is None or c.position != "rope":
            return part
        dim = c.rope_dim or c.head_dim
        half = dim // 2
        turns, size = turns_twin(dim, c.rope_theta, c.rope_scaling, len(ids))
        angles = [turn_by * turn for turn in turns]
        first = [part[i] * math.cos(a) - part[i + half] * math.sin(a) for i, a in enumerate(angles)]
        second = [part[i + half] * math.cos(a) + part[i] * math.sin(a) for i, a in enumerate(angles)]
        return [size * v for v in first + second] + part[dim:]

    streams = [list(p["embedding.weight"][id_]) for id_ in ids]
    if c.position == "learned":
        rows = p["positions.weight"][c.position_offset :]
        streams = [[a + b for a, b in zip(s, rows[t], strict=True)] for t, s in enumerate(streams)]
    for layer in range(c.layers):
        block = f"blocks.{layer}"
        came_in = streams[:]
        normed = [before(f"{block}.attention_norm", s) for s in streams]
        queries, keys, values = (
            [linear(f"{block}.attention.{name}", x) for x in normed] for name in ("query", "key", "value")
        )
        queries = [heads_normed(f"{block}.attention.query_norm", x) for x in queries]
        keys = [heads_normed(f"{block}.attention.key_norm", x) for x in keys]
        furthest = (c.windows[layer] if c.windows else None) or len(ids)
        for t in range(len(ids)):
            gathered: list[float] = []
            for h in range(c.heads):
                shared = h * c.kv_heads // c.heads
                query = head(queries[t], h, None if layer in c.unrotated else t)
                seen = range(max(0, t + 1 - furthest), t + 1)
                scores = []
                for s in seen:
                    key = head(keys[s], shared, None if layer in c.unrotated else s)
                    scores.append(sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(c.head_dim))
                weights = [math.exp(score - max(scores)) for score in scores]
                for d in range(c.head_dim):
                    total = sum(w * head(values[s], shared, None)[d] for s, w in zip(seen, weights, strict=True))
                    gathered.append(total / sum(weights))
            out = behind(f"{block}.attention_norm", linear(f"{block}.attention.output", gathered))
            streams[t] = [a + b for a, b in zip(streams[t], out, strict=True)]
        for t in range(len(ids)):
            x = before(f"{block}.mlp_norm", came_in[t] if c.parallel else streams[t])
            hidden = linear(f"{block}.mlp.up", x)
            if c.gated:
                hidden = [act(g) * u for g, u in zip(linear(f"{block}.mlp.gate", x), hidden, strict=True)]
            else:
                hidden = [act(u) for u in hidden]
            out = behind(f"{block}.mlp_norm", linear(f"{block}.mlp.down", hidden))
            streams[t] = [a + b for a, b in zip(streams[t], out, strict=True)]
    table = p["embedding.weight"] if c.tied else p["unembedding.weight"]
    finals = [norm("norm", s) for s in streams]
    return [[sum(w * v for w, v in zip(row, x, strict=True)) for row in table] for x in finals]


@every_config
def test_parameters_are_those_on_paper(config: ModelConfig) -> None:
    model = new_transformer(config)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {t.name: t.shape for t in tensors(config)}
    assert (model.unembedding.weight is model.embedding.weight) == config.tied


@every_config
def test_fused_attention_equals_the_loop_twin(config: ModelConfig) -> None:
    model = visible_model(config)
    ids = some_ids(config, rows=1, count=7)
    wanted = torch.tensor(loop_twin(model, ids[0].tolist()))
    assert wanted.std() > 0.3
    torch.testing.assert_close(model(ids)[0], wanted, atol=2e-5, rtol=0)


@every_config
def test_the_tap_changes_no_logits_and_is_the_slow_reference(config: ModelConfig) -> None:
    model = visible_model(config)
    ids = some_ids(config)
    torch.testing.assert_close(model(ids, tap=lambda name, value: None), model(ids), atol=1e-5, rtol=0)


def all_seen(config: ModelConfig) -> KVCache:
    return KVCache(config, 2, 16, device="cpu", dtype=torch.float32)


@every_config
def test_the_tap_and_the_cache_agree(config: ModelConfig) -> None:
    """The slow reference under both masks that a cache makes: a chunk in the middle, and one token at the end."""
    model = visible_model(config)
    ids = some_ids(config)
    whole = model(ids)
    cache, patterns = all_seen(config), []

    def tap(name: str, value: Tensor) -> None:
        if name == "blocks.1.pattern":
            patterns.append(value)

    parts = [model(ids[:, a:b], cache, tap=tap) for a, b in ((0, 3), (3, 8), (8, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)
    assert [tuple(pattern.shape[2:]) for pattern in patterns] == [(3, 3), (5, 8), (1, 9)]
    for pattern in patterns:
        torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))


@every_config
def test_taps_by_name_and_shape(config: ModelConfig) -> None:
    model = visible_model(config)
    ids = some_ids(config)
    seen: list[tuple[str, Tensor]] = []
    logits = model(ids, tap=lambda name, value: seen.append((name, value)))
    stream, pattern = (2, 9, config.width), (2, config.heads, 9, 9)
    wanted = [("embedding", stream)]
    if config.position == "learned":
        wanted.append(("positions", stream))
    for layer in range(config.layers):
        block = f"blocks.{layer}"
        wanted.append((f"{block}.query", (2, config.heads, 9, config.head_dim)))
        wanted += [(f"{block}.{part}", (2, config.kv_heads, 9, config.head_dim)) for part in ("key", "value")]
        wanted += [(f"{block}.pattern", pattern), (f"{block}.attention", stream)]
        wanted += [(f"{block}.hidden", (2, 9, config.mlp_width)), (f"{block}.mlp", stream), (block, stream)]
    wanted += [("norm", stream), ("logits", (2, 9, config.vocab_size))]
    assert [(name, tuple(value.shape)) for name, value in seen] == wanted
    values = dict(seen)
    assert torch.equal(values["logits"], logits)
    assert torch.equal(values["embedding"], model.embedding.weight[ids])
    before = values.get("positions", values["embedding"])
    for layer in range(config.layers):
        attention, mlp = values[f"blocks.{layer}.attention"], values[f"blocks.{layer}.mlp"]
        assert torch.equal(values[f"blocks.{layer}"], before + attention + mlp)
        before = values[f"blocks.{layer}"]
        rows = values[f"blocks.{layer}.pattern"]
        torch.testing.assert_close(rows.sum(-1), torch.ones(2, config.heads, 9))
        assert torch.equal(rows, rows.tril())
        assert rows.dtype == torch.float32


def test_residual_stream_leaves_the_last_block() -> None:
    config = CONFIGS["gpt2"]
    model = visible_model(config)
    ids = some_ids(config)
    seen: dict[str, Tensor] = {}
    stream = model.residual_stream(ids, tap=lambda name, value: seen.update({name: value}))
    assert torch.equal(stream, seen["blocks.1"])
    assert "logits" not in seen
    torch.testing.assert_close(model.unembedding(model.norm(model.residual_stream(ids))), model(ids))


@every_config
def test_last_takes_one_query_a_row(config: ModelConfig) -> None:
    model = visible_model(config)
    ids = some_ids(config, rows=3)
    last = torch.tensor([0, 8, 4])
    torch.testing.assert_close(model(ids, last=last), model(ids)[torch.arange(3), last], atol=1e-6, rtol=1e-6)


@every_config
@pytest.mark.parametrize("changed", [1, 5, 8])
def test_a_later_token_never_changes_earlier_logits(config: ModelConfig, changed: int) -> None:
    model = visible_model(config)
    ids = some_ids(config, rows=1)
    other = ids.clone()
    other[0, changed] = (other[0, changed] + 1) % config.vocab_size
    before, after = model(ids), model(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.allclose(before[:, changed], after[:, changed])


@every_config
def test_rows_of_a_batch_do_not_see_each_other(config: ModelConfig) -> None:
    model = visible_model(config)
    ids = some_ids(config, rows=3)
    together = model(ids)
    for row in range(3):
        torch.testing.assert_close(model(ids[row : row + 1])[0], together[row], atol=1e-5, rtol=0)


def test_attention_pattern_and_gather_by_hand() -> None:
    query = torch.tensor([[[[0.0, 0.0], [math.sqrt(2) * math.log(3), 0.0]]]])  # [1, 1, 2, 2]
    key = torch.tensor([[[[1.0, 5.0], [0.0, 7.0]]]])
    pattern = attention_pattern(query, key, "causal")
    torch.testing.assert_close(pattern, torch.tensor([[[[1.0, 0.0], [0.75, 0.25]]]]))
    torch.testing.assert_close(attention_pattern(query, key, None)[0, 0, 0], torch.tensor([0.5, 0.5]))
    value = torch.tensor([[[[4.0, 0.0], [0.0, 8.0]]]])
    torch.testing.assert_close(gather(pattern, value), torch.tensor([[[[4.0, 0.0], [3.0, 2.0]]]]))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["gpt2", "llama-like"])
def test_forward_compiles_as_one_graph(name: str, backend: str) -> None:
    config = CONFIGS[name]
    model = visible_model(config)
    ids = some_ids(config)
    torch._dynamo.reset()
    assert torch._dynamo.explain(model)(ids).graph_count == 1
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(ids), model(ids), atol=1e-5, rtol=0)
    torch._dynamo.reset()


def test_bfloat16_stays_bfloat16() -> None:
    config = CONFIGS["llama-like"]
    model = visible_model(config)
    ids = some_ids(config)
    exact = model(ids)
    rounded = model.bfloat16()(ids)
    assert rounded.dtype == torch.bfloat16
    assert 0 < (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_random_model_has_gpt2s_scales_and_its_seed() -> None:
    config = ModelConfig(**{**GPT2, "vocab_size": 2000, "width": 96, "heads": 12, "kv_heads": 12, "mlp_width": 384})
    model = random_model(config, 3)
    again, other = random_model(config, 3).state_dict(), random_model(config, 4)
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    assert not torch.equal(model.embedding.weight, other.embedding.weight)
    block = model.blocks[0]
    for weight, scale in (
        (model.embedding.weight, 0.02),
        (block.attention.query.weight, 0.02),
        (block.mlp.up.weight, 0.02),
        (block.attention.output.weight, 0.02 / math.sqrt(2 * config.layers)),
        (block.mlp.down.weight, 0.02 / math.sqrt(2 * config.layers)),
    ):
        assert weight.std().item() == pytest.approx(scale, rel=0.05)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            assert torch.equal(parameter, torch.full_like(parameter, float("norm.weight" in name)))


def test_a_post_norm_model_is_for_paper_only() -> None:
    with pytest.raises(UnsupportedError, match="openai-gpt"):
        new_transformer(ModelConfig(**{**GPT2, "family": "openai-gpt", "norm_first": False}))
