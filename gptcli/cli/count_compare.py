"""Two models side by side (``count-params --diff``), and a file against a configuration (``--check``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from gptcli.cli.out import Output, harmless
from gptcli.cli.table import Column, Table, as_csv, as_markdown, as_text, wrap
from gptcli.errors import CheckError
from gptcli.spec.diff import (
    Change,
    TensorChange,
    category_changes,
    config_changes,
    layer_changes,
    tensor_changes,
    total_changes,
)
from gptcli.spec.index import DTYPE_NAMES
from gptcli.spec.match import Comparison, compare
from gptcli.spec.params import count_params, tensors

if TYPE_CHECKING:
    from gptcli.cli.count_open import Counted

# Rows that a terminal is shown of a long list, and names that fit into an error's line.
_MOST_ROWS = 40
_MOST_NAMES = 4


# --- Two models


def show_diff(a: Counted, b: Counted, by: str, format: str, out: Output) -> None:
    """Show what differs between two models; that they differ is no error."""
    ours, theirs = count_params(a.config), count_params(b.config)
    config = config_changes(a.config, b.config)
    changes = layer_changes(a.config, b.config) if by == "layer" else category_changes(ours, theirs)
    totals = total_changes(ours, theirs)
    different = tensor_changes(a.config, b.config, _dtypes(a), _dtypes(b))
    if out.json:
        value: dict[str, Any] = {
            "a": a.title,
            "b": b.title,
            "config": [{"name": name, "a": mine, "b": other} for name, mine, other in config],
            "categories": [change.to_dict() for change in category_changes(ours, theirs)],
            "total": totals[0].to_dict(),
            "total_stored": totals[1].to_dict(),
            "tensors": [_tensor_json(change) for change in different],
        }
        if by == "layer":
            value["layers"] = [change.to_dict() for change in changes]
        out.record(value)
        return
    if format == "csv":
        rows = [*(each.change for each in different)] if by == "tensor" else [*changes, *totals]
        cells = ([change.name, change.a, change.b, change.difference, change.percent] for change in rows)
        out.data(as_csv([["name", a.title, b.title, "difference", "percent"], *cells]), end="")
        return
    parts = []
    if config:
        sizes = tuple((name, _word(mine), _word(other)) for name, mine, other in config)
        parts.append(Table(_sides("", a, b), sizes))
    if by == "tensor":
        most = _MOST_ROWS if out.on_terminal and format == "table" else len(different)
        parts.append(_tensors(different[:most], a, b, left_out=len(different) - most))
    parts.append(_changes([*(changes if by != "tensor" else ()), *totals], a, b))
    summary = _summary(different, a, b)
    if format == "markdown":
        out.data("\n\n".join("\n".join(as_markdown(part)) for part in parts) + f"\n\n{harmless(summary)}")
        return
    for part in parts:
        out.data("\n".join(as_text(part, out)) + "\n")
    told = summary if by == "tensor" or not different else f"{summary}; --by tensor lists them"
    out.data("\n".join(wrap(harmless(told), out)))


def _dtypes(counted: Counted) -> dict[str, str]:
    """The types of our tensors, where a file says them."""
    from gptcli.cli.count_views import stored_tensors

    if counted.matched is None:
        return {}
    return {each.tensor.name: each.dtype for each in stored_tensors(counted) if each.dtype}


def _tensor_json(change: TensorChange) -> dict[str, Any]:
    return {
        "name": change.name,
        "a_shape": None if change.a is None else list(change.a),
        "b_shape": None if change.b is None else list(change.b),
        "a_dtype": change.a_dtype,
        "b_dtype": change.b_dtype,
        "difference": change.change.difference,
        "percent": change.change.percent,
    }


def _sides(first: str, a: Counted, b: Counted, *more: Column) -> tuple[Column, ...]:
    return (Column(first, right=False), Column(a.title), Column(b.title), *more)


def _changes(changes: Iterable[Change], a: Counted, b: Counted) -> Table:
    rows = tuple((c.name, f"{c.a:,}", f"{c.b:,}", _signed(c.difference), _percent(c)) for c in changes)
    return Table(_sides("", a, b, Column("difference", keep=2), Column("change", keep=1)), rows)


def _tensors(changes: Iterable[TensorChange], a: Counted, b: Counted, left_out: int) -> Table:
    rows = tuple(
        (c.name, _held(c.a, c.a_dtype), _held(c.b, c.b_dtype), _signed(c.change.difference), _percent(c.change))
        for c in changes
    )
    notes = (_more(left_out),) if left_out > 0 else ()
    return Table(_sides("", a, b, Column("difference", keep=2), Column("change", keep=1)), rows, notes=notes)


def _more(count: int) -> str:
    return f"... and {count:,} more: all in a pipe, or with --json"


def _held(shape: tuple[int, ...] | None, dtype: str | None) -> str:
    if shape is None:
        return "-"
    return " x ".join(f"{size:,}" for size in shape) + (f" {dtype}" if dtype else "")


def _summary(changes: Sequence[TensorChange], a: Counted, b: Counted) -> str:
    if not changes:
        return "the same tensors"
    gone, new = sum(change.b is None for change in changes), sum(change.a is None for change in changes)
    both = [change for change in changes if change.a is not None and change.b is not None]
    reshaped = sum(change.a != change.b for change in both)
    told = [
        f"{number:,} {what}"
        for number, what in (
            (gone, f"only in {a.title}"),
            (new, f"only in {b.title}"),
            (reshaped, "of another shape"),
            (len(both) - reshaped, "of another type"),
        )
        if number
    ]
    return f"{len(changes):,} tensors differ: {', '.join(told)}"


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:,}" if isinstance(value, int) else str(value)


def _signed(number: int) -> str:
    return f"{number:+,}" if number else "0"


def _percent(change: Change) -> str:
    if change.percent is None:
        return "new" if change.b else ""
    return f"{change.percent:+,.1f} %" if change.difference else ""


# --- A file against a configuration


def show_check(counted: Counted, file: str, format: str, out: Output) -> None:
    """Hold a file's headers against a configuration. Raises CheckError where they do not agree, when all is shown."""
    from gptcli.cli.count_open import read_weights

    where, infos = read_weights(file)
    result = compare(infos, counted.config)
    rows = list(_faults(result))
    if out.json:
        out.record(_check_json(counted, str(where), result))
    elif format == "csv":
        out.data(as_csv([["fault", "name", "found", "wanted"], *rows]), end="")
    elif not result.ok:
        _show_faults(rows, format, out)
    else:
        total = sum(info.parameters for _, info in result.matched.values())
        what = f"{len(result.matched):,} tensors, {total:,} parameters in {', '.join(_types(result))}"
        out.data(f"{harmless(str(where))}: ok, as {harmless(counted.title)} wants it ({what})")
    if not result.ok:
        kinds = ("missing", "left over", "of the wrong shape", "of the wrong type")
        groups = (result.missing, result.left_over, result.wrong_shape, result.wrong_type)
        counts = ", ".join(f"{len(group):,} {kind}" for kind, group in zip(kinds, groups, strict=True) if group)
        names = ", ".join(name for _, name, _, _ in rows[:_MOST_NAMES]) + (", ..." if len(rows) > _MOST_NAMES else "")
        message = f"{where} does not hold what {counted.title} wants: {counts} ({names})"
        raise CheckError(message, "name the configuration that it was saved with, or save or download it again")


def _types(result: Comparison) -> list[str]:
    """The types in a file, the one of most parameters first."""
    counts: dict[str, int] = {}
    for _, info in result.matched.values():
        counts[info.dtype] = counts.get(info.dtype, 0) + info.parameters
    return [DTYPE_NAMES.get(dtype, dtype) for dtype in sorted(counts, key=counts.__getitem__, reverse=True)]


def _faults(result: Comparison) -> Iterable[tuple[str, str, str, str]]:
    """What is wrong, as (fault, name, what was found, what was wanted)."""
    for name in result.missing:
        yield "missing", name, "", ""
    for name in result.left_over:
        yield "left over", name, "", ""
    for name, shape, wanted in result.wrong_shape:
        yield "shape", name, " x ".join(map(str, shape)), " x ".join(map(str, wanted))
    for name, dtype in result.wrong_type:
        yield "type", name, dtype, " or ".join(DTYPE_NAMES.values())


def _check_json(counted: Counted, where: str, result: Comparison) -> dict[str, Any]:
    return {
        "model": counted.title,
        "file": where,
        "ok": result.ok,
        "tensors": len(result.matched),
        "expected_tensors": len(result.matched) + len(result.missing),
        "parameters": sum(info.parameters for _, info in result.matched.values()),
        "expected_parameters": sum(tensor.parameters for tensor in tensors(counted.config)),
        "dtypes": _types(result),
        "missing": list(result.missing),
        "left_over": list(result.left_over),
        "wrong_shape": [
            {"name": name, "shape": list(shape), "expected": list(wanted)} for name, shape, wanted in result.wrong_shape
        ],
        "wrong_type": [{"name": name, "dtype": dtype} for name, dtype in result.wrong_type],
    }


def _show_faults(rows: Sequence[tuple[str, str, str, str]], format: str, out: Output) -> None:
    """Every fault; a terminal is shown the first ones."""
    most = _MOST_ROWS if out.on_terminal else len(rows)
    columns = (Column("fault", right=False), Column("name", right=False), Column("found"), Column("wanted"))
    table = Table(columns, tuple(rows[:most]))
    out.data("\n".join(as_markdown(table) if format == "markdown" else as_text(table, out)))
    if len(rows) > most:
        out.data(_more(len(rows) - most))
