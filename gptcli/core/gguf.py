"""A model written as GGUF, which llama.cpp and what is built on it read: tensor after tensor, one in memory at a time.

The header is the ``gguf`` package's work, the plan ``spec/gguf.py``'s, the vocabulary ``text/gguf_words.py``'s.
Matrices are kept in the file's type; norms, biases and the position table stay in float32, as llama.cpp wants them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from gptcli.core.files import written_file
from gptcli.core.model import Transformer
from gptcli.errors import CorruptError, UnsupportedError
from gptcli.spec.gguf import GgufPlan, GgufTensor, plan_gguf
from gptcli.text.gguf_words import GgufWords

if TYPE_CHECKING:
    import gguf

# How a matrix may be kept, and what llama.cpp calls a file of it.
KINDS = {"f32": "ALL_F32", "bf16": "MOSTLY_BF16", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
_BLOCK = 32  # numbers of a row that share a scale in q8_0
_BLOCK_BYTES = _BLOCK + 2
_ALIGNMENT = 32  # of each tensor in the file, in bytes
_CHUNK = 1 << 22  # numbers that are converted at a time


@dataclass(frozen=True)
class Written:
    """What was written: llama.cpp's name of the architecture, the file's tensors, and what is to be said of it."""

    architecture: str
    tensors: int
    notes: tuple[str, ...]


def write_gguf(
    model: Transformer,
    file: Path,
    *,
    kind: str,
    name: str,
    words: GgufWords | None = None,
    template: str | None = None,
    license: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Write a model as one GGUF file, whole or not at all.

    Args:
        model: on the CPU, in any type.
        kind: one of ``KINDS``, of the matrices; in q8_0 those whose rows are no whole blocks are kept in float16.
        name: of the model.
        words: the vocabulary; None for a file that knows tokens by their numbers alone.
        template: of chats, in Jinja.
        license: by its SPDX name.
        progress: called with the bytes that are written and those of all.

    Raises UnsupportedError (no ``gguf`` package, or a model that llama.cpp has no architecture for), CorruptError for
    a weight that is not finite, or not in float16, OutputError where the file can't be written.
    """
    gguf = _package()
    plan = plan_gguf(model.config)
    tensors = [(_name(gguf, tensor), tensor, _kind(tensor, kind)) for tensor in plan.tensors]
    sizes = [_nbytes(tensor.shape, each) for _, tensor, each in tensors]
    notes = [*plan.notes, *(words.notes if words else ())]
    if fewer := sum(each == "f16" for _, _, each in tensors) if kind == "q8_0" else 0:
        notes.append(f"{fewer} matrices whose rows are no multiple of {_BLOCK} are in float16, not in q8_0")
    with written_file(file) as temporary:
        writer = gguf.GGUFWriter(temporary, plan.architecture.name)
        _write_facts(gguf, writer, model, plan, kind, name, license)
        _write_words(gguf, writer, model, words, template)
        if plan.rope_factors:
            shape = (len(plan.rope_factors),)
            _declare(gguf, writer, gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight", shape, "f32")
        for named, tensor, each in tensors:
            _declare(gguf, writer, named, tensor.shape, each)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        # The package would write a tensor by a call that does not tell a full disk from other failures.
        with temporary.open("ab") as stream:
            _pad(stream)
            if plan.rope_factors:
                _put(stream, torch.tensor(plan.rope_factors), "f32")
            done = 0
            for (named, tensor, each), size in zip(tensors, sizes, strict=True):
                values = _values(model, tensor)
                if not (values.amax().isfinite() and values.amin().isfinite()):
                    hint = "the weights are damaged: get them again"
                    raise CorruptError(f"{named} holds values that are not finite", hint)
                _put(stream, values, each)
                done += size
                if progress:
                    progress(done, sum(sizes))
    return Written(plan.architecture.name, len(tensors) + bool(plan.rope_factors), tuple(notes))


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise UnsupportedError(
            "writing GGUF needs the gguf package, which is not installed", "pip install 'gptcli[gguf]'"
        ) from None
    return gguf


def _name(gguf: Any, tensor: GgufTensor) -> str:
    pattern: str = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR[tensor.base]]
    return f"{pattern.format(bid=tensor.layer)}.{tensor.kind}"


def _kind(tensor: GgufTensor, kind: str) -> str:
    if tensor.exact:
        return "f32"
    return "f16" if kind == "q8_0" and tensor.shape[-1] % _BLOCK else kind


def _nbytes(shape: tuple[int, ...], kind: str) -> int:
    numbers = math.prod(shape)
    return numbers // _BLOCK * _BLOCK_BYTES if kind == "q8_0" else numbers * (4 if kind == "f32" else 2)


def _declare(gguf: Any, writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: str) -> None:
    import numpy as np

    stored = gguf.GGMLQuantizationType[kind.upper()]
    writer.add_tensor_info(name, shape, np.dtype(np.float32), _nbytes(shape, kind), raw_dtype=stored)


def _write_facts(
    gguf: Any, writer: gguf.GGUFWriter, model: Transformer, plan: GgufPlan, kind: str, name: str, license: str | None
) -> None:
    """The configuration by llama.cpp's keys."""
    config = model.config
    writer.add_type("model")
    writer.add_name(name)
    if license:
        writer.add_license(license)
    writer.add_context_length(plan.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.norm == "layernorm":
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.norm_eps)
    if plan.architecture.any_head_dim:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.position == "rope":
        writer.add_rope_dimension_count(config.rope_dim or config.head_dim)
        writer.add_rope_freq_base(config.rope_theta)
    if isinstance(plan.architecture.axes["parallel"], tuple):
        writer.add_parallel_residual(config.parallel)
    for key, value in plan.scaling.items():
        key = f"{plan.architecture.name}.rope.scaling.{key}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_float32(key, value)
    writer.add_file_type(gguf.LlamaFileType[KINDS[kind]])
    if kind == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _write_words(
    gguf: Any, writer: gguf.GGUFWriter, model: Transformer, words: GgufWords | None, template: str | None
) -> None:
    """The vocabulary and the chat template."""
    if words is None:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pattern)
    writer.add_token_list(words.tokens)
    if words.scores:
        writer.add_token_scores(words.scores)
    writer.add_token_types(words.kinds)
    if words.merges:
        writer.add_token_merges(words.merges)
    roles = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "eot": writer.add_eot_token_id,
        "unknown": writer.add_unk_token_id,
        "padding": writer.add_pad_token_id,
    }
    for role, id_ in words.ids.items():
        roles[role](id_)
    writer.add_add_bos_token(words.add_start)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(words.add_space)
    if template:
        writer.add_chat_template(template)


def _values(model: Transformer, tensor: GgufTensor) -> Tensor:
    """The rows of a tensor of the file, in the model's type."""
    parts = [_parameter(model, part) for part in tensor.parts]
    values = parts[0] if len(parts) == 1 else torch.cat(parts)
    assert tuple(values.shape) == tensor.shape, (tensor, values.shape)
    return values if tensor.permuted_heads is None else beside(values, tensor.permuted_heads)


def _parameter(model: Transformer, name: str) -> Tensor:
    """A parameter by our name, also of a map that keeps its matrix in few bits."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    in_few_bits: Callable[[], Tensor] | None = getattr(module, "dequantized", None)
    return module.get_parameter(leaf).detach() if in_few_bits is None or leaf != "weight" else in_few_bits()


def beside(rows: Tensor, heads: int) -> Tensor:
    """The rows ``[H D, ...]`` of a query or key with each rotated pair side by side: i, i + D/2 become 2i, 2i + 1.

    That is how Meta's files and llama.cpp's "llama" have them; here and in Hugging Face's they are half a head apart.
    """
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _put(stream: BinaryIO, values: Tensor, kind: str) -> None:
    """A tensor's numbers as they are kept, some rows at a time, and zeros up to the next tensor's place."""
    for rows in _rows(values):
        stream.write(memoryview(_encoded(rows, kind)).cast("B"))
    _pad(stream)


def _pad(stream: BinaryIO) -> None:
    stream.write(bytes(-stream.tell() % _ALIGNMENT))


def _rows(values: Tensor) -> Iterator[Tensor]:
    step = max(1, _CHUNK // max(1, math.prod(values.shape[1:])))
    return (values[start : start + step] for start in range(0, len(values), step))


def _encoded(rows: Tensor, kind: str) -> Any:
    """A NumPy array whose bytes are the file's."""
    if kind == "bf16":
        return rows.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    if kind == "f16":
        small = rows.to(torch.float16)
        if not small.isfinite().all():
            raise CorruptError("a weight is beyond what float16 holds", "use --dtype bf16 or f32")
        return small.contiguous().numpy()
    exact = rows.float().contiguous().numpy()
    if kind == "f32":
        return exact
    import gguf

    return gguf.quants.quantize(exact, gguf.GGMLQuantizationType.Q8_0)
