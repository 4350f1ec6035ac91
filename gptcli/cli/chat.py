"""``gptcli chat``: talk with a model."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gptcli.cli import options
from gptcli.cli.chat_line import MARK, MORE
from gptcli.cli.input import ERRORS, sources
from gptcli.cli.out import Output, harmless
from gptcli.cli.state import make_state_folder, state_folder
from gptcli.cli.warm import Warm
from gptcli.errors import CorruptError, GptcliError, UsageError

_LAST = "chat.jsonl"  # the conversation that --continue goes on with
_ASKED, _SAID = 500, 2000  # characters of it that are shown before it goes on: of the last question and of its answer


def chat(
    ctx: typer.Context,
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="The first message; - for stdin.")] = None,
    model: options.Model = None,
    system: Annotated[
        str | None, typer.Option("--system", "-s", metavar="TEXT", help="What sets the scene, before all messages.")
    ] = None,
    go_on: Annotated[bool, typer.Option("--continue", "-c", help="Go on with the last conversation.")] = False,
    show_prompt: Annotated[
        bool, typer.Option("--show-prompt", help="Show the exact text that the model continues, before each answer.")
    ] = False,
    lines: Annotated[bool, typer.Option("--lines", help="Each line that is piped in is a message.")] = False,
    history: Annotated[bool, typer.Option("--history/--no-history", help="Keep what was said on disk.")] = True,
    vi: options.Vi = False,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", metavar="N", help="Of an answer; -1: to its end or the context's.")
    ] = 256,
    temperature: options.Temperature = 0.8,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    presence_penalty: options.PresencePenalty = 0.0,
    logit_bias: options.LogitBias = None,
    stop: options.Stop = None,
    file: options.Files = None,
    no_stdin: options.NoStdin = False,
    strip: options.Strip = False,
    errors: options.Errors = "strict",
    seed: options.Seed = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = "none",
    threads: options.Threads = None,
    offline: options.Offline = False,
    warm: Warm = None,
) -> None:
    """Talk with a model.

    On a terminal line after line, /help lists its commands. There gptcli chat TEXT goes on as a conversation; with
    --no-stdin TEXT is answered, and that is all. What is piped in is one message, or with --lines a line is. The answer
    to message i has seed + i.
    """
    out: Output = ctx.obj
    options.choice("--errors", errors, ERRORS)
    options.choice("--quantize", quantize, options.QUANTIZE)
    from gptcli.cli.chat_settings import Settings
    from gptcli.core.settings import Sampling

    penalties = (repetition_penalty, frequency_penalty, presence_penalty)
    sampling = Sampling(temperature, top_k, top_p, min_p, *penalties, options.parse_biases(logit_bias or []))
    drawn = seed is None
    settings = Settings(sampling, max_tokens, tuple(stop or []), secrets.randbits(31) if seed is None else seed)
    typing = _types(out, text, file or [], no_stdin)
    given = [] if text is None else [text]
    found = sources(given, file or [], no_stdin=no_stdin or typing, strip=strip, required=not typing)
    if lines:
        messages = [line for source in found for line in source.lines(errors) if line.strip()]
    else:
        messages = ["".join(source.text(errors) for source in found)] if found else []
    if not typing and not any(message.strip() for message in messages):
        raise UsageError("the message is empty", "say something")

    last = _last(out) if go_on else None
    if last is not None:
        model, drawn = model if _typed(ctx, "model") else last.model or model, drawn and not last.seeded
    from gptcli.cli.chat_speaker import begin_speaker, open_speaker

    asked = {"device": device, "dtype": dtype, "quantize": quantize}
    # Who types is not kept waiting; whoever has said all is answered as soon as can be.
    opened = begin_speaker if typing and not any(message.strip() for message in messages) else open_speaker
    speaker = opened(model, out, warm=warm, threads=threads, **asked)
    try:
        from gptcli.cli.chat_talk import Chat
        from gptcli.text.conversation import Conversation
        from gptcli.text.transcript import open_chat

        start, ends = speaker.tokenizer.start_id, sorted(speaker.config.eos_ids)
        template = open_chat(
            speaker.folder,
            speaker.tokenizer,
            speaker.config.bos_id if start is None else start,
            ends[0] if ends else None,
        )
        talk = Chat(speaker, template, Conversation(system=system or ""), settings, out, show_prompt)
        talk.adopt(settings)
        talk.several, talk.stay = typing or lines, typing
        if last is not None:
            talk.take(last.line)
            typed = {name: value for name, value in settings.as_json().items() if _typed(ctx, name)}
            talk.adopt(talk.settings.changed(typed))
            if system is not None:
                talk.conversation.system = system
        if history:
            talk.keep = _kept(out)
        if drawn and sampling.temperature > 0 and not out.json:
            out.note(f"seed {talk.settings.seed}")
        if typing:
            _converse(talk, messages, history=history, vi=vi)
        else:
            for message in messages:
                talk.say(message)
    finally:
        speaker.close()


def _converse(talk: Any, first: Sequence[str], *, history: bool, vi: bool) -> None:
    """Say the first messages, then whatever is typed, until the user leaves."""
    from gptcli.cli.chat_commands import Commands
    from gptcli.cli.chat_line import open_line
    from gptcli.text.transcript import Transcript

    out = talk.out
    commands = Commands(talk)
    line = open_line(out, commands.complete, history=history, vi=vi, shown=talk.speaker.begin)
    base = " (a base model: it continues a transcript)" if isinstance(talk.template, Transcript) else ""
    out.note(f"{talk.speaker.name}{base}; /help lists the commands, Ctrl-D leaves")
    if talk.conversation.turns:
        out.note(f"{len(talk.conversation.turns):,} messages were said before")
        if out.talks_to_terminal:
            out.talk(out.style(harmless(_exchange(talk.conversation.turns)), "dim", stderr=True))

    def all_messages() -> Iterator[str]:
        yield from (f"/{text}" if text.startswith("/") else text for text in first)
        while (typed := line.read()) is not None:
            yield typed

    for text in all_messages():
        try:
            if text.strip() and not commands.take(text):
                return
        except GptcliError as error:
            if error is talk.speaker.failed:
                raise
            out.error(error)


def _exchange(turns: Sequence[dict[str, str]]) -> str:
    """The last question and its answer, as they stood on the screen; of long ones the beginning and the end."""
    begin = max((place for place, turn in enumerate(turns) if turn["role"] == "user"), default=len(turns) - 1)
    told = []
    for turn in turns[begin:]:
        text = turn["content"].strip("\n")
        if turn["role"] == "user":
            text = text if len(text) <= _ASKED else text[: _ASKED - 1] + "…"
            told.append(MARK + text.replace("\n", f"\n{MORE}"))
        else:
            told.append(text if len(text) <= _SAID else "…" + text[1 - _SAID :])
    return "\n".join(told)


def _types(out: Output, text: str | None, files: Sequence[Path], no_stdin: bool) -> bool:
    """Whether somebody types: at a terminal, unless all that is to be said is given and the answer goes elsewhere."""
    if no_stdin or text == "-" or Path("-") in files or sys.stdin is None or not sys.stdin.isatty():
        return False
    return out.on_terminal or (text is None and not files)


def _typed(ctx: typer.Context, name: str) -> bool:
    return options.strength(ctx, name) == options.TYPED


class _Last:
    """The last conversation, and what of it is needed before it can go on."""

    def __init__(self, line: str) -> None:
        from gptcli.text.conversation import read_conversation

        self.line = line
        _, more = read_conversation(line)
        named, values = more.get("model"), more.get("settings")
        self.model = named if isinstance(named, str) else None
        self.seeded = isinstance(values, dict) and "seed" in values


def _last(out: Output) -> _Last | None:
    """Raises CorruptError for one that can't be read."""
    file = state_folder() / _LAST
    try:
        return _Last(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        out.note("there is no conversation to go on with: this is a new one")
        return None
    except (OSError, ValueError) as error:
        raise CorruptError(f"{file} can't be read: {error}", "move it away") from None
    except CorruptError as error:
        raise CorruptError(f"{file}: {error.message}", "move it away") from None


def _kept(out: Output) -> Path | None:
    """The file that the conversation is kept in; None, and a note, where there can be none."""
    try:
        return make_state_folder() / _LAST
    except OSError as error:
        out.note(f"the conversation is not kept: {error.filename}: {error.strerror}")
        return None
