"""The other end of ``serve/inner.py``: a model that is warm in another process, as this one sees it.

Little is imported, so that a command that finds a warm model answers before it could have imported torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gptcli import errors
from gptcli.core.distribution import Candidate, Continuation, Distribution
from gptcli.core.requests import Choice, Request, Step, Timing
from gptcli.core.settings import Sampling
from gptcli.errors import GptcliError, NotFoundError
from gptcli.serve.place import Place
from gptcli.serve.wire import Answer, Wire, WireError


class GoneError(NotFoundError):
    """The warm process does not answer, or has ended in the middle of an answer."""


class LateError(GoneError):
    """The warm process did not answer in time."""


class Client:
    """One connection to a warm process; a request at a time."""

    def __init__(self, place: Place, timeout: float | None = None) -> None:
        """Nothing is opened yet. ``timeout``: seconds that any answer may keep one waiting; None waits."""
        self._wire = Wire(place.socket, timeout)

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object that a path gives. Raises GoneError, or the error that the process tells."""
        return self._object(self._ask("GET", path, None))

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """What a path answers to a JSON object. Raises as ``get`` does."""
        return self._object(self._ask("POST", path, body))

    def lines(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The same, of an answer of one object a line, as they come. Whoever stops early hangs up."""
        answer = self._ask("POST", path, body)
        try:
            while line := _or_gone(answer.readline):
                value = json.loads(line)
                if "error" in value:
                    raise error_from(value)
                yield value
        finally:
            if not answer.ended:
                self.close()

    def open(self, timeout: float | None = None) -> None:
        """Connect anew, and from now on with this ``timeout``: ``interrupt`` finds somebody. Raises GoneError."""
        _or_gone(lambda: self._wire.open(timeout))

    def close(self) -> None:
        """Hang up; the next request opens a new connection."""
        self._wire.close()

    def interrupt(self) -> None:
        """Let whoever waits for an answer find that there is none (GoneError); from another thread or a signal."""
        self._wire.interrupt()

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None) -> Answer:
        data = None if body is None else json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
        found: Answer = _or_gone(lambda: self._wire.ask(method, path, data))
        if found.status != 200:
            raise error_from(self._object(found))
        return found

    @staticmethod
    def _object(answer: Answer) -> dict[str, Any]:
        try:
            value = json.loads(_or_gone(answer.read))
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise GoneError("what listens at the socket is no gptcli", "end it, or use --no-warm")
        return value


def _or_gone(ask: Any) -> Any:
    try:
        return ask()
    except TimeoutError:
        raise LateError("the warm process did not answer in time", "give it more, or use --no-warm") from None
    except (OSError, WireError) as error:
        what = type(error).__name__ if not str(error) else str(error)
        raise GoneError(f"the warm process does not answer: {what}", "run it again, or with --no-warm") from None


def error_from(value: Mapping[str, Any]) -> GptcliError:
    """The exception that an error object tells of."""
    told: Any = value.get("error")
    if not isinstance(told, dict):
        return GoneError("what listens at the socket is no gptcli", "end it, or use --no-warm")
    name = "".join(word.capitalize() for word in str(told.get("type", "")).split("_")) + "Error"
    kind = getattr(errors, name, GptcliError)
    known = isinstance(kind, type) and issubclass(kind, GptcliError)
    return (kind if known else GptcliError)(str(told.get("message", "")), str(told.get("hint", "")))


class WarmModel:
    """A model in a warm process, with what commands ask of one.

    Attributes:
        client: how it is asked.
        name, used, context, vocab_size: of the model.
        load_seconds: nothing, which is the point.
        told: how its steps are taken.
        draft_name, fell_back: nothing, either: whoever asks for drafts or compiled steps gets a model of its own.
    """

    load_seconds = 0.0
    draft_name: str | None = None
    fell_back = False

    def __init__(self, client: Client, asked: Mapping[str, str]) -> None:
        """``asked``: device, dtype and quantize as the user has them, and the version of gptcli.

        Raises CheckError where the process has the model otherwise than a command would load it, GoneError where it
        does not answer.
        """
        self.client = client
        opened = client.post("/gptcli/open", asked)
        self.name: str = opened["name"]
        self.used: dict[str, str] = opened["used"]
        self.context: int = opened["context"]
        self.vocab_size: int = opened["vocab_size"]
        self.told: str = opened["step"]
        self._bytes: dict[int, bytes] = {}

    def prompt_ids(self, text: str, *, special: bool = False) -> list[int]:
        """As ``core.generate.prompt_ids``."""
        return self._ids(text, special, prompt=True)

    def encode(self, text: str, *, special: bool = False, follows: bool = False) -> list[int]:
        """The ids of a text alone; with ``follows`` one that goes on with another."""
        return self._ids(text, special, prompt=False, follows=follows)

    def _ids(self, text: str, special: bool, *, prompt: bool, follows: bool = False) -> list[int]:
        asked = {"text": text, "special": special, "prompt": prompt, "follows": follows}
        told = self.client.post("/gptcli/tokens", asked)
        ids: list[int] = told["ids"]
        return ids

    def token_text(self, id_: int) -> str:
        """The text of a token."""
        return self.token_bytes(id_).decode("utf-8", errors="replace")

    def token_bytes(self, id_: int) -> bytes:
        """The bytes of a token, asked for if they were not told with it."""
        if id_ not in self._bytes:
            self._know(self.client.post("/gptcli/pieces", {"ids": [id_]})["pieces"])
        return self._bytes[id_]

    def _know(self, pieces: Mapping[str, str]) -> None:
        self._bytes.update((int(id_), bytes.fromhex(data)) for id_, data in pieces.items())

    def distributions(
        self, prompts: Sequence[Sequence[int]], temperatures: Sequence[float], top: int
    ) -> list[list[Distribution]]:
        """As of ``core.runner.LocalModel``."""
        asked = {"prompts": list(prompts), "temperatures": list(temperatures), "top": top}
        told = self.client.post("/gptcli/predict", asked)
        self._know(told["pieces"])
        return [
            [
                Distribution(**{**each, "top": tuple(Candidate(**candidate) for candidate in each["top"])})
                for each in distributions
            ]
            for distributions in told["distributions"]
        ]

    def continuations(
        self, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[int]]
    ) -> list[list[Continuation]]:
        """As of ``core.runner.LocalModel``."""
        told = self.client.post("/gptcli/predict", {"prompts": list(prompts), "choices": list(choices)})
        return [
            [Continuation(tuple(each["ids"]), tuple(each["logprobs"])) for each in continuations]
            for continuations in told["continuations"]
        ]

    def complete(self, prefix: str, **asked: Any) -> dict[str, Any]:
        """As ``core.complete.complete``, and as plain as ``Completions.plain`` has it."""
        return self.client.post("/gptcli/complete", {"prefix": prefix, **asked})

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        logprobs: int | None = None,
        slide: bool = False,
        timing: Timing | None = None,
    ) -> Iterator[Step]:
        """As ``core.generate.generate``. Raises GoneError too."""
        body = {
            "requests": [asdict(request) for request in requests],
            "sampling": {**asdict(sampling), "logit_bias": dict(sampling.logit_bias)},
            "logprobs": logprobs,
            "slide": slide,
        }
        timing = timing or Timing()
        for line in self.client.lines("/gptcli/generate", body):
            self._know(line.get("pieces", {}))
            if told := line.get("timing"):
                timing.prefill_seconds += told["prefill_seconds"]
                timing.decode_seconds += told["decode_seconds"]
                self.told = told["step"]
                return
            timing.decoded_tokens += 1
            yield self._step(line)
        raise GoneError("the warm process has ended in the middle of the answer", "run it again, or with --no-warm")

    @staticmethod
    def _step(line: Mapping[str, Any]) -> Step:
        chosen = Choice(*line["chosen"]) if "chosen" in line else None
        top = tuple(Choice(*choice) for choice in line.get("top", ()))
        finish, slid = line.get("finish"), line.get("slid", 0)
        return Step(line["row"], line["token"], line["text"], chosen, top, finish, slid)
