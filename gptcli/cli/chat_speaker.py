"""Who answers in a conversation: a model in this process, whatever else may stand in for it later."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
        failed: why there is no model after all.
    """

    name: str
    known_as: str
    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer
    failed: BaseException | None

    @property
    def used(self) -> dict[str, str]: ...

    @property
    def load_seconds(self) -> float: ...

    def begin(self) -> None:
        """Somebody types: the model may be needed soon."""

    def wait(self) -> None:
        """Until an answer can begin, or ``hush``. Raises what keeps the model from being there."""

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

    failed: BaseException | None = None

    def __init__(self, model: Model, found: Found) -> None:
        from gptcli.serve.engine import Engine

        self.name, self.config, self.tokenizer = model.name, model.config, model.tokenizer
        self.folder, self.known_as = found.folder, _known_as(found)
        self.used, self.load_seconds = model.used, model.load_seconds
        self._steps: SimpleQueue[Any] = SimpleQueue()  # its put may interrupt itself
        self._hushed = False
        self.engine = Engine(model, self._steps.put)

    def begin(self) -> None:
        pass

    def wait(self) -> None:
        pass

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

    failed: BaseException | None = None

    def __init__(self, warm: WarmModel, found: Found, out: Output) -> None:
        from gptcli.cli.opening import open_tokenizer
        from gptcli.spec.config import read_config

        self._warm = warm
        self.name, self.used, self.load_seconds = warm.name, warm.used, warm.load_seconds
        self.config, self.tokenizer = read_config(found.folder), open_tokenizer(found, out)
        self.folder, self.known_as = found.folder, _known_as(found)
        self._hushed = False

    def begin(self) -> None:
        pass

    def wait(self) -> None:
        pass

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


class LoadingSpeaker:
    """A model that loads on a thread of its own, while somebody types; what is known without it, is known at once.

    Importing torch keeps the interpreter to itself for moments at a time: whoever has something to show first, shows it
    before ``begin``.
    """

    def __init__(self, found: Found, out: Output, load: Callable[[Output], Speaker]) -> None:
        """``load`` makes the speaker, and says what it has to say to the output that it is given.

        Raises what is wrong with the model's configuration and tokenizer.
        """
        from threading import Lock

        from gptcli.cli.opening import open_tokenizer
        from gptcli.spec.config import read_config

        self._later = _Later(out)
        self.config, self.tokenizer = read_config(found.folder), open_tokenizer(found, self._later)
        self._later.tell()
        self.name, self.folder, self.known_as = found.name, found.folder, _known_as(found)
        self.failed: BaseException | None = None
        self._speaker: Speaker | None = None
        self._woken: SimpleQueue[None] = SimpleQueue()  # its put may interrupt itself
        self._hushed = self._closed = False
        self._lock = Lock()  # of what close and the thread both look at
        self._to_load = load
        self._begun = False

    def begin(self) -> None:
        """Let the model load; ``wait`` does it at the latest."""
        from threading import Thread

        if not self._begun:
            self._begun = True
            Thread(target=self._load, name="load", daemon=True).start()

    def _load(self) -> None:
        try:
            made = self._to_load(self._later)
            with self._lock:
                if not self._closed:
                    self._speaker = made
                    return
            made.close()
        except BaseException as error:
            self.failed = error
        finally:
            self._woken.put(None)

    @property
    def used(self) -> dict[str, str]:
        return self._speaker.used if self._speaker else {}

    @property
    def load_seconds(self) -> float:
        return self._speaker.load_seconds if self._speaker else 0.0

    def wait(self) -> None:
        self.begin()
        while not (self._speaker or self.failed or self._hushed):
            self._woken.get()
        if self.failed:
            raise self.failed
        self._later.tell()

    def answer(self, ids: Sequence[int], seed: int, settings: Settings, stop: Sequence[str]) -> Iterator[Step]:
        try:
            if self._speaker and not self._hushed:
                yield from self._speaker.answer(ids, seed, settings, stop)
        finally:
            self._hushed = False  # it was for this answer

    def hush(self) -> None:
        self._hushed = True
        self._woken.put(None)
        if self._speaker:
            self._speaker.hush()

    def close(self) -> None:
        with self._lock:
            self._closed = True
        if self._speaker:
            self._speaker.close()


class _Later(Output):
    """Says nothing until it is told to: a line is being typed, and what it says would stand in it."""

    def __init__(self, out: Output) -> None:
        super().__init__(out.stdout, out.stderr, json=out.json)
        self.quiet, self.verbose, self.color = out.quiet, out.verbose, out.color
        self._out, self._said, self._told = out, list[tuple[str, str]](), set[tuple[str, str]]()

    def note(self, message: str) -> None:
        self._said.append(("note", message))

    def detail(self, message: str) -> None:
        self._said.append(("detail", message))

    def tell(self) -> None:
        """Say it now, and nothing twice."""
        said, self._said = self._said, []
        for each in said:
            if each not in self._told:
                self._told.add(each)
                getattr(self._out, each[0])(each[1])


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


def begin_speaker(
    name: str | None, out: Output, *, warm: bool | None, threads: int | None = None, **asked: Any
) -> Speaker:
    """As ``open_speaker``, but at once: the model loads in the background, and an answer waits for it."""
    from gptcli.cli.opening import find

    def load(later: Output) -> Speaker:
        return open_speaker(name, later, warm=warm, threads=threads, **asked)

    return LoadingSpeaker(find(name), out, load)
