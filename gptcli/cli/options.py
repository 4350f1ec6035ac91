"""The option types that commands share, and how strong the source of a value is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from gptcli.errors import UsageError

# An option that takes no value from the settings: an action of one command, whose name means something else to others.
typed_option = partial(typer.Option, allow_from_autoenv=False)


DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZE = ("none", "int8", "int4")


def one_of(*words: str) -> Callable[[str], list[str]]:
    """What a value that is being typed may become, where it is one of some words."""

    def begun(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return begun


def complete_value(param: Any) -> None:
    """Let a value complete in the shell as its metavar says: one of ``a|b|c``, or a MODEL. Files are the shell's."""
    from gptcli.cli.values import choices_of

    if getattr(param, "_custom_shell_complete", None) is not None:
        return
    choices = choices_of(param)
    names = one_of(*choices) if choices else model_names if param.metavar == "MODEL" else None
    if names is not None:
        param._custom_shell_complete = lambda ctx, param, incomplete: names(incomplete)


def model_names(incomplete: str) -> list[str]:
    """What a model's name that is being typed may become: the models that are here, and folders."""
    from gptcli.spec.library import ALIASES, all_models

    here = [found.name for found in all_models()]
    here += [alias for alias, name in ALIASES.items() if name in here]
    found = sorted(name for name in here if name.startswith(incomplete))
    typed = Path(incomplete)
    parent = Path(incomplete).expanduser() if incomplete.endswith("/") else typed.expanduser().parent
    if incomplete and parent.is_dir():
        begun = "" if incomplete.endswith("/") else typed.name
        before = incomplete.removesuffix(begun) if begun else incomplete
        for folder in sorted(parent.iterdir()):
            if folder.is_dir() and folder.name.startswith(begun) and (begun or not folder.name.startswith(".")):
                is_model = (folder / "config.json").is_file()
                if is_model or "/" in incomplete:
                    found.append(f"{before}{folder.name}{'' if is_model else '/'}")
    return list(dict.fromkeys(found))


Json = Annotated[bool, typer.Option("--json", help="One JSON object, or one a line where results repeat.")]
Format = Annotated[
    str | None, typer.Option("--format", metavar="text|json", help="text, or json (the same as --json).")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No notes on stderr.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More detail on stderr.")]
Color = Annotated[str, typer.Option("--color", metavar="auto|always|never", help="Colour, on a terminal by default.")]

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="A shipped model, a folder, or a Hub id that is cached here.",
        autocompletion=model_names,
    ),
]
Files = Annotated[
    list[Path] | None, typer.Option("--file", "-f", metavar="FILE", help="Read text from a file; may be repeated.")
]
NoStdin = Annotated[bool, typer.Option("--no-stdin", help="Do not read standard input, even if it is a pipe.")]
Strip = Annotated[bool, typer.Option("--strip", help="Take the last newline off piped text.")]
Vi = Annotated[bool, typer.Option("--vi", help="Edit with vi's keys.")]
Errors = Annotated[
    str, typer.Option("--errors", metavar="strict|replace|skip", help="What to do with bytes that are not UTF-8.")
]
Special = Annotated[
    str, typer.Option("--special", metavar="text|parse", help="Whether <|endoftext|> in a text is text or the token.")
]
Device = Annotated[
    str,
    typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.", autocompletion=one_of(*DEVICES)),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", metavar="DTYPE", help="auto, float32, bfloat16 or float16.", autocompletion=one_of(*DTYPES)
    ),
]
Quantize = Annotated[
    str,
    typer.Option("--quantize", metavar="none|int8|int4", help="Keep the matrices in fewer bits: faster, less exact."),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the step first: it takes up to minutes, and pays for long runs.")
]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Same seed, same text; drawn and told if not set.")
]
Threads = Annotated[int | None, typer.Option("--threads", metavar="N", min=1, help="CPU threads to use.")]
Temperature = Annotated[float, typer.Option("--temperature", "-t", metavar="T", help="0: always the likeliest token.")]
TopK = Annotated[int, typer.Option("--top-k", "-k", metavar="K", help="Draw among the K likeliest; 0: all.")]
TopP = Annotated[float, typer.Option("--top-p", metavar="P", help="Draw among the likeliest that make up P.")]
MinP = Annotated[
    float, typer.Option("--min-p", metavar="P", help="Leave out tokens P times less likely than the first.")
]
RepetitionPenalty = Annotated[float, typer.Option("--repetition-penalty", metavar="X", help="Above 1: repeat less.")]
FrequencyPenalty = Annotated[float, typer.Option("--frequency-penalty", metavar="X", help="Off per earlier use.")]
PresencePenalty = Annotated[float, typer.Option("--presence-penalty", metavar="X", help="Off if used before.")]
LogitBias = Annotated[
    list[str] | None, typer.Option("--logit-bias", metavar="ID:BIAS", help="Add to a token's logit; repeatable.")
]
Stop = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this string; repeatable.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network.")]
Pull = Annotated[bool, typer.Option("--pull", help="Get the model from the Hub if it is not here.")]


def common(
    json_: Json = False, format: Format = None, quiet: Quiet = False, verbose: Verbose = False, color: Color = "auto"
) -> None:
    """The options that every command takes; ``Output.configure`` reads them."""


def fetching(pull: Pull = False, offline: Offline = False) -> None:
    """The options of every command that takes a model; the program itself acts on ``--pull`` before the command."""


_SOURCES = ("DEFAULT", "DEFAULT_MAP", "ENVIRONMENT", "COMMANDLINE")
TYPED = len(_SOURCES) - 1


def stronger(ctx: Any, first: str, second: str) -> str | None:
    """Of two options that exclude each other, the one from the stronger source: the command line goes before the
    environment, that before ``config.toml``; None where both come from the same.
    """
    ranks = [strength(ctx, name) for name in (first, second)]
    return None if ranks[0] == ranks[1] else first if ranks[0] > ranks[1] else second


def strength(ctx: Any, name: str) -> int:
    """How strong the source of an option's value is; one of the command line has the most, ``TYPED``."""
    source = getattr(ctx.get_parameter_source(name), "name", "DEFAULT")
    return _SOURCES.index(source) if source in _SOURCES else len(_SOURCES)


def refuse_offline(ctx: Any, name: str) -> None:
    """Raise UsageError where ``--offline`` was typed beside an option that asks for the network.

    One of them from the settings is no contradiction: ``--offline`` there forbids what would be fetched.
    """
    if all(ctx.params.get(option) and strength(ctx, option) == TYPED for option in (name, "offline")):
        raise UsageError(f"--{name} and --offline contradict each other", "give one of them")


def check_seed(seed: int | None) -> None:
    """Raise UsageError for a seed that the noise, or torch's generator, does not take."""
    if seed is not None and not 0 <= seed < 2**63:
        raise UsageError(f"--seed {seed} is out of range", "it should be from 0 up to 2**63 - 1")


def parse_biases(pairs: Sequence[str]) -> dict[int, float]:
    """``ID:BIAS`` as numbers. Raises UsageError for what is not."""
    biases = {}
    for pair in pairs:
        id_, _, value = pair.partition(":")
        try:
            biases[int(id_)] = float(value)
        except ValueError:
            raise UsageError(f"--logit-bias {pair!r} is not ID:BIAS", "for instance --logit-bias 50256:-100") from None
    return biases


def check_biases(biases: Mapping[int, float], name: str, vocab_size: int) -> None:
    """Raise UsageError for a token that the model does not have."""
    if unknown := [id_ for id_ in biases if id_ >= vocab_size]:
        raise UsageError(f"--logit-bias: there is no token {unknown[0]}", f"{name} has {vocab_size:,} tokens")


def choice(name: str, value: str, choices: Sequence[str]) -> str:
    """``value`` if it is one of the choices; else a UsageError that lists them."""
    if value not in choices:
        raise UsageError(f"{name} {value!r} is not a choice", f"use {', '.join(choices)}")
    return value
