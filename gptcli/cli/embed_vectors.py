"""The vectors themselves: as numbers in a pipe, as a short view on a terminal, as JSON, or in a file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.cli.cells import cut, fit
from gptcli.cli.out import Output
from gptcli.cli.tokens import label, quoted

if TYPE_CHECKING:
    from gptcli.core.build import Model
    from gptcli.core.embedding import Pool, Table, Vector

_BAR_FROM = 64  # texts: fewer are done before a bar would be read


@dataclass(frozen=True)
class Item:
    """What a view shows: a text (or one of its tokens), how it is labelled, and its vector."""

    text: str
    label: str
    vector: Vector


@dataclass(frozen=True)
class Work:
    """A model at work on texts, or with ``table`` on words that are rows of it."""

    out: Output
    model: Model
    table: Table | None
    pool: Pool
    layer: int
    normalize: bool
    special: bool

    def vectors(self, texts: Sequence[str]) -> Iterator[Vector]:
        """The vector of each text, in order."""
        from gptcli.core.embedding import Rows, text_vectors
        from gptcli.core.generate import prompt_ids
        from gptcli.text.words import single_token

        if self.table is not None:
            ids = [single_token(self.model.tokenizer, text, special=self.special) for text in texts]
            yield from Rows(self.model, self.table).vectors(ids, normalize=self.normalize)
            return
        rows = [prompt_ids(self.model, text, special=self.special) for text in texts]
        found = text_vectors(self.model, rows, pool=self.pool, layer=self.layer, normalize=self.normalize)
        yield from self._counted(found, len(rows))

    def items(self, texts: Sequence[str]) -> list[Item]:
        """One vector an item: a text, or with pool ``none`` a token of one."""
        found = []
        for text, vector in zip(texts, self.vectors(texts), strict=True):
            if vector.values.dim() == 1:
                found.append(Item(text, label(text), vector))
                continue
            for token in vector.tokens():
                data = self.model.tokenizer.token_bytes(token.ids[0])
                found.append(Item(data.decode("utf-8", errors="replace"), quoted(data), token))
        return found

    def head(self) -> dict[str, Any]:
        """What every JSON object begins with."""
        from gptcli.core.embedding import resolve_layer

        source: dict[str, Any] = {"table": self.table}
        if self.table is None:
            source = {"pool": self.pool, "layer": resolve_layer(self.layer, self.model.config.layers)}
        used = {"device": str(self.model.device), "dtype": self.model.dtype_name}
        return {"model": self.model.name, **source, "dimensions": self.model.config.width, **used}

    def source(self) -> str:
        """Where the vectors come from, in words."""
        if self.table is not None:
            return f"rows of the {self.table} of {self.model.name}"
        head = self.head()
        pooled = {"last": "last token", "mean": "mean over tokens", "none": "a vector a token"}[self.pool]
        return f"{self.model.name}, {pooled}, layer {head['layer']} of {self.model.config.layers}"

    def show(self, texts: Sequence[str]) -> None:
        """Write the vectors to stdout."""
        if self.out.json:
            self._write_json(texts)
        elif self.out.on_terminal:
            self._view(texts)
        else:
            for vector in self.vectors(texts):
                for token in vector.tokens():
                    # Nine digits give a float32 back to the bit.
                    self.out.data(" ".join(f"{number:.9g}" for number in token.numbers()))
                if self.pool == "none" and self.table is None:
                    self.out.data("")

    def write(self, texts: Sequence[str], file: Path) -> None:
        """Write the vectors to a file, and its name to stdout."""
        from gptcli.core.embedding_file import save_vectors

        vectors = list(self.vectors(texts))
        head = self.head()
        save_vectors(file, vectors, {name: str(value) for name, value in head.items() if name != "device"})
        if self.out.json:
            items = [{"text": text, "tokens": list(v.ids)} for text, v in zip(texts, vectors, strict=True)]
            self.out.record({**head, "output": str(file), "items": items})
        else:
            self.out.data(str(file))

    def _write_json(self, texts: Sequence[str]) -> None:
        """One object, written as it comes: the numbers of many texts are larger as objects than as vectors."""
        vectors = zip(texts, self.vectors(texts), strict=True)
        first = next(vectors, None)  # what is wrong is told before anything is written
        self.out.data(self.out.encoded(self.head())[:-1] + ', "items": [', end="")
        while first is not None:
            text, vector = first
            self.out.data(
                self.out.encoded({"text": text, "tokens": list(vector.ids), "vector": vector.numbers()}), end=""
            )
            first = next(vectors, None)
            self.out.data(", " if first is not None else "", end="")
        self.out.data("]}")

    def _view(self, texts: Sequence[str]) -> None:
        """A line a text: what it is, how long its vector is, and the first of its numbers."""
        width = shutil.get_terminal_size().columns
        room = max(10, min(40, width // 3))
        found = zip(texts, self.vectors(texts), strict=True)
        first = next(found)  # what is wrong is told before anything is shown
        title = cut(f"{self.source()}: {self.model.config.width} numbers each", width)
        self.out.data(self.out.style(title, "dim"))
        for text, vector in chain([first], found):
            if vector.values.dim() == 2:
                self.out.data(self.out.style(cut(label(text), width), "bold"))
            for token in vector.tokens():
                shown = label(text)
                if vector.values.dim() == 2:
                    shown = quoted(self.model.tokenizer.token_bytes(token.ids[0]))
                start = f"{fit(shown, room)}  norm {token.norm:<8.4g}"
                numbers = token.numbers()
                count = max(0, min(len(numbers), (width - room - 18) // 8))
                more = " …" if count < len(numbers) else ""
                line = "".join(f"{number:8.3f}" for number in numbers[:count])
                self.out.data(cut(start, width) + self.out.style(line + more, "dim"))

    def _counted(self, vectors: Iterator[Vector], total: int) -> Iterator[Vector]:
        """The same vectors; of many, a bar shows a person how far it is."""
        if total < _BAR_FROM or self.out.on_terminal:  # on a terminal what is shown is the progress
            yield from vectors
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

        columns = [TextColumn("texts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        with self.out.progress(columns) as progress:
            task = progress.add_task("texts", total=total)
            for vector in vectors:
                progress.advance(task)
                yield vector
