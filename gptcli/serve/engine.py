"""One model, many requests: they share the steps of decoding, each with its own sampling, seed and end.

A thread of its own runs the model, so whatever else the process does is not held up by it, nor the other way round.
Between two steps rows come in, short prompts together, and those that ended or whose caller is gone leave; other work
on the model (``call``) waits for its turn there too. What was made in a step is handed over at once for all rows.

(Continuous batching: Yu et al. 2022, "Orca", section 4.1.)
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gptcli.core import runtime
from gptcli.core.build import Model
from gptcli.core.draw import Draw
from gptcli.core.generate import Row, check_finite, check_prompt
from gptcli.core.pool import Asked, Pool, draw_each
from gptcli.core.prefixes import Prefixes
from gptcli.core.requests import Request, Step
from gptcli.core.sampling import History
from gptcli.core.settings import Sampling
from gptcli.errors import BusyError, GptcliError, ResourceError

Result = TypeVar("Result")

# Prompt tokens that are computed between two steps, where there are more: about what a step of many rows takes.
_PROMPT_TOKENS = 256
# Prompts that the pool may choose from, to read some at once.
_CHOICE = 16


@dataclass(eq=False)
class Ticket:
    """One request on its way.

    Attributes:
        request, sampling: what is asked.
        logprobs: as of ``generate``.
        slide: as of ``generate``.
        whole: hand its steps over all together at its end, not as they are made.
        inbox: whatever the caller wants to find again with the steps.
        known: prompt tokens that were not computed, since an earlier text began alike.
        submitted, started, first, ended: when that happened, on the clock of ``time.perf_counter``; 0 before.
        error: why it ended without a finish.
    """

    request: Request
    sampling: Sampling
    logprobs: int | None = None
    slide: bool = False
    whole: bool = False
    inbox: Any = None
    known: int = 0
    submitted: float = 0.0
    started: float = 0.0
    first: float = 0.0
    ended: float = 0.0
    error: Exception | None = None
    _cancelled: bool = False
    _steps: list[Step] = field(default_factory=list)

    def cancel(self) -> None:
        """Nobody waits for it any more: it stops at the next token."""
        self._cancelled = True


# What a step made: each ticket with its new steps, in order; one that ended with an error has it in ``error``.
Delivery = list[tuple[Ticket, list[Step]]]


@dataclass
class Counts:
    """What was done since the start, for whoever watches."""

    requests: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    known_tokens: int = 0
    made_tokens: int = 0
    steps: int = 0
    busy_seconds: float = 0.0


@dataclass(eq=False)
class _Seat:
    """A ticket with its text; while it is one of the engine's seats, its row is in the pool."""

    ticket: Ticket
    row: Row
    history: History | None = None  # made when its row is there, as is the other
    draw: Draw | None = None

    def asked(self, library: Any) -> Asked:
        """What is to be drawn next, natively where there is a library."""
        if self.draw is None:
            self.draw = Draw(self.ticket.sampling, library)
        return Asked(self.draw, self.row.request.seed, self.row.position, self.ticket.logprobs, self.history)


class Engine:
    """Runs a model for many.

    Attributes:
        model: for what needs no computing: its tokenizer, its configuration. Everything else goes through ``call``.
        counts: what was done.
        prefixes: texts that were read before, for what goes through ``call``; None for none.
    """

    def __init__(
        self,
        model: Model,
        deliver: Callable[[Delivery], None],
        *,
        rows: int = 32,
        waiting: int = 256,
        prefix_bytes: int = 256 << 20,
    ) -> None:
        """Start its thread.

        Args:
            model: from ``open_model``.
            deliver: is called on the engine's thread, after each step, with what was made; it should be quick.
            rows: decoded together at most; ``waiting``: more that may wait for a place.
            prefix_bytes: for keys and values of texts that were read before; 0 for none.
        """
        self.model = model
        self.counts = Counts()
        self.rows, self.waiting = rows, waiting
        self._deliver = deliver
        self.prefixes = Prefixes(prefix_bytes) if prefix_bytes else None
        self._pool = Pool(model.transformer, model.stepping, self.prefixes)
        self._seats: list[_Seat] = []  # in the order of the pool's rows
        self._stale: list[_Seat] = []  # to be read anew, after their text was cut
        self._queue: deque[Ticket] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._made: Delivery = []
        self._wake = threading.Condition()
        self._closing = False
        # Of the thread that opened the model: this one's would be torch's default.
        self._threads = runtime.threads()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # --- For callers, on any thread

    def submit(self, ticket: Ticket) -> Ticket:
        """Let a request wait for its turn.

        Raises LimitError and UsageError as ``check_prompt`` does, BusyError when too many wait already.
        """
        self.submit_all([ticket])
        return ticket

    def submit_all(self, tickets: Sequence[Ticket]) -> None:
        """All of them or none. Raises as ``submit`` does."""
        for ticket in tickets:
            check_prompt(self.model, ticket.request.prompt)
        with self._wake:
            if self._closing:
                raise BusyError("the server is stopping", "start another")
            if len(self._queue) + len(tickets) > self.waiting:
                raise BusyError(f"{len(self._queue)} requests are waiting already", "try again in a moment")
            for ticket in tickets:
                ticket.submitted = time.perf_counter()
            self._queue.extend(tickets)
            self.counts.requests += len(tickets)
            self._wake.notify()

    def call(self, work: Callable[[], Result]) -> Future[Result]:
        """Let ``work`` use the model between two steps; what it returns or raises is in the future."""
        future: Future[Result] = Future()
        with self._wake:
            if self._closing:
                raise BusyError("the server is stopping", "start another")
            self._calls.append((work, future))
            self._wake.notify()
        return future

    @property
    def load(self) -> tuple[int, int]:
        """How many requests are decoded now, and how many wait."""
        return len(self._seats), len(self._queue)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._seats or self._stale or self._queue or self._calls)

    @property
    def cache_bytes(self) -> int:
        """Keys and values: of the rows that are decoded, and of those that are remembered."""
        return self._pool.bytes + (self.prefixes.bytes if self.prefixes else 0)

    def close(self) -> None:
        """Let the step that runs end, and nothing after it; whoever waits gets a BusyError."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    # --- On the engine's thread

    def _run(self) -> None:
        try:
            runtime.set_threads(self._threads)
            with suppress(Exception):  # the first request meets it again, and its caller is told
                self.model.stepping.prepare()
            while self._turn():
                pass
        finally:  # whatever ended it, nobody waits for ever
            self._closing = True
            self._fail_all()

    def _turn(self) -> bool:
        """Wait for something to do, and do some of it; False at the end."""
        with self._wake:
            while self.idle and not self._closing:
                self._wake.wait()
            if self._closing:
                return False
            call = self._calls.popleft() if self._calls else None
        start = time.perf_counter()
        if call is not None:
            _do(*call)
        self._drop_cancelled()
        self._admit()
        if self._seats:
            self._step()
        self._hand_over()
        self.counts.busy_seconds += time.perf_counter() - start
        return True

    def _fail_all(self) -> None:
        stopping = BusyError("the server is stopping", "start another")
        with self._wake:
            for ticket in [*(seat.ticket for seat in (*self._seats, *self._stale)), *self._queue]:
                self._fail(ticket, stopping)
            for _, future in self._calls:
                future.set_exception(stopping)
        self._hand_over()

    def _drop_cancelled(self) -> None:
        for place in range(len(self._seats) - 1, -1, -1):
            if self._seats[place].ticket._cancelled:
                self._stand_up(place)
                self.counts.cancelled += 1
        self._stale = [seat for seat in self._stale if not seat.ticket._cancelled]

    def _admit(self) -> None:
        """Seat whoever waits, but so many prompt tokens between two steps only: those who are being served go on."""
        stale, self._stale = self._stale, []
        for seat in stale:
            self._enter([seat])
        computed = 0
        while computed < _PROMPT_TOKENS and (line := self._line()):
            seats = [_Seat(ticket, Row(0, ticket.request, self.model)) for ticket in line]
            entered = self._enter(seats)
            with self._wake:
                self._queue.extendleft(reversed(line[entered:]))
            for ticket in line[:entered]:
                self.counts.prompt_tokens += len(ticket.request.prompt)
                self.counts.known_tokens += ticket.known
                computed += len(ticket.request.prompt) - ticket.known

    def _line(self) -> list[Ticket]:
        """Those who are next, out of the queue: as many as there are places, and can be read at once."""
        line: list[Ticket] = []
        places = min(self.rows - len(self._seats) - len(self._stale), _CHOICE)
        with self._wake:
            while self._queue and len(line) < places:
                ticket = self._queue.popleft()
                if ticket._cancelled:
                    self.counts.cancelled += 1
                elif ticket.request.max_tokens == 0:
                    ticket.started = time.perf_counter()
                    self._add(ticket, Step(0, None, "", finish="length"))
                else:
                    line.append(ticket)
        return line

    def _enter(self, seats: Sequence[_Seat]) -> int:
        """Rows for the first of some seats, and the token behind what each holds; returns how many had their turn."""
        start = time.perf_counter()
        try:
            entered = self._pool.enter_first([seat.row.window for seat in seats])
        except Exception as error:
            if len(seats) > 1:  # whose fault it is shows when it is alone
                return self._enter(seats[:1])
            self._fail(seats[0].ticket, _explained(error))
            return 1
        seats = seats[: len(entered)]
        self._seats += seats
        for seat, (logits, known) in zip(seats, entered, strict=True):
            try:
                if not seat.ticket.started:
                    seat.ticket.started, seat.ticket.known = start, known
                    self._sit(seat)
                check_finite(self.model, logits)
                self._draw([seat], logits[None])
            except Exception as error:
                self._stand_up(self._seats.index(seat), remember=False)
                self._fail(seat.ticket, _explained(error))
        self._settle()
        return len(seats)

    def _sit(self, seat: _Seat) -> None:
        """What a seat needs for its first token."""
        ticket = seat.ticket
        if ticket.sampling.looks_back:
            seat.history = History([ticket.request.prompt], self.model.config.vocab_size, self.model.device)
        # One object for all that are alike, so that every step sees it at once.
        alike = (other.ticket.sampling for other in self._seats if other.ticket.sampling == ticket.sampling)
        ticket.sampling = next(alike, ticket.sampling)

    def _step(self) -> None:
        """One more token for every row."""
        try:
            self._draw(self._seats, self._pool.step([seat.row.window[-1] for seat in self._seats]))
        except Exception as error:
            for seat in self._seats:
                self._fail(seat.ticket, _explained(error))
            self._seats.clear()
            self._pool.clear()
            return
        self.counts.steps += 1
        self._settle()

    def _settle(self) -> None:
        """Free the places of those who are done, and of those whose text was cut and has to be read anew."""
        for place in range(len(self._seats) - 1, -1, -1):
            seat = self._seats[place]
            if seat.ticket.ended:
                self._stand_up(place)
            elif seat.row.slid:
                self._stand_up(place, remember=False)
                self._stale.append(seat)

    def _draw(self, seats: Sequence[_Seat], logits: Any) -> None:
        """Draw the next token of some rows, whose logits are ``[len(seats), V]``."""
        library = self.model.stepping.library
        drawn = draw_each(logits, [seat.asked(library) for seat in seats])
        for seat, (token, chosen, top) in zip(seats, drawn, strict=True):
            step = seat.row.take(token, chosen, top, slide=seat.ticket.slide)
            self.counts.made_tokens += step.token is not None
            self._add(seat.ticket, step)

    def _stand_up(self, place: int, *, remember: bool = True) -> None:
        """Free a place; the last row takes it, as in the pool."""
        seat = self._seats[place]
        self._pool.leave(place, seat.row.window[:-1] if remember else ())
        last = self._seats.pop()
        if place < len(self._seats):
            self._seats[place] = last

    def _add(self, ticket: Ticket, step: Step) -> None:
        """Note a step for its caller."""
        now = time.perf_counter()
        ticket.first = ticket.first or now
        if step.finish is not None:
            ticket.ended = now
        if ticket._cancelled:
            return
        if not ticket.whole:
            self._made.append((ticket, [step]))
            return
        ticket._steps.append(step)
        if step.finish is not None:
            self._made.append((ticket, ticket._steps))

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        ticket.error, ticket.ended = error, time.perf_counter()
        self.counts.failed += 1
        if not ticket._cancelled:
            self._made.append((ticket, []))

    def _hand_over(self) -> None:
        if self._made:
            made, self._made = self._made, []
            self._deliver(made)


def _do(work: Callable[[], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(_explained(error))


def _explained(error: Exception) -> Exception:
    """Torch's way to say that memory ran out, as ours."""
    if isinstance(error, GptcliError):
        return error
    if runtime.is_out_of_memory(error):
        return ResourceError("there is not enough memory for this request", "send a shorter one, or fewer at once")
    return error
