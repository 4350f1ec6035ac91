"""``gptcli train``: text in, a model folder out, with its progress told as it goes."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli import options
from gptcli.cli.out import Output
from gptcli.errors import NotFoundError, OutputError, UsageError
from gptcli.spec.config import DTYPES

if TYPE_CHECKING:
    from gptcli.spec.config import ModelConfig
    from gptcli.text.tokenizer import Tokenizer
    from gptcli.train.data import Corpus
    from gptcli.train.loop import Plan

_LINE_EVERY_SECONDS = 10.0


def train(
    ctx: typer.Context,
    data: Annotated[list[str], typer.Argument(metavar="DATA", help="Texts, .jsonl, .xz, .gz, .zst, folders, or -.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The model folder to write.")],
    valid: Annotated[
        list[str] | None, typer.Option("--valid", metavar="FILE", help="Text to evaluate on; else 1% of the documents.")
    ] = None,
    field: Annotated[str, typer.Option("--field", metavar="NAME", help="Where .jsonl lines have their text.")] = "text",
    preset: Annotated[
        str | None, typer.Option("--preset", metavar="NAME", help="A size by name: gpt2, gpt2-medium, ...")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="A config.json to take the size from.")
    ] = None,
    layers: Annotated[int | None, typer.Option("--layers", metavar="L", min=1, help="Default: 6.")] = None,
    heads: Annotated[
        int | None, typer.Option("--heads", metavar="H", min=1, help="Default: one for each 64 of width.")
    ] = None,
    width: Annotated[int | None, typer.Option("--width", metavar="C", min=1, help="Default: 256.")] = None,
    context: Annotated[
        int | None,
        typer.Option("--context", metavar="T", min=2, help="The most tokens that the model sees. Default: 512."),
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option("--vocab-size", metavar="V", help="Train a tokenizer of this size.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="MODEL", help="Use a model's tokenizer; default: the shipped model's."),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", metavar="N", min=1)] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", metavar="N", min=1)] = None,
    epochs: Annotated[
        float | None, typer.Option("--epochs", metavar="X", help="Passes over the data; 1 if no length is given.")
    ] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", metavar="X")] = None,
    batch_tokens: Annotated[int, typer.Option("--batch-tokens", metavar="N", min=1, help="Tokens a step.")] = 8192,
    lr: Annotated[float, typer.Option("--lr", metavar="X", help="The highest learning rate.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option("--weight-decay", metavar="X")] = 0.1,
    eval_every: Annotated[
        int, typer.Option("--eval-every", metavar="N", min=0, help="Steps; 0: only at the end.")
    ] = 250,
    save_every: Annotated[
        int, typer.Option("--save-every", metavar="N", min=0, help="Steps; 0: only at the end.")
    ] = 1000,
    seed: options.Seed = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    save_dtype: Annotated[
        str, typer.Option("--save-dtype", metavar="DTYPE", help="float32, bfloat16 or float16.")
    ] = "float32",
    threads: options.Threads = None,
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the model first.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the model in DIR.")] = False,
) -> None:
    """Train a model on text.

    Documents are parted by <|endoftext|>; a file named twice counts twice. DIR becomes a model folder that every
    command, and transformers, can open.
    """
    said: Output = ctx.obj
    _check_lengths({"--steps": steps, "--tokens": tokens, "--epochs": epochs, "--minutes": minutes})
    for name, value in (("--lr", lr), ("--epochs", epochs), ("--minutes", minutes)):
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"{name} {value} is not above 0", f"give {name} a positive number")
    if vocab_size is not None and tokenizer is not None:
        raise UsageError("--vocab-size trains a tokenizer, --tokenizer takes one", "give one of them")
    if data.count("-") > 1 or ("-" in data and vocab_size is not None):
        raise UsageError("stdin can be read only once", "put the text into a file")
    shape = {"--layers": layers, "--heads": heads, "--width": width, "--context": context}
    sizes = {"--preset": preset, "--config": config, **{name: size for name, size in shape.items() if size}}
    if len(given := [name for name, size in sizes.items() if size]) > 1 and (preset or config):
        raise UsageError(f"{given[0]} and {given[1]} both give a size", "give one of them")
    options.check_seed(seed)
    options.choice("--save-dtype", save_dtype, DTYPES)
    if dtype == "float16":
        raise UsageError("training in float16 needs loss scaling, which is not here", "use bfloat16 or float32")
    if not 0 <= weight_decay < float("inf"):
        raise UsageError(f"--weight-decay {weight_decay} is out of range", "it should be 0 or more")
    _claim(out, force)

    from gptcli.core import runtime
    from gptcli.core.build import random_model
    from gptcli.train.documents import documents_of
    from gptcli.train.loop import Plan, train

    runtime.set_threads(threads)
    target = runtime.pick_device(device)
    # By itself bfloat16, where the device multiplies in it; the weights and the optimizer stay float32.
    kind = runtime.pick_dtype(dtype, "bfloat16", target)
    drawn = seed if seed is not None else runtime.draw_seed()
    if seed is None:
        said.note(f"seed {drawn}")

    held_out = 0.0 if valid else 0.01
    files = _tokenizer_files(said, documents_of(data, held_out, field=field), vocab_size, tokenizer)
    words = _open_tokenizer(files)
    start_id = _start_token(words)
    corpora = _read_corpora(said, data, valid or [], held_out, field, words, start_id)
    size = _size(preset, config, layers, heads, width, context, words, start_id)
    plan = Plan(
        batch_tokens=batch_tokens,
        lr=lr,
        weight_decay=weight_decay,
        steps=_steps(steps, tokens, epochs, minutes, batch_tokens, size.context, corpora[0]),
        minutes=minutes,
        eval_every=eval_every,
        save_every=save_every,
        seed=drawn,
        dtype=kind,
        save_dtype=runtime.DTYPES[save_dtype],
        compile=compile,
    )
    files["train.toml"] = _train_toml(plan, size, data).encode()
    model = random_model(size, drawn).to(target)
    _follow(said, train(model, corpora[0], corpora[1:], plan, out, files), plan, out)


def _check_lengths(lengths: dict[str, Any]) -> None:
    given = [name for name, value in lengths.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} both say how long to train", "give one of them")


def _claim(out: Path, force: bool) -> None:
    """Refuse a folder that holds a model or a run, unless told to replace it."""
    taken = [name for name in ("config.json", "metrics.jsonl", "model.safetensors") if (out / name).exists()]
    if taken and not force:
        raise UsageError(f"{out} already holds {taken[0]}", "name another folder, or replace it with --force")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} can't be made: {error.strerror}", "name another folder") from None


def _tokenizer_files(
    said: Output, documents: Iterator[str], vocab_size: int | None, tokenizer: str | None
) -> dict[str, bytes]:
    """The tokenizer's files for the model folder: trained now, or another model's."""
    if vocab_size is not None:
        from gptcli.train.data import train_tokenizer

        said.note(f"training a tokenizer of {vocab_size:,} tokens")
        return {"tokenizer.json": train_tokenizer(documents, vocab_size)}
    from gptcli.spec.library import DEFAULT_MODEL, resolve

    folder = resolve(tokenizer or DEFAULT_MODEL).folder
    names = ["tokenizer.json"] if (folder / "tokenizer.json").is_file() else ["vocab.json", "merges.txt"]
    if not all((folder / name).is_file() for name in names):
        raise NotFoundError(f"{folder} has no tokenizer files", "name another model with --tokenizer")
    return {name: (folder / name).read_bytes() for name in names}


def _open_tokenizer(files: dict[str, bytes]) -> Tokenizer:
    """The tokenizer of these files; the model folder is not touched before there is a model to put in."""
    import tempfile

    from gptcli.text.tokenizer import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        return Tokenizer.from_folder(Path(folder))


def _start_token(tokenizer: Tokenizer) -> int:
    from gptcli.train.documents import SEPARATOR

    if SEPARATOR not in tokenizer.special_tokens:
        raise UsageError(f"the tokenizer has no {SEPARATOR}", "train one with --vocab-size")
    return tokenizer.special_tokens[SEPARATOR]


def _read_corpora(
    said: Output,
    data: list[str],
    valid: list[str],
    held_out: float,
    field: str,
    tokenizer: Tokenizer,
    start_id: int,
) -> list[Corpus]:
    """The training corpus, then those to evaluate on."""
    from gptcli.train.data import encode_documents
    from gptcli.train.documents import documents_of

    if held_out:
        corpora = _hold_out(said, data, held_out, field, tokenizer, start_id)
    else:
        corpora = [encode_documents("the data", documents_of(data, field=field), tokenizer, start_id)]
    for name in valid:
        title = Path(name).name.split(".txt")[0].split(".jsonl")[0]
        corpora.append(encode_documents(title, documents_of([name], field=field), tokenizer, start_id))
    first = corpora[0]
    said.note(f"{first.documents:,} documents, {first.text_bytes:,} bytes, {len(first.tokens):,} tokens to train on")
    return corpora


def _hold_out(
    said: Output, data: list[str], held_out: float, field: str, tokenizer: Tokenizer, start_id: int
) -> list[Corpus]:
    """The data in two: what to train on, and documents, or else the end of the text, to evaluate on."""
    from gptcli.train.data import encode_documents, hold_out_end
    from gptcli.train.documents import documents_of, is_held_out

    train_part: list[str] = []
    valid_part: list[str] = []
    for place, path in enumerate(data):
        for document in documents_of([path], field=field):
            if not is_held_out(document, held_out):
                train_part.append(document)
            elif path not in data[:place]:  # a file named twice counts twice in training only
                valid_part.append(document)
    if valid_part and train_part:
        parts = {"the data": train_part, "held out": valid_part}
        return [encode_documents(name, part, tokenizer, start_id) for name, part in parts.items()]
    whole = encode_documents("the data", train_part or valid_part, tokenizer, start_id)
    corpora = hold_out_end(whole, tokenizer)
    if len(corpora) > 1:
        said.note("too few documents to hold one out: the end of the text is held out")
    else:
        said.warn("the text is too short to hold some out, so there is no evaluation; name a text with --valid")
    return corpora


def _size(
    preset: str | None,
    config: Path | None,
    layers: int | None,
    heads: int | None,
    width: int | None,
    context: int | None,
    tokenizer: Tokenizer,
    start_id: int,
) -> ModelConfig:
    """The size to train, with the tokenizer's vocabulary: from one preset or file, or from its four numbers."""
    from dataclasses import replace

    from gptcli.spec.config import ModelConfig, read_config
    from gptcli.spec.presets import read_preset

    if preset or config:
        base = read_preset(preset) if preset else read_config(config or Path())
    else:
        layers, width, context = layers or 6, width or 256, context or 512
        heads = heads or max(1, width // 64)
        if width % heads:
            raise UsageError(f"a width of {width} does not divide into {heads} heads", "change --width or --heads")
        base = ModelConfig("gpt2", 1, context, layers, width, heads, heads, width // heads, 4 * width)
    return replace(base, vocab_size=tokenizer.vocab_size, bos_id=start_id, eos_ids=(start_id,), dtype=None)


def _steps(
    steps: int | None,
    tokens: int | None,
    epochs: float | None,
    minutes: float | None,
    batch_tokens: int,
    context: int,
    corpus: Corpus,
) -> int | None:
    if minutes is not None or steps is not None:
        return steps
    batch = max(1, round(batch_tokens / context)) * context
    wanted = tokens if tokens is not None else (1.0 if epochs is None else epochs) * len(corpus.tokens)
    return max(1, round(wanted / batch))


def _train_toml(plan: Plan, size: ModelConfig, data: list[str]) -> str:
    """What was asked for, so that it can be read and asked for again."""
    from dataclasses import asdict

    lines = [f"data = {json.dumps(data)}"]
    for name, value in {**asdict(plan), **size.to_dict()}.items():
        if value is not None and name != "dtype":
            lines.append(f"{name} = {json.dumps(str(value).removeprefix('torch.') if name == 'save_dtype' else value)}")
    lines.append(f'dtype = "{str(plan.dtype).removeprefix("torch.")}"')
    return "\n".join(lines) + "\n"


def _follow(said: Output, events: Any, plan: Plan, out: Path) -> None:
    """Show the events: as NDJSON, as a progress bar, or as a line now and then."""
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("step {task.fields[step]}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[rate]} tokens/s"),
        TimeRemainingColumn(),
    )
    told, saved = time.monotonic(), False
    with said.progress(columns) as shown:
        task = shown.add_task("train", total=1.0, step="0", loss="-", rate="-")

        def show(event: dict[str, Any]) -> None:
            nonlocal told, saved
            saved |= event["event"] == "save"
            if said.json:
                said.record(event)
            kind = event["event"]
            if kind == "step":
                of = f"/{plan.steps:,}" if plan.steps else ""
                loss = "not finite" if event["loss"] is None else f"{event['loss']:.3f}"
                step, rate = f"{event['step']:,}{of}", f"{event['tokens_per_second']:,.0f}"
                shown.update(task, completed=event["progress"], step=step, loss=loss, rate=rate)
                if not said.talks_to_terminal and not said.json and time.monotonic() - told >= _LINE_EVERY_SECONDS:
                    told = time.monotonic()
                    said.note(f"step {step}  loss {loss}  lr {event['lr']:.2e}  {rate} tokens/s")
            elif kind == "eval" and not said.json:
                parts = "  ".join(f"{name} {bits:.4f}" for name, bits in event["valid"].items())
                said.note(f"step {event['step']:,}: bits per byte {parts}")
            elif kind == "done" and not said.json:
                skipped = f", {event['skipped']} steps skipped" if event["skipped"] else ""
                said.note(f"{event['tokens']:,} tokens in {event['seconds']:,.0f} s{skipped}")

        try:
            for event in events:
                show(event)
        except KeyboardInterrupt:
            # If it struck here and not in the loop, the loop has yet to hear of it, and saves.
            with contextlib.suppress(KeyboardInterrupt, StopIteration):
                show(events.throw(KeyboardInterrupt()))
            said.note(f"stopped; what was learnt so far is in {out}" if saved else "stopped before the first step")
            raise
    if not said.json:
        said.data(str(out))
