"""The errors of gptcli: each knows its exit code, what happened, and what to do about it."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a command's exit status means; the table of the command contract."""

    OK = 0
    FAULT = 1
    USAGE = 2
    NOT_FOUND = 3
    LIMIT = 4
    RESOURCE = 5
    CHECK = 6
    INTERRUPTED = 130


class GptcliError(Exception):
    """Something a person can act on: ``message`` says what happened, ``hint`` what to do."""

    exit_code = ExitCode.FAULT

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @property
    def type(self) -> str:
        """The error's name in JSON: the class name in snake case without ``Error``."""
        words = "".join("_" + c.lower() if c.isupper() else c for c in type(self).__name__.removesuffix("Error"))
        return words.lstrip("_")


class OutputError(GptcliError):
    """An output that could not be written: a full disk, a folder without permission."""

    exit_code = ExitCode.FAULT


class DivergedError(GptcliError):
    """Training whose loss stays away from any number, whatever is tried."""

    exit_code = ExitCode.FAULT


class UsageError(GptcliError):
    """Wrong use: an option out of range, options that exclude each other, nothing to work on."""

    exit_code = ExitCode.USAGE


class NotFoundError(GptcliError):
    """A model, tokenizer, file or server that is not there, or would need the network."""

    exit_code = ExitCode.NOT_FOUND


class CorruptError(GptcliError):
    """Something that is there, but can't be read or trusted: a bad header, bad UTF-8, a wrong shape."""

    exit_code = ExitCode.NOT_FOUND


class NetworkError(GptcliError):
    """A server that can't be reached, breaks off, or has no time; the same command may succeed later."""

    exit_code = ExitCode.NOT_FOUND


class AccessError(GptcliError):
    """Something that is there, but not for whoever asks: a gated or private model, a token that does not count."""

    exit_code = ExitCode.NOT_FOUND


class UnsupportedError(GptcliError):
    """A well-formed model or tokenizer that asks for something gptcli does not have."""

    exit_code = ExitCode.NOT_FOUND


class LimitError(GptcliError):
    """Over a limit: the context length, ``--max``."""

    exit_code = ExitCode.LIMIT


class ResourceError(GptcliError):
    """Not enough memory, or the device asked for is not there."""

    exit_code = ExitCode.RESOURCE


class BusyError(ResourceError):
    """A server that has as much to do as it takes on; later there may be room."""


class CheckError(GptcliError):
    """A check said no."""

    exit_code = ExitCode.CHECK
