"""``gptcli predict``: the distribution over the next token, or over given continuations."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli import options, predict_bars, ranks
from gptcli.cli.distribution import as_json
from gptcli.cli.input import ERRORS, Source, note_line_end, one_text, sources
from gptcli.cli.out import Output
from gptcli.cli.tokens import quoted
from gptcli.cli.warm import Runner, Warm, open_runner
from gptcli.errors import LimitError, UsageError

if TYPE_CHECKING:
    from gptcli.core.distribution import Continuation

# Lines of --lines that are read before they are computed together.
_LINES_AT_ONCE = 64


def predict(
    ctx: typer.Context,
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="What comes before; - for stdin.")] = None,
    model: options.Model = None,
    top: Annotated[int, typer.Option("--top", metavar="N", help="Show the N likeliest tokens.")] = 10,
    temperature: Annotated[
        list[str] | None,
        typer.Option("--temperature", "-t", metavar="T[,T...]", help="1 by default; several stand side by side."),
    ] = None,
    choose: Annotated[
        list[str] | None,
        typer.Option("--choose", metavar="TEXT", help="Weigh whole continuations against each other; repeatable."),
    ] = None,
    winner: Annotated[bool, typer.Option("--winner", help="Print only the likeliest of --choose.")] = False,
    per_token: Annotated[
        bool, typer.Option("--per-token", help="Weigh --choose by the mean over tokens, not the sum.")
    ] = False,
    lines: Annotated[bool, typer.Option("--lines", help="Each line is a text of its own.")] = False,
    truncate_prompt: Annotated[
        str | None, typer.Option("--truncate-prompt", metavar="left", help="Cut a prompt that is too long.")
    ] = None,
    file: options.Files = None,
    no_stdin: options.NoStdin = False,
    strip: options.Strip = False,
    errors: options.Errors = "strict",
    special: options.Special = "text",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = "none",
    threads: options.Threads = None,
    tp: ranks.Tp = None,
    offload: ranks.Offload = False,
    offline: options.Offline = False,
    warm: Warm = None,
) -> None:
    """Show what may come next, as bars.

    The text is TEXT, a pipe, a file, or a pipe and then TEXT. In a pipe: a line a token, of its probabilities (one for
    each temperature), logit, id and text, parted by tabs.
    """
    out: Output = ctx.obj
    options.choice("--errors", errors, ERRORS)
    options.choice("--special", special, ("text", "parse"))
    options.choice("--quantize", quantize, options.QUANTIZE)
    if truncate_prompt is not None:
        options.choice("--truncate-prompt", truncate_prompt, ("left",))
    if top < 1:
        raise UsageError(f"--top {top} is out of range", "it should be 1 or more")
    temperatures = _temperatures(temperature or ["1"])
    asked = _Asked(choose or [], winner, per_token, lines)
    asked.check(out)
    if choose and temperatures != [1.0] and options.strength(ctx, "temperature") == options.TYPED:
        raise UsageError("--choose weighs continuations at temperature 1", "leave out -t, or leave out --choose")
    line = ranks.join(out, tp, "predict", device=device, threads=threads)
    found = sources([] if text is None else [text], file or [], no_stdin=no_stdin, strip=strip, note=out.note)
    texts = _lines(found, errors) if lines else iter([one_text(found, errors)])
    first = next(texts, None)  # what can't be read is told before a model is loaded
    if first is None:
        return
    if text is None and not file and not lines:
        note_line_end(first, out)

    how: dict[str, Any] = {"device": device, "dtype": dtype, "quantize": quantize, "threads": threads}
    runner = open_runner(model, out, warm=warm, line=line, offload=offload, **how)
    work = _Work(out, runner, asked, top, temperatures, special == "parse", truncate_prompt is not None)
    texts = chain([first], texts)
    while group := list(islice(texts, _LINES_AT_ONCE)):
        work.do(group)


@dataclass(frozen=True)
class _Asked:
    """What is asked of continuations, and whether of many prompts."""

    choices: Sequence[str]
    winner: bool
    per_token: bool
    lines: bool

    def check(self, out: Output) -> None:
        for name, given in (("--winner", self.winner), ("--per-token", self.per_token)):
            if given and not self.choices:
                raise UsageError(f"{name} is about the continuations of --choose, and there are none", "add --choose")
        if "" in self.choices:
            raise UsageError("--choose was given an empty text", "an end of text is --choose '<|endoftext|>'")
        if twice := [text for place, text in enumerate(self.choices) if text in self.choices[:place]]:
            raise UsageError(f"--choose {twice[0]!r} was given twice", "give each continuation once")
        broken = self.lines and self.winner and not out.json and any("\n" in text for text in self.choices)
        if broken:
            raise UsageError("a choice holds a line end, and --lines --winner prints one line a prompt", "use --json")


def _temperatures(given: Sequence[str]) -> list[float]:
    from gptcli.core.settings import Sampling

    values = []
    for word in ",".join(given).split(","):
        try:
            values.append(float(word))
        except ValueError:
            raise UsageError(f"--temperature {word!r} is not a number", "for instance -t 0.2,1,2") from None
        Sampling(temperature=values[-1])
    return values


def _lines(found: Sequence[Source], errors: str) -> Iterator[str]:
    for source in found:
        yield from source.lines(errors)


@dataclass
class _Prompt:
    """A text and its token ids; ``number`` counts the lines from 1."""

    text: str
    number: int
    ids: list[int]


class _Work:
    """One model at work on some prompts, in groups."""

    def __init__(
        self,
        out: Output,
        runner: Runner,
        asked: _Asked,
        top: int,
        temperatures: Sequence[float],
        special: bool,
        truncate: bool,
    ) -> None:
        self.out, self.runner, self.asked, self.top, self.temperatures = out, runner, asked, top, temperatures
        self.special, self.truncate = special, truncate
        # A choice is encoded apart from the prompt: so the prompt's tokens are the same for all of them.
        self.choices = [runner.encode(text, special=special, follows=True) for text in asked.choices]
        self._done = 0

    def do(self, texts: Sequence[str]) -> None:
        """The answers for some prompts, written before the next ones are looked at."""
        prompts = [self._prepare(text, number) for number, text in enumerate(texts, self._done + 1)]
        if self.choices:
            self._choose(prompts)
        else:
            self._distribute(prompts)
        self._done += len(texts)
        self.out.stdout.flush()

    def _prepare(self, text: str, number: int) -> _Prompt:
        from gptcli.core.distribution import check_lengths

        where = f"line {number}: " if self.asked.lines else ""
        ids = self.runner.prompt_ids(text, special=self.special)
        most = self.runner.context - max(map(len, self.choices), default=1) + 1
        if self.truncate and len(ids) > most > 0:
            self.out.note(f"{where}the first {len(ids) - most:,} of {len(ids):,} prompt tokens were cut off")
            ids = ids[-most:]
        try:
            check_lengths(ids, self.choices or [[0]], self.runner.context, self.runner.name)
        except LimitError as error:
            raise LimitError(where + error.message, error.hint) from None
        if self.out.verbose:
            self._tell_borders(text, where)
        return _Prompt(text, number, ids)

    def _tell_borders(self, text: str, where: str) -> None:
        """Say which choices would be other tokens if they were encoded along with the prompt."""
        encode = self.runner.encode
        apart = encode(text, special=self.special)
        for choice, ids in zip(self.asked.choices, self.choices, strict=True):
            if encode(text + choice, special=self.special) != apart + ids:
                pieces = " ".join(map(self._shown, ids))
                self.out.detail(
                    f"{where}{choice!r} is weighed as {pieces}; in one piece with the prompt it would be other tokens"
                )

    def _distribute(self, prompts: Sequence[_Prompt]) -> None:
        every = self.runner.distributions([each.ids for each in prompts], self.temperatures, self.top)
        for prompt, found in zip(prompts, every, strict=True):
            if self.out.json:
                blocks = [as_json(each, self.runner.token_text) for each in found]
                self._record(prompt, blocks[0] if len(blocks) == 1 else {"temperatures": blocks})
            elif self.out.on_terminal:
                tokens = [self._shown(candidate.id) for candidate in found[0].top]
                rest = self.runner.vocab_size - len(tokens)
                self._title(prompt)
                self.out.data(predict_bars.distributions(found, tokens, rest, _width(), self.out.style))
            else:
                if prompt.number > 1:
                    self.out.data("")
                for place, candidate in enumerate(found[0].top):
                    chances = [each.top[place].probability for each in found]
                    self._row(*chances, candidate.logit, candidate.id, self._shown(candidate.id))
                for each in found:
                    self.out.detail(f"T = {each.temperature:g}: entropy {each.entropy_bits} bits, others {each.others}")

    def _choose(self, prompts: Sequence[_Prompt]) -> None:
        from gptcli.core.distribution import normalized

        found = self.runner.continuations([prompt.ids for prompt in prompts], self.choices)
        for prompt, scored in zip(prompts, found, strict=True):
            weights = [each.logprob_per_token if self.asked.per_token else each.logprob for each in scored]
            chances = normalized(weights)
            best = self.asked.choices[max(range(len(weights)), key=lambda place: weights[place])]
            if self.out.json:
                choices = [
                    self._choice(text, each, chance)
                    for text, each, chance in zip(self.asked.choices, scored, chances, strict=True)
                ]
                self._record(prompt, {"temperature": 1.0, "choices": choices, "winner": best})
            elif self.asked.winner:
                self.out.text(best + "\n", flush=False)
            else:
                self._show_choices(prompt, scored, chances)

    def _show_choices(self, prompt: _Prompt, scored: Sequence[Continuation], chances: Sequence[float]) -> None:
        names = [quoted(text.encode("utf-8", errors="replace")) for text in self.asked.choices]
        logprobs = [each.logprob for each in scored]
        counts = [len(each.ids) for each in scored]
        if self.out.on_terminal:
            self._title(prompt)
            self.out.data(predict_bars.choices(names, chances, logprobs, counts, _width(), self.out.style))
        elif self.asked.lines:
            self._row(*chances)
        else:
            for row in zip(chances, logprobs, counts, names, strict=True):
                self._row(*row)

    def _title(self, prompt: _Prompt) -> None:
        if prompt.number > 1:
            self.out.data("")
        before, text = predict_bars.title(self.runner.name, prompt.text, _width())
        self.out.data(self.out.style(before, "dim") + self.out.style(text, "bold"))

    def _row(self, *values: float | str) -> None:
        """Numbers as they are, for ``awk`` and ``sort -g``."""
        self.out.data("\t".join(map(str, values)))

    def _shown(self, id_: int) -> str:
        return quoted(self.runner.token_bytes(id_))

    def _record(self, prompt: _Prompt, answer: dict[str, Any]) -> None:
        index = {"index": prompt.number - 1} if self.asked.lines else {}
        of_prompt = {"model": self.runner.name, "prompt": prompt.text, "tokens": prompt.ids}
        self.out.record(index | of_prompt | answer | self.runner.used)

    def _choice(self, text: str, scored: Continuation, chance: float) -> dict[str, Any]:
        return {
            "text": text,
            "logprob": scored.logprob,
            "probability": chance,
            "tokens": list(scored.ids),
            "logprobs": list(scored.logprobs),
        }


def _width() -> int:
    return shutil.get_terminal_size().columns
