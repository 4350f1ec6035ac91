"""Words in the embedding table: which are nearest, and how they lie along a direction."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gptcli.cli.cells import bar, cells, cut, fit, signed_bar
from gptcli.cli.out import Output
from gptcli.cli.tokens import quoted, visible
from gptcli.errors import UsageError

if TYPE_CHECKING:
    from gptcli.core.build import Model
    from gptcli.core.embedding import Along, Near, Table

_LONGEST_BAR = 60


class Words:
    """The table of a model, asked about words."""

    def __init__(self, out: Output, model: Model, table: Table, *, special: bool) -> None:
        from gptcli.core.embedding import Rows

        self.out, self.model, self.table, self.special = out, model, table, special
        self.rows = Rows(model, table)
        self._first = True

    def nearest(self, expression: str | None, words: Sequence[str], count: int) -> None:
        """The tokens nearest to an expression, or to each word."""
        from gptcli.text.expression import quote
        from gptcli.text.words import single_token

        if expression is not None:
            asked = [(expression, self._weights(expression))]
        else:
            ids = [single_token(self.model.tokenizer, word, special=self.special) for word in words]
            asked = [(quote(word), {id_: 1.0}) for word, id_ in zip(words, ids, strict=True)]
        for shown, weights in asked:
            vector = self.rows.combination(weights)
            found = self.rows.nearest(vector, count, exclude=weights)
            if self.out.json:
                nearest = [{"id": near.id, "text": self._text(near.id), "cosine": near.cosine} for near in found]
                self.out.record(self._head(shown, weights) | {"nearest": nearest} | self.model.used)
            else:
                self._say_excluded(weights)
                self._show_nearest(shown, found)

    def direction(self, expression: str, words: Sequence[str], count: int) -> None:
        """Words along a direction, or without any the ends of the whole table."""
        from gptcli.text.words import single_token

        weights = self._weights(expression)
        direction = self.rows.combination(weights)
        if words:
            ids = [single_token(self.model.tokenizer, word, special=self.special) for word in words]
            found = sorted(self.rows.project(direction, ids), key=lambda along: -along.projection)
            excluded: dict[int, float] = {}
        else:
            found = self.rows.ends(direction, count, exclude=weights)
            excluded = weights
        if self.out.json:
            listed = [
                {"id": each.id, "text": self._text(each.id), "projection": each.projection, "cosine": each.cosine}
                for each in found
            ]
            self.out.record(self._head(expression, excluded) | {"words": listed} | self.model.used)
            return
        if excluded:
            self._say_excluded(excluded)
        self._show_direction(expression, found, ends=None if words else count)

    def _weights(self, expression: str) -> dict[int, float]:
        """The weight of each token of an expression. Raises UsageError that says where a word is no single token."""
        from gptcli.text.expression import combined, parse
        from gptcli.text.words import single_token

        terms = parse(expression)
        ids = []
        for term in terms:
            if term.id is None:
                try:
                    ids.append(single_token(self.model.tokenizer, term.text, special=self.special))
                except UsageError as error:
                    message = f"the expression's word at character {term.place + 1}: {error.message}"
                    raise UsageError(message, error.hint) from None
            else:
                self.rows.row(term.id)  # or it says that there is none
                ids.append(term.id)
        return combined(terms, ids)

    def _head(self, expression: str, excluded: Sequence[int] | dict[int, float]) -> dict[str, Any]:
        return {
            "model": self.model.name,
            "table": self.table,
            "expression": expression,
            "excluded": list(excluded),
        }

    def _text(self, id_: int) -> str:
        return self.model.tokenizer.token_text(id_)

    def _quoted(self, id_: int) -> str:
        return quoted(self.model.tokenizer.token_bytes(id_))

    def _say_excluded(self, ids: Sequence[int] | dict[int, float]) -> None:
        self.out.note(f"left out of the answer, since they were asked with: {', '.join(map(self._quoted, ids))}")

    def _part(self) -> None:
        """An empty line between answers."""
        if not self._first:
            self.out.data("")
        self._first = False

    def _show_nearest(self, shown: str, found: Sequence[Near]) -> None:
        self._part()
        if not self.out.on_terminal:
            for near in found:
                self.out.data(f"{near.cosine!r}\t{near.id}\t{visible(self.model.tokenizer.token_bytes(near.id))}")
            return
        width = shutil.get_terminal_size().columns
        names = [self._quoted(near.id) for near in found]
        room = min(max(map(cells, names), default=0), max(8, width // 3))
        title = f"nearest to {shown} by cosine, {self.table} of {self.model.name}"
        self.out.data(self.out.style(cut(title, width), "dim"))
        longest = min(_LONGEST_BAR, width - room - 9)
        for near, name in zip(found, names, strict=True):
            line = f"{near.cosine:6.3f}  {self.out.style(fit(name, room), 'bold')}"
            self.out.data(f"{line} {bar(near.cosine, longest)}".rstrip())

    def _show_direction(self, shown: str, found: Sequence[Along], ends: int | None) -> None:
        if not self.out.on_terminal:
            for each in found:
                text = visible(self.model.tokenizer.token_bytes(each.id))
                self.out.data(f"{each.projection!r}\t{each.cosine!r}\t{each.id}\t{text}")
            return
        width = shutil.get_terminal_size().columns
        names = [self._quoted(each.id) for each in found]
        room = min(max(map(cells, names), default=0), max(8, width // 3))
        measure = "projection" if ends is None else "cosine"
        title = f"along {shown} by {measure}, {self.table} of {self.model.name}"
        self.out.data(self.out.style(cut(title, width), "dim"))
        half = max(1, min(_LONGEST_BAR // 2, (width - room - 11) // 2))
        values = [each.projection if ends is None else each.cosine for each in found]
        most = max(map(abs, values), default=0.0) or 1.0
        for number, (value, name) in enumerate(zip(values, names, strict=True)):
            if number == ends and len(found) == 2 * ends:
                self.out.data(self.out.style("...".rjust(5), "dim"))
            line = f"{value:8.3f}  {self.out.style(fit(name, room), 'bold')}"
            self.out.data(f"{line} {signed_bar(value / most, half)}".rstrip())
