"""What ``gptcli train`` reads: the tokenizer's files, the text to train on, the texts to evaluate on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.cli.out import Output
from gptcli.errors import NotFoundError, UsageError
from gptcli.spec.files import BESIDE, VOCABULARY

if TYPE_CHECKING:
    from gptcli.cli.train_asked import Asked
    from gptcli.spec.config import ModelConfig
    from gptcli.text.tokenizer import Tokenizer
    from gptcli.train.data import Corpus

# Of the documents, where no text to evaluate on is named.
_HELD_OUT = 0.01
# What the cache of tokens holds at most; the texts used least recently go first.
_CACHE_BYTES = 20_000_000_000


def tokenizer_files(said: Output, asked: Asked, out: Path, begun: str | None) -> dict[str, bytes]:
    """The tokenizer's files for the model folder: trained now, or another model's.

    ``begun`` is the digest of those of a run that goes on: it finds its own in ``out``, unless it was killed before
    they came there.
    """
    if begun is not None:
        with contextlib.suppress(NotFoundError):
            if tokenizer_digest(files := files_of_folder(out)) == begun:
                return files
    if asked.vocab_size is None:
        return files_of_tokenizer(asked.init_from or asked.tokenizer)
    from gptcli.train.data import train_tokenizer
    from gptcli.train.documents import documents_of

    said.note(f"training a tokenizer of {asked.vocab_size:,} tokens")
    held_out = 0.0 if asked.valid else _HELD_OUT
    return {"tokenizer.json": train_tokenizer(documents_of(asked.data, held_out, field=asked.field), asked.vocab_size)}


def files_of_tokenizer(name: str | None) -> dict[str, bytes]:
    """The tokenizer's files of a model, the shipped one by default. Raises NotFoundError if it has none."""
    from gptcli.spec.library import DEFAULT_MODEL, resolve

    return files_of_folder(resolve(name or DEFAULT_MODEL).folder)


def files_of_folder(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files in a model folder, and what says how it writes conversations."""
    names = VOCABULARY[:1] if (folder / VOCABULARY[0]).is_file() else VOCABULARY[1:]
    if not all((folder / name).is_file() for name in names):
        raise NotFoundError(f"{folder} has no tokenizer files", "name another model")
    return {name: (folder / name).read_bytes() for name in (*names, *BESIDE) if (folder / name).is_file()}


def tokenizer_digest(files: Mapping[str, bytes]) -> str:
    """By what a run knows its tokenizer again."""
    sums = {name: hashlib.sha256(files[name]).hexdigest() for name in VOCABULARY if name in files}
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def fingerprint(corpus: Corpus) -> dict[str, Any]:
    """By what a run knows its training data again."""
    digest = hashlib.sha256()
    for stream in (corpus.tokens, corpus.learnt):
        for start in range(0, len(stream) if stream is not None else 0, 1 << 24):
            digest.update(stream[start : start + (1 << 24)].tobytes())  # type: ignore[index]
    return {"tokens": len(corpus.tokens), "sha256": digest.hexdigest()}


def read_corpora(
    said: Output,
    asked: Asked,
    words: Tokenizer,
    files: dict[str, bytes],
    start_id: int,
    size: ModelConfig,
    context: int,
) -> list[Corpus]:
    """The training corpus, then those to evaluate on; what the model folder needs besides goes into ``files``.

    ``context`` is tokens a row, which may be fewer than the model's.
    """
    from gptcli.train.examples import hold_examples

    if "-" in asked.data and sys.stdin is not None and sys.stdin.isatty():
        said.note("reading standard input, to its end (Ctrl-D)")
    learns_answers = "-" not in asked.data and hold_examples(asked.data, asked.field)
    if learns_answers and not asked.init_from:
        raise UsageError(
            "the data are examples of answers, and there is no model to teach them to",
            "name one with --init-from, or the field that holds text with --field",
        )
    if learns_answers:
        corpora = _read_examples(said, asked, words, files, start_id, size, context)
    else:
        corpora = _read_texts(said, asked, words, files, start_id)
    first = corpora[0]
    kind = "examples, {:,} bytes of answers" if learns_answers else "documents, {:,} bytes"
    said.note(f"{first.documents:,} {kind.format(first.text_bytes)}, {len(first.tokens):,} tokens to train on")
    return corpora


def _read_texts(said: Output, asked: Asked, words: Tokenizer, files: dict[str, bytes], start_id: int) -> list[Corpus]:
    from dataclasses import replace

    from gptcli.cli.caches import token_cache
    from gptcli.train.data import hold_out_end
    from gptcli.train.prepare import prepare

    known = {name: content for name, content in files.items() if name in VOCABULARY}

    def prepared(name: str, paths: list[str], held_out: float) -> list[Corpus]:
        with _progress(said, name) as progress:
            parts = prepare(
                name,
                paths,
                words,
                known,
                start_id,
                cache=token_cache(),
                field=asked.field,
                held_out=held_out,
                progress=progress,
                workers=asked.threads,
                keep_bytes=_CACHE_BYTES,
            )
        return [part for part in parts if part is not None]

    corpora = prepared("the data", list(asked.data), 0.0 if asked.valid else _HELD_OUT)
    if not asked.valid and len(corpora) < 2:
        corpora = hold_out_end(replace(corpora[0], name="the data"), words)
        if len(corpora) > 1:
            said.note("too few documents to hold one out: the end of the text is held out")
        else:
            said.warn("the text is too short to hold some out, so there is no evaluation; name a text with --valid")
    for name, title in _titles(asked.valid).items():
        corpora += [replace(prepared(title, [name], 0.0)[0], name=title)]
    return corpora


def _titles(names: Sequence[str]) -> dict[str, str]:
    """What to call each text in reports: its file's name alone, where that is clear."""
    short = {name: "stdin" if name == "-" else Path(name).name for name in names}
    short = {name: title.split(".txt")[0].split(".jsonl")[0] or name for name, title in short.items()}
    taken = list(short.values())
    return {name: title if taken.count(title) == 1 else name for name, title in short.items()}


@contextmanager
def _progress(said: Output, name: str) -> Iterator[Any]:
    """A bar for a preparation that takes a while."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn(f"reading {Path(name).name}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with said.progress(columns) as shown:
        task = shown.add_task(name, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def _read_examples(
    said: Output,
    asked: Asked,
    words: Tokenizer,
    files: dict[str, bytes],
    start_id: int,
    size: ModelConfig,
    context: int,
) -> list[Corpus]:
    """Messages, or prompts and completions: only the answers are learnt."""
    from gptcli.text.template import open_template, tokenizer_config
    from gptcli.train.data import Corpus
    from gptcli.train.examples import Examples, examples_of

    folder = _folder_of(asked.init_from)
    template = open_template(folder, words, start_id, size.eos_ids[0] if size.eos_ids else start_id)

    def corpus(name: str, examples: Examples) -> Corpus:
        if examples.longest > context:
            said.note(f"the longest of {name} is {examples.longest:,} tokens: beyond {context:,} it is learnt in parts")
        return Corpus(
            name,
            examples.tokens,
            examples.documents,
            examples.text_bytes,
            start_id,
            examples.learnt,
            examples.starts,
        )

    learnt, held = examples_of(asked.data, words, template, start_id, held_out=0.0 if asked.valid else _HELD_OUT)
    corpora = [corpus("the data", learnt)]
    if held is not None:
        corpora.append(corpus("held out", held))
    for name, title in _titles(asked.valid).items():
        corpora.append(corpus(title, examples_of([name], words, template, start_id)[0]))
    if len(corpora) < 2:
        said.warn("there are too few examples to hold some out, so there is no evaluation; name some with --valid")
    files["tokenizer_config.json"] = tokenizer_config(template, size.context, files)
    files.pop("chat_template.jinja", None)  # it would count before
    return corpora


def _folder_of(name: str | None) -> Path:
    from gptcli.spec.library import DEFAULT_MODEL, resolve

    return resolve(name or DEFAULT_MODEL).folder
