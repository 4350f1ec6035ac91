"""The composition root: a folder or a configuration in, a model that can run out."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from gptcli.core import runtime
from gptcli.core.checkpoint import load_weights
from gptcli.core.model import Transformer
from gptcli.core.quantize import check_quantize, quantize_
from gptcli.core.stepping import Stepping
from gptcli.errors import UnsupportedError
from gptcli.spec.config import ModelConfig, read_config
from gptcli.spec.match import match_folder, stored_dtype
from gptcli.text.tokenizer import Tokenizer


@dataclass
class Model:
    """A loaded model: what generates, scores and embeds.

    Its ``stepping`` keeps what makes its steps fast, so that a process that lives long prepares it once; ``native`` is
    the folder of native libraries, None for none, and ``compile`` has torch compile the step.
    """

    name: str
    config: ModelConfig
    transformer: Transformer
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype
    load_seconds: float = 0.0
    quantize: str = "none"
    native: Path | None = None
    compile: bool = False
    stepping: Stepping = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.stepping = Stepping(self.transformer, self.native, lean=True, compile=self.compile)

    @property
    def dtype_name(self) -> str:
        return runtime.DTYPE_NAMES[self.dtype]

    @property
    def used(self) -> dict[str, str]:
        """What computes it, as every report names it."""
        return {"device": str(self.device), "dtype": self.dtype_name, "quantize": self.quantize}


def open_model(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    name: str = "",
    device: str = "auto",
    dtype: str = "auto",
    quantize: str = "none",
    native: Path | None = None,
    compile: bool = False,
) -> Model:
    """Load a model folder for inference.

    Args:
        folder: Hugging Face layout: config.json, model.safetensors or shards with their index.
        tokenizer: the folder's.
        name: what to call it in reports; the folder's name by default.
        device, dtype: as ``runtime.pick_device`` and ``runtime.pick_dtype`` take them.
        quantize: ``int8`` or ``int4`` keeps the matrices in so many bits (``core/quantize.py``); ``none`` as they are.
        native: the folder where ``native_build`` puts its libraries; None: steps are PyTorch's.
        compile: have torch compile the step when the first is taken (``core/compiled.py``).

    Raises NotFoundError, CorruptError, UnsupportedError (the folder), ResourceError (the device, memory), UsageError
    (a name that is none of these, a device where nothing is quantized).
    """
    start = time.perf_counter()
    config = read_config(folder)
    target = runtime.pick_device(device)
    check_quantize(quantize, target)
    matched = match_folder(folder, config)
    kind = runtime.pick_dtype(dtype, stored_dtype(matched), target)
    with torch.device("meta"):
        transformer = new_transformer(config)
    # On a CPU what is going to be quantized stays in the mapped file until its turn comes.
    first = None if quantize != "none" and target.type == "cpu" else kind
    load_weights(transformer, matched, device=target, dtype=first)
    transformer.eval().requires_grad_(False)
    if quantize != "none":
        quantize_(transformer, quantize, kind)
    seconds = time.perf_counter() - start
    return Model(name or folder.name, config, transformer, tokenizer, target, kind, seconds, quantize, native, compile)


def open_weights(folder: Path) -> Transformer:
    """A folder's weights on the CPU, for what reads them without computing: mapped from the files, in their own types.

    Raises NotFoundError, CorruptError, UnsupportedError.
    """
    config = read_config(folder)
    matched = match_folder(folder, config)
    with torch.device("meta"):
        transformer = new_transformer(config)
    load_weights(transformer, matched, device=torch.device("cpu"), dtype=None)
    return transformer.eval().requires_grad_(False)


def new_transformer(config: ModelConfig) -> Transformer:
    """The modules of a configuration, not yet filled. Raises UnsupportedError for a model that is for paper only."""
    if not config.norm_first:
        raise UnsupportedError(
            f"the family {config.family} puts its norms after each layer, and is here for counting only",
            "use a model of another family",
        )
    return Transformer(config)


def learnable(transformer: Transformer) -> Transformer:
    """A loaded model ready to be trained: its parameters are its own memory, not views of a mapped file."""
    for module in transformer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().clone(memory_format=torch.contiguous_format)))
    transformer.tie()
    return transformer.train()


def random_model(config: ModelConfig, seed: int) -> Transformer:
    """A float32 model with GPT-2's initial weights: normal(0, 0.02), what adds to the stream scaled by 1/sqrt(2L).

    The same seed gives the same weights. Source: Radford et al. 2019, section 2.3; the 0.02 is in the released code.
    """
    transformer = new_transformer(config)
    generator = torch.Generator().manual_seed(seed)
    adds_to_stream = ("attention.output.weight", "mlp.down.weight")
    for name, parameter in transformer.named_parameters():
        if parameter.dim() < 2:
            nn.init.constant_(parameter, float(name.endswith("norm.weight")))
        else:
            scale = 1 / math.sqrt(2 * config.layers) if name.endswith(adds_to_stream) else 1.0
            nn.init.normal_(parameter, std=0.02 * scale, generator=generator)
    return transformer
