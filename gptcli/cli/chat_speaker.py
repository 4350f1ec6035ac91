"""Who answers in a conversation: a model in this process, whatever else may stand in for it later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from gptcli.cli.out import Output
from gptcli.spec.config import ModelConfig
from gptcli.spec.library import Found

if TYPE_CHECKING:
    from gptcli.cli.chat_settings import Settings
    from gptcli.core.build import Model
    from gptcli.core.requests import Step
    from gptcli.serve.client import WarmModel
    from gptcli.text.tokenizer import Tokenizer


class Speaker(Protocol):
    """Makes answers, one at a time.

    Attributes:
        name, folder, config, tokenizer: the model's; ``known_as`` finds it again, wherever it is asked for.
        used: what computes it, as every report names it.
        load_seconds: that it took to load.
    """

    name: str
    known_as: str
    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer
    used: dict[str, str]
    load_seconds: float

    def answer(self, ids: Sequence[int], seed: int, settings: Settings, stop: Sequence[str]) -> Iterator[Step]:
        """The steps of one answer; the last has its ``finish``, unless ``hush`` ended it.

        Args:
            ids: of the prompt; their beginning, where it was read before, should cost nothing.
            seed: of this answer; that of the settings does not count.
            settings: how to draw, how long.
            stop: strings that end it, those of the settings among them.
        """
        ...

    def hush(self) -> None:
        """End the answer that is being made; may be called at any moment, from a signal handler too."""

    def close(self) -> None:
        """Let the model go."""


class EngineSpeaker:
    """A model in this process: an engine with one caller, which remembers the keys and values of what it read."""

    def __init__(self, model: Model, found: Found) -> None:
        from gptcli.serve.engine import Engine

        self.name, self.config, self.tokenizer = model.name, model.config, model.tokenizer
        self.folder, self.known_as = found.folder, _known_as(found)
        self.used, self.load_seconds = model.used, model.load_seconds
        self._steps: SimpleQueue[Any] = SimpleQueue()  # its put may interrupt itself
        self._hushed = False
        self.engine = Engine(model, self._steps.put)

    def answer(self, ids: Sequence[int], seed: int, settings: Settings, stop: Sequence[str]) -> Iterator[Step]:
        from gptcli.core.requests import Request
        from gptcli.serve.engine import Ticket

        request = Request(ids, seed, settings.max_tokens, stop)
        self._hushed = False
        ticket = self.engine.submit(Ticket(request, settings.sampling))
        try:
            while not self._hushed:
                # What an earlier answer still had to say when it was ended is not for this one.
                for whose, steps in self._steps.get() or ():
                    if whose is ticket:
                        yield from steps
                        if ticket.error is not None:
                            raise ticket.error
                        if steps and steps[-1].finish is not None:
                            return
        finally:
            ticket.cancel()

    def hush(self) -> None:
        self._hushed = True
        self._steps.put(None)  # whoever waits sees it

    def close(self) -> None:
        self.engine.close()


class WarmSpeaker:
    """A model in a warm process."""

    def __init__(self, warm: WarmModel, found: Found, out: Output) -> None:
        from gptcli.cli.opening import open_tokenizer
        from gptcli.spec.config import read_config

        self._warm = warm
        self.name, self.used, self.load_seconds = warm.name, warm.used, warm.load_seconds
        self.config, self.tokenizer = read_config(found.folder), open_tokenizer(found, out)
        self.folder, self.known_as = found.folder, _known_as(found)
        self._hushed = False

    def answer(self, ids: Sequence[int], seed: int, settings: Settings, stop: Sequence[str]) -> Iterator[Step]:
        from gptcli.core.requests import Request
        from gptcli.serve.client import GoneError

        self._hushed = False
        request = Request(ids, seed, settings.max_tokens, stop)
        try:
            yield from self._warm.generate([request], settings.sampling)
        except GoneError:
            if not self._hushed:
                raise

    def hush(self) -> None:
        self._hushed = True
        self._warm.client.interrupt()

    def close(self) -> None:
        self._warm.client.close()


def _known_as(found: Found) -> str:
    """What finds a model again, wherever it is asked for."""
    return str(found.folder.resolve()) if found.source == "folder" else found.name


def open_speaker(
    name: str | None, out: Output, *, warm: bool | None, threads: int | None = None, **asked: Any
) -> Speaker:
    """The warm model, as ``open_runner`` finds it, or one that is loaded; ``asked`` is for ``open_for_inference``."""
    from gptcli.cli.opening import find, open_for_inference
    from gptcli.cli.warm import find_warm

    if warm or (warm is None and threads is None):
        found = find_warm(name, out, asked, start=bool(warm), threads=threads)
        if found is not None:
            return WarmSpeaker(found, find(name), out)
    return EngineSpeaker(open_for_inference(name, out, threads=threads, **asked), find(name))
