"""``gptcli train``: text in, a model folder out, with its progress told as it goes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli import options
from gptcli.cli.out import Output
from gptcli.errors import UsageError
from gptcli.spec.config import DTYPES

if TYPE_CHECKING:
    from gptcli.cli.train_run import Asked


def train(
    ctx: typer.Context,
    data: Annotated[
        list[str] | None, typer.Argument(metavar="DATA", help="Texts, .jsonl, .xz, .gz, .zst, folders, or -.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="The model folder to write.")] = None,
    valid: Annotated[
        list[str] | None, typer.Option("--valid", metavar="FILE", help="Text to evaluate on; else 1% of the documents.")
    ] = None,
    field: Annotated[str, typer.Option("--field", metavar="NAME", help="Where .jsonl lines have their text.")] = "text",
    init_from: Annotated[
        str | None, typer.Option("--init-from", metavar="MODEL", help="Fine-tune this model, with its tokenizer.")
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option("--freeze", metavar="PATTERN", help="Parameters to leave alone, as 'blocks.0.*'; repeatable."),
    ] = None,
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
    optimizer: Annotated[str, typer.Option("--optimizer", metavar="NAME", help="muon or adamw.")] = "muon",
    lr: Annotated[
        float | None, typer.Option("--lr", metavar="X", help="The highest learning rate; fine-tuning has a lower one.")
    ] = None,
    weight_decay: Annotated[float, typer.Option("--weight-decay", metavar="X")] = 0.1,
    mask_documents: Annotated[
        bool, typer.Option("--mask-documents", help="No document sees the one packed before it.")
    ] = False,
    eval_every: Annotated[
        int, typer.Option("--eval-every", metavar="N", min=0, help="Steps; 0: only at the end.")
    ] = 250,
    save_every: Annotated[
        int, typer.Option("--save-every", metavar="N", min=0, help="Steps; 0: only at the end.")
    ] = 1000,
    sample_every: Annotated[
        int | None, typer.Option("--sample-every", metavar="N", min=0, help="Steps; default: at each evaluation.")
    ] = None,
    sample_prompt: Annotated[
        str, typer.Option("--sample-prompt", metavar="TEXT", help="What samples go on from.")
    ] = "",
    keep: Annotated[int, typer.Option("--keep", metavar="N", min=1, help="Checkpoints to keep.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in DIR.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is in DIR.")] = False,
    seed: options.Seed = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    save_dtype: Annotated[
        str, typer.Option("--save-dtype", metavar="DTYPE", help="float32, bfloat16 or float16.")
    ] = "float32",
    threads: options.Threads = None,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Default: on CUDA where a short trial gains by it.")
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option("--micro-batch", metavar="ROWS", min=1, help="At once; default: what fits.")
    ] = None,
    checkpoint_activations: Annotated[
        bool | None,
        typer.Option(
            "--checkpoint-activations/--no-checkpoint-activations",
            help="Less memory, a third more work; default: where it would not fit.",
        ),
    ] = None,
    parallel: Annotated[
        str, typer.Option("--parallel", metavar="WAY", help="Under torchrun: auto, ddp or fsdp.")
    ] = "auto",
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what each rank would hold, and whether it fits.")
    ] = False,
    gpus: Annotated[
        str | None, typer.Option("--gpus", metavar="CARDS", help="With --plan: cards and their memory, as 8x141GB.")
    ] = None,
) -> None:
    """Train a model on text, or fine-tune one.

    Documents are parted by <|endoftext|>; a file named twice counts twice. DIR becomes a model folder that every
    command, and transformers, can open. With --init-from, .jsonl lines may hold "messages", or "prompt" and
    "completion": then only the answers are learnt. The same command under torchrun uses every rank.
    """
    said: Output = ctx.obj
    from gptcli.cli.train_run import Asked, go, read_resumed, show_paper_plan

    asked = Asked.of(ctx.params)
    _check(asked)
    if plan:
        show_paper_plan(said, asked)
        return
    if gpus:
        raise UsageError("--gpus goes with --plan", "say --plan too, or leave --gpus out")
    if out is None:
        raise UsageError("there is no folder to write to", "name one with --out DIR")
    if resume and force:
        raise UsageError("--resume goes on with what --force would replace", "give one of them")
    given = {param for param in ctx.params if _source(ctx, param) == "COMMANDLINE"}
    resumed = read_resumed(said, asked, out, given) if resume else None
    if resumed:
        asked = resumed.asked
        _check(asked)
    if not asked.data:
        raise UsageError("there is nothing to train on", "name texts, folders, or - for standard input")
    go(said, asked, out, resumed=resumed, force=force)


def _source(ctx: typer.Context, param: str) -> str:
    source = ctx.get_parameter_source(param)
    return source.name if source is not None else ""


def _check(asked: Asked) -> None:
    """Refuse what can't be meant, before anything heavy is imported."""
    lengths = {name: getattr(asked, name) for name in ("steps", "tokens", "epochs", "minutes")}
    given = [f"--{name}" for name, value in lengths.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} both say how long to train", "give one of them")
    for name in ("lr", "epochs", "minutes"):
        value = getattr(asked, name)
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"--{name} {value} is not above 0", f"give --{name} a positive number")
    if asked.vocab_size is not None and asked.tokenizer is not None:
        raise UsageError("--vocab-size trains a tokenizer, --tokenizer takes one", "give one of them")
    if asked.data.count("-") > 1 or ("-" in asked.data and asked.vocab_size is not None):
        raise UsageError("stdin can be read only once", "put the text into a file")
    _check_size(asked)
    options.check_seed(asked.seed)
    options.choice("--save-dtype", asked.save_dtype, DTYPES)
    options.choice("--optimizer", asked.optimizer, ("muon", "adamw"))
    options.choice("--parallel", asked.parallel, ("auto", "ddp", "fsdp"))
    if asked.dtype == "float16":
        raise UsageError("training in float16 needs loss scaling, which is not here", "use bfloat16 or float32")
    if not 0 <= asked.weight_decay < float("inf"):
        raise UsageError(f"--weight-decay {asked.weight_decay} is out of range", "it should be 0 or more")


def _check_size(asked: Asked) -> None:
    shape = {f"--{name}": getattr(asked, name) for name in ("layers", "heads", "width", "context")}
    whole: dict[str, Any] = {"--preset": asked.preset, "--config": asked.config, "--init-from": asked.init_from}
    given = [name for name, value in {**whole, **shape}.items() if value]
    if len(given) > 1 and any(whole.values()):
        raise UsageError(f"{given[0]} and {given[1]} both give a size", "give one of them")
    words = [name for name in ("vocab_size", "tokenizer") if getattr(asked, name) is not None]
    if asked.init_from and words:
        name = f"--{words[0].replace('_', '-')}"
        raise UsageError(f"{name} would replace the tokenizer that --init-from comes with", "leave it out")
    with contextlib.suppress(StopIteration):
        if asked.freeze and not asked.init_from:
            raise UsageError("--freeze without --init-from would keep random weights", "name a model with --init-from")
