"""The commands of a conversation: lines that begin with a slash."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from gptcli.cli.chat_settings import NAMES
from gptcli.cli.chat_talk import Chat
from gptcli.errors import CorruptError, GptcliError, NotFoundError, OutputError, UsageError
from gptcli.text.conversation import read_conversation

_COMMAND = re.compile(r"/([A-Za-z]+|\?)(?:\s+(.*))?\s*", re.DOTALL)
_OTHER_NAMES = {"exit": "quit", "bye": "quit", "?": "help"}

_HELP = {
    "set": ("[NAME [VALUE]]", "a setting, or all of them: /set temperature 0.5"),
    "system": ("[TEXT]", 'the text that sets the scene; /system "" takes it away'),
    "retry": ("", "the last question again, with another seed"),
    "undo": ("", "take the last question and its answer back"),
    "clear": ("", "begin anew"),
    "prompt": ("", "the text that the model would continue now"),
    "save": ("FILE", "the conversation as a line of .jsonl, as train reads it"),
    "load": ("FILE", "go on with a saved one"),
    "help": ("", "this list; so does /?"),
    "quit": ("", "leave; so does Ctrl-D"),
}


class Commands:
    """Does what lines with a slash ask for."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._out = chat.out
        self._done: dict[str, Callable[[str], None]] = {
            "set": self._set,
            "system": self._system,
            "retry": self._without("retry", chat.retry),
            "undo": self._without("undo", chat.undo),
            "clear": self._without("clear", self._clear),
            "prompt": self._without("prompt", self._prompt),
            "save": self._save,
            "load": self._load,
            "help": self._help,
        }

    def take(self, line: str) -> bool:
        """Do what a line asks for, or say it to the model; returns whether the conversation goes on.

        A message that begins with a slash of its own is written with two. Raises GptcliError, and then nothing changed.
        """
        if line.startswith("//"):
            self._chat.say(line[1:])
            return True
        match = _COMMAND.fullmatch(line)
        typed = match[1].lower() if match else ""
        name = _OTHER_NAMES.get(typed, typed)
        if match is None or (name not in _HELP and "\n" in line):  # as /usr/bin, or a text that was pasted
            self._chat.say(line)
            return True
        if name == "quit":
            return False
        if name not in self._done:
            raise UsageError(
                f"there is no command /{match[1]}", "/help lists them; a message begins with // for a slash"
            )
        self._done[name]((match[2] or "").strip())
        return True

    def complete(self, text: str) -> list[str]:
        """What the last word of an unfinished line may become."""
        if not text.startswith("/") or "\n" in text:
            return []
        name, space, rest = text[1:].partition(" ")
        name = name.lower()
        if not space:
            return [f"/{known}" for known in _HELP if known.startswith(name)]
        if name == "set" and " " not in rest:
            return [known for known in NAMES if known.startswith(rest)]
        return _paths(rest) if name in ("save", "load") else []

    def _set(self, rest: str) -> None:
        chat = self._chat
        name, _, value = rest.partition(" ")
        if not rest:
            width = max(map(len, NAMES))
            for known in NAMES:
                self._out.stats(f"{known.ljust(width)}  {chat.settings.shown(known)}")
        elif not value.strip():
            if name.replace("_", "-") not in NAMES:
                raise UsageError(f"there is no setting {name}", f"the settings are {', '.join(NAMES)}")
            self._out.stats(chat.settings.shown(name))
        else:
            chat.adopt(chat.settings.told(name, value.strip()))
            self._out.note(f"{name} is {chat.settings.shown(name)}")

    def _system(self, rest: str) -> None:
        conversation = self._chat.conversation
        if not rest:
            self._out.stats(conversation.system or "there is no system message")
            return
        conversation.system = "" if rest == '""' else rest
        self._out.note("the system message is set" if conversation.system else "there is no system message now")

    def _clear(self) -> None:
        self._chat.clear()
        self._out.note("a new conversation")

    def _prompt(self) -> None:
        self._out.stats(self._chat.prompt())

    def _save(self, rest: str) -> None:
        file = _path(rest, "save")
        if not self._chat.conversation.turns:
            raise UsageError("there is nothing to save yet", "say something")
        if file.is_file() and file.stat().st_size and not _is_conversation(file):
            raise OutputError(f"{file} holds something else than a conversation", "save under another name")
        from gptcli.core.files import write_whole

        write_whole(file, self._chat.line().encode())
        self._out.note(f"saved in {file}")

    def _load(self, rest: str) -> None:
        file = _path(rest, "load")
        lines = _lines(file)
        if not lines:
            raise CorruptError(f"{file} is empty", "name another file")
        try:
            self._chat.take(lines[0])
        except GptcliError as error:
            raise CorruptError(f"{file}: {error.message}", error.hint) from None
        if len(lines) > 1:
            self._out.note(f"{file} holds {len(lines):,} conversations; this is the first")
        self._out.note(f"{len(self._chat.conversation.turns):,} messages, and their settings; /set shows them")

    def _help(self, rest: str) -> None:
        width = max(len(f"/{name} {usage}") for name, (usage, _) in _HELP.items())
        for name, (usage, what) in _HELP.items():
            self._out.stats(f"{f'/{name} {usage}'.ljust(width)}  {what}")

    @staticmethod
    def _without(name: str, work: Callable[[], None]) -> Callable[[str], None]:
        """A command that takes nothing more."""

        def run(rest: str) -> None:
            if rest:
                raise UsageError(f"/{name} takes nothing more", f"a message that begins so is written //{name}")
            work()

        return run


def _path(rest: str, command: str) -> Path:
    name = rest[1:-1] if len(rest) > 1 and rest[0] == rest[-1] and rest[0] in "\"'" else rest
    if not name:
        raise UsageError(f"/{command} needs a file", f"for instance /{command} chat.jsonl")
    try:
        return Path(name).expanduser()
    except RuntimeError:  # an unknown ~user
        return Path(name)


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {file}", "check the path") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise CorruptError(f"{file} can't be read: {reason}", "check the path") from None


def _is_conversation(file: Path) -> bool:
    """Whether one conversation is all that a file holds."""
    try:
        (line,) = _lines(file)
        read_conversation(line)
    except (GptcliError, ValueError):
        return False
    return True


def _paths(begun: str) -> list[str]:
    """Files and folders that a path may become."""
    folder, _, name = begun.rpartition("/")
    try:
        found = sorted(Path(f"{folder}/" if "/" in begun else ".").expanduser().iterdir())
    except (OSError, RuntimeError, ValueError):
        return []
    before = f"{folder}/" if "/" in begun else ""
    return [
        f"{before}{path.name}{'/' * path.is_dir()}"
        for path in found
        if path.name.startswith(name) and (name.startswith(".") or not path.name.startswith("."))
    ]
