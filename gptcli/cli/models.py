"""``gptcli models``: which models are here, what they are, whether they are whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gptcli.cli import options
from gptcli.cli.out import Output, harmless
from gptcli.cli.units import byte_text
from gptcli.errors import CheckError, CorruptError, GptcliError, NotFoundError, UnsupportedError
from gptcli.spec.card import read_card, tokenizer_kind
from gptcli.spec.config import ModelConfig, read_config
from gptcli.spec.library import DEFAULT_MODEL, Found, all_models, resolve, revision_of, unfinished, verify_hashes
from gptcli.spec.match import match_folder, stored_dtype
from gptcli.spec.params import count_params

Name = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A shipped model, a folder, or a cached Hub id; fable by default.",
        autocompletion=options.model_names,
    ),
]


def list_models(ctx: typer.Context) -> None:
    """List the models on this machine.

    Shipped ones and those in the Hub cache; one that gptcli can't run is listed with the reason. Nothing is fetched.
    """
    out: Output = ctx.obj
    entries = [_describe(found) for found in all_models()]
    entries += [_describe_part(*part) for part in unfinished()]
    if out.json:
        for entry in entries:
            out.record(entry)
        return
    if not entries:
        out.note("there are no models here")
        return
    rows = [("NAME", "FAMILY", "PARAMETERS", "TYPE", "SIZE", "FROM")]
    for entry in entries:
        if entry["problem"]:
            rows.append(
                (entry["name"], "-", "-", "-", byte_text(entry["bytes"]), f"{entry['source']}: {entry['problem']}")
            )
            continue
        count = f"{entry['parameters']:,}"
        rows.append((entry["name"], entry["family"], count, entry["dtype"], byte_text(entry["bytes"]), entry["source"]))
    _columns(out, rows)


def show_model(
    ctx: typer.Context, name: Name = None, model: options.Model = None, offline: options.Offline = False
) -> None:
    """Show one model: its card, shape, size and files."""
    out: Output = ctx.obj
    found = resolve(name or model or DEFAULT_MODEL)
    config = read_config(found.folder)
    dtype = stored_dtype(match_folder(found.folder, config))
    report = count_params(config)
    card = read_card(found.folder)
    tokenizer = tokenizer_kind(found.folder)
    files = {
        file.relative_to(found.folder).as_posix(): file.stat().st_size
        for file in sorted(found.folder.rglob("*"))
        if file.is_file()
    }
    if out.json:
        out.record(
            {
                "name": found.name,
                "source": found.source,
                "folder": str(found.folder),
                "revision": revision_of(found),
                "card": card,
                "config": config.to_dict(),
                "parameters": report.total_stored,
                "dtype": dtype,
                "tokenizer": tokenizer,
                "bytes": sum(files.values()),
                "files": [{"name": file, "bytes": size} for file, size in files.items()],
            }
        )
        return
    facts = {
        "name": found.name,
        "from": f"{found.source}, {found.folder}",
        **({"revision": revision} if (revision := revision_of(found)) else {}),
        **{name.replace("_", " "): ", ".join(map(str, value)) for name, value in card.items()},
        "family": config.family,
        "parameters": f"{report.total_stored:,} in {dtype}",
        "shape": f"{config.layers} layers, width {config.width:,}, {config.heads} heads of {config.head_dim}",
        "vocabulary": f"{config.vocab_size:,}",
        "context": f"{config.context:,} tokens",
        "tokenizer": tokenizer or "none of its own",
        "size": byte_text(sum(files.values())),
    }
    for label, value in facts.items():
        out.data(f"{out.style(f'{label:<12}', 'bold')} {harmless(value)}")
    for file, size in files.items():
        out.data(f"  {harmless(file):<32} {byte_text(size):>9}")


def verify_model(
    ctx: typer.Context, name: Name = None, model: options.Model = None, offline: options.Offline = False
) -> None:
    """Check a model's files against its hashes and headers.

    Exit 6 if something does not hold: a hash, a tensor, a shape, the tokenizer's size.
    """
    out: Output = ctx.obj
    found = resolve(name or model or DEFAULT_MODEL)
    again = "get it again"
    if found.source == "cache":
        again = f"`gptcli models pull {found.name} --repair` gets what is wrong again"
    try:
        hashed = verify_hashes(found.folder, again)
        config = read_config(found.folder)
        tensors = match_folder(found.folder, config)
        _check_tokenizer(found, config, out)
    except (CorruptError, NotFoundError) as error:
        raise CheckError(error.message, error.hint) from None
    if out.json:
        out.record({"name": found.name, "ok": True, "hashed": hashed, "tensors": len(tensors)})
        return
    hashes = f"{len(hashed)} hashes" if hashed else "no hashes are known"
    out.data(f"{harmless(found.name)}: ok ({hashes}, {len(tensors)} tensors)")


def _check_tokenizer(found: Found, config: ModelConfig, out: Output) -> None:
    from gptcli.cli.opening import open_tokenizer

    tokenizer = open_tokenizer(found, out)
    rows, size = config.vocab_size, tokenizer.vocab_size
    added = {id_: text for text, id_ in tokenizer.special_tokens.items()}
    if not all(id_ in added for id_ in range(rows, size)):
        raise CheckError(
            f"the tokenizer has {size:,} tokens, and the model has room for {rows:,}",
            "the tokenizer belongs to another model",
        )
    if size > rows:  # padding, most often, that whoever trained the model on never gave a row
        names = ", ".join(added[id_] for id_ in range(rows, size))
        out.note(f"the model has no row for what was added to its tokenizer: {names}; a prompt can't hold it")


def _describe(found: Found) -> dict[str, Any]:
    """A model's line in the list; ``problem`` says why it can't be used."""
    size = sum(file.stat().st_size for file in found.folder.glob("*.safetensors"))
    entry = _entry(found.name, found.source, found.folder, revision_of(found), size)
    try:
        config = read_config(found.folder)
        dtype = stored_dtype(match_folder(found.folder, config))
    except UnsupportedError as error:
        return entry | {"problem": error.message.removeprefix(str(found.folder / "config.json")).lstrip(": ")}
    except GptcliError as error:
        return entry | {"problem": error.message}
    parameters = count_params(config).total_stored
    return entry | {"family": config.family, "parameters": parameters, "dtype": dtype}


def _describe_part(name: str, folder: Path, size: int) -> dict[str, Any]:
    problem = f"not whole, `gptcli models pull {name}` goes on"
    return _entry(name, "cache", folder, None, size) | {"problem": problem}


def _entry(name: str, source: str, folder: Path, revision: str | None, size: int) -> dict[str, Any]:
    """What is known of every model; the rest is null until it has been read."""
    known = {"name": name, "source": source, "folder": str(folder), "revision": revision, "bytes": size}
    return known | dict.fromkeys(("family", "parameters", "dtype", "problem"))


def _columns(out: Output, rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for number, row in enumerate(rows):
        line = "  ".join(harmless(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        out.data(out.style(line, "bold") if number == 0 else line)
