"""A model that is warm in another process where there is one, else loaded here; and how such a process is started."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from gptcli import __version__
from gptcli.cli.out import Output
from gptcli.errors import CheckError, GptcliError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from gptcli.core.distribution import Continuation, Distribution
    from gptcli.core.group import Line
    from gptcli.core.requests import Request, Step, Timing
    from gptcli.core.settings import Sampling
    from gptcli.serve.client import WarmModel
    from gptcli.serve.place import Place

Warm = Annotated[
    bool | None,
    typer.Option(
        "--warm/--no-warm", help="Keep the model warm in a process for the next commands; or use none that is there."
    ),
]

# Minutes without a request after which a process that was started on demand leaves.
IDLE_MINUTES = 15


class Runner(Protocol):
    """A model here (``core.runner.LocalModel``) or in a warm process (``serve.client.WarmModel``)."""

    name: str
    used: dict[str, str]
    load_seconds: float
    draft_name: str | None
    context: int
    vocab_size: int

    @property
    def told(self) -> str: ...

    @property
    def fell_back(self) -> bool: ...

    def prompt_ids(self, text: str, *, special: bool = False) -> list[int]: ...

    def encode(self, text: str, *, special: bool = False, follows: bool = False) -> list[int]: ...

    def token_text(self, id_: int) -> str: ...

    def token_bytes(self, id_: int) -> bytes: ...

    def distributions(
        self, prompts: Sequence[Sequence[int]], temperatures: Sequence[float], top: int
    ) -> list[list[Distribution]]: ...

    def continuations(
        self, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[int]]
    ) -> list[list[Continuation]]: ...

    def complete(self, prefix: str, **asked: Any) -> dict[str, Any]: ...

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        logprobs: int | None = None,
        slide: bool = False,
        timing: Timing | None = None,
    ) -> Iterator[Step]: ...


def open_runner(
    name: str | None,
    out: Output,
    *,
    warm: bool | None,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str = "none",
    threads: int | None = None,
    timeout: float | None = None,
    compile: bool = False,
    draft: str | None = None,
    line: Line | None = None,
    offload: bool = False,
) -> Runner:
    """A model for a command: the warm one if it is just what would be loaded, else loaded now.

    With ``warm`` true a process is started where none serves the model; with false none is looked for. ``threads``
    are this process's, so whoever asks for some is not served by another, unless by one that is started. Of a warm
    one each answer may take ``timeout`` seconds; else it is a LateError.

    ``compile``, ``draft`` (the name of a model, or ``none``), ``line`` and ``offload`` are of this command alone, so
    the model is loaded here.
    """
    asked: dict[str, Any] = {"device": device, "dtype": dtype, "quantize": quantize}
    drafting = draft not in (None, "none")
    if drafting and line is not None:
        raise UsageError("--draft-model and --tp do not go together", "leave out one of them")
    own = compile or drafting or line is not None or offload
    if warm and own:
        raise UsageError("--compile, --draft-model, --tp and --offload need a model of their own", "leave out --warm")
    if warm or (warm is None and threads is None and not own):
        found = find_warm(name, out, asked, start=bool(warm), threads=threads, timeout=timeout)
        if found is not None:
            return found
    from gptcli.cli.opening import open_for_inference

    model = open_for_inference(name, out, threads=threads, compile=compile, line=line, offload=offload, **asked)
    drafter = open_for_inference(draft, out, threads=threads, **asked) if drafting else None
    from gptcli.core.runner import LocalModel

    return LocalModel(model, draft=drafter, lookup=draft is None)


def find_warm(
    name: str | None,
    out: Output,
    asked: Mapping[str, str],
    *,
    start: bool = False,
    threads: int | None = None,
    timeout: float | None = None,
) -> WarmModel | None:
    """The warm process of a model, if it is there and has it as ``asked``; with ``start`` it is started if not.

    None where there is none to be had; ``-v`` says why.
    """
    from gptcli.cli.opening import find
    from gptcli.serve.place import Place, listens, runtime_folder

    folder = find(name).folder
    place = Place.of(runtime_folder(), folder)
    if not start and not place.socket.exists():
        return None
    from gptcli.serve.client import Client, GoneError, LateError, WarmModel

    started = start_process(place, folder, asked, threads) if start and not listens(place) else None
    try:
        warm = WarmModel(Client(place, timeout), {**asked, "version": __version__})
    except CheckError as other:
        if not start:
            out.detail(f"{other.message}: the model is loaded here")
            return None
        raise
    except LateError:
        raise
    except GoneError as gone:
        if started:
            _wait(started)
            raise why_it_ended(place, gone) from None
        out.detail(f"{gone.message}: the model is loaded here")
        return None
    out.detail(f"{warm.name} from the warm process at {place.socket}")
    return warm


def start_process(place: Place, folder: Path, asked: Mapping[str, str], threads: int | None = None) -> Any:
    """Start ``gptcli serve`` on its own, and return when somebody listens at the place, or it has failed.

    Returns the process. Raises UnsupportedError where what it needs is not installed.
    """
    import subprocess

    check_extra()
    ready, told = os.pipe()
    options = [f"--{key}={value}" for key, value in asked.items()]
    if threads is not None:
        options.append(f"--threads={threads}")
    command = [sys.executable, "-m", "gptcli", "serve", "--model", str(folder), f"--idle={IDLE_MINUTES}"]
    # What this command was told by the environment is in the options; the rest is none of the process's business, but
    # whether its log is to have tracebacks.
    told_apart = {key for key in os.environ if key.startswith("GPTCLI_") and key != "GPTCLI_DEBUG"}
    environment = {key: value for key, value in os.environ.items() if key not in told_apart}
    try:
        log = place.open_log()
        try:
            process = subprocess.Popen(
                [*command, *options, f"--ready-fd={told}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=[told],
                env=environment,
                cwd="/",
                start_new_session=True,
            )
        finally:
            os.close(log)
            os.close(told)
        os.read(ready, 1)
    finally:
        os.close(ready)
    return process


def check_extra() -> None:
    """Raise UnsupportedError where the packages of the extra ``serve`` are missing."""
    from importlib.util import find_spec

    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise UnsupportedError(f"a warm process needs {' and '.join(missing)}", "pip install 'gptcli[serve]'")


def _wait(process: Any) -> None:
    """Until a process that has let go of us has said why."""
    import subprocess

    with suppress(subprocess.TimeoutExpired):
        process.wait(60)


def why_it_ended(place: Place, gone: GptcliError) -> GptcliError:
    """The error that a process told before it ended, from its log."""
    with suppress(OSError):
        said = place.log.read_text(errors="replace").splitlines()
        message = next((line.removeprefix("error: ") for line in said if line.startswith("error: ")), "")
        hint = next((line.removeprefix("hint: ") for line in said if line.startswith("hint: ")), "")
        if message:
            return type(gone)(f"the warm process could not start: {message}", hint or "use --no-warm")
    return gone
