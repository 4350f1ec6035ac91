"""Whoever is asked for ghost text: loads in the background, answers the last question, drops what nobody waits for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptcli.cli.edit_ask import COLD, FAILED, LOADING, WARM, Answer, Asker, Asking, Question, begin
from gptcli.cli.edit_ghost import Found
from gptcli.errors import CorruptError, GptcliError
from gptcli.serve.client import Client, GoneError, WarmModel
from tests.cli.shells import StandIn

_PATIENCE = 180  # seconds, far beyond what anything here takes


def result(*texts: str, late: bool = False, known: int = 0) -> dict[str, Any]:
    return {"completions": [{"text": text, "probability": 0.5} for text in texts], "late": late, "known": known}


class Runner:
    """A model of our own that answers what a test says; between two steps it looks at the clock."""

    name, used, context = "stood in", {"device": "cpu"}, 64

    def __init__(self, answer: Callable[[str, dict[str, Any]], dict[str, Any]]) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._answer = answer

    def complete(self, prefix: str, **asked: Any) -> dict[str, Any]:
        self.asked.append((prefix, asked))
        return self._answer(prefix, asked)


class Talk:
    """An asker that has begun, and what it says."""

    def __init__(self, asker: Asker) -> None:
        self.asker = asker
        self.states: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[tuple[Question, Answer]] = queue.SimpleQueue()
        asker.start(lambda: self.states.put(asker.state), lambda *told: self.answers.put(told))

    def state(self) -> str:
        return self.states.get(timeout=_PATIENCE)

    def answer(self) -> tuple[Question, Answer]:
        return self.answers.get(timeout=_PATIENCE)

    def ask(self, before: str, after: str = "", **more: Any) -> Answer:
        question = Question(before, after, **more)
        self.asker.ask(question)
        whose, answer = self.answer()
        assert whose is question
        return answer


@pytest.fixture
def talk() -> Iterator[Callable[..., Talk]]:
    """Begin to talk with a runner, or with what is called to open one."""
    begun: list[Talk] = []

    def start(runner: Any = None, find: Callable[[], Any] = lambda: None, **asking: Any) -> Talk:
        load = runner if callable(runner) else lambda: runner
        begun.append(Talk(Asker("tiny", find, load, Asking(**asking))))
        return begun[-1]

    yield start
    for each in begun:
        each.asker.close()


def test_a_model_loads_and_answers_as_it_is_asked(talk: Callable[..., Talk]) -> None:
    runner = Runner(lambda prefix, asked: result(" time"))
    said = talk(runner, deadline_seconds=0.5, until="word", max_tokens=7)
    assert said.asker.name in ("tiny", "stood in")
    assert [said.state(), said.state()] == [LOADING, COLD]
    assert (said.asker.name, said.asker.used) == ("stood in", {"device": "cpu"})
    assert said.ask("Once upon a", " there", num=3, min_prob=0.25) == [Found(" time", 0.5)]
    ((prefix, asked),) = runner.asked
    assert prefix == "Once upon a"
    kept = {"prefixes", "clock"}
    assert {name: value for name, value in asked.items() if name not in kept} == {
        "suffix": " there",
        "num": 3,
        "max_tokens": 7,
        "until": "word",
        "min_prob": 0.25,
        "deadline_seconds": 0.5,
    }
    assert kept <= asked.keys()


def test_blanks_behind_the_cursor_are_no_suffix(talk: Callable[..., Talk]) -> None:
    runner = Runner(lambda prefix, asked: result(" time"))
    talk(runner).ask("Once", "\n\n")
    assert runner.asked[0][1]["suffix"] == ""


def test_only_what_may_fit_the_context_is_sent(talk: Callable[..., Talk]) -> None:
    runner = Runner(lambda prefix, asked: result(" time"))
    said = talk(runner)
    text = "".join(f"{number} " for number in range(10_000))
    said.ask(text, text)
    prefix, asked = runner.asked[0]
    assert text.endswith(prefix)
    assert 3 * 64 * 16 // 4 < len(prefix) <= 64 * 16
    assert len(asked["suffix"]) <= 512


def test_what_is_sent_begins_at_the_same_place_for_many_keys() -> None:
    places = [begin(length, 64) for length in range(10_000)]
    assert places[:1025] == [0] * 1025
    assert all(length - place <= 1024 for length, place in enumerate(places))
    assert len(set(places)) <= 1 + (10_000 - 1024) / 256 + 1
    assert begin(10**7, 10**6) >= 10**7 - (1 << 19)


def test_no_question_waits_for_another_that_nobody_waits_for(talk: Callable[..., Talk]) -> None:
    """A computation stops at the next look at the clock."""
    computing = threading.Event()

    def answer(prefix: str, asked: dict[str, Any]) -> dict[str, Any]:
        if prefix == "slow":
            computing.set()
            while True:
                asked["clock"]()
        return result(" fast")

    said = talk(Runner(answer))
    said.asker.ask(Question("slow", ""))
    assert computing.wait(_PATIENCE)
    assert said.ask("quick") == [Found(" fast", 0.5)]
    assert said.answers.empty()  # the dropped one has no answer


def test_a_question_that_is_cancelled_has_no_answer(talk: Callable[..., Talk]) -> None:
    computing, stopped = threading.Event(), threading.Event()

    def answer(prefix: str, asked: dict[str, Any]) -> dict[str, Any]:
        if prefix != "slow":
            return result(" fast")
        computing.set()
        try:
            while True:
                asked["clock"]()
        finally:
            stopped.set()

    said = talk(Runner(answer))
    said.asker.ask(Question("slow", ""))
    assert computing.wait(_PATIENCE)
    said.asker.cancel()
    assert stopped.wait(_PATIENCE)
    assert said.ask("quick") == [Found(" fast", 0.5)]
    assert said.answers.empty()


def test_what_is_asked_while_it_loads_is_answered_then_the_last_question_alone(talk: Callable[..., Talk]) -> None:
    may_load = threading.Event()
    runner = Runner(lambda prefix, asked: result(f" after {prefix}"))

    def load() -> Runner:
        assert may_load.wait(_PATIENCE)
        return runner

    said = talk(load)
    assert said.state() == LOADING
    said.asker.ask(Question("one", ""))
    said.asker.ask(last := Question("two", ""))
    may_load.set()
    assert said.answer() == (last, [Found(" after two", 0.5)])
    assert [prefix for prefix, _ in runner.asked] == ["two"]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (CorruptError("the weights are damaged", "get them again"), "the weights are damaged"),
        (MemoryError(), "there is not enough memory"),
        (ValueError("a bug"), "ValueError: a bug"),
    ],
)
def test_without_a_model_it_says_why_and_answers_nothing(talk: Callable[..., Talk], error: Exception, why: str) -> None:
    def load() -> Runner:
        raise error

    said = talk(load)
    assert [said.state(), said.state()] == [LOADING, FAILED]
    assert said.asker.why == why
    assert said.ask("x") == []


def test_an_error_is_an_answer(talk: Callable[..., Talk]) -> None:
    def answer(prefix: str, asked: dict[str, Any]) -> dict[str, Any]:
        raise CorruptError("not finite", "hint") if prefix == "a" else ValueError("a bug")

    said = talk(Runner(answer))
    first, second = said.ask("a"), said.ask("b")
    assert isinstance(first, CorruptError)
    assert isinstance(second, GptcliError)
    assert second.message == "ValueError: a bug"


def test_what_a_terminal_would_obey_is_left_out_and_so_is_what_then_is_the_same(talk: Callable[..., Talk]) -> None:
    texts = (" a\x1b[2J", "\x1b]0;", " a", " b")
    assert talk(Runner(lambda prefix, asked: result(*texts))).ask("x") == [Found(" a", 0.5), Found(" b", 0.5)]


def test_too_late_for_an_answer_it_goes_on_while_more_of_the_text_gets_known(talk: Callable[..., Talk]) -> None:
    answers = iter([result(late=True), result(late=True, known=64), result(" at last", late=True, known=128)])
    said = talk(Runner(lambda prefix, asked: next(answers)))
    assert said.ask("long") == [Found(" at last", 0.5)]
    again = talk(Runner(lambda prefix, asked: result(late=True, known=5)))
    assert again.ask("long") == []


def test_a_real_model_answers_and_stops_between_two_tokens(talk: Callable[..., Talk], tiny_folder: Path) -> None:
    from gptcli.core.build import open_model
    from gptcli.core.runner import LocalModel
    from gptcli.text.tokenizer import Tokenizer

    model = open_model(tiny_folder, Tokenizer.from_folder(tiny_folder), device="cpu", dtype="float32")
    local = LocalModel(model)
    expected = local.complete("Once upon a", num=1)["completions"]
    said = talk(local, deadline_seconds=600.0)
    found = said.ask("Once upon a")
    assert isinstance(found, list)
    assert [each.probability for each in found] == pytest.approx([each["probability"] for each in expected])
    # Dropped before its first step, it takes none.
    question = Question("Once upon", "")
    question.dropped = True
    assert said.asker._answer(question) == []


# --- A warm process


@pytest.fixture
def served(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., tuple[StandIn, Callable[[], WarmModel]]]]:
    """A stand-in for a warm process, and what finds it."""
    servers: list[StandIn] = []

    def serve(answer: Callable[[dict[str, str]], list[str] | None]) -> tuple[StandIn, Callable[[], WarmModel]]:
        path = tmp_path_factory.mktemp("s") / "s"
        servers.append(StandIn(path, answer))
        place: Any = SimpleNamespace(socket=path)
        return servers[-1], lambda: WarmModel(Client(place), {})

    yield serve
    for server in servers:
        server.close()


def test_a_warm_process_is_asked(talk: Callable[..., Talk], served: Callable[..., Any]) -> None:
    server, find = served(lambda asked: [" time", " hill"])
    said = talk(None, find, deadline_seconds=60.0)
    assert [said.state(), said.state()] == [LOADING, WARM]
    assert said.ask("Once upon a", num=2) == [Found(" time", 0.5), Found(" hill", 0.25)]
    assert said.ask("Once upon the") == [Found(" time", 0.5), Found(" hill", 0.25)]
    assert [each["prefix"] for each in server.asked] == ["Once upon a", "Once upon the"]


def test_a_warm_process_is_hung_up_on_when_a_question_is_dropped(
    talk: Callable[..., Talk], served: Callable[..., Any]
) -> None:
    reached = threading.Event()

    def answer(asked: dict[str, str]) -> list[str] | None:
        if asked["prefix"] != "slow":
            return [" fast"]
        reached.set()
        return None

    server, find = served(answer)
    said = talk(None, find, deadline_seconds=600.0)
    said.asker.ask(Question("slow", ""))
    assert reached.wait(_PATIENCE)
    assert said.ask("quick") == [Found(" fast", 0.5)]
    assert said.answers.empty()
    said.asker.close()
    assert server.dropped.get(timeout=_PATIENCE)["prefix"] == "slow"


def test_where_the_warm_process_has_gone_the_model_is_loaded_here(
    talk: Callable[..., Talk], served: Callable[..., Any]
) -> None:
    server, find = served(lambda asked: [" warm"])
    finds = iter([find, lambda: None])
    said = talk(Runner(lambda prefix, asked: result(" cold")), lambda: next(finds)())
    assert [said.state(), said.state()] == [LOADING, WARM]
    assert said.ask("x") == [Found(" warm", 0.5)]
    server.close()
    assert said.ask("x") == [Found(" cold", 0.5)]
    assert [said.state(), said.state()] == [LOADING, COLD]


def test_one_that_stays_away_is_told(talk: Callable[..., Talk], served: Callable[..., Any]) -> None:
    server, find = served(lambda asked: [" warm"])

    def again() -> WarmModel:
        if said.asker.state != LOADING or server.asked:
            raise GoneError("it is gone", "start it")
        return find()

    said = talk(None, lambda: find() if not server.asked else again())
    assert [said.state(), said.state()] == [LOADING, WARM]
    assert said.ask("x") == [Found(" warm", 0.5)]
    server.close()
    assert said.ask("x") == []
    assert [said.state(), said.state()] == [LOADING, FAILED]
    assert said.asker.why == "it is gone"


def test_a_warm_process_that_is_too_busy_is_no_error(talk: Callable[..., Talk], served: Callable[..., Any]) -> None:
    _, find = served(lambda asked: None)
    assert talk(None, find, deadline_seconds=0.01).ask("x") == []


def test_whoever_leaves_does_not_wait_for_a_model(talk: Callable[..., Talk]) -> None:
    may_find, loaded = threading.Event(), threading.Event()

    def find() -> None:
        assert may_find.wait(_PATIENCE)

    def load() -> Runner:
        loaded.set()
        return Runner(lambda prefix, asked: result())

    said = talk(load, find)
    assert said.state() == LOADING
    said.asker.close()
    may_find.set()
    said.asker._thread.join(_PATIENCE)
    assert not said.asker._thread.is_alive()
    assert not loaded.is_set()
