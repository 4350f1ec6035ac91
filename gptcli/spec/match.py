"""A model's file and its configuration, held against each other: which tensors belong there, and which are there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptcli.errors import CorruptError
from gptcli.spec.config import ModelConfig
from gptcli.spec.index import DTYPE_NAMES, TensorInfo, read_folder
from gptcli.spec.names import FAMILIES, HEADS
from gptcli.spec.params import tensors


@dataclass(frozen=True)
class DiskTensor:
    """One tensor of a model file: its shape on disk and our tensors that it holds, as (name, rows).

    Each of ours stands whole above the next; or in ``turns``, where each turn has the same share of every one.
    """

    shape: tuple[int, ...]
    parts: tuple[tuple[str, int], ...]
    transpose: bool
    turns: int = 1

    def rows(self) -> list[int]:
        """How many rows of each of ours stand in one turn."""
        return [count // self.turns for _, count in self.parts]


def disk_layout(config: ModelConfig) -> dict[str, DiskTensor]:
    """Every tensor of the model's file by its name on disk without the prefix, in the order of the forward pass."""
    shapes = {tensor.name: tensor.shape for tensor in tensors(config)}
    layout: dict[str, DiskTensor] = {}
    for rule in FAMILIES[config.family].rules:
        layers = range(config.layers) if "{i}" in rule.disk else range(1)
        for i in layers:
            ours = [name.replace("{i}", str(i)) for name in rule.ours]
            if not all(name in shapes for name in ours):
                continue
            rows = tuple((name, shapes[name][0]) for name in ours)
            shape = (sum(count for _, count in rows), *shapes[ours[0]][1:])
            shape = shape[::-1] if rule.transpose else shape
            layout[rule.disk.replace("{i}", str(i))] = DiskTensor(
                shape, rows, rule.transpose, config.heads if rule.by_head else 1
            )
    return layout


def written_name(config: ModelConfig, name: str) -> str:
    """The name under which ``transformers`` writes a tensor of the layout."""
    return name if name in HEADS else FAMILIES[config.family].prefix + name


def match_names(config: ModelConfig, names: Iterable[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """Match the names in a file with the layout.

    Returns ``(found, missing, left over)``: layout name -> name in the file, layout names without one, and names in
    the file that belong to nothing. A tied model's file may repeat its unembedding.
    """
    family = FAMILIES[config.family]
    layout = disk_layout(config)
    found: dict[str, str] = {}
    extra: list[str] = []
    for name in names:
        bare = name.removeprefix(family.prefix)
        if bare in layout and bare not in found:
            found[bare] = name
        elif not (family.ignored.fullmatch(bare) or (config.tied and bare in HEADS)):
            extra.append(name)
    return found, [name for name in layout if name not in found], extra


# Layout name -> the name in the file, and what its header says.
Matched = dict[str, tuple[str, TensorInfo]]


def match_folder(folder: Path, config: ModelConfig) -> Matched:
    """``match`` of a model folder; raises as ``read_folder`` and ``match`` do."""
    return match(read_folder(folder), config, str(folder))


def match(infos: Mapping[str, TensorInfo], config: ModelConfig, where: str) -> Matched:
    """Match the tensors that headers declare with a configuration; ``where`` names the file or folder in errors.

    Raises CorruptError that lists the tensors which are missing, left over, of the wrong shape or of an integer type.
    """
    result = compare(infos, config)
    if not result.ok:
        message = f"the weights in {where} do not fit the configuration: {'; '.join(result.faults()[:4])}"
        raise CorruptError(message, "download or save the folder again, or check config.json")
    return result.matched


@dataclass(frozen=True)
class Comparison:
    """What headers hold beside what a configuration wants; names are those in the file, missing ones as written."""

    matched: Matched
    missing: tuple[str, ...]
    left_over: tuple[str, ...]
    wrong_shape: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]  # name, its shape, the shape that is wanted
    wrong_type: tuple[tuple[str, str], ...]  # name, its type, which no weight has

    @property
    def ok(self) -> bool:
        return not (self.missing or self.left_over or self.wrong_shape or self.wrong_type)

    def faults(self) -> list[str]:
        """In words; missing and left-over names are listed together, and only the first few."""
        faults = [f"missing: {_list(self.missing)}"] if self.missing else []
        faults += [f"left over: {_list(self.left_over)}"] if self.left_over else []
        faults += [
            f"{name} is {list(shape)}, and the configuration wants {list(wanted)}"
            for name, shape, wanted in self.wrong_shape
        ]
        kinds = ", ".join(DTYPE_NAMES)
        return faults + [f"{name} is of type {dtype}, and weights are {kinds}" for name, dtype in self.wrong_type]


def compare(infos: Mapping[str, TensorInfo], config: ModelConfig) -> Comparison:
    """Hold the tensors that headers declare against a configuration; differences are data, not errors."""
    found, missing, extra = match_names(config, infos)
    layout = disk_layout(config)
    held = {name: (theirs, infos[theirs]) for name, theirs in found.items()}
    shapes = [(theirs, info.shape, layout[name].shape) for name, (theirs, info) in held.items()]
    wrong_shape = tuple(each for each in shapes if each[1] != each[2])
    misshapen = {name for name, _, _ in wrong_shape}
    types = [(theirs, info.dtype) for theirs, info in held.values() if theirs not in misshapen]
    wrong_type = tuple(each for each in types if each[1] not in DTYPE_NAMES)
    return Comparison(held, tuple(missing), tuple(extra), wrong_shape, wrong_type)


def stored_dtype(matched: Matched) -> str:
    """The type that most parameters of a matched folder are stored in, by torch's name."""
    counts: dict[str, int] = {}
    for _, info in matched.values():
        counts[info.dtype] = counts.get(info.dtype, 0) + info.parameters
    return DTYPE_NAMES[max(counts, key=counts.__getitem__)]


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
