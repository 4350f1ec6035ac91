"""The composition root: a folder or a configuration in, a model that can run out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from gptcli.core import runtime
from gptcli.core.checkpoint import assign, load_weights
from gptcli.core.model import Transformer
from gptcli.core.quantize import check_quantize, quantize_
from gptcli.core.stepping import Stepping
from gptcli.errors import GptcliError, ResourceError, UnsupportedError, UsageError
from gptcli.spec.config import ModelConfig, read_config
from gptcli.spec.match import Matched, match_folder, stored_dtype
from gptcli.spec.split import Share, check_split
from gptcli.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gptcli.core.group import Line


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
    plain: str | None = None  # why only the transformer's own forward is used; see ``Stepping``
    told: str = ""  # what there is to say of how it is held
    stepping: Stepping = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.stepping = Stepping(self.transformer, self.native, lean=True, compile=self.compile, plain=self.plain)

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
    line: Line | None = None,
    offload: bool = False,
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
        line: to other ranks, which are waiting in ``open_part``: the model is dealt out to all of them.
        offload: keep the blocks on the host, and bring each to the device when it is its turn (``core/offload.py``).

    Raises NotFoundError, CorruptError, UnsupportedError (the folder), ResourceError (the device, memory), UsageError
    (a name that is none of these, a device where nothing is quantized).
    """
    start = time.perf_counter()
    _check_ways(line, offload=offload, compile=compile, quantize=quantize)
    config = read_config(folder)
    target = line.device if line else runtime.pick_device(device)
    check_quantize(quantize, target)
    matched = match_folder(folder, config)
    kind = runtime.pick_dtype(dtype, stored_dtype(matched), target)
    named, plain, told = name or folder.name, None, ""
    if line is not None:
        check_split(config, line.ranks)
        asked = {"folder": str(folder), "dtype": runtime.DTYPE_NAMES[kind], "quantize": quantize}
        line.tell({"do": "open", **asked})
        transformer: Transformer = open_part(line, **asked)
        plain = f"the model is on {line.ranks} ranks"
    else:
        # On a CPU what is going to be quantized stays in the mapped file until its turn comes.
        first = None if quantize != "none" and target.type == "cpu" else kind
        transformer = _whole_model(config, matched, torch.device("cpu") if offload else target, first)
        if quantize != "none":
            quantize_(transformer, quantize, kind)
        if offload and target.type == "cuda":
            from gptcli.core.offload import Offload

            told = Offload(transformer, target).told
            plain = "its layers come from the host"
    seconds = time.perf_counter() - start
    return Model(
        named, config, transformer, tokenizer, target, kind, seconds, quantize, native, compile, plain=plain, told=told
    )


def _check_ways(line: Line | None, *, offload: bool, compile: bool, quantize: str) -> None:
    """Raise UsageError for ways to hold a model that do not go together."""
    if line is not None and (compile or offload):
        raise UsageError(f"--tp and --{'compile' if compile else 'offload'} do not go together", "leave out one")
    if offload and compile:
        raise UsageError("--offload and --compile do not go together", "leave out one")
    if offload and quantize != "none":
        raise UsageError("--offload keeps the weights as they are", "leave out --quantize, or --offload")


def _whole_model(config: ModelConfig, matched: Matched, device: torch.device, dtype: torch.dtype | None) -> Transformer:
    with torch.device("meta"):
        transformer = new_transformer(config)
    load_weights(transformer, matched, device=device, dtype=dtype)
    return transformer.eval().requires_grad_(False)


def open_part(line: Line, *, folder: str, dtype: str, quantize: str) -> Transformer:
    """On every rank, with the same arguments: this rank's slice of a model, ready to work with those of the others.

    Raises what went wrong on any of them, on all of them: as ``open_model``, and as ``split.check_split``.
    """
    from gptcli.core import parallel
    from gptcli.core.following import Leading

    failed: GptcliError | None = None
    try:
        config = read_config(Path(folder))
        share = Share(config, line.rank, line.ranks)
        matched = match_folder(Path(folder), config)
        transformer = new_part(share, (lambda part: Leading(part, line)) if line.rank == 0 else Transformer)
        load_weights(transformer, matched, device=line.device, dtype=runtime.DTYPES[dtype], share=share)
        transformer.eval().requires_grad_(False)
        if quantize != "none":
            quantize_(transformer, quantize)
    except GptcliError as error:
        failed = error
    except (RuntimeError, MemoryError) as error:
        if not runtime.is_out_of_memory(error):
            raise
        failed = ResourceError("there is not enough memory", "use more ranks, or --quantize int8")
    line.agree(failed)
    parallel.join_ranks(transformer, share, line.device)
    if isinstance(transformer, Leading):
        transformer.begin()
    return transformer


def new_part(share: Share, make: Callable[[ModelConfig], Transformer] = Transformer) -> Transformer:
    """The modules of one rank's slice on the meta device, which takes no memory, each tensor in its own shape."""
    with torch.device("meta"):
        transformer = make(share.part)
        for name, _ in list(transformer.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            setattr(transformer.get_submodule(owner), leaf, None)
        for tensor, slice_ in share.tensors():
            assign(transformer, tensor.name, torch.empty(slice_.shape(tensor.shape)))
    transformer.tie()
    return transformer


def open_weights(folder: Path) -> Transformer:
    """A folder's weights on the CPU, for what reads them without computing: mapped from the files, in their own types.

    Raises NotFoundError, CorruptError, UnsupportedError.
    """
    config = read_config(folder)
    matched = match_folder(folder, config)
    return _whole_model(config, matched, torch.device("cpu"), None)


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
