"""What ``gptcli train`` reads: the tokenizer's files, the text to train on, the texts to evaluate on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.cli.out import Output
from gptcli.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from gptcli.cli.train_run import Asked
    from gptcli.spec.config import ModelConfig
    from gptcli.text.tokenizer import Tokenizer
    from gptcli.train.data import Corpus

# Of the documents, where no text to evaluate on is named.
_HELD_OUT = 0.01
_FILES = ("tokenizer.json", "vocab.json", "merges.txt")


def tokenizer_files(said: Output, asked: Asked, begun: Path | None) -> dict[str, bytes]:
    """The tokenizer's files for the model folder: trained now, another model's, or those of the run that goes on."""
    if begun is not None and (begun / "tokenizer.json").is_file():
        return files_of_folder(begun)
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
    """The tokenizer's files in a model folder."""
    names = _FILES[:1] if (folder / _FILES[0]).is_file() else _FILES[1:]
    if not all((folder / name).is_file() for name in names):
        raise NotFoundError(f"{folder} has no tokenizer files", "name another model with --tokenizer")
    with_config = [*names, *(name for name in ("tokenizer_config.json",) if (folder / name).is_file())]
    return {name: (folder / name).read_bytes() for name in with_config}


def read_corpora(
    said: Output, asked: Asked, words: Tokenizer, files: dict[str, bytes], start_id: int, size: ModelConfig
) -> list[Corpus]:
    """The training corpus, then those to evaluate on; what the model folder needs besides goes into ``files``."""
    from gptcli.train.examples import hold_examples

    learns_answers = "-" not in asked.data and hold_examples(asked.data, asked.field)
    if learns_answers and not asked.init_from:
        raise UsageError(
            "the data are examples of answers, and there is no model to teach them to",
            "name one with --init-from, or the field that holds text with --field",
        )
    if learns_answers:
        corpora = _read_examples(said, asked, words, files, start_id, size)
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

    known = {name: content for name, content in files.items() if name in _FILES}

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
            )
        return [part for part in parts if part is not None]

    corpora = prepared("the data", list(asked.data), 0.0 if asked.valid else _HELD_OUT)
    if not asked.valid and len(corpora) < 2:
        corpora = hold_out_end(replace(corpora[0], name="the data"), words)
        if len(corpora) > 1:
            said.note("too few documents to hold one out: the end of the text is held out")
        else:
            said.warn("the text is too short to hold some out, so there is no evaluation; name a text with --valid")
    for name in asked.valid:
        corpora += [replace(prepared(name, [name], 0.0)[0], name=_title(name))]
    return corpora


def _title(name: str) -> str:
    return Path(name).name.split(".txt")[0].split(".jsonl")[0]


@contextmanager
def _progress(said: Output, name: str) -> Iterator[Any]:
    """A bar for a preparation that takes a while."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn(f"reading {Path(name).name}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with said.progress(columns) as shown:
        task = shown.add_task(name, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def _read_examples(
    said: Output, asked: Asked, words: Tokenizer, files: dict[str, bytes], start_id: int, size: ModelConfig
) -> list[Corpus]:
    """Messages, or prompts and completions: only the answers are learnt."""
    from gptcli.text.template import open_template, tokenizer_config
    from gptcli.train.data import Corpus
    from gptcli.train.examples import Examples, examples_of

    folder = _folder_of(asked.init_from)
    template = open_template(folder, words, start_id, size.eos_ids[0] if size.eos_ids else start_id)

    def corpus(name: str, examples: Examples) -> Corpus:
        if examples.longest > size.context:
            said.note(f"the longest of {name} is {examples.longest:,} tokens: beyond {size.context:,} it is cut")
        return Corpus(name, examples.tokens, examples.documents, examples.text_bytes, start_id, examples.learnt)

    learnt, held = examples_of(asked.data, words, template, start_id, held_out=0.0 if asked.valid else _HELD_OUT)
    corpora = [corpus("the data", learnt)]
    if held is not None:
        corpora.append(corpus("held out", held))
    for name in asked.valid:
        corpora.append(corpus(_title(name), examples_of([name], words, template, start_id)[0]))
    if len(corpora) < 2:
        said.warn("there are too few examples to hold some out, so there is no evaluation; name some with --valid")
    files["tokenizer_config.json"] = tokenizer_config(template, size.context, files)
    return corpora


def _folder_of(name: str | None) -> Path:
    from gptcli.spec.library import DEFAULT_MODEL, resolve

    return resolve(name or DEFAULT_MODEL).folder
