"""The native step's library: compiled for this CPU once, found again, and trusted only where all of it fits.

A library is the file ``step-KEY-CONTENT.so`` in a folder that the caller names. KEY stands for the source, the
compiler's flags and the CPU's features, CONTENT for the file's own bytes. So one that was built from another version,
or on another machine with the same home folder, is not even looked at, and a damaged one is never loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gptcli.core import runtime
from gptcli.errors import CorruptError, NotFoundError, OutputError, ResourceError

SOURCE = Path(__file__).parent / "native" / "step.cpp"
PARTS = tuple(SOURCE.parent / name for name in ("draw.h", "tiles.h"))  # that it includes
ABI = 4  # as in step.cpp
COMPILERS = ("c++", "g++", "clang++")
# No -ffast-math: a model whose numbers overflow has to show it.
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-Wno-psabi")
_LONGEST_BUILD = 300  # seconds
_HINT = "gptcli models prepare builds it"


@dataclass(frozen=True)
class Library:
    """A library that was checked and loaded.

    Attributes:
        file: where it is.
        functions: its entry points, as ctypes knows them.
        lanes: rows of a matrix that are computed together.
        features: of the CPU, that it uses, for people.
        compiler: what built it, as it calls itself.
        seconds: how long the build took; None where there was nothing to build.
    """

    file: Path
    functions: ctypes.CDLL
    lanes: int
    features: str
    compiler: str
    seconds: float | None = None

    @property
    def tiles(self) -> bool:
        """Whether bfloat16 is multiplied by tiles, some rows at the price of one."""
        return "AMX" in self.features


def flags() -> tuple[str, ...]:
    """The compiler's flags for this machine."""
    return (*FLAGS, "-mcpu=native" if runtime.machine() in ("arm64", "aarch64") else "-march=native")


def key() -> str:
    """What a library has to be built from and for, in 16 hexadecimal digits."""
    sources = [file.read_bytes() for file in (SOURCE, *PARTS)]
    parts = [*sources, " ".join(flags()).encode(), runtime.cpu_features().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def load(folder: Path) -> Library:
    """The library in ``folder`` for this version and CPU.

    Raises NotFoundError where none was built, CorruptError where it can't be trusted.
    """
    wanted = key()
    found = sorted(folder.glob(f"step-{wanted}-*.so"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise NotFoundError("no native step was built for this version and CPU", _HINT)
    return _load(found[-1], wanted)


def _load(file: Path, wanted: str) -> Library:
    try:
        status, content = file.stat(), _digest(file)
        if status.st_uid not in (os.getuid(), 0) or status.st_mode & 0o022:
            raise CorruptError(f"others may write {file}", f"delete it; {_HINT}")
        if file.stem.rpartition("-")[2] != content:
            raise CorruptError(f"{file} is damaged", _HINT)
        functions = ctypes.CDLL(str(file))
        functions.gptcli_built.restype = functions.gptcli_features.restype = ctypes.c_char_p
        built, _, compiler = functions.gptcli_built().decode().partition(" ")
        if built != wanted or functions.gptcli_abi() != ABI:
            raise CorruptError(f"{file} was built from something else", f"delete it; {_HINT}")
        return Library(file, functions, functions.gptcli_lanes(), functions.gptcli_features().decode(), compiler)
    except (OSError, AttributeError) as error:
        raise CorruptError(f"{file} can't be loaded: {error}", _HINT) from None


def build(folder: Path) -> Library:
    """Compile the library into ``folder``, unless this compiler has done so already, and load it.

    The compiler is the one of CXX, or ``c++``, ``g++``, ``clang++``. Raises ResourceError without one or when it
    fails, OutputError when the folder can't be written, CorruptError when what was built does not load.
    """
    compiler, name = _find_compiler()
    wanted = key()
    try:
        there = load(folder)
        if there.compiler == name:
            return there
    except (NotFoundError, CorruptError):
        pass
    start = time.perf_counter()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=folder) as temporary:
            made = Path(temporary) / "step.so"
            about = f'-DGPTCLI_BUILT="{wanted} {name}"'
            _run([*compiler, *flags(), about, "-o", str(made), str(SOURCE)], temporary)
            made.chmod(0o755)
            file = folder / f"step-{wanted}-{_digest(made)}.so"
            os.replace(made, file)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{folder} could not be written: {reason}", "check its permissions and the disk") from None
    seconds = time.perf_counter() - start
    for old in folder.glob(f"step-{wanted}-*.so"):
        if old != file:
            old.unlink(missing_ok=True)
    return replace(_load(file, wanted), seconds=seconds)


def _find_compiler() -> tuple[list[str], str]:
    """The command of the compiler and the name it gives itself."""
    chosen = runtime.chosen_compiler()
    for command in [shlex.split(chosen)] if chosen else [[name] for name in COMPILERS]:
        if command and shutil.which(command[0]):
            said = _run([*command, "--version"], None)
            # It becomes a C++ string.
            return command, re.sub(r"[^\w .()+~-]", "", said.partition("\n")[0])[:100].strip()
    missing = f"CXX names {chosen!r}, which is not there" if chosen else "there is no C++ compiler here"
    raise ResourceError(missing, "install g++ or clang++ (GCC 11 or Clang 14, or newer), or set CXX")


def _run(command: Sequence[str], folder: str | None) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_LONGEST_BUILD,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ResourceError(f"{command[0]} could not be run: {error}", "set CXX to another C++ compiler") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line] or lines or [f"exit {done.returncode}"]
        hint = "it has to know C++20 (GCC 11 or Clang 14, or newer); set CXX to another"
        raise ResourceError(f"{command[0]} failed: {'; '.join(errors[-3:])}", hint)
    return done.stdout


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
