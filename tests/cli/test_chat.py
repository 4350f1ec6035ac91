"""gptcli chat: what is piped, what is typed (on a line of the test's own), and what the model is given."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from gptcli.cli import chat as chat_module
from gptcli.cli import chat_line, opening
from gptcli.cli.chat_commands import Commands
from gptcli.cli.chat_speaker import EngineSpeaker, LoadingSpeaker
from gptcli.cli.state import state_folder
from gptcli.core.requests import Step
from gptcli.errors import UnsupportedError
from gptcli.text.template import PLAIN, ChatTemplate
from gptcli.text.tokenizer import Tokenizer
from gptcli.text.transcript import SCENE, Transcript, Trim
from tests.cli.chatting import always, save_talker, template_file
from tests.cli.conftest import Done, Run
from tests.conftest import PATIENCE

EOT = "<|endoftext|>"
JINJA = (
    "{% for message in messages %}{{ '[' + message.role + '] ' + message.content + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_talker(tmp_path_factory.mktemp("models") / "talker", 512, eos=0)


@pytest.fixture
def piped(run: Run, talker: Path) -> Run:
    """``gptcli chat`` with every token an m."""
    return lambda *args, **more: run("chat", "-m", talker, *always(talker), "-n", "4", *args, **more)


def shows(line: Any) -> Any:
    """What opens a line of the test's own."""

    def open_line(*asked: Any, shown: Callable[[], None], **more: Any) -> Any:
        shown()
        return line

    return open_line


class Typed:
    """What is answered, as JSON, to lines that are typed; draws freely. ``told`` is what was said on stderr."""

    def __init__(self, run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._run, self._model, self._monkeypatch = run, model, monkeypatch
        self.told = ""

    def __call__(
        self, *lines: str, options: Sequence[str | Path] = (), model: Path | None = None
    ) -> list[dict[str, Any]]:
        source = iter(lines)

        class Fed:
            def read(self) -> str | None:
                return next(source, None)

        self._monkeypatch.setattr(chat_module, "_types", lambda *asked: True)
        self._monkeypatch.setattr(chat_line, "open_line", shows(Fed()))
        fixed = ("--json", "--show-prompt", "-n", "4", "--seed", "10", "--dtype", "float32")
        done = self._run("chat", "-m", model or self._model, *fixed, *options)
        assert done.code == 0, done.err
        self.told = done.err.decode()
        return records(done)


@pytest.fixture
def typed(run: Run, talker: Path, monkeypatch: pytest.MonkeyPatch) -> Typed:
    return Typed(run, talker, monkeypatch)


def records(done: Done) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.out.splitlines()]


def transcript(*said: str, system: str = SCENE) -> str:
    """The text of turns, the user's first, up to where the next answer begins."""
    names = ("User", "Assistant")
    return EOT + system + "\n\n" + "".join(f"{names[i % 2]}: {text}\n\n" for i, text in enumerate(said)) + "Assistant:"


# --- Pipes


def test_what_is_piped_is_one_message(piped: Run) -> None:
    done = piped(stdin=b"hi\nyou\n")
    assert (done.code, done.out, done.err) == (0, b"mmmm", b"")
    (told,) = records(piped("--json", "--show-prompt", stdin=b"hi\nyou\n"))
    assert told["prompt"] == transcript("hi\nyou")
    assert (told["role"], told["text"], told["finish_reason"], told["seed"]) == ("assistant", "mmmm", "length", 1)
    assert told["usage"]["completion_tokens"] == 4


def test_a_text_is_a_message_behind_what_is_piped(piped: Run) -> None:
    (told,) = records(piped("--json", "--show-prompt", "-s", "Be brief.", " Why?", stdin=b"hi"))
    assert told["prompt"] == transcript("hi Why?", system="Be brief.")


def test_each_line_may_be_a_message(piped: Run) -> None:
    told = records(piped("--json", "--show-prompt", "--lines", stdin=b"a\n\n/b\n"))
    assert [answer["seed"] for answer in told] == [1, 2]
    assert told[1]["prompt"] == transcript("a", "mmmm", "/b")
    assert piped("--lines", stdin=b"a\nb\n").out == b"mmmm\n<|endoftext|>\nmmmm\n"


@pytest.mark.parametrize("stdin", [b"", b" \n"])
def test_no_message_is_wrong_use(piped: Run, stdin: bytes) -> None:
    assert piped(stdin=stdin).code == 2


def test_nothing_to_read_is_wrong_use(piped: Run) -> None:
    assert piped().code == 2


def test_the_prompt_is_shown_as_the_model_goes_on_with_it(piped: Run) -> None:
    assert piped("--show-prompt", stdin=b"hi").out.decode() == transcript("hi") + "mmmm"
    assert piped("--show-prompt", "-n", "0", stdin=b"hi").out.decode() == transcript("hi")


def test_a_base_model_does_not_speak_for_the_user(run: Run, talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speak = EngineSpeaker.answer
    asked = {}

    def listen(
        self: EngineSpeaker, ids: Sequence[int], seed: int, settings: Any, stop: Sequence[str]
    ) -> Iterator[Step]:
        asked["stop"] = stop
        return speak(self, ids, seed, settings, stop)

    monkeypatch.setattr(EngineSpeaker, "answer", listen)
    run("chat", "-m", talker, "-n", "1", "--stop", "x", "hi")
    assert asked["stop"] == ("\nUser:", "\nAssistant:", "x")


def test_white_space_around_an_answer_is_no_part_of_it() -> None:
    for pieces in (["\n ", " a", "\n\n", "b ", " \n"], ["  a\n\nb  \n"], ["", " a\n", "\n", "b", "\n"]):
        trim = Trim()
        assert "".join(map(trim.push, pieces)) == "a\n\nb"


def test_a_prompt_beyond_the_context_is_over_the_limit(piped: Run) -> None:
    done = piped(stdin=b"hello " * 400)
    assert (done.code, done.out) == (4, b"")
    assert b"the message makes a prompt of" in done.err


def test_ctrl_c_in_a_pipe_keeps_the_answer_and_ends_with_130(
    run: Run, talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_behind(3, monkeypatch)
    done = run("chat", "-m", talker, *always(talker), "-n", "-1", "--json", "hi")
    assert done.code == 130
    (told,) = records(done)
    assert (set(told["text"]), told["finish_reason"]) == ({"m"}, None)
    assert json.loads((state_folder() / "chat.jsonl").read_text())["messages"][1]["content"] == told["text"]


def interrupt_behind(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C once so many steps of an answer have come."""
    speak = EngineSpeaker.answer

    def speaking(self: EngineSpeaker, *args: Any) -> Iterator[Step]:
        for number, step in enumerate(speak(self, *args), 1):
            yield step
            if number == count:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(EngineSpeaker, "answer", speaking)


# --- The last conversation


def test_the_last_conversation_goes_on(run: Run, talker: Path) -> None:
    common = ("-m", talker, "--dtype", "float32", "--json", "--show-prompt")
    whole = records(run("chat", *common, "--seed", "3", "-n", "5", "-t", "0.9", "--lines", stdin=b"a\nb\n"))
    (first,) = records(run("chat", *common, "--seed", "3", "-n", "5", "-t", "0.9", "a"))
    (second,) = records(run("chat", "--dtype", "float32", "--json", "--show-prompt", "-c", "b"))  # the model too
    for told, same in ((first, whole[0]), (second, whole[1])):
        assert [told[name] for name in ("model", "prompt", "text", "seed")] == [
            same[name] for name in ("model", "prompt", "text", "seed")
        ]
    assert (state_folder() / "chat.jsonl").stat().st_mode & 0o777 == 0o600
    (third,) = records(run("chat", *common, "-c", "-n", "2", "-s", "New.", "c"))
    assert third["prompt"].startswith(f"{EOT}New.\n\nUser: a\n\n")
    assert (third["seed"], third["usage"]["completion_tokens"]) == (5, 2)


def test_without_a_last_conversation_a_new_one_begins(piped: Run) -> None:
    done = piped("-c", stdin=b"hi")
    assert (done.code, done.out) == (0, b"mmmm")
    assert b"this is a new one" in done.err


def test_nothing_is_kept_if_told_so(piped: Run) -> None:
    assert piped("--no-history", stdin=b"hi").code == 0
    assert not state_folder().exists()


def test_a_state_folder_that_can_not_be_is_told(piped: Run) -> None:
    state_folder().parent.mkdir(parents=True)
    state_folder().write_text("a file")
    done = piped(stdin=b"hi")
    assert (done.code, done.out) == (0, b"mmmm")
    assert b"the conversation is not kept" in done.err


def test_a_last_conversation_that_is_damaged_is_an_error(piped: Run) -> None:
    state_folder().mkdir(parents=True)
    (state_folder() / "chat.jsonl").write_text('{"messages": [{"role": "robot"}]}')
    done = piped("-c", stdin=b"hi")
    assert done.code == 3
    assert b"chat.jsonl" in done.err


# --- Commands


def test_turns_follow_one_another(typed: Typed) -> None:
    first, second = typed("a", "b", "/quit", "c")
    assert first["prompt"] == transcript("a")
    assert second["prompt"] == transcript("a", first["text"], "b")
    assert (first["seed"], second["seed"]) == (10, 11)


def test_same_seed_same_conversation(typed: Typed) -> None:
    said = [[answer["text"] for answer in typed("a", "b", "c")] for _ in range(2)]
    assert said[0] == said[1]


def test_retry_asks_again_with_another_seed(typed: Typed) -> None:
    first, again, third, after = typed("a", "/retry", "/retry", "b", options=("-n", "12"))
    assert "again, with seed 1010" in typed.told
    assert [told["seed"] for told in (first, again, third, after)] == [10, 1010, 2010, 11]
    assert first["prompt"] == again["prompt"] == third["prompt"]
    assert first["text"] != again["text"]
    assert after["prompt"] == transcript("a", third["text"], "b")


def test_undo_takes_back_a_turn(typed: Typed) -> None:
    first, _, after = typed("a", "b", "/undo", "c", "/undo", "/undo", "/undo")
    assert after["prompt"] == transcript("a", first["text"], "c")
    assert "there is nothing to take back" in typed.told


def test_clear_begins_anew(typed: Typed) -> None:
    _, after = typed("/system Be brief.", "a", "/clear", "b")
    assert (after["prompt"], after["seed"]) == (transcript("b", system="Be brief."), 10)


def test_what_was_cleared_does_not_come_back(typed: Typed, run: Run) -> None:
    typed("/system Be brief.", "/set temperature 1.5", "a", "/clear")
    (after,) = typed("b", options=("-c",))
    assert (after["prompt"], after["seed"]) == (transcript("b", system="Be brief."), 10)
    kept = (state_folder() / "chat.jsonl").read_text()
    typed("/clear")  # nothing was said in this one: what is kept is another
    assert (state_folder() / "chat.jsonl").read_text() == kept
    assert json.loads(kept)["settings"]["temperature"] == 1.5


def test_the_last_exchange_is_shown_to_a_terminal_alone(typed: Typed) -> None:
    typed("a", "b")
    typed(options=("-c",))
    assert "4 messages were said before" in typed.told
    assert "> b" not in typed.told


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (["a", "b", "c\nd", "e\n"], "> c\n… d\ne"),
        (["q" * 600, "s" * 3000], f"> {'q' * 499}…\n…{'s' * 1999}"),
        (["a", "b", "c"], "> c"),
    ],
)
def test_the_last_exchange_as_it_stood_there(said: list[str], shown: str) -> None:
    roles = ("user", "assistant")
    turns = [{"role": roles[place % 2], "content": text} for place, text in enumerate(said)]
    assert chat_module._exchange(turns) == shown
    assert chat_module._exchange([{"role": "assistant", "content": "x"}]) == "x"


def test_commands_in_any_case_and_a_question_mark(typed: Typed) -> None:
    _, after = typed("/SYSTEM Be brief.", "a", "/Clear", "/?", "b", "/Quit", "c")
    assert after["prompt"] == transcript("b", system="Be brief.")
    assert "the conversation as a line of .jsonl" in typed.told


def test_system_sets_the_scene(typed: Typed) -> None:
    first, second = typed("/system Be\nbrief.", "a", "/system", '/system ""', "b")
    assert first["prompt"] == transcript("a", system="Be\nbrief.")
    assert second["prompt"].startswith(EOT + SCENE)
    assert "Be\nbrief." in typed.told


def test_set_changes_any_setting(typed: Typed) -> None:
    lines = ("/set max-tokens 2", "a", "/set seed 7", "/set temperature", "/set temperature 0", "b", "/set")
    first, second = typed(*lines, '/set stop "The end" "\\n"', "/set stop")
    assert (first["usage"]["completion_tokens"], second["seed"]) == (2, 8)
    told = typed.told.splitlines()
    assert "0.8" in told
    assert "temperature         0.0" in told
    assert '"The end" "\\n"' in told


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/set temperature hot", "temperature 'hot' is not a number"),
        ("/set max-tokens 1.5", "max-tokens '1.5' is not a whole number"),
        ("/set top-p 2", "top-p 2.0 is out of range"),
        ("/set seed -1", "seed -1 is out of range"),
        ("/set colour 2", "there is no setting colour"),
        ("/set colour", "there is no setting colour"),
        ("/set logit-bias 999:1", "there is no token 999"),
        ('/set stop "open', "a quote is open"),
        ("/wave", "there is no command /wave"),
        ("/Wave", "there is no command /Wave"),
        ("/undo twice", "/undo takes nothing more"),
        ("/retry", "nothing was asked yet"),
        ("/save", "/save needs a file"),
        ("/save x", "there is nothing to save yet"),
        ("/load none.jsonl", "there is no file none.jsonl"),
    ],
)
def test_what_can_not_be_done_is_told_and_changes_nothing(typed: Typed, line: str, told: str) -> None:
    plain, after = typed("a")[0], typed(line, "a")[0]
    assert told in typed.told
    assert (after["prompt"], after["text"], after["seed"]) == (plain["prompt"], plain["text"], plain["seed"])


def test_what_begins_with_a_slash_may_be_a_message(typed: Typed) -> None:
    texts = ("/help me", "/usr/bin is full", "/Usr/bin/x", "/pasted\nlines", "/??")
    said = typed(f"/{texts[0]}", *texts[1:], options=("/first",))
    assert said[0]["prompt"] == transcript("/first")
    for told, text in zip(said[1:], texts, strict=True):
        assert f"User: {text}\n\nAssistant:" in told["prompt"]


def test_commands_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl").touch()

    class Nobody:
        out = retry = undo = clear = None

    complete = Commands(Nobody()).complete  # type: ignore[arg-type]
    assert complete("/s") == ["/set", "/system", "/save"]
    assert complete("/S") == complete("/s")
    assert complete("/set top") == complete("/Set top") == ["top-k", "top-p"]
    assert complete("/load s") == ["sub/"]
    assert complete("/load sub/") == ["sub/a.jsonl"]
    assert complete("hello /s") == complete("/set top-k ") == complete("/nothing ") == []


def test_saved_and_loaded_it_goes_on_as_it_was(typed: Typed, tmp_path: Path) -> None:
    file = tmp_path / "a chat.jsonl"
    _, second, third = typed("/system Be brief.", "a", "/set temperature 1.5", "b", f"/save {file}", "c")
    assert str(file) in typed.told
    (loaded,) = typed(f'/load "{file}"', "c")
    same = ("prompt", "text", "seed")
    assert [loaded[name] for name in same] == [third[name] for name in same]
    kept = json.loads(file.read_text())
    assert kept["messages"][0] == {"role": "system", "content": "Be brief."}
    assert kept["messages"][-1]["content"] == second["text"]
    assert kept["settings"]["temperature"] == 1.5


def test_train_reads_what_is_saved(typed: Typed, tmp_path: Path, run: Run, talker: Path) -> None:
    file = tmp_path / "chat.jsonl"
    typed(*["many words " * 9] * 16, f"/save {file}")
    size = ("--steps", "1", "--batch-tokens", "512", "--dtype", "float32", "-q")
    done = run("train", file, "-o", tmp_path / "tuned", "--init-from", talker, *size)
    assert done.code == 0, done.err


def test_only_a_conversation_is_written_over(typed: Typed, tmp_path: Path) -> None:
    file, other = tmp_path / "chat.jsonl", tmp_path / "chats.jsonl"
    row = '{"messages": [{"role": "user", "content": "x"}]}\n'
    file.write_text(row)
    other.write_text(row * 2)
    typed("a", f"/save {file}", f"/save {other}")
    assert json.loads(file.read_text())["messages"][0]["content"] == "a"
    assert other.read_text() == row * 2
    assert "holds something else than a conversation" in typed.told


def test_of_several_conversations_the_first_is_loaded(typed: Typed, tmp_path: Path) -> None:
    row = '{"messages": [{"role": "user", "content": "%s"}]}\n'
    (tmp_path / "chats.jsonl").write_text(row % "x" + row % "y")
    (again,) = typed(f"/load {tmp_path / 'chats.jsonl'}", "/retry")
    assert again["prompt"] == transcript("x")
    assert "holds 2 conversations" in typed.told


def test_ctrl_c_ends_the_answer_alone_and_keeps_it(typed: Typed, talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_behind(3, monkeypatch)
    first, second = typed("a", "b", options=(*always(talker), "-n", "-1"))
    for told in (first, second):
        assert set(told["text"]) == {"m"}
        assert told["finish_reason"] is None
    assert second["prompt"] == transcript("a", first["text"], "b")


def test_an_empty_answer_is_not_kept(typed: Typed, talker: Path) -> None:
    empty, again, after = typed("a", "/retry", '/set logit-bias ""', "b", options=always(talker, EOT))
    assert (empty["text"], empty["finish_reason"], again["prompt"]) == ("", "eos", transcript("a"))
    assert after["prompt"] == transcript("b")
    assert "nothing was answered" in typed.told


# --- The context


def test_past_the_context_the_oldest_turns_go_and_the_system_message_stays(typed: Typed, talker: Path) -> None:
    lines = [f"{number} " + "word " * 12 for number in range(12)]
    answers = typed(*lines, options=(*always(talker), "-n", "8", "-s", "Be brief."))
    assert [answer["left_out"] for answer in answers[:3]] == [0, 0, 0]
    assert answers[-1]["left_out"] > 0
    for place, answer in enumerate(answers):
        kept = lines[answer["left_out"] // 2 : place + 1]
        said = [text for line in kept for text in (line.strip(), "mmmmmmmm")][:-1]
        assert answer["prompt"] == transcript(*said, system="Be brief.")
        assert answer["usage"]["prompt_tokens"] <= 512 - 8
        assert answer["finish_reason"] == "length"
    assert "the context is full: the oldest 2 messages" in typed.told


def test_a_message_that_is_too_long_ends_nothing(typed: Typed) -> None:
    (after,) = typed("long " * 400, "a")
    assert after["prompt"] == transcript("a")


def test_what_was_read_before_is_not_computed_again(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    monkeypatch.setattr(EngineSpeaker, "close", lambda self: (counts.append(self.engine.counts), self.engine.close()))
    answers = typed("a", "b", "c")
    prompts = [answer["usage"]["prompt_tokens"] for answer in answers]
    (done,) = counts
    assert done.prompt_tokens == sum(prompts)
    assert done.known_tokens >= prompts[0] - 1 + prompts[1] - 1


# --- Templates


@pytest.mark.parametrize("source", [JINJA, PLAIN], ids=["jinja", "plain"])
def test_a_models_own_template_writes_the_prompt(typed: Typed, tmp_path: Path, source: str) -> None:
    folder = save_talker(tmp_path / "model", 512, template_file(source, bos_token=EOT, eos_token=EOT), eos=0)
    messages = [f"what is {EOT}?", "b"]
    first, second = typed(*messages, model=folder, options=("-s", "Be brief."))
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": messages[0]},
        {"role": "assistant", "content": first["text"]},
        {"role": "user", "content": messages[1]},
    ]
    template, tokenizer = ChatTemplate(source, EOT, EOT), Tokenizer.from_folder(folder)
    assert first["prompt"] == template.render(said[:2], add_generation_prompt=True)
    assert second["prompt"] == template.render(said, add_generation_prompt=True)
    assert second["usage"]["prompt_tokens"] == len(template.encode(tokenizer, said))
    # The mark that a template writes is the token; one that is typed is text.
    assert template.encode(tokenizer, said[:2]).count(0) < first["prompt"].count(EOT)


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (ChatTemplate(JINJA, EOT, EOT), (EOT,)),
        (ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"), ("\nuser:",)),
        (ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}"), ()),
        (Transcript(), ("\nUser:", "\nAssistant:")),
    ],
)
def test_what_ends_an_answer_is_found_out(talker: Path, template: ChatTemplate, ends: tuple[str, ...]) -> None:
    assert template.ends(Tokenizer.from_folder(talker)) == ends


def test_a_template_without_jinja_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "jinja2"]:
        monkeypatch.delitem(sys.modules, name)
    found = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "jinja2":
            raise ImportError(name)
        return found(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnsupportedError) as error:
        ChatTemplate(JINJA + "{# new #}").render([{"role": "user", "content": "a"}])
    assert error.value.hint == "pip install 'gptcli[families]'"


def test_the_shipped_model_continues_a_transcript(run: Run) -> None:
    done = run("chat", "--seed", "1", "-n", "40", "--json", "Tell me about the king.")
    assert done.code == 0, done.err
    assert "\nUser:" not in done.json["text"]
    assert done.json["text"] == done.json["text"].strip()


# --- The model loads while somebody types


class Slow:
    """Holds the loading of models back until ``go``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.ended = threading.Event(), threading.Event()
        load = opening.open_for_inference

        def slowly(*args: Any, **more: Any) -> Any:
            try:
                assert self.go.wait(PATIENCE)
                return load(*args, **more)
            finally:
                self.ended.set()

        monkeypatch.setattr(opening, "open_for_inference", slowly)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    slow = Slow(monkeypatch)
    yield slow
    slow.go.set()
    assert slow.ended.wait(PATIENCE)


def test_the_first_line_is_read_before_the_model_is_there(
    run: Run, talker: Path, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fed:
        lines = iter(["/set temperature 0", "hi", None])

        def read(self) -> str | None:
            line = next(self.lines)
            if line == "hi":
                assert not slow.ended.is_set()
                slow.go.set()
            return line

    monkeypatch.setattr(chat_module, "_types", lambda *asked: True)
    monkeypatch.setattr(chat_line, "open_line", shows(Fed()))
    done = run("chat", "-m", talker, *always(talker), "-n", "3", "--json", "-v")
    assert done.code == 0
    (told,) = records(done)
    assert (told["text"], told["model"]) == ("mmm", "talker")
    assert told["device"]
    assert told["timing"]["load_seconds"] > 0
    said = done.err.decode()
    assert said.index("temperature is 0") < said.index("talker from")  # nothing was said while a line was typed
    assert said.count("talker from") == 1


def test_who_leaves_before_the_model_is_there_does_not_wait(typed: Typed, slow: Slow) -> None:
    assert typed() == []
    assert not slow.ended.is_set()


def test_ctrl_c_ends_the_wait_for_the_model(typed: Typed, slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = LoadingSpeaker.wait

    def waiting(self: LoadingSpeaker) -> None:
        if not slow.go.is_set():
            threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGINT]).start()  # as a terminal does
        wait(self)

    monkeypatch.setattr(LoadingSpeaker, "wait", waiting)
    (told,) = typed("hi")
    assert (told["text"], told["finish_reason"]) == ("", None)
    assert "nothing was answered" in typed.told


def test_a_model_that_does_not_load_is_told_at_the_first_message_and_ends_it(
    run: Run, talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Path(shutil.copytree(talker, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"no tensors")
    lines = iter(["/help", "hi", "not read any more"])

    class Fed:
        def read(self) -> str | None:
            return next(lines)

    monkeypatch.setattr(chat_module, "_types", lambda *asked: True)
    monkeypatch.setattr(chat_line, "open_line", shows(Fed()))
    done = run("chat", "-m", broken)
    assert (done.code, done.out) == (3, b"")
    said = done.err.decode()
    assert said.index("/help") < said.index("error: ")
    assert said.count("error: ") == 1
    assert next(lines) == "not read any more"
    (broken / "config.json").write_text("{}")
    assert run("chat", "-m", broken).code in (3, 6)  # what is known at once is told at once
    assert next(lines, None) is None
