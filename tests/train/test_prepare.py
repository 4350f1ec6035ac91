"""The token cache: equal to encoding in memory, whatever the input, and whatever happened to it on the way."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcli.errors import CorruptError, NotFoundError, OutputError, UsageError
from gptcli.text.tokenizer import Tokenizer
from gptcli.train import documents, entry, prepare, units
from gptcli.train.data import Corpus, encode_documents
from gptcli.train.documents import SEPARATOR, documents_of, is_held_out
from gptcli.train.encode import Encoder
from tests.conftest import PATIENCE

ROOT = Path(__file__).parent.parent.parent
TEXT = "Once upon a time there was a king — naïve 東京 🙂 who had 123 daughters.\n\n\t'No!'  said she. <|end of|> "
WORDS = re.split(" ", TEXT)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is so small that a few thousand bytes are many units, shards, and large documents."""
    for module, name, size in SMALL:
        monkeypatch.setattr(module, name, size)


SMALL: list[tuple[Any, str, int]] = [
    (documents, "_READ", 100),
    (units, "_UNIT", 200),
    (units, "LARGEST", 700),
    (units, "_PART", 150),
    (entry, "_SHARD", 1500),
    (entry, "_AHEAD", 2000),
    (prepare, "_SMALL", 1000),
    (prepare, "_BUNDLE", 2000),
]


def some_documents(seed: int, count: int = 60, most: int = 60) -> list[str]:
    """Documents of very different sizes, none above what is large."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=1 + int(most * chance.random() ** 3))) for _ in range(count)]


def write(folder: Path, name: str, content: str | bytes) -> str:
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder / name)


class Maker:
    """Prepares with one tokenizer, in one cache."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.tokenizer = Tokenizer.from_folder(folder)
        self.files = {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}
        self.cache = cache

    def __call__(self, *paths: str, **more: Any) -> tuple[Corpus | None, Corpus | None]:
        return prepare.prepare("data", paths, self.tokenizer, self.files, 0, cache=self.cache, **more)

    def train(self, *paths: str, **more: Any) -> Corpus:
        corpus = self(*paths, **more)[0]
        assert corpus is not None
        return corpus

    def in_memory(self, *paths: str, **more: Any) -> Corpus:
        """The slow twin."""
        return encode_documents("data", documents_of(paths, **more), self.tokenizer, 0)

    def check(self, *paths: str, held_out: float = 0.0, **more: Any) -> None:
        """That both parts are what encoding in memory gives."""
        for part, corpus in zip(("train", "valid"), self(*paths, held_out=held_out, **more), strict=True):
            if corpus is None:
                assert not list(documents_of(paths, held_out, part, **more))
            else:
                same(corpus, self.in_memory(*paths, held_out=held_out, part=part, **more))

    def entries(self) -> list[Path]:
        return sorted(path for path in self.cache.iterdir() if path.is_dir())


def same(one: Corpus, other: Corpus) -> None:
    assert one.tokens[:].tolist() == other.tokens[:].tolist()
    assert one.tokens[:].dtype == other.tokens[:].dtype
    assert (one.documents, one.text_bytes, one.start_id) == (other.documents, other.text_bytes, other.start_id)


@pytest.fixture
def make(tiny_folder: Path, tmp_path: Path) -> Maker:
    return Maker(tiny_folder, tmp_path / "cache")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# --- Equal to the slow twin


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("held_out", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_text_is_encoded_as_in_memory(tmp_path: Path, make: Maker, seed: int, held_out: float) -> None:
    path = write(tmp_path, "a.txt", f"\n{SEPARATOR}\n".join(some_documents(seed)))
    make.check(path, held_out=held_out)
    assert len(list(make.entries()[0].glob("*.json"))) > 2


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.xz", "a.md.zst"])
def test_packed_text_is_unpacked(tmp_path: Path, make: Maker, name: str) -> None:
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    make.check(write(tmp_path, name, pack(SEPARATOR.join(some_documents(1)).encode())), held_out=0.2)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines_are_encoded_as_in_memory(tmp_path: Path, make: Maker, name: str) -> None:
    texts = [
        *some_documents(2),
        f"with {SEPARATOR} in it",
        f"{SEPARATOR}",
        " ",
        "",
        "\n\nkept\n\n",
        "x" * 3000,
        "\ud800y",
    ]
    lines = [json.dumps({"story": text}, ensure_ascii=i % 2 == 0 or i >= 60) for i, text in enumerate(texts)]
    content = "\n\n".join(lines).encode()
    path = write(tmp_path, name, gzip.compress(content) if name.endswith("gz") else content)
    make.check(path, held_out=0.2, field="story")
    with pytest.raises(CorruptError, match="line 1 "):
        make(path)


@pytest.mark.usefixtures("small")
@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["a", "b ", "\n", " ", SEPARATOR, SEPARATOR[:5], "é", "東 ", "word " * 30, "w" * 300])))
def test_any_text_is_encoded_as_in_memory(
    tmp_path_factory: pytest.TempPathFactory, tiny: Path, text: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    path = write(folder, "a.txt", "".join(text))
    make = Maker(tiny, folder / "cache")
    twin = "".join(text).split(SEPARATOR)
    large = [document for document in twin if len(document.encode()) > units.LARGEST]
    if not any(document.strip() for document in twin):
        with pytest.raises(UsageError, match="no text in data"):
            make(path)
    elif not any(is_held_out(document.removeprefix("\n").removesuffix("\n"), 0.3) for document in large):
        make.check(path, held_out=0.3)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> Path:
    return tiny_folder


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("seed", range(6))
def test_a_large_document_comes_in_parts_and_is_one_to_train_on(tmp_path: Path, make: Maker, seed: int) -> None:
    documents = some_documents(seed, 20)
    for place in (3, 4, 15):
        documents[place] = "".join(some_documents(seed + place, 1000, 2))[: 5000 * place]
    path = write(tmp_path, "a.txt", f"\n{SEPARATOR}\n".join(documents) + "\n")
    same(make.train(path), make.in_memory(path))
    train, valid = make(path, held_out=0.999999)
    assert train is not None
    assert valid is not None
    large = [document for document in documents if len(document.encode()) > 700]
    same(train, encode_documents("data", large, make.tokenizer, 0))
    assert train.documents + valid.documents == sum(not document.isspace() for document in filter(None, documents))


@pytest.mark.usefixtures("small")
def test_a_document_without_a_place_to_cut_is_held_whole(tmp_path: Path, make: Maker) -> None:
    make.check(write(tmp_path, "a.txt", "x" * 5000 + " y\n" * 3 + SEPARATOR + "z" * 800))


def test_an_encoder_of_documents_equals_one_at_a_time(tiny_folder: Path) -> None:
    """Where the joined texts would read otherwise, too: separators in a text, another start token, remapped ids."""
    tokenizer = Tokenizer.from_folder(tiny_folder)
    texts = ["a", "", " b", f"c{SEPARATOR}d", SEPARATOR, "\ud83d x \udc00", "é" * 9]
    for start_id in (0, 5):
        for chosen in (texts, texts[:3], texts[5:], []):
            expected = [id_ for text in chosen for id_ in (start_id, *tokenizer.encode(text))]
            assert Encoder(tokenizer, start_id).documents(chosen).tolist() == expected


def remapped(content: bytes, always: str | None = None) -> bytes:
    """A tokenizer.json whose ids are turned around, so that they can't be ranks; and with a token matched always."""
    raw = json.loads(content)
    vocab = raw["model"]["vocab"]
    ids = {token: (len(vocab) - id_) % len(vocab) for token, id_ in vocab.items()}
    raw["model"]["vocab"] = ids
    for token in raw["added_tokens"]:
        token["id"] = ids.get(token["content"], token["id"])
    if always:
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        raw["added_tokens"].append({"id": len(vocab), "content": always, **plain})
    return json.dumps(raw).encode()


@pytest.mark.parametrize("always", [None, "king"])
def test_ids_that_are_not_ranks_are_looked_up(tmp_path: Path, tiny_folder: Path, always: str | None) -> None:
    write(tmp_path, "other/tokenizer.json", remapped((tiny_folder / "tokenizer.json").read_bytes(), always))
    tokenizer = Tokenizer.from_folder(tmp_path / "other")
    assert tokenizer.ids_of_ranks is not None
    assert tokenizer.special_tokens[SEPARATOR] == 0
    texts = ["there was a king", "no one", f"king{SEPARATOR}king", "a\ud800king"]
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]
    for chosen in (texts, texts[:2], texts[1:2]):
        expected = [id_ for text in chosen for id_ in (0, *tokenizer.encode(text))]
        assert Encoder(tokenizer, 0).documents(chosen).tolist() == expected


def test_a_large_vocabulary_takes_wider_tokens(tmp_path: Path, make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.txt", "Once upon a time")
    monkeypatch.setattr(Tokenizer, "vocab_size", (1 << 16) + 1)
    assert make.train(path).tokens[:].dtype == np.uint32
    make.check(path)


# --- Several inputs


@pytest.mark.usefixtures("small")
def test_folders_are_their_files_in_order_and_small_ones_share_an_entry(tmp_path: Path, make: Maker) -> None:
    for number, count in enumerate([1, 2, 3, 90, 1, 1, 60, 2, *[3] * 30]):
        write(tmp_path, f"in/{number:02d}.txt", SEPARATOR.join(some_documents(number, count, 20)))
    write(tmp_path, "in/04.jsonl", json.dumps({"text": "one"}))
    write(tmp_path, "in/05.txt", "")
    make.check(str(tmp_path / "in"), held_out=0.2)
    assert 5 < len(make.entries()) < 20


@pytest.mark.usefixtures("small")
def test_a_file_named_twice_is_encoded_once_and_counts_twice_in_training_only(tmp_path: Path, make: Maker) -> None:
    one = write(tmp_path, "one.txt", SEPARATOR.join(some_documents(1)))
    two = write(tmp_path, "two.txt", SEPARATOR.join(some_documents(2)))
    train, valid = make(one, two, one, held_out=0.2)
    assert train is not None
    assert valid is not None
    same(train, make.in_memory(one, two, one, held_out=0.2))
    same(valid, make.in_memory(one, two, held_out=0.2, part="valid"))
    assert len(make.entries()) == 2
    before = contents(make.cache)
    same(make.train(two, two, one, held_out=0.2), make.in_memory(two, two, one, held_out=0.2))
    assert contents(make.cache) == before


@pytest.mark.usefixtures("small")
def test_standard_input_is_keyed_by_what_it_held(tmp_path: Path, make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    text = SEPARATOR.join(some_documents(5))
    path = write(tmp_path, "a.txt", text)
    told: list[tuple[int, int | None]] = []
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        told.clear()
        same(make.train("-", "-", progress=lambda done, total: told.append((done, total))), make.in_memory(path, path))
    assert told[0][1] is None
    assert told[-1] == (len(text.encode()), len(text.encode()))
    make.train(path)
    assert len(make.entries()) == 1
    assert {file.suffix for file in make.cache.iterdir()} == {"", ".lock"}
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="standard input"):
        make("-")


def test_a_named_pipe_is_read_once(tmp_path: Path, make: Maker) -> None:
    text = SEPARATOR.join(some_documents(6))
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    path = write(tmp_path, "a.txt", text)
    with subprocess.Popen(["cp", path, str(pipe)]):
        same(make.train(str(pipe)), make.in_memory(path))


# --- What the key depends on


def test_the_key_is_the_content_and_what_it_is_made_with(tmp_path: Path, make: Maker, tiny_folder: Path) -> None:
    path = write(tmp_path, "a.txt", "Once upon a time")
    make.train(path)
    make.train(write(tmp_path, "other name.md", "Once upon a time"))
    make.train(path, field="other")  # no matter here
    assert len(make.entries()) == 1
    make.train(write(tmp_path, "a.txt", "Once upon a timE"))
    same(make.train(path), make.in_memory(path))
    assert len(make.entries()) == 2
    make.train(path, held_out=1e-9)
    assert len(make.entries()) == 3
    make.files = {"tokenizer.json": make.files["tokenizer.json"] + b"\n"}
    make.train(path)
    assert len(make.entries()) == 4
    line = '{"text": "a", "more": "b"}'
    same(make.train(write(tmp_path, "a.txt", line)), make.in_memory(path))
    for field in ("text", "more"):
        same(
            make.train(write(tmp_path, "a.jsonl", line), field=field),
            encode_documents("data", [json.loads(line)[field]], make.tokenizer, 0),
        )
    assert len(make.entries()) == 7


def test_the_same_text_is_not_encoded_again(tmp_path: Path, make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.txt", "Once upon a time")
    first = make.train(path)
    monkeypatch.setattr(Tokenizer, "encode_ranks", None)
    told: list[tuple[int, int | None]] = []
    same(make.train(path, progress=lambda done, total: told.append((done, total))), first)
    assert told == [(16, 16)]


# --- Interrupted

CHILD = """
import json, sys
from pathlib import Path
from tests.train import test_prepare
folder, cache, workers, *paths = sys.argv[1:]
for module, name, size in test_prepare.SMALL:
    setattr(module, name, size)
make = test_prepare.Maker(Path(folder), Path(cache))
def told(done, total):
    print(done, flush=True)
    sys.stdin.readline()
print("go", flush=True)
make(*paths, held_out=0.2, workers=int(workers), progress=told)
"""


def child(
    make: Maker, cache: Path, folder: Path, *paths: str, workers: int = 2, waits: bool = False
) -> subprocess.Popen[str]:
    """A process that tells of every unit, and, if it ``waits``, goes on with the next one when it is sent a line."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(cache), str(workers), *paths],
        stdin=subprocess.PIPE if waits else subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """Text with large documents, JSON lines, packed text, and a folder."""
    documents = some_documents(7, 200)
    documents[50] = " ".join(some_documents(8, 600, 30))
    lines = "\n".join(json.dumps({"text": text}) for text in some_documents(9, 150))
    for number in range(5):
        write(tmp_path, f"in/{number}.txt", SEPARATOR.join(some_documents(number)))
    return [
        write(tmp_path, "a.txt", f"\n{SEPARATOR}\n".join(documents)),
        write(tmp_path, "b.jsonl", lines),
        write(tmp_path, "c.txt.xz", lzma.compress(SEPARATOR.join(some_documents(10, 200)).encode())),
        str(tmp_path / "in"),
    ]


@pytest.mark.usefixtures("small")
def test_a_preparation_killed_at_any_moment_goes_on(
    tmp_path: Path, make: Maker, tiny_folder: Path, inputs: list[str]
) -> None:
    """kill -9 at moments a seed picks: what is left and finished equals, byte for byte, what was never interrupted."""
    make.check(*inputs, held_out=0.2)
    chance = random.Random(3)
    killed = tmp_path / "killed"
    unfinished = 0
    for _ in range(6):
        with child(make, killed, tiny_folder, *inputs, workers=1, waits=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == "go\n"
            for _ in range(chance.randrange(2, 60)):
                if process.stdout.readline():
                    process.stdin.write("\n")
                    process.stdin.flush()
            process.kill()  # it is at most one unit ahead, and in the middle of that
        unfinished += contents(killed) != contents(make.cache)
    assert unfinished >= 3
    Maker(tiny_folder, killed)(*inputs, held_out=0.2)
    assert contents(killed) == contents(make.cache)


@pytest.mark.usefixtures("small")
def test_a_preparation_stopped_behind_any_unit_goes_on_with_little_lost(
    make: Maker, inputs: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    """As above, but at each unit in turn; and no more than a shard is read again."""
    make(*inputs, held_out=0.2)
    other = Maker(tiny_folder, tmp_path / "stopped")
    count = stops = 0
    while stops < 200:
        count = 0

        def stopping(done: int, total: int | None) -> None:
            nonlocal count
            count += 1
            if count > 15:  # a shard is about so many units
                raise KeyboardInterrupt

        try:
            other(*inputs, held_out=0.2, workers=1, progress=stopping)
            break
        except KeyboardInterrupt:
            stops += 1
    assert 5 < stops < 200
    assert contents(other.cache) == contents(make.cache)


@pytest.mark.usefixtures("small")
def test_several_at_once_make_it_once(make: Maker, tmp_path: Path, tiny_folder: Path, inputs: list[str]) -> None:
    make(*inputs, held_out=0.2)
    shared = tmp_path / "shared"
    processes = [child(make, shared, tiny_folder, *inputs) for _ in range(3)]
    said = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert contents(shared) == contents(make.cache)
    # Every unit is encoded by one of them: the others pass over what is there.
    alone = child(make, tmp_path / "alone", tiny_folder, *inputs).communicate(timeout=PATIENCE)[0]
    units, entries = alone.count("\n"), len(make.entries())
    assert sum(text.count("\n") for text in said) <= units + 2 * (entries + 1)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("damage", ["shorter", "longer", "gone", "no record", "bad record", "odd record", "left over"])
def test_a_damaged_shard_is_made_anew(make: Maker, inputs: list[str], damage: str) -> None:
    make(*inputs, held_out=0.2)
    whole = contents(make.cache)
    folder = max(make.entries(), key=lambda entry: len(list(entry.iterdir())))
    shard, record = folder / "00002.train", folder / "00002.json"
    if damage == "shorter":
        os.truncate(shard, shard.stat().st_size - 2)
    elif damage == "longer":
        shard.write_bytes(shard.read_bytes() + b"\0")
    elif damage == "gone":
        shard.unlink()
    elif damage == "no record":
        record.unlink()
    elif damage == "left over":
        record.unlink()
        (folder / "writing.train").write_bytes(b"half")
        (folder / "00099.train").write_bytes(b"more")
    else:
        record.write_text("{" if damage == "bad record" else '{"train": [], "valid": 3}')
    make.check(*inputs, held_out=0.2)
    assert contents(make.cache) == whole


def test_a_mapped_shard_of_the_wrong_size_is_noticed(
    tmp_path: Path, make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "a.txt", "there was a king " * 40_000)
    make.train(path)
    shard = make.entries()[0] / "00000.train"
    assert shard.stat().st_size > 1 << 16
    for size in (shard.stat().st_size - 2, shard.stat().st_size - 1, 0):
        os.truncate(shard, size)
        same(make.train(path), make.in_memory(path))


# --- What goes wrong


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, make: Maker) -> None:
    path = write(tmp_path, "a.txt", "Once upon a time")

    def changing(done: int, total: int | None) -> None:
        Path(path).write_text("There was another king")

    with pytest.raises(CorruptError, match=r"a\.txt changed"):
        make(path, progress=changing)
    same(make.train(path), make.in_memory(path))
    assert not [file for entry in make.entries() for file in entry.glob("writing.*")]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("at", [0, 500, 5000, 12_000])
@pytest.mark.parametrize("large", [False, True])
def test_bad_bytes_are_named_as_in_memory(tmp_path: Path, make: Maker, at: int, large: bool) -> None:
    text = (" ".join if large else SEPARATOR.join)(some_documents(1, 500, 20)).encode()
    assert len(text) > 12_000
    for content in (text[:at] + b"\xff" + text[at:], text[:at] + b"\xe6\x9d", text[:at] + b"\xe6\x9d" + text[at:]):
        path = write(tmp_path, "a.txt", content)
        with pytest.raises(CorruptError) as expected:
            make.in_memory(path)
        with pytest.raises(CorruptError) as caught:
            make(path)
        assert caught.value.message == expected.value.message


def test_inputs_that_can_not_be_read(tmp_path: Path, make: Maker) -> None:
    with pytest.raises(NotFoundError, match=r"no .*none"):
        make(str(tmp_path / "none"))
    with pytest.raises(CorruptError, match=r"cut\.xz"):
        make(write(tmp_path, "cut.xz", lzma.compress(b"text" * 99)[:-4]))
    with pytest.raises(UsageError, match="no text in data"):
        make(write(tmp_path, "a.txt", f" \n{SEPARATOR}\n"))
    with pytest.raises(CorruptError, match=r"a\.jsonl line 3 "):
        make(write(tmp_path, "a.jsonl", '{"text": "a"}\n\n{"text": 3}'))


def test_a_cache_that_can_not_be_written_is_said(tmp_path: Path, make: Maker) -> None:
    path = write(tmp_path, "a.txt", "Once upon a time")
    make.cache = Path(path) / "cache"
    with pytest.raises(OutputError, match="cache"):
        make(path)


def test_a_full_disk_leaves_what_can_go_on(
    tmp_path: Path, make: Maker, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "a.txt", SEPARATOR.join(some_documents(1, 300)))
    real, left = os.fsync, iter([True] * 7)

    def full(handle: int) -> None:
        if not next(left, False):
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        make(path)
    monkeypatch.setattr(os, "fsync", real)
    assert list(make.entries()[0].glob("*.json"))
    make.check(path)


# --- The cache's size


def test_entries_used_least_recently_go_first(tmp_path: Path, make: Maker) -> None:
    paths = [write(tmp_path, f"{i}.txt", f"{i} Once upon a time " * 2000) for i in range(4)]
    keys: list[Path] = []
    for age, path in enumerate(paths):
        make.train(path)
        (new,) = set(make.entries()) - set(keys)
        os.utime(new, (1000 + age, 1000 + age))
        keys.append(new)
    size = sum(file.stat().st_size for file in keys[0].iterdir())
    with entry.locked(keys[1].with_suffix(".lock")):
        kept = make.train(paths[0], keep_bytes=2 * size + size // 2)
    # The first was used just now, the second is in use elsewhere.
    assert set(make.entries()) == {keys[0], keys[1]}
    make.train(paths[3], keep_bytes=0)
    assert set(make.entries()) == {keys[3]}
    same(kept, make.in_memory(paths[0]))  # what is mapped stays readable


# --- Memory

MEASURE = """
import resource, sys
from pathlib import Path
from gptcli.train import entry, units
from tests.train import test_prepare
entry._AHEAD = units.LARGEST = 1 << 21
make = test_prepare.Maker(Path(sys.argv[1]), Path(sys.argv[2]))
make.train(sys.argv[3])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
corpus = make.train(sys.argv[4], workers=2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, corpus.documents, len(corpus.tokens))
"""


@pytest.mark.parametrize("parting", [" ", f"\n{SEPARATOR}\n"], ids=["one document", "many documents"])
def test_memory_does_not_grow_with_the_text(tmp_path: Path, tiny_folder: Path, parting: str) -> None:
    """48 MB of text, packed small, in less than its size; without mapped files and text that waits in much less."""
    page = " ".join(["the king said and he went to the forest " * 25] * 100) + parting
    text = (page * 480).encode()
    assert len(text) > 48e6
    path = write(tmp_path, "big.txt.zst", zstandard.compress(text))
    small_path = write(tmp_path, "small.txt", "Once upon a time")
    del text
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tiny_folder), str(tmp_path / "cache"), small_path, path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    grown, documents, tokens = map(int, done.stdout.split())
    assert documents == (1 if parting == " " else 480)
    assert tokens > 48e6 / 5
    assert grown * 1024 < 40e6
