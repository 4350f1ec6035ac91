"""``gptcli count-params``: the parameter report, as the lecture's closing table draws it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gptcli.cli import options
from gptcli.cli.out import Output, harmless
from gptcli.errors import GptcliError, NotFoundError, UsageError
from gptcli.spec.config import ModelConfig, read_config
from gptcli.spec.library import DEFAULT_MODEL, local_path, resolve
from gptcli.spec.params import ParamCount
from gptcli.spec.params import count_params as count
from gptcli.spec.presets import NAMES, read_preset

FORMATS = ("table", "json", "csv", "markdown")
_BAR = 20


def count_params(
    ctx: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="Presets, models, folders, config.json or .safetensors files."),
    ] = None,
    model: options.Model = None,
    format: Annotated[
        str | None, typer.Option("--format", metavar="|".join(FORMATS), help="How to show it; table by default.")
    ] = None,
) -> None:
    """Report a model's parameters, matrix by matrix.

    Presets: gpt1, gpt2, gpt2-medium, gpt2-large, gpt2-xl, gpt3-small, gpt3-medium, gpt3-large, gpt3-xl, gpt3-2.7b,
    gpt3-6.7b, gpt3-13b, gpt3. No tensor is read.
    """
    out: Output = ctx.obj
    options.choice("--format", format or "table", FORMATS)
    for number, name in enumerate(models or [model or DEFAULT_MODEL]):
        title, config = find_config(name, out)
        report = count(config)
        if out.json:
            out.record(as_json(title, report))
        elif format == "csv":
            out.data(_as_csv(title, report, header=number == 0), end="")
        elif format == "markdown":
            out.data(("\n" if number else "") + _as_markdown(title, report))
        else:
            out.data(("\n" if number else "") + _as_table(title, report, out))


def find_config(name: str, out: Output) -> tuple[str, ModelConfig]:
    """The title and configuration of what a name stands for; a folder or weight file is checked against its headers."""
    if name in NAMES:
        return name, read_preset(name)
    path = local_path(name)
    if path is not None and path.is_file():
        return str(name), _config_of_file(path, out)
    from gptcli.spec.match import match_folder

    try:
        found = resolve(name)
    except NotFoundError as error:
        raise NotFoundError(error.message, f"{error.hint}; presets: {', '.join(NAMES)}") from None
    config = read_config(found.folder)
    if _has_weights(found.folder):
        match_folder(found.folder, config)
    else:
        out.note(f"{name} holds no weights; counted from its config.json")
    return found.name, config


def _has_weights(folder: Path) -> bool:
    from gptcli.spec.index import FILE_NAME, INDEX_NAME

    return (folder / FILE_NAME).exists() or (folder / INDEX_NAME).exists()


def _config_of_file(path: Path, out: Output) -> ModelConfig:
    from gptcli.spec.index import read_header, read_index
    from gptcli.spec.infer import ASSUMED_HEAD_DIM, infer_config
    from gptcli.spec.match import match

    if path.name.endswith(".index.json"):
        infos = read_index(path)
    elif path.suffix == ".safetensors":
        infos = read_header(path)
    elif path.suffix == ".json":
        return read_config(path)
    else:
        raise UsageError(f"{path} is no config.json, .safetensors file or index", "see gptcli count-params --help")
    beside = path.parent / "config.json"
    if beside.is_file():
        config = read_config(beside)
    else:
        config = infer_config(infos, str(path))
        out.note(f"no config.json beside {path.name}: heads of {ASSUMED_HEAD_DIM} are assumed, as in GPT-2")
    try:
        match(infos, config, str(path))
    except GptcliError as error:
        hint = "count the index.json or the folder, not one shard" if "-of-" in path.name else error.hint
        raise type(error)(error.message, hint) from None
    return config


def as_json(title: str, report: ParamCount) -> dict[str, Any]:
    """The contract's object."""
    return {
        "model": title,
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


def _as_table(title: str, report: ParamCount, out: Output) -> str:
    config = report.config
    rows = _rows(report)
    name = max(len(row[0]) for row in rows)
    shape = max(len(row[1]) for row in rows)
    matrices = max(len(row[2]) for row in rows)
    parameters = max(len(f"{value:,}") for value in (report.total, report.matrix_parameters))
    lines = [
        out.style(harmless(title), "bold")
        + f"  {config.layers} layers, width {config.width:,}, {config.heads} heads of {config.head_dim}, "
        f"vocabulary {config.vocab_size:,}, context {config.context:,}"
    ]
    for row in rows:
        bar = _bar(row[4]) if out.on_terminal else ""
        size = f"{row[1]:>{shape}} x {row[2]:>{matrices}}"
        lines.append(f"{row[0]:<{name}}  {size}  {row[3]:>{parameters},}  {row[4]:5.1f} %  {bar}".rstrip())
    before = name + 2 + shape + 3 + matrices + 2
    rule = out.style("-" * (before + parameters), "dim")
    lines.append(rule)
    lines.append(f"{f'{report.matrices:,} matrices':<{before}}{report.matrix_parameters:>{parameters},}")
    lines += [f"{label:<{before}}{value:>{parameters},}" for label, value in report.other]
    lines.append(rule)
    lines.append(out.style(f"{'Total':<{before}}{report.total:>{parameters},}", "bold"))
    if config.tied:
        lines.append(f"{'Stored (the tied matrix once)':<{before}}{report.total_stored:>{parameters},}")
    return "\n".join(lines)


def _bar(percent: float) -> str:
    eighths = round(percent / 100 * _BAR * 8)
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def _as_markdown(title: str, report: ParamCount) -> str:
    lines = [f"| {title} | shape | matrices | parameters | % |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {name} | {shape} | {count} | {value:,} | {share:.1f} |"
        for name, shape, count, value, share in _rows(report)
    ]
    lines.append(f"| **In matrices** | | {report.matrices:,} | {report.matrix_parameters:,} | 100.0 |")
    lines += [f"| {label} | | | {value:,} | |" for label, value in report.other]
    lines.append(f"| **Total** | | | **{report.total:,}** | |")
    if report.config.tied:
        lines.append(f"| Stored (the tied matrix once) | | | {report.total_stored:,} | |")
    return "\n".join(lines)


def _as_csv(title: str, report: ParamCount, *, header: bool) -> str:
    """Plain numbers for a sheet; one model below the other."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(["model", "name", "matrices", "rows", "columns", "parameters", "percent", "tied"])
    for row in report.categories:
        share = _percent(report, row.parameters)
        writer.writerow([title, row.name, row.matrices, *row.shape, row.parameters, share, str(row.tied).lower()])
    others: Sequence[tuple[str, int]] = [*report.other, ("Total", report.total), ("Stored", report.total_stored)]
    for label, value in others:
        writer.writerow([title, label, "", "", "", value, "", ""])
    return text.getvalue()
