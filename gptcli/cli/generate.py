"""``gptcli generate``: continue a text, streaming."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli import options, placing, ranks
from gptcli.cli.input import ERRORS, note_line_end, one_text, sources
from gptcli.cli.out import Output
from gptcli.cli.warm import Runner, Warm, open_runner
from gptcli.errors import CorruptError, UsageError
from gptcli.spec.library import DEFAULT_MODEL
from gptcli.text.documents import SEPARATOR

if TYPE_CHECKING:
    from gptcli.core.requests import Choice, Step, Timing
    from gptcli.core.settings import Sampling

# Rows that are decoded together; more wait for their turn.
_ROWS_AT_ONCE = 16


def _drafts(incomplete: str) -> list[str]:
    """What a draft model's name that is being typed may become."""
    return [*options.model_names(incomplete), *options.one_of("none")(incomplete)]


def generate(
    ctx: typer.Context,
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="The text to continue; - for stdin.")] = None,
    model: options.Model = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", metavar="N", help="-1: to the text's end or the context's.")
    ] = 128,
    temperature: options.Temperature = 0.8,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    presence_penalty: options.PresencePenalty = 0.0,
    logit_bias: options.LogitBias = None,
    stop: options.Stop = None,
    num_samples: Annotated[int, typer.Option("--num-samples", metavar="N", help="N texts; sample i has seed + i.")] = 1,
    logprobs: Annotated[int | None, typer.Option("--logprobs", metavar="N", help="In JSON: log-probabilities.")] = None,
    batch: Annotated[
        Path | None, typer.Option("--batch", metavar="FILE.jsonl", help='Lines {"prompt": ...}, perhaps with "seed".')
    ] = None,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Show text as it is made.")] = True,
    echo: Annotated[
        bool | None, typer.Option("--echo/--no-echo", help="Show the prompt first; on a terminal by default.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-text token.")] = False,
    slide: Annotated[bool, typer.Option("--slide", help="Past the context, keep its last half and go on.")] = False,
    truncate_prompt: Annotated[
        str | None, typer.Option("--truncate-prompt", metavar="left", help="Cut a prompt that is too long.")
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Speed and counts, on stderr.")] = False,
    file: options.Files = None,
    no_stdin: options.NoStdin = False,
    strip: options.Strip = False,
    errors: options.Errors = "strict",
    special: options.Special = "text",
    seed: options.Seed = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = "none",
    draft_model: Annotated[
        str | None,
        typer.Option(
            "--draft-model",
            metavar="MODEL",
            help="A smaller model that guesses ahead; none: no guessing.",
            autocompletion=_drafts,
        ),
    ] = None,
    compile: options.Compile = False,
    threads: options.Threads = None,
    tp: ranks.Tp = None,
    offload: ranks.Offload = False,
    plan: placing.Plan = False,
    gpus: placing.Gpus = None,
    offline: options.Offline = False,
    warm: Warm = None,
) -> None:
    """Continue a text, streaming.

    The text is TEXT, a pipe, a file, or a pipe and then TEXT. Without a --seed one is drawn and told.
    """
    out: Output = ctx.obj
    options.choice("--errors", errors, ERRORS)
    options.choice("--special", special, ("text", "parse"))
    options.choice("--quantize", quantize, options.QUANTIZE)
    if truncate_prompt is not None:
        options.choice("--truncate-prompt", truncate_prompt, ("left",))
    for name, value, least in (("--max-tokens", max_tokens, -1), ("--num-samples", num_samples, 1)):
        if value < least:
            raise UsageError(f"{name} {value} is out of range", f"it should be {least} or more")
    if logprobs is not None and not (0 <= logprobs <= 100 and out.json):
        raise UsageError(f"--logprobs {logprobs} needs --json and a number up to 100", "add --json")
    options.check_seed(seed)
    if placing.asked(ctx, plan):
        held: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "tp": tp, "offload": offload}
        placing.show_placing(out, model or DEFAULT_MODEL, gpus, sequences=min(num_samples, _ROWS_AT_ONCE), **held)
        return
    line = ranks.join(out, tp, "generate", device=device, threads=threads)
    from gptcli.core.settings import Sampling

    penalties = (repetition_penalty, frequency_penalty, presence_penalty)
    sampling = Sampling(temperature, top_k, top_p, min_p, *penalties, options.parse_biases(logit_bias or []))
    if batch is None:
        found = sources([] if text is None else [text], file or [], no_stdin=no_stdin, strip=strip, note=out.note)
        prompts = [_Prompt(one_text(found, errors))]
        if text is None and not file:
            note_line_end(prompts[0].text, out)
        if text == "" and not prompts[0].text:  # of a variable that is not set, or of an edit that was left
            out.note("the text is empty: the model begins by itself")
    elif text is not None or file:
        raise UsageError("--batch brings its own prompts", "leave out the text")
    else:
        prompts = list(_read_batch(batch, errors, no_stdin))

    how: dict[str, Any] = {"device": device, "dtype": dtype, "quantize": quantize, "threads": threads}
    runner = open_runner(model, out, warm=warm, compile=compile, draft=draft_model, line=line, offload=offload, **how)
    from gptcli.core.requests import Timing

    options.check_biases(sampling.logit_bias, runner.name, runner.vocab_size)
    common_seed = seed if seed is not None else secrets.randbits(32)
    if seed is None and not out.json and temperature > 0:
        out.note(f"seed {common_seed}")
    # What a prompt that is cut leaves free for the answer: what it needs, up to half the context.
    half = runner.context // 2
    room = None if truncate_prompt is None else min(max_tokens, half) if max_tokens >= 0 else half
    for prompt in prompts:
        prompt.prepare(runner, special=special == "parse", room=room, out=out)
    job = _Job(runner, sampling, max_tokens, stop or [], ignore_eos, slide, logprobs, Timing())
    runs = [
        _Run(prompt, (prompt.seed if prompt.seed is not None else common_seed) + i)
        for prompt in prompts
        for i in range(num_samples)
    ]
    if out.json:
        # Also where one sample was asked for: whoever says how many reads as many lines of one form.
        several = num_samples > 1 or options.strength(ctx, "num_samples") == options.TYPED
        _write_json(out, job, runs, numbered=several or batch is not None)
    else:
        shown = out.on_terminal if echo is None else echo
        _write_text(out, job, runs, echo=shown, stream=stream)
    (out.note if runner.fell_back else out.detail)(runner.told)
    if job.timing.drafted_tokens:
        by = f"by {runner.draft_name}" if runner.draft_name else "by looking them up in the text"
        out.detail(f"{job.drafted}, {by}")
    if stats:
        _tell_stats(out, job, runs)


@dataclass
class _Prompt:
    """A text to continue, and its token ids once the model is there."""

    text: str
    seed: int | None = None
    ids: list[int] = field(default_factory=list)

    def prepare(self, runner: Runner, *, special: bool, room: int | None, out: Output) -> None:
        """Encode the text; past the context its beginning goes, if ``room`` says how much to leave for the answer."""
        from gptcli.core.requests import check_length

        ids = runner.prompt_ids(self.text, special=special)
        if room is not None and len(ids) > runner.context:
            most = max(1, runner.context - room)
            out.note(f"the first {len(ids) - most:,} of {len(ids):,} prompt tokens were cut off")
            ids = ids[-most:]
        check_length(ids, runner.context, runner.name)
        self.ids = ids


@dataclass
class _Run:
    """One answer as it grows."""

    prompt: _Prompt
    seed: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None  # until it ends; Ctrl-C leaves it so
    logprobs: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class _Job:
    """What all runs of a command share."""

    runner: Runner
    sampling: Sampling
    max_tokens: int
    stop: Sequence[str]
    ignore_eos: bool
    slide: bool
    logprobs: int | None
    timing: Timing

    @property
    def drafted(self) -> str:
        """How many tokens were guessed, and how many rightly."""
        return f"{self.timing.drafted_tokens:,} tokens were drafted and {self.timing.accepted_tokens:,} accepted"

    def steps(self, runs: Sequence[_Run], timing: Timing) -> Iterator[Step]:
        """Decode some runs together, keeping their answers up to date."""
        from gptcli.core.requests import Request

        requests = [Request(run.prompt.ids, run.seed, self.max_tokens, self.stop, self.ignore_eos) for run in runs]
        for step in self.runner.generate(
            requests, self.sampling, logprobs=self.logprobs, slide=self.slide, timing=timing
        ):
            run = runs[step.row]
            run.text += step.text
            if step.token is not None:
                run.tokens.append(step.token)
            if step.chosen is not None and step.token is not None:
                run.logprobs.append({**self._choice(step.chosen), "top": [self._choice(choice) for choice in step.top]})
            if step.finish is not None:
                run.finish = step.finish
            yield step
        self.timing.prefill_seconds += timing.prefill_seconds
        self.timing.decode_seconds += timing.decode_seconds
        self.timing.decoded_tokens += timing.decoded_tokens
        self.timing.drafted_tokens += timing.drafted_tokens
        self.timing.accepted_tokens += timing.accepted_tokens

    def groups(self, runs: Sequence[_Run], out: Output) -> Iterator[tuple[int, Sequence[_Run], Timing]]:
        """Decode all runs, some at a time; yields each group when it is done, or, after Ctrl-C, as far as it came."""
        from gptcli.core.requests import Timing

        at_once = 1 if self.runner.draft_name else _ROWS_AT_ONCE
        for first in range(0, len(runs), at_once):
            group = runs[first : first + at_once]
            timing = Timing()
            try:
                for step in self.steps(group, timing):
                    _tell_slide(out, step)
            except KeyboardInterrupt:
                yield first, group, timing
                raise
            yield first, group, timing

    def _choice(self, choice: Choice) -> dict[str, Any]:
        return {"id": choice.id, "text": self.runner.token_text(choice.id), "logprob": choice.logprob}


def _write_json(out: Output, job: _Job, runs: list[_Run], *, numbered: bool) -> None:
    """One object a run, in their order."""
    for first, group, timing in job.groups(runs, out):
        for index, run in enumerate(group, first):
            out.record(_as_json(job, run, timing, index if numbered else None))


def _as_json(job: _Job, run: _Run, timing: Timing, index: int | None) -> dict[str, Any]:
    runner = job.runner
    value: dict[str, Any] = {} if index is None else {"index": index}
    value |= {
        "model": runner.name,
        "prompt": run.prompt.text,
        "text": run.text,
        "tokens": run.tokens,
        "finish_reason": run.finish,
        "seed": run.seed,
        **({"draft_model": runner.draft_name} if runner.draft_name else {}),
        **runner.used,
        "usage": {"prompt_tokens": len(run.prompt.ids), "completion_tokens": len(run.tokens)},
        "timing": {
            "load_seconds": runner.load_seconds,
            "prefill_seconds": timing.prefill_seconds,
            "decode_seconds": timing.decode_seconds,
            "tokens_per_second": timing.tokens_per_second,
            "drafted_tokens": timing.drafted_tokens,
            "accepted_tokens": timing.accepted_tokens,
        },
    }
    if job.logprobs is not None:
        value["logprobs"] = run.logprobs
    return value


def _write_text(out: Output, job: _Job, runs: list[_Run], *, echo: bool, stream: bool) -> None:
    """The texts themselves. One alone streams. Several come whole: on a terminal each under its number, else parted
    by the line that parts documents everywhere in gptcli.
    """
    from gptcli.core.requests import Timing

    if len(runs) == 1:
        if echo:
            out.text(runs[0].prompt.text)
        if stream:
            for step in job.steps(runs, Timing()):
                _tell_slide(out, step)
                out.text(step.text)
        else:
            for _, group, _ in job.groups(runs, out):
                out.text(group[0].text)
        out.end_line()
        _tell_finish(out, runs[0])
        return
    for first, group, _ in job.groups(runs, out):
        for index, run in enumerate(group, first):
            if out.on_terminal:
                out.data(out.style(f"--- {index} (seed {run.seed})", "bold"))
            elif index:
                out.data(SEPARATOR)
            text = (run.prompt.text if echo else "") + run.text
            out.text(text if text.endswith("\n") else text + "\n")


def _tell_slide(out: Output, step: Step) -> None:
    if step.slid:
        out.note(f"past the context: the oldest {step.slid:,} tokens were let go")


def _tell_finish(out: Output, run: _Run) -> None:
    if run.finish == "context":
        out.note("the context is full; --slide goes on past it")


def _tell_stats(out: Output, job: _Job, runs: list[_Run]) -> None:
    timing = job.timing
    prompt, made = sum(len(run.prompt.ids) for run in runs), sum(len(run.tokens) for run in runs)
    used = ", ".join(word for word in job.runner.used.values() if word != "none")
    out.stats(
        f"{job.runner.name} ({used}): load {job.runner.load_seconds:.3f} s, "
        f"prompt {prompt:,} tokens in {timing.prefill_seconds:.3f} s, "
        f"text {made:,} tokens in {timing.decode_seconds:.3f} s, {timing.tokens_per_second:,.1f} tokens/s"
        + (f", {job.drafted}" if timing.drafted_tokens else "")
    )


def _read_batch(file: Path, errors: str, no_stdin: bool) -> Iterator[_Prompt]:
    """The prompts of a ``.jsonl`` file, and of a pipe only where it is ``-``. Raises CorruptError that names the line,
    UsageError for ``-`` where standard input is closed or refused.
    """
    (source,) = sources([], [file], no_stdin=no_stdin or file != Path("-"))
    for number, line in enumerate(source.lines(errors), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            prompt, seed = value["prompt"], value.get("seed")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CorruptError(f'{file} line {number} is not an object with a "prompt"', "correct the line") from None
        if not isinstance(prompt, str) or not (seed is None or (type(seed) is int and 0 <= seed < 2**63)):
            raise CorruptError(f"{file} line {number}: prompt should be a text and seed a number", "correct the line")
        yield _Prompt(prompt, seed)
