"""``gptcli tokenize``: ids, counts, cuts and pieces, on a pipe."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from tests.cli.conftest import Done, Run

TEXT = "Once upon a time there was a king — naïve 東京 🙂!\n"

needs_encodings = pytest.mark.skipif(
    not os.environ.get("TIKTOKEN_CACHE_DIR"), reason="needs tiktoken's vocabularies in TIKTOKEN_CACHE_DIR"
)


@pytest.fixture
def tokenize(run: Run, tiny_folder: Path) -> Run:
    """``gptcli tokenize`` with the tiny model's tokenizer."""
    return lambda *args, **more: run("tokenize", "-m", tiny_folder, *args, **more)


@pytest.fixture
def ids_of(tiny_folder: Path) -> Callable[[str], list[int]]:
    """The ids of a text as Hugging Face's library finds them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        # Pieces of the separator apart, so that it is text.
        tokenizer.encode_special_tokens = True
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return encode


IdsOf = Callable[[str], list[int]]


def shown(done: Done) -> str:
    """The output of a run that went well and had nothing to say."""
    assert (done.code, done.err) == (0, b"")
    return done.out.decode()


# --- Ids


def test_a_pipe_gets_ids_on_one_line(tokenize: Run, ids_of: IdsOf) -> None:
    expected = " ".join(map(str, ids_of(TEXT))) + "\n"
    assert shown(tokenize(TEXT)) == expected
    assert shown(tokenize(TEXT, "--ids")) == expected
    assert shown(tokenize(stdin=TEXT.encode())) == expected
    assert shown(tokenize("-", stdin=TEXT.encode())) == expected


def test_each_document_has_a_line(tokenize: Run, ids_of: IdsOf, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("from a file")
    done = tokenize("an argument", "another", "-f", tmp_path / "file", stdin=b"piped\n")
    documents = ["piped\n", "from a file", "an argument", "another"]
    assert [[int(word) for word in line.split()] for line in shown(done).splitlines()] == [
        ids_of(document) for document in documents
    ]


def test_lines_are_documents_if_told(tokenize: Run, ids_of: IdsOf) -> None:
    done = tokenize("--lines", stdin=b"Once upon\n\na time")
    assert shown(done) == "".join(" ".join(map(str, ids_of(line))) + "\n" for line in ("Once upon", "", "a time"))
    assert shown(tokenize("--lines", "--count", stdin=b"Once upon\n\na time\n")) == (
        f"{len(ids_of('Once upon'))}\n0\n{len(ids_of('a time'))}\n"
    )
    several = tokenize("--lines", "--json", stdin=b"Once upon\na time\n")
    assert [json.loads(line)["count"] for line in shown(several).splitlines()] == [
        len(ids_of("Once upon")),
        len(ids_of("a time")),
    ]


def test_an_empty_document_has_an_empty_line(tokenize: Run) -> None:
    assert shown(tokenize("")) == "\n"
    assert shown(tokenize("", "--count")) == "0\n"


def test_strip_and_no_stdin(tokenize: Run, ids_of: IdsOf) -> None:
    assert shown(tokenize("--strip", "--count", stdin=b"a\n\n")) == f"{len(ids_of('a' + chr(10)))}\n"
    assert shown(tokenize("b", "--no-stdin", "--count", stdin=b"a b c")) == "1\n"
    assert tokenize("-", "--no-stdin", stdin=b"a").code == 2
    assert tokenize().code == 2


def test_special_tokens_are_text_unless_parsed(tokenize: Run, ids_of: IdsOf) -> None:
    text = "king<|endoftext|>king"
    plain = [int(word) for word in shown(tokenize(text)).split()]
    assert plain == ids_of(text)
    assert 0 not in plain
    parsed = shown(tokenize(text, "--special", "parse")).split()
    assert parsed == [*map(str, ids_of("king")), "0", *map(str, ids_of("king"))]


# --- Count


def test_count_is_a_number(tokenize: Run, ids_of: IdsOf) -> None:
    assert shown(tokenize(TEXT, "--count")) == f"{len(ids_of(TEXT))}\n"
    assert shown(tokenize("--count", stdin=TEXT.encode())) == f"{len(ids_of(TEXT))}\n"


def test_files_as_arguments_are_counted_in_rows_like_wc(tokenize: Run, ids_of: IdsOf, tmp_path: Path) -> None:
    small, large = tmp_path / "small.txt", tmp_path / "large.txt"
    small.write_text("king")
    large.write_text(TEXT * 10)
    one, ten = len(ids_of("king")), len(ids_of(TEXT * 10))
    assert shown(tokenize("--count", small)) == f"{one}\n"
    rows = [line.split(maxsplit=1) for line in shown(tokenize("--count", small, large)).splitlines()]
    assert rows == [[str(one), str(small)], [str(ten), str(large)], [str(one + ten), "total"]]
    flagged = [line.split(maxsplit=1)[0] for line in shown(tokenize("--count", "-f", small, "-f", large)).splitlines()]
    assert flagged == [str(one), str(ten), str(one + ten)]
    values = [json.loads(line) for line in shown(tokenize("--count", "--json", small, large)).splitlines()]
    assert [(value["count"], value["name"]) for value in values] == [(one, str(small)), (ten, str(large))]
    assert tokenize("--count", small, "no file").code == 2


def test_counting_a_long_text_in_chunks_is_counting_it_whole(
    tokenize: Run, ids_of: IdsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptcli.cli.input._READ", 7)
    monkeypatch.setattr("gptcli.text.tokenizer._CHUNK", 20)
    text = TEXT * 20
    assert [int(word) for word in shown(tokenize(stdin=text.encode())).split()] == ids_of(text)
    assert shown(tokenize("--count", stdin=text.encode())) == f"{len(ids_of(text))}\n"


def test_many_files_are_counted_on_all_cores_in_their_order(
    tokenize: Run, ids_of: IdsOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptcli.cli.input._READ", 50)
    monkeypatch.setattr("gptcli.text.tokenizer._CHUNK", 20)
    texts = {tmp_path / f"{number:02}": TEXT * (7 * number % 12) for number in range(40)}  # empty ones, too
    for path, text in texts.items():
        path.write_text(text)
    values = [json.loads(line) for line in shown(tokenize("--count", "--json", *texts)).splitlines()]
    assert [value["name"] for value in values] == [str(path) for path in texts]
    assert [value["count"] for value in values] == [len(ids_of(text)) for text in texts.values()]
    flags = [word for path in texts for word in ("-f", path)]
    lines = shown(tokenize(*flags)).split("\n")
    assert lines == [" ".join(map(str, ids_of(text))) for text in texts.values()] + [""]


def test_of_many_files_those_before_a_bad_one_are_told(tokenize: Run, tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / str(number)).write_bytes(b"king" if number != 7 else b"king \xff")
    done = tokenize("--count", "--json", *(tmp_path / str(number) for number in range(9)))
    assert done.code == 3
    assert b"offset 5" in done.err
    assert [json.loads(line)["name"] for line in done.out.splitlines()] == [str(tmp_path / str(n)) for n in range(7)]


# --- Pieces and JSON


def test_json_has_each_token_and_its_place_in_bytes(tokenize: Run, ids_of: IdsOf) -> None:
    value = tokenize(TEXT, "--json").json
    assert value.keys() == {"tokenizer", "count", "tokens"}
    assert value["tokenizer"] == "tiny"
    assert value["count"] == len(value["tokens"]) == len(ids_of(TEXT))
    assert [token["id"] for token in value["tokens"]] == ids_of(TEXT)
    data = TEXT.encode()
    position = 0
    for token in value["tokens"]:
        assert token.keys() == {"id", "text", "bytes", "start", "end"}
        assert token["start"] == position
        position = token["end"]
        assert bytes.fromhex(token["bytes"]) == data[token["start"] : token["end"]]
        assert token["text"] == bytes.fromhex(token["bytes"]).decode(errors="replace")
    assert position == len(data)


def test_json_is_one_object_a_document(tokenize: Run) -> None:
    done = tokenize("k", "", "--json")
    assert [json.loads(line)["count"] for line in shown(done).splitlines()] == [1, 0]


def test_pieces_are_a_token_a_line(tokenize: Run, ids_of: IdsOf) -> None:
    rows = [line.split("\t") for line in shown(tokenize("a\tb\\n\n\x1b 東", "--pieces")).splitlines()]
    assert [int(row[0]) for row in rows] == ids_of("a\tb\\n\n\x1b 東")
    assert "".join(row[1] for row in rows) == "a\\tb\\\\n\\n\\x1b \\xe6\\x9d\\xb1"


# --- Decode


def test_decode_gives_the_bytes_back(tokenize: Run, ids_of: IdsOf) -> None:
    ids = " ".join(map(str, ids_of(TEXT)))
    assert shown(tokenize("--decode", ids)) == TEXT
    assert shown(tokenize("--decode", stdin=f"{json.dumps(ids_of(TEXT))}\n".encode())) == TEXT


def test_decode_keeps_bytes_that_are_no_text(tokenize: Run) -> None:
    half = tokenize("東", "--json").json["tokens"][0]
    done = tokenize("--decode", str(half["id"]))
    assert (done.code, done.out) == (0, b"\xe6")
    assert tokenize("--decode", str(half["id"]), "--json").json["text"] == "\ufffd"


def test_decode_refuses_what_is_no_id(tokenize: Run) -> None:
    for text in ("1 two", "-1", "1.5", "٣"):
        done = tokenize("--decode", stdin=text.encode())
        assert (done.code, done.out) == (3, b"")


# --- Cut


@pytest.mark.parametrize("size", [0, 1, 3, 10, 17, 1000])
@pytest.mark.parametrize("keep", ["head", "tail", "middle"])
def test_truncate_keeps_a_part_of_at_most_so_many_tokens(tokenize: Run, ids_of: IdsOf, size: int, keep: str) -> None:
    text = shown(tokenize(TEXT, "--truncate", str(size), "--keep", keep))
    assert len(ids_of(text)) <= size
    assert text in TEXT
    if size == 1000:
        assert text == TEXT
    elif size == 10:
        assert text
        assert TEXT.startswith(text) == (keep == "head")
        assert TEXT.endswith(text) == (keep == "tail")


def test_truncate_of_lines(tokenize: Run) -> None:
    assert shown(tokenize("--truncate", "1", stdin=b"!king")) == "!"
    assert shown(tokenize("--truncate", "1", "--lines", stdin=b"!king\n?king\n")) == "!\n?\n"


@pytest.mark.parametrize("size", [1, 2, 5, 8, 100])
def test_split_joined_is_the_text(tokenize: Run, ids_of: IdsOf, size: int) -> None:
    done = tokenize(TEXT, "--split", str(size), "-0")
    assert done.code == 0
    *pieces, rest = done.out.split(b"\0")
    assert rest == b""
    assert b"".join(pieces) == TEXT.encode()
    for piece in pieces:
        assert len(ids_of(piece.decode())) <= size or len(piece.decode()) == 1


def test_split_with_overlap_shares_tokens(tokenize: Run, ids_of: IdsOf) -> None:
    text = "Once upon a time there was a king who had a daughter"
    pieces = tokenize(text, "--split", "10", "--overlap", "4", "-0").out.decode().split("\0")[:-1]
    assert len(pieces) > 2
    place = 0
    for before, piece in pairwise(pieces):
        start = text.index(piece, place)
        shared = text[start : place + len(before)]
        assert before.endswith(shared)
        assert len(ids_of(shared)) >= 4
        assert len(ids_of(piece)) <= 10
        place = start
    assert text.endswith(pieces[-1])


def test_split_ends_pieces_with_newlines_by_default_and_counts_them_in_json(tokenize: Run, ids_of: IdsOf) -> None:
    pieces = tokenize("king was king", "--split", "3", "-0").out.decode().split("\0")[:-1]
    assert shown(tokenize("king was king", "--split", "3")) == "".join(piece + "\n" for piece in pieces)
    values = [json.loads(line) for line in shown(tokenize("king was king", "--split", "3", "--json")).splitlines()]
    assert [(value["index"], value["text"]) for value in values] == list(enumerate(pieces))
    assert [value["count"] for value in values] == [len(ids_of(piece)) for piece in pieces]


def test_split_of_lines_never_joins_them(tokenize: Run) -> None:
    assert tokenize("--split", "100", "--lines", "-0", stdin=b"king\nwas\n").out == b"king\0was\0"


def test_a_special_token_counts_as_one_when_cut(tokenize: Run) -> None:
    args = ("a<|endoftext|>b", "--special", "parse")
    values = [json.loads(line) for line in shown(tokenize(*args, "--split", "2", "--json")).splitlines()]
    assert [(value["text"], value["count"]) for value in values] == [("a<|endoftext|>", 2), ("b", 1)]
    assert shown(tokenize(*args, "--truncate", "2")) == "a<|endoftext|>"


# --- Limits


def test_max_fails_with_4_and_shows_nothing(tokenize: Run, ids_of: IdsOf) -> None:
    number = len(ids_of(TEXT))
    most, less = ("--max", str(number)), ("--max", str(number - 2))
    assert shown(tokenize(TEXT, *most)) == shown(tokenize(TEXT))
    assert shown(tokenize(TEXT, *most, "--count")) == f"{number}\n"
    for mode in ([], ["--count"], ["--pieces"], ["--truncate", "3"], ["--split", "3"], ["--lines"]):
        done = tokenize(TEXT, *less, *mode)
        assert (done.code, done.out) == (4, b""), mode
        assert done.err.startswith(b"error: ")


def test_max_lets_whole_documents_pass(tokenize: Run, ids_of: IdsOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptcli.text.tokenizer._CHUNK", 5)
    done = tokenize("king", TEXT, "--max", str(len(ids_of(TEXT)) - 1))
    assert (done.code, done.out.decode()) == (4, " ".join(map(str, ids_of("king"))) + "\n")


@pytest.mark.parametrize("mode", [[], ["--count"], ["--split", "3"]], ids=" ".join)
def test_max_shows_nothing_in_json_either(tokenize: Run, mode: list[str]) -> None:
    done = tokenize(TEXT, "--max", "3", "--json", *mode)
    assert (done.code, done.out) == (4, b"")
    assert json.loads(done.err)["error"]["type"] == "limit"


def test_max_counts_ids_that_are_decoded(tokenize: Run) -> None:
    assert tokenize("--decode", "1 2 3", "--max", "2").code == 4


# --- Which tokenizer


@needs_encodings
@pytest.mark.parametrize(
    ("encoding", "ids"),
    [
        # From tiktoken's README and OpenAI's cookbook.
        ("cl100k_base", [83, 1609, 5963, 374, 2294, 0]),
        ("r50k_base", [83, 1134, 30001, 318, 1049, 0]),
        ("gpt2", [83, 1134, 30001, 318, 1049, 0]),
        ("o200k_base", [83, 8251, 2488, 382, 2212, 0]),
    ],
)
def test_encodings(run: Run, encoding: str, ids: list[int]) -> None:
    assert shown(run("tokenize", "-e", encoding, "tiktoken is great!")) == " ".join(map(str, ids)) + "\n"
    value = run("tokenize", "--encoding", encoding, "tiktoken is great!", "--json").json
    assert (value["tokenizer"], value["count"]) == (encoding, 6)


def test_an_encoding_that_is_not_there(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unknown = run("tokenize", "-e", "no_base", "x")
    assert (unknown.code, unknown.out) == (3, b"")
    assert b"cl100k_base" in unknown.err
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    # Nobody else loads this one, and tiktoken keeps what it has loaded.
    absent = run("tokenize", "-e", "p50k_edit", "x")
    assert (absent.code, absent.out) == (3, b"")
    assert b"--pull" in absent.err
    assert list(tmp_path.iterdir()) == []


# --- Errors


@pytest.mark.parametrize(
    "options",
    [
        ("--count", "--pieces"),
        ("--decode", "--split", "3"),
        ("--truncate", "-1"),
        ("--split", "0"),
        ("--split", "3", "--overlap", "3"),
        ("--split", "3", "--overlap", "-1"),
        ("--overlap", "1"),
        ("--max", "-1"),
        ("--keep", "left"),
        ("--errors", "ignore"),
        ("--special", "both"),
        ("-e", "gpt2"),
        ("--pull", "--offline"),
        ("--json", "--format", "text"),
        ("--split", "many"),
    ],
    ids=" ".join,
)
def test_wrong_use_is_2(tokenize: Run, options: tuple[str, ...]) -> None:
    done = tokenize("text", *options)
    assert (done.code, done.out) == (2, b"")


@pytest.mark.parametrize("mode", [[], ["--json"], ["--count"], ["--pieces"], ["--count", "--json"]], ids=" ".join)
def test_bad_utf8_is_an_error_with_its_offset_and_nothing_is_shown(tokenize: Run, mode: list[str]) -> None:
    done = tokenize(*mode, stdin=b"king \xff")
    assert (done.code, done.out) == (3, b"")
    assert b"offset 5" in done.err


def test_bad_utf8_can_be_replaced_or_skipped(tokenize: Run, ids_of: IdsOf) -> None:
    for how, text in (("replace", "king\ufffd!"), ("skip", "king!")):
        assert shown(tokenize("--errors", how, stdin=b"king\xff!")).split() == [str(id_) for id_ in ids_of(text)]


def test_a_missing_file(tokenize: Run, tmp_path: Path) -> None:
    done = tokenize("-f", tmp_path / "none", "--count")
    assert (done.code, done.out) == (3, b"")
