"""``--tp N`` under torchrun: rank 0 runs the command, and the other ranks do what it does with their part of the model.

Rank 0 alone reads, prints and serves. Whatever it comes to, the others end with it.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli.out import Output
from gptcli.errors import UsageError

if TYPE_CHECKING:
    from gptcli.core.group import Line

_TIME_TO_TELL = 5.0  # seconds

Tp = Annotated[
    int | None,
    typer.Option("--tp", metavar="N", min=1, help="Deal the model out to N processes, started by torchrun."),
]
Offload = Annotated[
    bool, typer.Option("--offload", help="Keep the layers on the host, for a card that the model does not fit.")
]


def join(out: Output, tp: int | None, command: str, *, device: str, threads: int | None = None) -> Line | None:
    """The line to the other ranks that ``--tp`` asks for; None where it asks for none.

    To be called before anything is read. On every rank but the first it does not return: that one follows rank 0 to its
    end, and raises SystemExit. Raises UsageError where as many processes were not started.
    """
    if tp is None or tp == 1:
        return None
    if "RANK" not in os.environ:
        raise UsageError(
            f"--tp {tp} needs {tp} processes, and this is one",
            f"torchrun --nproc-per-node {tp} -m gptcli {command} --tp {tp} ...",
        )
    from gptcli.core import runtime
    from gptcli.core.group import Line

    place = runtime.rank_place()
    count = place.count if place else 1
    if place is None or count != tp:
        were = "process was" if count == 1 else "processes were"
        _first_alone()
        raise UsageError(f"--tp {tp}, and {count} {were} started", f"start torchrun with --nproc-per-node {tp}")
    if place.rank:
        _follow_quietly(out)
    runtime.set_threads(threads)
    line = Line.start(place, device)
    if place.rank == 0:
        atexit.register(line.close)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
        return line
    _follow(out, line)
    raise SystemExit(0)


def follows(args: Sequence[str]) -> bool:
    """Whether a command line, before it is read, is that of a rank for which rank 0 speaks."""
    shared = args[:1] == ["train"] or any(arg.partition("=")[0] == "--tp" for arg in args)
    return shared and os.environ.get("RANK", "0") != "0" and os.environ.get("WORLD_SIZE", "1") != "1"


def let_the_first_speak() -> None:
    """To be called before any other rank ends for what rank 0 finds wrong, too, and alone tells.

    The first process that fails has torchrun end all others, so rank 0 is given the time to.
    """
    time.sleep(_TIME_TO_TELL)


def _first_alone() -> None:
    if os.environ.get("RANK") != "0":
        let_the_first_speak()
        raise SystemExit(2)


def _end_with(parent: int) -> None:
    """On rank 0: end when torchrun was killed, which could not end its processes. The others end with this one."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _follow_quietly(out: Output) -> None:
    """Ctrl-C is for rank 0, which tells the others when it is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    out.silence()


def _follow(out: Output, line: Line) -> None:
    """Wait for rank 0 to open a model, and follow it. Ends the process where rank 0 is gone."""
    from gptcli.core import runtime
    from gptcli.core.build import open_part
    from gptcli.core.following import follow
    from gptcli.errors import GptcliError

    try:
        told = line.hear()
        if told[-1]["do"] == "end":
            return
        asked: dict[str, Any] = {name: value for name, value in told[-1].items() if name != "do"}
        try:
            transformer = open_part(line, **asked)
        except GptcliError as error:
            raise SystemExit(int(error.exit_code)) from None  # rank 0 tells it
        follow(transformer, line)
    except RuntimeError as error:
        if runtime.is_connection_lost(error):
            raise SystemExit(1) from None  # rank 0 has told why, or was killed
        if runtime.is_out_of_memory(error):
            out.stats(f"rank {line.rank}: there is not enough memory")
            raise SystemExit(5) from None
        raise
