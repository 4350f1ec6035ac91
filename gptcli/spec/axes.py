"""The axes on which models differ: a transformer on paper, whatever family its file belongs to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from gptcli.errors import CorruptError

Activation = Literal["gelu_tanh", "gelu", "relu", "silu"]
DTYPES = ("float32", "bfloat16", "float16")

# Above these a configuration is a typing error or an attack, not a model.
_MOST_LAYERS = 10_000
_LARGEST_SIZE = 2**31 - 1


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched to a context longer than the one they were first trained on.

    ``linear`` divides every position by ``factor``; ``dynamic`` raises the base as the text outgrows
    ``original_context``; ``llama3`` slows the slow frequencies by ``factor`` and leaves the fast ones, with a ramp
    between; ``yarn`` (Peng et al. 2023) does so by the number of turns, and scales what is rotated.
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn"]
    factor: float
    original_context: int
    low_frequency_factor: float = 1.0  # llama3: wavelengths above original_context over this are slowed
    high_frequency_factor: float = 4.0  # llama3: those below original_context over this are left
    beta_fast: float = 32.0  # yarn: turns within original_context from which a frequency is left
    beta_slow: float = 1.0  # yarn: turns up to which it is slowed
    attention_factor: float | None = None  # yarn: what rotated queries and keys are scaled by; None: 0.1 ln(factor) + 1
    truncate: bool = True  # yarn: the ends of the ramp are whole numbers

    def __post_init__(self) -> None:
        if self.factor <= 0 or self.original_context < 1 or self.beta_fast <= 0 or self.beta_slow <= 0:
            raise CorruptError(
                f"a {self.kind} scaling of rotary positions is out of range: {self}", "check config.json"
            )
        if self.kind == "llama3" and not 0 < self.low_frequency_factor < self.high_frequency_factor:
            low, high = self.low_frequency_factor, self.high_frequency_factor
            raise CorruptError(f"a llama3 scaling goes from {low} to {high}", "check config.json")


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer on paper. Sizes are counts; see the shape legend in ``core/model.py``."""

    family: str
    vocab_size: int  # V
    context: int  # most positions the model was made for
    layers: int  # L
    width: int  # C
    heads: int  # H
    kv_heads: int  # K; fewer than heads is grouped-query attention
    head_dim: int  # D
    mlp_width: int  # F
    activation: Activation = "gelu_tanh"
    gated: bool = False  # SwiGLU-like: a gate beside the up-projection
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    norm_first: bool = True  # pre-norm with a final norm (GPT-2); False is GPT-1's post-norm without one
    position: Literal["learned", "rope"] = "learned"
    rope_theta: float = 10_000.0
    rope_dim: int | None = None  # numbers of each head that are rotated, the first; None: all
    rope_scaling: RopeScaling | None = None
    unrotated: tuple[int, ...] = ()  # layers that do not rotate (SmolLM3)
    position_offset: int = 0  # rows of the position table before the first position (OPT)
    parallel: bool = False  # attention and MLP read the stream side by side (GPT-NeoX)
    norm_output: bool = False  # norms of what a layer made, before it is added, instead of what it reads (OLMo 2)
    qk_norm: Literal["none", "head", "whole"] = "none"  # RMS norm of query and key: each head, or all heads as one
    windows: tuple[int | None, ...] = ()  # a layer: how many tokens a query sees, itself the last; (): all
    qkv_bias: bool = True
    output_bias: bool = True
    mlp_bias: bool = True
    tied: bool = True  # the unembedding is the embedding, transposed
    dtype: str | None = None  # as the file declares it
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "layers", "width", "heads", "kv_heads", "head_dim", "mlp_width"):
            value = getattr(self, name)
            if not 1 <= value <= (_MOST_LAYERS if name == "layers" else _LARGEST_SIZE):
                raise CorruptError(f"the configuration's {name} is {value}", "check config.json")
        if self.heads % self.kv_heads:
            message = f"{self.heads} heads can't share {self.kv_heads} key-value heads evenly"
            raise CorruptError(message, "check config.json")
        turned = self.head_dim if self.rope_dim is None else self.rope_dim
        if self.position == "rope" and (turned % 2 or not 2 <= turned <= self.head_dim):
            message = f"{turned} of the {self.head_dim} numbers of each head can't turn in pairs"
            raise CorruptError(message, "check config.json")
        if self.windows and (len(self.windows) < self.layers or any(w is not None and w < 1 for w in self.windows)):
            message = f"the windows {self.windows} are not tokens, or None, for each of {self.layers} layers"
            raise CorruptError(message, "check config.json")

    def to_dict(self) -> dict[str, Any]:
        """The axes by our names, for JSON output."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
