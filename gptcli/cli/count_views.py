"""The parameter report: by category, as the lecture's closing table draws it; by layer; by tensor."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptcli.cli.out import Output, harmless
from gptcli.cli.table import Column, Table, as_csv, as_markdown, as_text, bars_of, fits, width_of, wrap
from gptcli.cli.units import scaled
from gptcli.spec.params import Layer, ParamCount, Tensor, count_layers, tensors

if TYPE_CHECKING:
    from gptcli.cli.count_open import Counted

BY = ("category", "layer", "tensor")


def headline(counted: Counted, out: Output) -> list[str]:
    """The model's name and sizes."""
    config = counted.config
    title = harmless(counted.title)
    sizes = (
        f"{config.layers} layers, width {config.width:,}, {config.heads} heads of {config.head_dim}, "
        f"vocabulary {config.vocab_size:,}, context {config.context:,}"
    )
    first, *more = wrap(f"{title}  {sizes}", out)
    return [out.style(title, "bold") + first[len(title) :], *more]


# --- By category


def as_json(counted: Counted, report: ParamCount) -> dict[str, Any]:
    """The contract's object."""
    return {
        "model": counted.title,
        "config": report.config.to_dict(),
        "categories": [
            {
                "name": row.name,
                "matrices": row.matrices,
                "shape": list(row.shape),
                "parameters": row.parameters,
                "percent": _percent(report, row.parameters),
                "tied": row.tied,
            }
            for row in report.categories
        ],
        "matrices": report.matrices,
        "matrix_parameters": report.matrix_parameters,
        "other": [{"name": name, "parameters": parameters} for name, parameters in report.other],
        "total": report.total,
        "total_stored": report.total_stored,
        "tied": report.config.tied,
    }


def _percent(report: ParamCount, parameters: int) -> float:
    """Of all that stands in matrices, so that the eight rows make up 100."""
    return 100 * parameters / report.matrix_parameters


def _rows(report: ParamCount) -> list[tuple[str, str, str, int, float]]:
    """Name, shape, matrices, parameters, percent for the eight rows."""
    return [
        (
            row.name + (" (tied)" if row.tied else ""),
            f"{row.shape[0]:,} x {row.shape[1]:,}",
            f"{row.matrices:,}",
            row.parameters,
            _percent(report, row.parameters),
        )
        for row in report.categories
    ]


def category_text(report: ParamCount, out: Output) -> list[str]:
    """The lecture's table: eight rows of shape x count, their share, and the total."""
    rows = _rows(report)
    name = max(len(row[0]) for row in rows)
    shape = max(len(row[1]) for row in rows)
    matrices = max(len(row[2]) for row in rows)
    parameters = max(len(f"{value:,}") for value in (report.total, report.matrix_parameters))
    before = name + 2 + shape + 3 + matrices + 2
    width = width_of(out)
    bars = bars_of([row[4] for row in rows], None if width is None else width - before - parameters - 11)
    lines = []
    for row, bar in zip(rows, bars, strict=True):
        size = f"{row[1]:>{shape}} x {row[2]:>{matrices}}"
        lines.append(f"{row[0]:<{name}}  {size}  {row[3]:>{parameters},}  {row[4]:5.1f} %  {bar}".rstrip())
    rule = out.style("-" * (before + parameters), "dim")
    lines.append(rule)
    lines.append(f"{f'{report.matrices:,} matrices':<{before}}{report.matrix_parameters:>{parameters},}")
    lines += [f"{label:<{before}}{value:>{parameters},}" for label, value in report.other]
    lines.append(rule)
    lines.append(out.style(f"{'Total':<{before}}{report.total:>{parameters},}", "bold"))
    if report.config.tied:
        lines.append(f"{'Stored (the tied matrix once)':<{before}}{report.total_stored:>{parameters},}")
    return lines


def category_markdown(title: str, report: ParamCount) -> list[str]:
    lines = [f"| {harmless(title)} | shape | matrices | parameters | % |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {name} | {shape} | {count} | {value:,} | {share:.1f} |"
        for name, shape, count, value, share in _rows(report)
    ]
    lines.append(f"| **In matrices** | | {report.matrices:,} | {report.matrix_parameters:,} | 100.0 |")
    lines += [f"| {label} | | | {value:,} | |" for label, value in report.other]
    lines.append(f"| **Total** | | | **{report.total:,}** | |")
    if report.config.tied:
        lines.append(f"| Stored (the tied matrix once) | | | {report.total_stored:,} | |")
    return lines


def _category_csv(title: str, report: ParamCount) -> Iterator[Sequence[object]]:
    yield ["model", "name", "matrices", "rows", "columns", "parameters", "percent", "tied"]
    for row in report.categories:
        share = _percent(report, row.parameters)
        yield [title, row.name, row.matrices, *row.shape, row.parameters, share, str(row.tied).lower()]
    for label, value in (*report.other, ("Total", report.total), ("Stored", report.total_stored)):
        yield [title, label, "", "", "", value, "", ""]


# --- By layer


def layers_json(report: ParamCount) -> list[dict[str, Any]]:
    return [
        {
            "name": layer.name,
            "layer": layer.layer,
            "attention": layer.attention,
            "mlp": layer.mlp,
            "norms": layer.norms,
            "biases": layer.biases,
            "parameters": layer.parameters,
            "percent": 100 * layer.parameters / report.total,
            "tied": layer.tied,
        }
        for layer in count_layers(report.config)
    ]


def layer_table(report: ParamCount, most: int | None, *, exact: bool = True) -> tuple[Table, list[float]]:
    """The table and the percentages of its rows. Of more than ``most`` blocks three stand for all.

    Not ``exact``: what a row is made of is rounded, so that it fits a narrow terminal.
    """

    def part(count: int) -> str:
        return "" if not count else f"{count:,}" if exact else scaled(count, "", 1)

    layers = count_layers(report.config)
    blocks = [layer for layer in layers if layer.layer is not None]
    shown: list[Layer | str] = list(layers)
    if most is not None and len(blocks) > max(most, 4):
        at = layers.index(blocks[0])
        left_out = f"... {len(blocks) - 3:,} more, all alike"
        shown = [*layers[: at + 2], left_out, blocks[-1], *layers[at + len(blocks) :]]
    rows: list[tuple[str, ...]] = []
    shares = []
    for layer in shown:
        if isinstance(layer, str):
            rows.append((layer, "", "", "", "", "", ""))
            shares.append(0.0)
            continue
        share = 100 * layer.parameters / report.total
        parts = (layer.attention, layer.mlp, layer.norms, layer.biases)
        name = layer.name + (" (tied)" if layer.tied else "")
        rows.append((name, *map(part, parts), f"{layer.parameters:,}", f"{share:.2f} %"))
        shares.append(share)
    sums = (sum(getattr(layer, name) for layer in layers) for name in ("attention", "mlp", "norms", "biases"))
    rows.append(("Total", *map(part, sums), f"{report.total:,}", "100.00 %"))
    columns = (
        *(Column("", right=False), Column("attention", keep=4), Column("MLP", keep=5)),
        *(Column("norms", keep=2), Column("biases", keep=3), Column("parameters"), Column("share", keep=1)),
    )
    return Table(columns, tuple(rows)), [*shares, 0.0]


def _layer_csv(title: str, report: ParamCount) -> Iterator[Sequence[object]]:
    yield ["model", "name", "layer", "attention", "mlp", "norms", "biases", "parameters", "percent", "tied"]
    for row in layers_json(report):
        yield [title, *(value for name, value in row.items() if name != "tied"), str(row["tied"]).lower()]


# --- By tensor


@dataclass(frozen=True)
class StoredTensor:
    """One of our tensors, and the tensor of the file that holds it: its name and shape there, and its type if known."""

    tensor: Tensor
    disk_name: str
    disk_shape: tuple[int, ...]
    dtype: str | None


def stored_tensors(counted: Counted) -> list[StoredTensor]:
    """Every stored tensor in the order of the forward pass; without a file, under the names that would be written."""
    from gptcli.spec.index import DTYPE_NAMES
    from gptcli.spec.match import disk_layout, written_name

    config, holders = counted.config, {}
    for disk, held in disk_layout(config).items():
        name, dtype = written_name(config, disk), None
        if counted.matched is not None:
            name, info = counted.matched[disk]
            dtype = DTYPE_NAMES[info.dtype]
        holders.update({ours: (name, held.shape, dtype) for ours, _ in held.parts})
    return [StoredTensor(tensor, *holders[tensor.name]) for tensor in tensors(config)]


def tensors_json(counted: Counted, report: ParamCount) -> list[dict[str, Any]]:
    return [
        {
            "name": each.tensor.name,
            "category": each.tensor.category,
            "layer": each.tensor.layer,
            "shape": list(each.tensor.shape),
            "parameters": each.tensor.parameters,
            "percent": 100 * each.tensor.parameters / report.total_stored,
            "disk_name": each.disk_name,
            "disk_shape": list(each.disk_shape),
            "dtype": each.dtype,
        }
        for each in stored_tensors(counted)
    ]


def tensor_table(counted: Counted, report: ParamCount, most: int | None) -> tuple[Table, list[float]]:
    """The table and the percentages of its rows. Of more than ``most`` tensors the first block's stand for all."""
    every = stored_tensors(counted)
    summed = most is not None and len(every) > most and report.config.layers > 2
    rows: list[tuple[str, ...]] = []
    shares = []
    for each in every:
        tensor = each.tensor
        share = 100 * tensor.parameters / report.total_stored
        if summed and tensor.layer:
            if tensor.layer == 1 and len(rows) and not rows[-1][0].startswith("..."):
                rest = [other.tensor for other in every if other.tensor.layer]
                parameters = sum(other.parameters for other in rest)
                what = f"... {len(rest):,} alike in blocks 1 to {report.config.layers - 1}"
                share = 100 * parameters / report.total_stored
                rows.append((what, "", f"{parameters:,}", f"{share:.2f} %", "", ""))
                shares.append(0.0)
            continue
        shape = " x ".join(f"{size:,}" for size in tensor.shape)
        rows.append((tensor.name, shape, f"{tensor.parameters:,}", f"{share:.2f} %", each.dtype or "", each.disk_name))
        shares.append(share)
    rows.append(("Stored", "", f"{report.total_stored:,}", "100.00 %", "", ""))
    columns = [Column("", right=False), Column("shape", keep=4), Column("parameters"), Column("share", keep=3)]
    columns += [Column("type", right=False, keep=2), Column("in the file", right=False, keep=1)]
    if counted.matched is None:
        rows = [(*row[:4], row[5]) for row in rows]
        del columns[4]
    return Table(tuple(columns), tuple(rows)), [*shares, 0.0]


def _tensor_csv(counted: Counted, report: ParamCount) -> Iterator[Sequence[object]]:
    yield ["model", "name", "category", "layer", "shape", "parameters", "percent", "disk_name", "disk_shape", "dtype"]
    for row in tensors_json(counted, report):
        shapes = {name: "x".join(map(str, row[name])) for name in ("shape", "disk_shape")}
        yield [counted.title, *(row | shapes).values()]


# --- All three


def view_text(counted: Counted, report: ParamCount, by: str, out: Output) -> list[str]:
    """The lines of a view. On a terminal long ones are shortened to what it can show; in a pipe they are whole."""
    if by == "category":
        return category_text(report, out)
    most = max(12, shutil.get_terminal_size().lines - 8) if out.on_terminal else None
    if by == "layer":
        table, shares = layer_table(report, most)
        if not fits(table, out):
            table, shares = layer_table(report, most, exact=False)
    else:
        table, shares = tensor_table(counted, report, most)
    lines = as_text(table, out, shares=shares)
    lines[-1] = out.style(lines[-1], "bold")
    return lines


def view_markdown(counted: Counted, report: ParamCount, by: str) -> list[str]:
    if by == "category":
        return category_markdown(counted.title, report)
    table, _ = layer_table(report, None) if by == "layer" else tensor_table(counted, report, None)
    first, *others = table.columns
    return as_markdown(Table((first._replace(title=counted.title), *others), table.rows))


def view_csv(counted: Counted, report: ParamCount, by: str, *, header: bool) -> str:
    """Plain numbers for a sheet; one model below the other."""
    if by == "layer":
        rows = list(_layer_csv(counted.title, report))
    else:
        rows = list(_tensor_csv(counted, report) if by == "tensor" else _category_csv(counted.title, report))
    return as_csv(rows if header else rows[1:])


def view_json(counted: Counted, report: ParamCount, by: str) -> dict[str, Any]:
    value = as_json(counted, report)
    if by == "layer":
        value["layers"] = layers_json(report)
    elif by == "tensor":
        value["tensors"] = tensors_json(counted, report)
    return value
