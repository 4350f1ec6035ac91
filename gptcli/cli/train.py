"""``gptcli train``: text in, a model folder out, with its progress told as it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gptcli.cli import options
from gptcli.cli.out import Output
from gptcli.errors import UsageError


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
    from gptcli.cli.train_asked import Asked, check, read_resumed, without_weaker
    from gptcli.cli.train_run import go, show_paper_plan

    strength = {name: options.strength(ctx, name) for name in ctx.params}
    asked = without_weaker(Asked.of(ctx.params), strength)
    if plan:
        check(asked)
        show_paper_plan(said, asked)
        return
    if gpus:
        raise UsageError("--gpus goes with --plan", "say --plan too, or leave --gpus out")
    if out is None:
        raise UsageError("there is no folder to write to", "name one with --out DIR")
    if resume and force:
        raise UsageError("--resume goes on with what --force would replace", "give one of them")
    typed = {name for name, source in strength.items() if source >= options.TYPED}
    resumed = read_resumed(said, asked, out, typed) if resume else None
    asked = resumed.asked if resumed else asked
    check(asked)
    if not asked.data:
        missing = (
            f"there is no checkpoint in {out}, and nothing to train on" if resume else "there is nothing to train on"
        )
        raise UsageError(missing, "name DATA: texts, folders, or - for standard input")
    if resume and not resumed:
        said.note(f"there is no checkpoint in {out}: training starts at step 0")
    go(said, asked, out, resumed=resumed, replacing=force or resume)
