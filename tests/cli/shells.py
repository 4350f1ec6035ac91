"""Shells to type at: zsh, bash and fish in tmux, and a server that answers what a test says."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from urllib.parse import parse_qs

from tests.cli.tmux import PATIENCE, Tmux
from tests.conftest import ROOT

Asked = dict[str, str]
Answer = Callable[[Asked], "list[str] | None"]

START = {
    "zsh": ["zsh", "-f", "-i"],
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "fish": ["fish", "--no-config", "--private", "-i"],
}
_PROMPT = {
    "zsh": "PS1='{}'; setopt interactivecomments",
    "bash": "PS1='{}'",
    "fish": "function fish_prompt; echo -n '{}'; end; set -g fish_autosuggestion_enabled 0",
}


class Shell(Tmux):
    """A shell in a tmux of its own."""

    name = ""
    prompt = ""
    _runs = 0

    def line(self) -> str:
        """What stands behind the last prompt, and what is below it, without its end of blanks."""
        return self.text().rpartition(self.prompt.rstrip())[2].removeprefix(" ").rstrip()

    def until(self, line: str) -> None:
        """Wait until the line shows just this."""
        self.wait(lambda _: self.line() == line)

    def run(self, command: str) -> None:
        """Run a command, and wait for its end."""
        self._runs += 1  # the end of the last one may still be on the screen, or above it
        self.press("C-l")
        self.type(f" {command}; echo do''ne{self._runs}")
        self.press("Enter")
        self.wait(lambda screen: f"\ndone{self._runs}\n" in f"\n{screen}\n")
        self.press("C-l")
        self.until("")


@contextmanager
def shell_in_tmux(name: str, *, prompt: str = "> ", width: int = 90, height: int = 12) -> Iterator[Shell]:
    """A shell without anybody's settings."""
    folder = Path(tempfile.mkdtemp(prefix="tmux-"))
    shell = Shell(folder / "s")
    shell.name, shell.prompt = name, prompt
    around = {
        **{key: value for key, value in os.environ.items() if key not in ("TMUX", "NO_COLOR")},
        "PYTHONPATH": str(ROOT),
        "LC_ALL": "C.UTF-8",
        "HISTFILE": "",
    }
    begin = ["tmux", "-u", "-f", os.devnull, "-S", str(folder / "s"), "new-session", "-d"]
    size = ["-x", str(width), "-y", str(height)]
    try:
        subprocess.run([*begin, *size, *START[name]], env=around, check=True, timeout=PATIENCE)
        shell.wait(lambda screen: bool(screen.strip()))
        shell.type(_PROMPT[name].format(prompt))
        shell.press("Enter")
        shell.wait(lambda screen: screen.rstrip().endswith("\n" + prompt.rstrip()))
        yield shell
    finally:
        subprocess.run(["tmux", "-S", str(folder / "s"), "kill-server"], capture_output=True, timeout=PATIENCE)
        shutil.rmtree(folder, ignore_errors=True)


_OPENED = {
    "name": "tiny",
    "used": {"device": "cpu", "dtype": "float32", "quantize": "none"},
    "context": 64,
    "vocab_size": 300,
    "step": "by nobody",
}


class StandIn:
    """Speaks HTTP at a socket as a warm process does, and answers what ``answer`` says; None: never.

    Attributes:
        asked: what it was asked; ``dropped``: those of them whose asker hung up, since no answer came.
    """

    def __init__(self, path: Path, answer: Answer) -> None:
        self.asked: list[Asked] = []
        self.dropped: SimpleQueue[Asked] = SimpleQueue()
        self._heard = threading.Condition()
        self._answer = answer
        self._held: list[socket.socket] = []
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(64)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                talk, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(talk,), daemon=True).start()

    def _talk(self, talk: socket.socket) -> None:
        with suppress(OSError):
            data = b""
            while b"\r\n\r\n" not in data:
                if not (block := talk.recv(1 << 16)):
                    return
                data += block
            head, _, body = data.partition(b"\r\n\r\n")
            headers = dict(line.lower().split(": ", 1) for line in head.decode().split("\r\n")[1:])
            while len(body) < int(headers["content-length"]):
                body += talk.recv(1 << 16)
            form = "urlencoded" in headers["content-type"]
            fields = parse_qs(body.decode(), keep_blank_values=True) if form else {}
            asked = {name: values[-1] for name, values in fields.items()} or json.loads(body)
            if head.startswith(b"POST /gptcli/open "):
                self._tell(talk, json.dumps(_OPENED))
                return
            with self._heard:
                self.asked.append(asked)
                self._heard.notify_all()
            texts = self._answer(asked)
            if texts is None:
                self._held.append(talk)
                talk.recv(1)
                self.dropped.put(asked)
                return
            if form:
                told = "".join(f"{0.5 / number:.6f}\t{text}\n" for number, text in enumerate(texts, 1))
            else:
                found = [{"text": text, "probability": 0.5 / number} for number, text in enumerate(texts, 1)]
                told = json.dumps({"completions": found, "late": False, "known": 0})
            self._tell(talk, told)

    @staticmethod
    def _tell(talk: socket.socket, told: str) -> None:
        answer = told.encode()
        talk.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(answer) + answer)
        talk.close()

    def wait(self, holds: Callable[[list[Asked]], object] = bool) -> None:
        """Wait until something holds of what was asked; that anything was."""
        with self._heard:
            assert self._heard.wait_for(lambda: holds(self.asked), PATIENCE), f"asked was only {self.asked}"

    def close(self) -> None:
        with suppress(OSError):  # it may be closed already
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for talk in self._held:
            talk.close()
