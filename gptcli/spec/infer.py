"""A configuration read off the tensors themselves, for a weight file that comes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping

from gptcli.errors import UnsupportedError
from gptcli.spec.config import ModelConfig
from gptcli.spec.index import TensorInfo
from gptcli.spec.names import FAMILIES, Rule

# GPT-2's files do not say how many heads a matrix holds; in every published size each has this dimension.
ASSUMED_HEAD_DIM = 64


def infer_config(infos: Mapping[str, TensorInfo], where: str) -> ModelConfig:
    """The GPT-2 configuration whose tensors these are, with heads of ``ASSUMED_HEAD_DIM``.

    Raises UnsupportedError when the names are not GPT-2's: other families' tensors don't say enough (how many heads
    share a key, how fast positions turn), and the error names the families that they may be of.
    """
    prefix = FAMILIES["gpt2"].prefix
    shapes = {name.removeprefix(prefix): info.shape for name, info in infos.items()}
    layers = {int(found[1]) for name in shapes if (found := re.match(r"h\.(\d{1,5})\.", name))}
    needed = ("wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight")
    if not layers or any(len(shapes.get(name, ())) != 2 for name in needed):
        kin = _families_of(infos)
        message = f"{where} has no config.json beside it, and its tensors are not GPT-2's"
        raise UnsupportedError(
            f"{message} but look like those of {' or '.join(kin)}, which need one" if kin else message,
            "count the folder, or put its config.json beside the file",
        )
    vocab, width = shapes["wte.weight"]
    heads = width // ASSUMED_HEAD_DIM if width and width % ASSUMED_HEAD_DIM == 0 else 1
    return ModelConfig(
        family="gpt2",
        vocab_size=vocab,
        context=shapes["wpe.weight"][0],
        layers=max(layers) + 1,
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_width=shapes["h.0.mlp.c_fc.weight"][1],
        tied="lm_head.weight" not in shapes,
    )


def _families_of(infos: Mapping[str, TensorInfo]) -> list[str]:
    """The families whose first layer has these matrices by name."""
    found = []
    for name, family in FAMILIES.items():
        bare = {tensor.removeprefix(family.prefix) for tensor in infos}
        matrices = [rule.disk.replace("{i}", "0") for rule in family.rules if "{i}" in rule.disk and _is_matrix(rule)]
        if bare.issuperset(matrices):
            found.append(name)
    return found


def _is_matrix(rule: Rule) -> bool:
    return rule.disk.endswith(".weight") and "norm" not in rule.ours[0]
