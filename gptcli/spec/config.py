"""Hugging Face's ``config.json`` read and written, both ways, by the family that it names.

A family (GPT-2, Llama, ...) is a reader and a writer between its key names and the axes of ``ModelConfig``. A key that
changes the forward pass and has no axis here is refused by name; every other key is left alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gptcli.errors import CorruptError, GptcliError, NotFoundError, UnsupportedError
from gptcli.spec.axes import DTYPES as DTYPES
from gptcli.spec.axes import Activation as Activation
from gptcli.spec.axes import ModelConfig as ModelConfig
from gptcli.spec.axes import RopeScaling as RopeScaling
from gptcli.spec.families import gpt, llama, neox, opt
from gptcli.spec.families.missing import NEEDS
from gptcli.spec.keys import Keys

GENERATION_NAME = "generation_config.json"


def read_config(path: Path) -> ModelConfig:
    """The configuration in ``path``, a ``config.json`` or a folder that holds one.

    In a folder, the ends of a text that ``generation_config.json`` names count before its own, as in ``transformers``:
    some models that chat name theirs only there. Raises NotFoundError without a file, CorruptError when it can't be
    read, UnsupportedError when it asks for something that changes the forward pass and is not here.
    """
    if not path.is_dir():
        return from_hf(_read(path), str(path))
    file = path / "config.json"
    config = from_hf(_read(file), str(file))
    generation = path / GENERATION_NAME
    if not generation.is_file():
        return config
    ends = Keys(_read(generation), str(generation)).ids("eos_token_id")
    known = tuple(id_ for id_ in dict.fromkeys(ends) if 0 <= id_ < config.vocab_size)
    return replace(config, eos_ids=known) if known else config


def _read(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise NotFoundError(f"there is no {file}", "a model folder holds config.json and model.safetensors") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptError(f"{file} can't be read as JSON: {error}", "download or save the model again") from None
    if not isinstance(raw, dict):
        raise CorruptError(f"{file} holds {type(raw).__name__}, not an object", "download or save the model again")
    return raw


def from_hf(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """A ModelConfig from the keys of a Hugging Face ``config.json``; ``where`` names the file in errors."""
    keys = Keys(raw, where)
    family = keys.text("model_type", "")
    if family not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        what = f"is of the family {family!r}" if family else "names no model_type"
        needs = f": it needs {NEEDS[family]}" if family in NEEDS else ""
        raise UnsupportedError(f"{where} {what}, which gptcli does not read{needs}", f"it reads: {known}")
    for name, values in _NEUTRAL.items():
        keys.refuse_unless(name, *values)
    if quantized := keys.table("quantization_config"):
        method = quantized.text("quant_method", "some method")
        raise UnsupportedError(
            f"{where}: the weights are quantized by {method}, which gptcli does not read",
            "get the model in bfloat16 or float16; --quantize int8 and int4 make it smaller here",
        )
    return _FAMILIES[family][0](keys)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The keys of a ``config.json`` that ``transformers`` reads back as the same model.

    Raises UnsupportedError that names the axes which the family's keys can't say: written without them, it would be
    another model.
    """
    written = _FAMILIES[config.family][1](config)
    try:
        read = from_hf(written, "it")
    except GptcliError as error:
        raise UnsupportedError(f"a {config.family} can't be written so: {error}", _OTHER_FAMILY) from None
    said, meant = asdict(_in_one_way(read)), asdict(_in_one_way(config))
    if lost := [f"{name} = {meant[name]!r}" for name in meant if meant[name] != said[name]]:
        message = f"the config.json of a {config.family} has no words for {', '.join(lost)}"
        raise UnsupportedError(message, _OTHER_FAMILY)
    return written


_OTHER_FAMILY = "write it as a family that has them, or change the model"


def _in_one_way(config: ModelConfig) -> ModelConfig:
    """The same model with each axis in the one way in which files are read, and without what no forward pass asks."""
    rope = config.position == "rope"
    windows = config.windows[: config.layers]
    return replace(
        config,
        rope_theta=config.rope_theta if rope else 0.0,
        rope_dim=(config.rope_dim or config.head_dim) if rope else None,
        rope_scaling=config.rope_scaling if rope else None,
        unrotated=tuple(sorted(set(config.unrotated))) if rope else (),
        windows=windows if any(windows) else (),
        dtype=None,
        bos_id=None,
        eos_ids=(),
    )


# Keys of other families, seen in files that borrow a model_type from these: the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alibi": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "is_encoder_decoder": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
}

_FAMILIES: dict[str, tuple[Callable[[Keys], ModelConfig], Callable[[ModelConfig], dict[str, Any]]]] = {
    "gpt2": (gpt.read_gpt2, gpt.write_gpt2),
    "gpt_neox": (neox.read_neox, neox.write_neox),
    "llama": (llama.read_llama, llama.write_llama),
    "mistral": (llama.read_mistral, llama.write_mistral),
    "olmo2": (llama.read_olmo2, llama.write_olmo2),
    "openai-gpt": (gpt.read_gpt1, gpt.write_gpt1),
    "opt": (opt.read_opt, opt.write_opt),
    "phi3": (llama.read_phi3, llama.write_phi3),
    "qwen2": (llama.read_qwen2, llama.write_qwen2),
    "qwen3": (llama.read_qwen3, llama.write_qwen3),
    "smollm3": (llama.read_smollm3, llama.write_smollm3),
}
