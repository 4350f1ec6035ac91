"""What ``gptcli train`` is asked: checked, kept in the run's checkpoints, and compared when the run goes on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.cli import options
from gptcli.cli.metrics import FILE_NAME, Event, read_events
from gptcli.cli.out import Output
from gptcli.errors import CorruptError, GptcliError, UsageError
from gptcli.spec.config import DTYPES

if TYPE_CHECKING:
    from gptcli.train.state import Checkpoint


@dataclass(frozen=True)
class Asked:
    """The options that shape a run. On resuming, those that are not given again are what they were."""

    data: tuple[str, ...]
    valid: tuple[str, ...]
    field: str
    init_from: str | None
    freeze: tuple[str, ...]
    preset: str | None
    config: str | None
    layers: int | None
    heads: int | None
    width: int | None
    context: int | None
    vocab_size: int | None
    tokenizer: str | None
    steps: int | None
    tokens: int | None
    epochs: float | None
    minutes: float | None
    batch_tokens: int
    optimizer: str
    lr: float | None
    weight_decay: float
    mask_documents: bool
    seed: int | None
    dtype: str
    compile: bool | None
    micro_batch: int | None
    checkpoint_activations: bool | None
    # From here on a resumed run may be asked for something else.
    eval_every: int
    save_every: int
    sample_every: int | None
    sample_prompt: str
    keep: int
    device: str
    save_dtype: str
    threads: int | None
    parallel: str
    gpus: str | None

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Asked:
        """From the command's parameters by name, or from the JSON of a checkpoint. Raises KeyError without one."""

        def plain(value: Any) -> Any:
            return tuple(value) if isinstance(value, list) else str(value) if isinstance(value, Path) else value

        values: dict[str, Any] = {name: plain(params[name]) for name in _NAMES}
        values |= {name: () for name in ("data", "valid", "freeze") if values[name] is None}
        return cls(**values)


_NAMES = [field.name for field in fields(Asked)]
_FIXED = _NAMES[: _NAMES.index("eval_every")]
_LENGTHS = ("steps", "tokens", "epochs", "minutes")
_SHAPE = ("layers", "heads", "width", "context")
_TOGETHER = ("init_from", "context")


# --- Checking


def check(asked: Asked) -> None:
    """Refuse what can't be meant, before anything heavy is imported."""
    _exclude(asked, _LENGTHS, "both say how long to train")
    for name in ("lr", "epochs", "minutes"):
        value = getattr(asked, name)
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"--{name} {value} is not above 0", f"give --{name} a positive number")
    if not 0 <= asked.weight_decay < float("inf"):
        raise UsageError(f"--weight-decay {asked.weight_decay} is out of range", "it should be 0 or more")
    if [*asked.data, *asked.valid].count("-") > 1 or ("-" in asked.data and asked.vocab_size is not None):
        raise UsageError("stdin can be read only once", "put the text into a file")
    _check_size(asked)
    options.check_seed(asked.seed)
    options.choice("--save-dtype", asked.save_dtype, DTYPES)
    options.choice("--optimizer", asked.optimizer, ("muon", "adamw"))
    options.choice("--parallel", asked.parallel, ("auto", "ddp", "fsdp"))
    if asked.dtype == "float16":
        raise UsageError("training in float16 needs loss scaling, which is not here", "use bfloat16 or float32")


def _check_size(asked: Asked) -> None:
    for name in _SHAPE:
        # Of a model that is there, --context says only how much of it a row of training fills.
        others = ("preset", "config") if name == "context" else ("preset", "config", "init_from")
        _exclude(asked, (*others, name), "both give a size")
    _exclude(asked, ("preset", "config", "init_from"), "both give a size")
    _exclude(asked, ("vocab_size", "tokenizer"), "both say which tokenizer")
    for name in ("vocab_size", "tokenizer"):
        if asked.init_from and getattr(asked, name) is not None:
            raise UsageError(f"{flag(name)} would replace the tokenizer that --init-from comes with", "leave it out")
    if asked.freeze and not asked.init_from:
        raise UsageError("--freeze without --init-from would keep random weights", "name a model with --init-from")


def _exclude(asked: Asked, names: tuple[str, ...], why: str) -> None:
    given = [flag(name) for name in names if getattr(asked, name) is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} {why}", "give one of them")


def flag(name: str) -> str:
    """What a person types for a parameter."""
    return "DATA" if name == "data" else f"--{name.replace('_', '-')}"


def without_weaker(asked: Asked, rank: Mapping[str, int]) -> Asked:
    """``asked`` without what the settings say where the command line says otherwise.

    ``rank`` is how strong the source of each parameter is. ``--steps`` beside ``minutes`` in ``config.toml``, or
    ``--preset`` beside ``layers`` there, then is no contradiction.
    """
    sizes = ("preset", "config", "init_from")
    against = [(one, other) for one in _LENGTHS for other in _LENGTHS]
    against += [(one, other) for one in sizes for other in (*sizes, *_SHAPE) if (one, other) != _TOGETHER]
    against += [("vocab_size", "tokenizer"), ("init_from", "vocab_size"), ("init_from", "tokenizer")]
    given = {name for name in _NAMES if getattr(asked, name) is not None}
    weaker: dict[str, Any] = {
        one if rank[one] < rank[other] else other: None
        for one, other in against
        if one in given and other in given and rank[one] != rank[other]
    }
    return replace(asked, **weaker)


# --- Going on


@dataclass(frozen=True)
class Resumed:
    """The checkpoint to go on from, what the run is asked now, and its last event if there is nothing left to do."""

    asked: Asked
    checkpoint: Checkpoint
    done: Event | None


def to_keep(asked: Asked) -> dict[str, Any]:
    """What a checkpoint keeps of the options, as JSON: as they were given, and where paths began."""
    return {"asked": {name: getattr(asked, name) for name in _NAMES}, "cwd": os.getcwd()}


def read_resumed(said: Output, asked: Asked, out: Path, given: set[str]) -> Resumed | None:
    """The run to go on with, from the last whole checkpoint in ``out``; None where there is none.

    ``given`` are the options of the command line. Raises UsageError naming those that differ from what the run began
    with, and where there is a model without a checkpoint: it would be replaced by one that knows nothing yet.
    """
    from gptcli.core import runtime
    from gptcli.train.state import checkpoints

    place = runtime.rank_place()
    if place is not None and place.rank:
        said.silence()
    found = next(checkpoints(out), None)
    if found is None:
        if (out / "config.json").exists():
            hint = "fine-tune it with --init-from, name another folder, or replace it with --force"
            raise UsageError(f"{out} holds a model, but no checkpoint to go on from", hint)
        return None
    try:
        kept = found.state["options"]
        before, there = Asked.of(kept["asked"]), str(kept["cwd"])
    except (KeyError, TypeError, AttributeError):
        raise CorruptError(f"{found.folder} does not say what it was asked", "start anew with --force") from None
    here = os.getcwd()
    changed = [name for name in _FIXED if name in given and not _same(name, asked, here, before, there)]
    if changed:
        names = ", ".join(flag(name) + _was(name, before) for name in changed)
        hint = "resume without it, or start anew with --force"
        raise UsageError(f"changed since the run in {out} began: {names}", hint)
    again = {name: getattr(asked, name) for name in _NAMES if name in given}
    return Resumed(replace(_seen_from(before, there, here), **again), found, _last_event(out, found.step))


def _was(name: str, before: Asked) -> str:
    value = getattr(before, name)
    if name == "data" or isinstance(value, bool):
        return ""
    told = ", ".join(value) if isinstance(value, tuple) else value
    return " (was not given)" if told in (None, "") else f" (was {told})"


def _same(name: str, asked: Asked, here: str, before: Asked, there: str) -> bool:
    """Whether an option says the same, or names the same files from elsewhere."""
    if getattr(asked, name) == getattr(before, name):
        return True
    return name in _PATHS and _placed(name, asked, here) == _placed(name, before, there)


_PATHS = ("data", "valid", "config", "init_from", "tokenizer")


def _seen_from(before: Asked, there: str, here: str) -> Asked:
    """What was asked in one folder, as it would have been asked in another."""
    return before if here == there else replace(before, **{name: _placed(name, before, there) for name in _PATHS})


def _placed(name: str, asked: Asked, cwd: str) -> Any:
    """An option's paths, whole. A model may also be named in other ways."""

    def whole(path: str) -> str:
        return os.path.normpath(os.path.join(cwd, os.path.expanduser(path)))

    value = getattr(asked, name)
    if isinstance(value, tuple):
        return tuple(path if path == "-" else whole(path) for path in value)
    if value is None or (name != "config" and not os.path.isdir(whole(value))):
        return value
    return whole(value)


def _last_event(out: Path, step: int) -> Event | None:
    """The event ``done`` of a run that ended at this step, with its model in place."""
    try:
        last = read_events(out / FILE_NAME)[-1]
    except (GptcliError, IndexError):
        return None
    complete = last["event"] == "done" and last.get("step") == step and (out / "config.json").is_file()
    return last if complete else None
