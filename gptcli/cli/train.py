"""``gptcli train``: text in, a model folder out, with its progress told as it goes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from gptcli.cli import options
from gptcli.cli.input import stdin_has_data
from gptcli.cli.out import Output
from gptcli.errors import UsageError
from gptcli.spec.presets import NAMES

# The headings of the help, in its order.
run_option = partial(typer.Option, rich_help_panel="Run")
data_option = partial(typer.Option, rich_help_panel="Data")
model_option = partial(typer.Option, rich_help_panel="Model")
schedule_option = partial(typer.Option, rich_help_panel="Length and schedule")
saving_option = partial(typer.Option, rich_help_panel="Evaluate and save")
machine_option = partial(typer.Option, rich_help_panel="Machine")


def train(
    ctx: typer.Context,
    data: Annotated[
        list[str] | None, typer.Argument(metavar="DATA", help="Texts, .jsonl, .xz, .gz, .zst, folders, or -.")
    ] = None,
    out: Annotated[Path | None, run_option("--out", "-o", metavar="DIR", help="The model folder to write.")] = None,
    resume: Annotated[bool, run_option("--resume", help="Go on from the last checkpoint in DIR.")] = False,
    force: Annotated[bool, run_option("--force", help="Replace what is in DIR.")] = False,
    plan: Annotated[
        bool, run_option("--plan", help="Only say what each rank would hold, and whether it fits.")
    ] = False,
    gpus: Annotated[
        str | None,
        run_option(
            "--gpus", metavar="CARDS", help="With --plan: cards and their memory, as 8x141GB; default: this machine's."
        ),
    ] = None,
    valid: Annotated[
        list[str] | None,
        data_option("--valid", metavar="FILE", help="Text to evaluate on, repeatable; else 1% of the documents."),
    ] = None,
    field: Annotated[str, data_option("--field", metavar="NAME", help="Where .jsonl lines have their text.")] = "text",
    mask_documents: Annotated[
        bool, data_option("--mask-documents", help="No document sees the one packed before it.")
    ] = False,
    init_from: Annotated[
        str | None, model_option("--init-from", metavar="MODEL", help="Fine-tune this model, with its tokenizer.")
    ] = None,
    freeze: Annotated[
        list[str] | None,
        model_option("--freeze", metavar="PATTERN", help="Parameters to leave alone, as 'blocks.0.*'; repeatable."),
    ] = None,
    preset: Annotated[
        str | None,
        model_option(
            "--preset",
            metavar="NAME",
            help="A size by name: gpt2, gpt2-medium, ...",
            autocompletion=options.one_of(*NAMES),
        ),
    ] = None,
    config: Annotated[
        Path | None, model_option("--config", metavar="FILE", help="A config.json to take the size from.")
    ] = None,
    layers: Annotated[int | None, model_option("--layers", metavar="L", min=1, help="Default: 6.")] = None,
    heads: Annotated[
        int | None, model_option("--heads", metavar="H", min=1, help="Default: one for each 64 of width.")
    ] = None,
    width: Annotated[int | None, model_option("--width", metavar="C", min=1, help="Default: 256.")] = None,
    context: Annotated[
        int | None,
        model_option(
            "--context",
            metavar="T",
            min=2,
            help="Tokens that the model sees; with --init-from: in a row. Default: 512.",
        ),
    ] = None,
    vocab_size: Annotated[
        int | None, model_option("--vocab-size", metavar="V", help="Train a tokenizer of this size.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        model_option("--tokenizer", metavar="MODEL", help="Use a model's tokenizer; default: the shipped model's."),
    ] = None,
    steps: Annotated[int | None, schedule_option("--steps", metavar="N", min=1, help="Updates of the weights.")] = None,
    tokens: Annotated[
        int | None, schedule_option("--tokens", metavar="N", min=1, help="Tokens to train on, repeats counted.")
    ] = None,
    epochs: Annotated[
        float | None, schedule_option("--epochs", metavar="X", help="Passes over the data; 1 if no length is given.")
    ] = None,
    minutes: Annotated[
        float | None, schedule_option("--minutes", metavar="X", help="By the clock, from the first step on.")
    ] = None,
    batch_tokens: Annotated[
        int, schedule_option("--batch-tokens", metavar="N", min=1, help="Tokens a step, rounded to whole contexts.")
    ] = 8192,
    optimizer: Annotated[
        str,
        schedule_option(
            "--optimizer", metavar="NAME", help="muon or adamw.", autocompletion=options.one_of("muon", "adamw")
        ),
    ] = "muon",
    lr: Annotated[
        float | None,
        schedule_option("--lr", metavar="X", help="The highest learning rate; fine-tuning has a lower one."),
    ] = None,
    weight_decay: Annotated[float, schedule_option("--weight-decay", metavar="X", help="Of the matrices.")] = 0.1,
    seed: Annotated[
        int | None, schedule_option("--seed", metavar="N", help="Same seed, same run; drawn and told if not set.")
    ] = None,
    eval_every: Annotated[
        int, saving_option("--eval-every", metavar="N", min=0, help="Steps; 0: only at the end.")
    ] = 250,
    save_every: Annotated[
        int, saving_option("--save-every", metavar="N", min=0, help="Steps; 0: only at the end.")
    ] = 1000,
    sample_every: Annotated[
        int | None,
        saving_option("--sample-every", metavar="N", min=0, help="Steps; default: at each evaluation; 0: never."),
    ] = None,
    sample_prompt: Annotated[
        str, saving_option("--sample-prompt", metavar="TEXT", help="What samples go on from.")
    ] = "",
    keep: Annotated[int, saving_option("--keep", metavar="N", min=1, help="Checkpoints to keep.")] = 2,
    save_dtype: Annotated[
        str,
        saving_option(
            "--save-dtype",
            metavar="DTYPE",
            help="Of the model: float32, bfloat16 or float16.",
            autocompletion=options.one_of(*options.DTYPES[1:]),
        ),
    ] = "float32",
    device: Annotated[
        str,
        machine_option(
            "--device",
            metavar="DEVICE",
            help="auto, cpu, cuda, cuda:N or mps.",
            autocompletion=options.one_of(*options.DEVICES),
        ),
    ] = "auto",
    dtype: Annotated[
        str,
        machine_option(
            "--dtype",
            metavar="DTYPE",
            help="float32 or bfloat16; auto: bfloat16 where it is fast.",
            autocompletion=options.one_of(*options.DTYPES[:3]),
        ),
    ] = "auto",
    threads: Annotated[int | None, machine_option("--threads", metavar="N", min=1, help="CPU threads to use.")] = None,
    micro_batch: Annotated[
        int | None, machine_option("--micro-batch", metavar="ROWS", min=1, help="Contexts at once; default: what fits.")
    ] = None,
    compile: Annotated[
        bool | None, machine_option("--compile/--no-compile", help="Default: on CUDA where a short trial gains by it.")
    ] = None,
    checkpoint_activations: Annotated[
        bool | None,
        machine_option(
            "--checkpoint-activations/--no-checkpoint-activations",
            help="Less memory, a third more work; default: on CUDA where it would not fit.",
        ),
    ] = None,
    parallel: Annotated[
        str,
        machine_option(
            "--parallel",
            metavar="WAY",
            help="Under torchrun: auto, ddp or fsdp.",
            autocompletion=options.one_of("auto", "ddp", "fsdp"),
        ),
    ] = "auto",
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
    if strength["gpus"] >= options.TYPED:
        raise UsageError("--gpus goes with --plan", "say --plan too, or leave --gpus out")
    if out is None:
        raise UsageError("there is no folder to write to", "name one with --out DIR")
    if resume and force:
        raise UsageError("--resume goes on with what --force would replace", "give one of them")
    typed = {name for name, source in strength.items() if source >= options.TYPED}
    resumed = read_resumed(said, asked, out, typed) if resume else None
    asked = resumed.asked if resumed else asked
    if not asked.data and "-" not in asked.valid and stdin_has_data():
        asked = replace(asked, data=("-",))
    check(asked)
    if not asked.data:
        missing = (
            f"there is no checkpoint in {out}, and nothing to train on" if resume else "there is nothing to train on"
        )
        raise UsageError(missing, "name DATA: texts, folders, or - for standard input")
    if resume and not resumed:
        said.note(f"there is no checkpoint in {out}: training starts at step 0")
    go(said, asked, out, resumed=resumed, replacing=force or resume)
