"""``gptcli models export``: a model for other programs, as a Hugging Face folder or as one GGUF file."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli import options
from gptcli.cli.models import Name
from gptcli.cli.opening import find
from gptcli.cli.out import Output, harmless
from gptcli.cli.units import byte_text
from gptcli.errors import UsageError
from gptcli.spec.files import BESIDE, UNREAD, VOCABULARY
from gptcli.spec.match import match_folder, stored_dtype

if TYPE_CHECKING:
    from gptcli.core.model import Transformer
    from gptcli.spec.config import ModelConfig
    from gptcli.spec.library import Found

_SHORT = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
_LONG = {name: short for short, name in _SHORT.items()}
# What travels with the weights of a folder, where it is there.
_TOKENIZER = (*VOCABULARY, *UNREAD)
_ALONG = (
    *BESIDE,
    "generation_config.json",
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)


def export(
    ctx: typer.Context,
    name: Name = None,
    model: options.Model = None,
    to: Annotated[str | None, typer.Option("--to", metavar="hf|gguf", help="A Hugging Face folder, or a GGUF.")] = None,
    out_path: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PATH", help="The folder, or the file, to write.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="auto (as it is stored), f32, bf16, f16; of a GGUF also q8_0.",
            autocompletion=options.one_of("auto", *_SHORT, "q8_0"),
        ),
    ] = "auto",
    force: Annotated[bool, options.typed_option("--force", help="Write over what is there.")] = False,
    offline: options.Offline = False,
) -> None:
    """Write a model for other programs.

    --to hf writes a folder as transformers, vLLM and others open it: config, weights, tokenizer, chat template, card.
    --to gguf writes one file for llama.cpp and what is built on it, tokenizer included; it needs the extra "gguf".
    """
    out: Output = ctx.obj
    if to is None:
        raise UsageError("--to is missing", "use --to hf, or --to gguf")
    options.choice("--to", to, ("hf", "gguf"))
    if out_path is None:
        raise UsageError("-o is missing", "name the folder or file to write")
    kind = _SHORT.get(dtype, dtype)
    kinds = ("auto", *_LONG, "q8_0") if to == "gguf" else ("auto", *_LONG)
    if kind not in kinds:
        raise UsageError(
            f"--dtype {dtype!r} is not a choice", f"use {', '.join(_LONG.get(each, each) for each in kinds)}"
        )
    path = out_path.expanduser()
    found = find(name or model)
    _check_place(path, to, force)
    from gptcli.core.build import open_weights

    start = time.perf_counter()
    weights = open_weights(found.folder)
    if kind == "auto":
        kind = stored_dtype(match_folder(found.folder, weights.config))
    told = (_write_folder if to == "hf" else _write_gguf)(out, found, weights, path, kind)
    files = sorted(path.iterdir()) if to == "hf" else [path]
    sizes = {file.name: file.stat().st_size for file in files if file.is_file()}
    for note in told["notes"]:
        out.note(note)
    shown = kind if to == "hf" else _LONG.get(kind, kind)
    report: dict[str, Any] = {
        "model": found.name,
        "to": to,
        "output": str(path),
        "dtype": shown,
        **told,
        "files": [{"name": file, "bytes": size} for file, size in sizes.items()],
        "bytes": sum(sizes.values()),
        "seconds": time.perf_counter() - start,
    }
    if out.json:
        out.record(report)
        return
    what = f"{told['architecture']}, {shown}, {told['tensors']} tensors, {byte_text(report['bytes'])}"
    out.data(f"{harmless(found.name)}: {harmless(str(path))} ({what})")


def _check_place(path: Path, to: str, force: bool) -> None:
    """Raise UsageError for a place that is taken, or of the wrong kind."""
    if to == "gguf":
        if path.is_dir():
            raise UsageError(f"{path} is a folder, and a GGUF is a file", "name the file, for instance model.gguf")
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is not a file", "a GGUF goes into a file")
        if path.exists() and not force:
            raise UsageError(f"{path} is there already", "name another file, or write over it with --force")
        return
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, and --to hf writes a folder", "name a folder")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise UsageError(
            f"{path} is there already, and not empty", "name another folder, or write over it with --force"
        )


def _write_folder(out: Output, found: Found, weights: Transformer, path: Path, kind: str) -> dict[str, Any]:
    """The model as a Hugging Face folder: what is told of it."""
    from gptcli.core.checkpoint import save_folder
    from gptcli.core.runtime import DTYPES
    from gptcli.spec.config import to_hf
    from gptcli.spec.match import disk_layout

    files = {
        file: (found.folder / file).read_bytes() for file in (*_TOKENIZER, *_ALONG) if (found.folder / file).is_file()
    }
    notes = []
    if not any(file in files for file in _TOKENIZER):
        notes.append("there are no tokenizer files beside this model, so the folder has none")
    elif "tokenizer_config.json" not in files:
        files["tokenizer_config.json"] = _tokenizer_config(weights.config, files)
    if "generation_config.json" not in files:
        files["generation_config.json"] = _generation_config(weights.config)
    if "README.md" not in files:
        files["README.md"] = f"# {found.name}\n\nExported by gptcli; its license is that of the model.\n".encode()
        notes.append("there is no card (README.md) beside this model: its license is not known")
    save_folder(weights, path, dtype=DTYPES[kind], files=files)
    architecture = to_hf(weights.config)["architectures"][0]
    return {"architecture": architecture, "tensors": len(disk_layout(weights.config)), "notes": notes}


def _tokenizer_config(config: ModelConfig, files: dict[str, bytes]) -> bytes:
    """With which transformers takes tokenizer.json as it is, rather than by the model's type."""
    if "tokenizer.json" not in files:
        return b'{"tokenizer_class": "GPT2Tokenizer"}\n'
    added = json.loads(files["tokenizer.json"]).get("added_tokens") or []
    texts = {token["id"]: token["content"] for token in added}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": texts.get(config.bos_id),
        "eos_token": texts.get(config.eos_ids[0] if config.eos_ids else None),
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.context,
    }
    return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()


def _generation_config(config: ModelConfig) -> bytes:
    from gptcli.spec.config import to_hf

    keys = to_hf(config)
    settings = {key: keys[key] for key in ("bos_token_id", "eos_token_id") if key in keys}
    return (json.dumps({"_from_model_config": True, **settings}, indent=2) + "\n").encode()


def _write_gguf(out: Output, found: Found, weights: Transformer, path: Path, kind: str) -> dict[str, Any]:
    """The model as a GGUF: what is told of it."""
    from gptcli.core.gguf import write_gguf
    from gptcli.text.gguf_words import read_gguf_words
    from gptcli.text.template import read_template

    config = weights.config
    words = read_gguf_words(found.folder, config.vocab_size, start_id=config.bos_id, end_ids=config.eos_ids)
    with _progress(out, path.name) as progress:
        written = write_gguf(
            weights,
            path,
            kind=_LONG.get(kind, kind),
            name=found.name,
            words=words,
            template=read_template(found.folder),
            license=_license(found.folder),
            progress=progress,
        )
    return {"architecture": written.architecture, "tensors": written.tensors, "notes": list(written.notes)}


def _license(folder: Path) -> str | None:
    """What the head of the model's card says."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    named = re.search(r"^license:\s*[\"']?([\w.+-]+)", head[1], re.MULTILINE) if head else None
    return named[1] if named else None


@contextmanager
def _progress(out: Output, name: str) -> Iterator[Any]:
    """A bar for the person who waits."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

    with out.progress((TextColumn(f"writing {name}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())) as shown:
        task = shown.add_task(name, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
