"""How ``gptcli score`` shows surprise: coloured text, a token or a line a row, totals, JSON."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gptcli.cli.out import Output, harmless
from gptcli.cli.score_read import Document
from gptcli.cli.shade import HEAT, shade
from gptcli.cli.tokens import visible

if TYPE_CHECKING:
    from gptcli.core.build import Model
    from gptcli.core.score import Scored, Totals

# The colours take a step every so many bits, and the last is open: 2 bits are one chance in four.
_BITS_A_STEP = 2

Token = tuple[int, "float | None"]


def shaded(text: str, bits: float | None) -> str:
    """Text on the background of its bits."""
    return shade(text, (bits or 0.0) / _BITS_A_STEP / (len(HEAT) + 1))


def legend() -> str:
    """What the colours mean, in themselves."""
    labels = [f" {step * _BITS_A_STEP}{'+' if step == len(HEAT) else ''} " for step in range(1, len(HEAT) + 1)]
    steps = "".join(shaded(label, step * _BITS_A_STEP) for step, label in enumerate(labels, 1))
    return f"bits a token:  less {steps}"


class View:
    """Takes in what ``score`` gives, document by document; a view is one of the classes below."""

    def __init__(self, out: Output, model: Model, stride: int) -> None:
        self.out, self.model, self.stride = out, model, stride
        self.names: Sequence[str] = ()  # of the sources

    def source(self, number: int) -> None:
        """A source begins."""

    def begin(self, document: Document) -> None:
        """A document begins."""

    def tokens(self, document: Document, scored: Scored) -> None:
        """Some more of its tokens have been scored."""

    def end(self, document: Document, totals: Totals) -> None:
        """It ends; ``totals`` are its own."""

    def source_end(self, number: int, totals: Totals) -> None:
        """A source ends; so may one that has no document."""

    def close(self, rest: str, totals: Totals) -> None:
        """All has been scored; ``rest`` stands behind the last document."""

    def interrupted(self, totals: Totals) -> None:
        """Ctrl-C came; ``totals`` are of what has been scored of the source, but for its bytes."""


class ColoredText(View):
    """The text itself, each token on the background of its bits; without the colours it is the input."""

    def begin(self, document: Document) -> None:
        self.out.text(document.gap, flush=False)
        self._painter = Painter(self.out, self.model)

    def tokens(self, document: Document, scored: Scored) -> None:
        self.out.painted(self._painter.paint(scored.tokens()))

    def close(self, rest: str, totals: Totals) -> None:
        self.out.text(rest)
        self.out.part()
        if self.out.colored(self.out.stderr):
            self.out.talk(legend())
        self.out.talk(summary(totals))


class TokenRows(View):
    """A token a line: its bits, a tab, the token with line breaks escaped; ``-`` for one without a score."""

    def tokens(self, document: Document, scored: Scored) -> None:
        for id_, bits in scored.tokens():
            self.out.data(f"{_fixed(bits)}\t{visible(self.model.tokenizer.token_bytes(id_))}")


class Lines(View):
    """A line a row: its bits, its bits a byte, itself; or, with ``above``, the odd lines alone."""

    def __init__(self, out: Output, model: Model, stride: int, above: float | None, numbers: bool) -> None:
        super().__init__(out, model, stride)
        self._above, self._numbers = above, numbers
        self._colored = out.colored()

    def begin(self, document: Document) -> None:
        self._painted: list[str] = []
        self._painter = Painter(self.out, self.model)

    def tokens(self, document: Document, scored: Scored) -> None:
        if self._colored:
            self._painted.append(self._painter.paint(scored.tokens()))

    def end(self, document: Document, totals: Totals) -> None:
        if not is_above(totals, self._above):
            return
        bits, rate, line = _fixed(totals.bits), _fixed(totals.bits_per_byte), document.line
        ending = "\n" if line.endswith("\n") else ""
        text = line.removesuffix("\n")
        if self._numbers:
            ending = "\n"  # a row is a line
            row = f"{bits:>9} {rate:>7}  " if self.out.on_terminal else f"{bits}\t{rate}\t"
            self.out.data(row, end="")
        if self._painted:
            self.out.painted("".join(self._painted))
        else:
            self.out.text(text, flush=False)
        self.out.data(ending, end="")
        # At once, for who reads it as it comes.
        self.out.stdout.flush()

    def close(self, rest: str, totals: Totals) -> None:
        if self.out.on_terminal:
            self.out.part()
            if self._numbers:
                self.out.talk("columns: bits, bits a byte, the line")
            self.out.talk(summary(totals))


class TotalRows(View):
    """A row a source, and one of all where there are several, as ``wc`` has them; on a terminal under a heading."""

    _WIDTHS = (13, 10, 12, 10, 11)
    _HEADS = ("bits", "bits/byte", "perplexity", "tokens", "bytes", "")

    def __init__(self, out: Output, model: Model, stride: int) -> None:
        super().__init__(out, model, stride)
        self._held: list[Sequence[str]] = [self._HEADS] if out.on_terminal else []  # while the bar is there

    def source_end(self, number: int, totals: Totals) -> None:
        self._row(totals, self.names[number])

    def interrupted(self, totals: Totals) -> None:
        self._write()

    def close(self, rest: str, totals: Totals) -> None:
        if len(self.names) > 1:
            self._row(totals, "total")
        self._write()

    def _row(self, totals: Totals, name: str) -> None:
        values = (_fixed(totals.bits), _fixed(totals.bits_per_byte, 4), _fixed(totals.perplexity))
        self._held.append((*values, str(totals.tokens), str(totals.bytes), harmless(name)))
        if not self.out.on_terminal:
            self._write()

    def _write(self) -> None:
        for row in self._held:
            if not self.out.on_terminal:
                self.out.data("\t".join(row))
                continue
            line = "".join(f"{cell:>{width}}" for cell, width in zip(row, self._WIDTHS, strict=False))
            room = max(8, shutil.get_terminal_size().columns - len(line) - 2)
            name = row[-1] if len(row[-1]) <= room else f"…{row[-1][1 - room :]}"
            self.out.data(self.out.style(line, "dim") if row is self._HEADS else f"{line}  {name}")
        self._held = []


class Json(View):
    """One object a source, written as it comes: a text may be larger than memory."""

    def __init__(self, out: Output, model: Model, stride: int, with_tokens: bool) -> None:
        super().__init__(out, model, stride)
        self._with_tokens = with_tokens
        self._open = False

    def source(self, number: int) -> None:
        named = {"name": self.names[number]} if len(self.names) > 1 else {}
        head = self.out.encoded({"model": self.model.name, **named})
        self._between, self._bytes = "", 0
        if self._with_tokens:
            self.out.data(f'{head[:-1]}, "tokens": [', end="")
            self._open = True

    def tokens(self, document: Document, scored: Scored) -> None:
        if self._with_tokens:
            for token in _as_json(self.model, scored.tokens()):
                self.out.data(self._between + self.out.encoded(token), end="")
                self._between = ", "
            self._bytes += sum(len(self.model.tokenizer.token_bytes(id_)) for id_, _ in scored.tokens())

    def source_end(self, number: int, totals: Totals) -> None:
        self._finish(totals, self.names[number])

    def interrupted(self, totals: Totals) -> None:
        if self._open:
            totals.bytes = self._bytes
            self._finish(totals, "")

    def _finish(self, totals: Totals, name: str) -> None:
        tail = self.out.encoded(_totals_as_json(self, totals))
        if self._open:
            self.out.data(f"], {tail[1:]}")
            self._open = False
        else:
            named = {"name": name} if len(self.names) > 1 else {}
            self.out.data(self.out.encoded({"model": self.model.name, **named})[:-1] + f", {tail[1:]}")

    def close(self, rest: str, totals: Totals) -> None:
        if not self._with_tokens and len(self.names) > 1:
            self._finish(totals, "total")


class JsonLines(View):
    """One object a line of the text."""

    def __init__(self, out: Output, model: Model, stride: int, above: float | None) -> None:
        super().__init__(out, model, stride)
        self._above = above

    def begin(self, document: Document) -> None:
        self._tokens: list[dict[str, Any]] = []

    def tokens(self, document: Document, scored: Scored) -> None:
        self._tokens += _as_json(self.model, scored.tokens())

    def end(self, document: Document, totals: Totals) -> None:
        if is_above(totals, self._above):
            named = {"name": self.names[document.source]} if len(self.names) > 1 else {}
            head = {"model": self.model.name, **named, "line": document.number}
            text = document.line.removesuffix("\n")
            self.out.record({**head, "text": text, "tokens": self._tokens, **_totals_as_json(self, totals)})


class Painter:
    """Tokens to text with colours around it; a character of several tokens waits for its last, and has their sum."""

    def __init__(self, out: Output, model: Model) -> None:
        self._bytes: Callable[[int], bytes] = model.tokenizer.speller()
        self._shown: Callable[[str], str] = harmless if out.on_terminal else str
        self._colored = out.colored()
        self._held, self._bits = b"", 0.0

    def paint(self, tokens: Sequence[Token]) -> str:
        return "".join(self._pieces(tokens))

    def _pieces(self, tokens: Sequence[Token]) -> Iterator[str]:
        for id_, bits in tokens:
            self._held += self._bytes(id_)
            self._bits += bits or 0.0
            try:
                text = self._held.decode()
            except UnicodeDecodeError:
                continue
            shown = self._shown(text)
            yield shaded(shown, self._bits) if self._colored else shown
            self._held, self._bits = b"", 0.0


def is_above(totals: Totals, above: float | None) -> bool:
    """Whether a line is odd enough to be kept; one without a score is not, unless all are."""
    return above is None or (totals.bits_per_byte is not None and totals.bits_per_byte > above)


def summary(totals: Totals) -> str:
    """The totals in words."""
    if totals.bits_per_byte is None or totals.perplexity is None:
        return "nothing was scored"
    return (
        f"{totals.bits:,.1f} bits in {totals.tokens:,} tokens, {totals.bytes:,} bytes: "
        f"{totals.bits_per_byte:.3f} bits a byte, perplexity {totals.perplexity:,.2f}"
    )


def _fixed(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _as_json(model: Model, tokens: Sequence[Token]) -> Iterator[dict[str, Any]]:
    for id_, bits in tokens:
        yield {"id": id_, "text": model.tokenizer.token_text(id_), "bits": bits}


def _totals_as_json(view: View, totals: Totals) -> dict[str, Any]:
    return {
        "total_bits": totals.bits,
        "bits_per_byte": totals.bits_per_byte,
        "perplexity": totals.perplexity,
        "tokens_scored": totals.tokens,
        "bytes": totals.bytes,
        "documents": totals.documents,
        "stride": view.stride,
        **view.model.used,
    }
