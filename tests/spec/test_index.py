"""Safetensors headers: equal to what the reference implementation writes, and never fooled by a bad file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcli.errors import CorruptError, GptcliError, NotFoundError
from gptcli.spec.index import FILE_NAME, INDEX_NAME, TensorInfo, read_folder, read_header, read_index

F32: dict[str, Any] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def _bytes(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file; a header that is not bytes becomes JSON, with blanks to a multiple of 8 or to ``length``."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw = raw.ljust(-(-len(raw) // 8) * 8 if length is None else length)
    return struct.pack("<Q", len(raw)) + raw + data


def _entry(**changes: Any) -> dict[str, Any]:
    return {"a": {**F32, **changes}}


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., Path]:
    """Write bytes to a file."""

    def write(content: bytes, name: str = FILE_NAME) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


# --- good files -----------------------------------------------------------------------------------------------------

ARRAYS = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "float16": np.arange(4, dtype=np.float16),
    "float64": np.ones((1, 2, 3)),
    "int64": np.arange(5),
    "int8": np.arange(3, dtype=np.int8),
    "bool": np.array([True, False]),
    "scalar": np.array(2.5, dtype=np.float32),
    "empty": np.zeros((0, 4), dtype=np.float32),
    "name with ünïcode and 'quotes'\n": np.zeros(1, dtype=np.uint8),
}
NAMES = {"float32": "F32", "float16": "F16", "float64": "F64", "int64": "I64", "int8": "I8", "bool": "BOOL"}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_equals_the_reference_implementation(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    file = tmp_path / FILE_NAME
    safetensors.numpy.save_file(ARRAYS, file, metadata)
    data = file.read_bytes()
    infos = read_header(file)
    assert infos.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        info = infos[name]
        assert info.shape == array.shape
        assert info.parameters == array.size
        assert info.file == file
        assert data[info.begin : info.end] == array.tobytes()
        assert info.dtype == NAMES.get(name, info.dtype)


def test_torch_file(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    file = tmp_path / FILE_NAME
    half = torch.arange(6, dtype=torch.bfloat16).reshape(3, 2)
    save_file({"b": half, "a": torch.zeros(4)}, file)
    infos = read_header(file)
    assert infos["b"].dtype == "BF16"
    assert infos["b"].shape == (3, 2)
    data = bytearray(file.read_bytes()[infos["b"].begin : infos["b"].end])
    assert torch.equal(torch.frombuffer(data, dtype=torch.bfloat16).reshape(3, 2), half)


arrays = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(lambda name: name != "__metadata__"),
    st.tuples(
        st.sampled_from([np.float32, np.float16, np.int64, np.uint8, np.bool_]),
        st.lists(st.integers(0, 4), max_size=3),
    ),
    max_size=6,
)


@settings(max_examples=80, deadline=None)
@given(plan=arrays)
def test_any_file_of_the_reference_implementation(plan: dict[str, Any], tmp_path_factory: Any) -> None:
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    made = {name: np.zeros(shape, dtype) for name, (dtype, shape) in plan.items()}
    file.write_bytes(safetensors.numpy.save(made))
    infos = read_header(file)
    assert {name: info.shape for name, info in infos.items()} == {name: array.shape for name, array in made.items()}
    assert sum(info.end - info.begin for info in infos.values()) == sum(array.nbytes for array in made.values())


def test_exact_infos(put: Callable[..., Path]) -> None:
    header = {"__metadata__": {"x": "y"}, **_entry(), "b": {"dtype": "I8", "shape": [], "data_offsets": [8, 9]}}
    content = _bytes(header, b"12345678" + b"9")
    file = put(content)
    base = len(content) - 9
    assert read_header(file) == {
        "a": TensorInfo("F32", (2,), base, base + 8, file),
        "b": TensorInfo("I8", (), base + 8, base + 9, file),
    }


def test_no_tensors(put: Callable[..., Path]) -> None:
    assert read_header(put(_bytes({}))) == {}
    assert read_header(put(_bytes({"__metadata__": {}}))) == {}


def test_tensors_in_any_order(put: Callable[..., Path]) -> None:
    header = {"b": {**F32, "data_offsets": [8, 16]}, "a": F32}
    assert list(read_header(put(_bytes(header, bytes(16))))) == ["b", "a"]


@pytest.mark.parametrize("length", [316, 640, 1152, 15_392, 8_208, 12_576, 18_000])
def test_no_header_length_looks_like_another_format(length: int, put: Callable[..., Path]) -> None:
    """640 and 1152 begin like a pickle, 316 and (after a blank) 15,392 like a page, the others like nothing."""
    assert list(read_header(put(_bytes(_entry(), bytes(8), length=length)))) == ["a"]


# --- bad files ------------------------------------------------------------------------------------------------------

HUGE = 2**63
GOOD = _bytes(_entry(), bytes(8))

BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too short"),
    "7 bytes": (b"\x08" + bytes(6), "too short"),
    "header past the end": (struct.pack("<Q", 1_000) + b"{}", "declares a header of 1,000 bytes"),
    "header past the end by one": (struct.pack("<Q", 3) + b"{}", "declares a header of 3 bytes"),
    "header of 2**63": (struct.pack("<Q", HUGE) + b"{}", "declares a header"),
    "header of 2**64 - 1": (b"\xff" * 8 + b"{}", "declares a header"),
    "not JSON": (_bytes(b"{'a': 1}"), "not JSON"),
    "no header": (_bytes(b""), "not JSON"),
    "JSON cut short": (_bytes(json.dumps(_entry()).encode()[:-1], bytes(8)), "not JSON"),
    "not UTF-8": (_bytes(b'{"\xff": 1}'), "not JSON"),
    "UTF-16": (_bytes('{"a": 1}'.encode("utf-16")), "not JSON"),
    "deep": (_bytes(b"[" * 100_000), "not JSON"),
    "endless number": (_bytes(b'{"a": ' + b"9" * 5_000 + b"}"), "not JSON"),
    "list": (_bytes([]), "not an object"),
    "string": (_bytes("header"), "not an object"),
    "null": (_bytes(None), "not an object"),
    "entry is a list": (_bytes({"a": []}), "lacks"),
    "entry is null": (_bytes({"a": None}), "lacks"),
    "no dtype": (_bytes({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "lacks"),
    "no shape": (_bytes({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), "lacks"),
    "no offsets": (_bytes({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "lacks"),
    "one offset": (_bytes(_entry(data_offsets=[0]), bytes(8)), "lacks"),
    "three offsets": (_bytes(_entry(data_offsets=[0, 8, 16]), bytes(8)), "lacks"),
    "unknown dtype": (_bytes(_entry(dtype="F31"), bytes(8)), "unknown dtype 'F31'"),
    "dtype in small letters": (_bytes(_entry(dtype="f32"), bytes(8)), "unknown dtype"),
    "dtype is a list": (_bytes(_entry(dtype=["F32"]), bytes(8)), "unknown dtype"),
    "dtype is a number": (_bytes(_entry(dtype=32), bytes(8)), "unknown dtype"),
    "size true": (_bytes(_entry(shape=[True, 2]), bytes(8)), "not sizes"),
    "size 2.0": (_bytes(_entry(shape=[2.0]), bytes(8)), "not sizes"),
    "size '2'": (_bytes(_entry(shape=["2"]), bytes(8)), "not sizes"),
    "size null": (_bytes(_entry(shape=[None]), bytes(8)), "not sizes"),
    "size in a list": (_bytes(_entry(shape=[[2]]), bytes(8)), "not sizes"),
    "size -2": (_bytes(_entry(shape=[-2]), bytes(8)), "not sizes"),
    "sizes -1 and -2": (_bytes(_entry(shape=[-1, -2]), bytes(8)), "not sizes"),
    "size 2**63": (_bytes(_entry(shape=[HUGE]), bytes(8)), "not sizes"),
    "size NaN": (_bytes(_entry(shape=[float("nan")]), bytes(8)), "not sizes"),
    "offset true": (_bytes(_entry(shape=[], dtype="I8", data_offsets=[False, True]), bytes(1)), "not sizes"),
    "offset 8.0": (_bytes(_entry(data_offsets=[0, 8.0]), bytes(8)), "not sizes"),
    "offset '8'": (_bytes(_entry(data_offsets=["0", "8"]), bytes(8)), "not sizes"),
    "offset -8": (_bytes(_entry(data_offsets=[-8, 0]), bytes(8)), "not sizes"),
    "offsets of a string": (_bytes(_entry(data_offsets="08"), bytes(8)), "not sizes"),
    "offsets backwards": (_bytes(_entry(data_offsets=[8, 0]), bytes(8)), "needs 8 bytes"),
    "shape is a number": (_bytes(_entry(shape=2), bytes(8)), "shape"),
    "shape is a string": (_bytes(_entry(dtype="F64", shape=""), bytes(8)), "shape"),
    "shape is an object": (_bytes(_entry(dtype="F64", shape={}), bytes(8)), "shape"),
    "too many bytes for the shape": (_bytes(_entry(shape=[1]), bytes(8)), "needs 4 bytes, not 8"),
    "too few bytes for the shape": (_bytes(_entry(shape=[3]), bytes(8)), "needs 12 bytes, not 8"),
    "too few bytes for the dtype": (_bytes(_entry(dtype="F64"), bytes(8)), "needs 16 bytes, not 8"),
    "shape of 2**124": (_bytes(_entry(shape=[2**62, 2**62]), bytes(8)), "needs"),
    "shape of 400 sizes": (_bytes(_entry(shape=[2**62] * 400), bytes(8)), "shape"),
    "out of the file": (_bytes(_entry(data_offsets=[8, 16]), bytes(8)), "reaches to"),
    "far out of the file": (_bytes(_entry(data_offsets=[2**50, 2**50 + 8]), bytes(8)), "reaches to"),
    "same place": (_bytes({"a": F32, "b": F32}, bytes(8)), "overlap"),
    "overlap": (_bytes({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12)), "overlap"),
    "hole": (_bytes({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, bytes(20)), "hole between a and b"),
    "hole at the start": (_bytes(_entry(data_offsets=[4, 12]), bytes(12)), "hole between the header and a"),
    "cut short": (GOOD[:-1], "reaches to"),
    "cut at the header": (GOOD[:-8], "reaches to"),
    "more at the end": (GOOD + b"x", "1 bytes after"),
    "data without a tensor": (_bytes({}, bytes(8)), "8 bytes after"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 548105171\n", "Git LFS pointer"),
    "torch zip": (b"PK\x03\x04\x00\x00\x08\x08\x00\x00" + bytes(90), "pickle"),
    "old torch": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "pickle"),
    "pickle 4": (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94.", "pickle"),
    "web page": (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
    "web page after blanks": (b"\n\n  <html></html>", "web page"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(40), "GGUF"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case: str, put: Callable[..., Path]) -> None:
    content, word = BAD[case]
    file = put(content)
    with pytest.raises(GptcliError) as caught:
        read_header(file)
    assert type(caught.value) is CorruptError
    assert word in caught.value.message
    assert str(file) in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 3


def test_name_twice(put: Callable[..., Path]) -> None:
    raw = b'{"a": %s, "a": %s}' % (json.dumps(F32).encode(), json.dumps(F32).encode())
    with pytest.raises(CorruptError, match="declares a twice"):
        read_header(put(_bytes(raw, bytes(8))))


def test_key_twice_within_an_entry(put: Callable[..., Path]) -> None:
    raw = b'{"a": {"dtype": "F64", "shape": [1], "shape": [], "data_offsets": [0, 8]}}'
    with pytest.raises(CorruptError, match="declares shape twice"):
        read_header(put(_bytes(raw, bytes(8))))


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(CorruptError, match="can't be read"):
        read_header(tmp_path)


def test_huge_declared_header_is_not_allocated(tmp_path: Path) -> None:
    """A sparse file of 10 GB that declares a header of 9 GB."""
    file = tmp_path / FILE_NAME
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 9 << 30))
        stream.truncate(10 << 30)
    with pytest.raises(CorruptError, match="declares a header"):
        read_header(file)


SAMPLE = _bytes(
    {
        "__metadata__": {"format": "pt"},
        "wte.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
    },
    bytes(range(22)),
)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_flipped_and_cut_bytes_never_crash(data: st.DataObject, tmp_path_factory: Any) -> None:
    content = bytearray(SAMPLE)
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["flip", "put", "cut", "insert", "drop"]))
        place = data.draw(st.integers(0, max(0, len(content) - 1)))
        if kind == "flip" and content:
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "put" and content:
            content[place] = data.draw(st.sampled_from(list(b'{}[]",:0129-eE.\\utn \x00\xff')))
        elif kind == "cut":
            del content[place:]
        elif kind == "insert":
            content[place:place] = data.draw(st.binary(max_size=8))
        else:
            del content[place : place + data.draw(st.integers(1, 8))]
    file = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    file.write_bytes(content)
    try:
        infos = read_header(file)
    except GptcliError:
        return
    assert sum(info.end - info.begin for info in infos.values()) < len(content)
    assert all(8 < info.begin <= info.end <= len(content) for info in infos.values())


header_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.sampled_from(["F32", "BF16", "", "shape"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(key=st.sampled_from(["dtype", "shape", "data_offsets"]), value=header_values)
def test_any_value_in_an_entry(key: str, value: Any, tmp_path_factory: Any) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    file.write_bytes(_bytes(_entry(**{key: value}), bytes(8)))
    try:
        infos = read_header(file)
    except GptcliError:
        return
    assert infos["a"].end - infos["a"].begin == 8
    assert json.loads(json.dumps(infos["a"].shape)) == (value if key == "shape" else [2])


# --- shards ---------------------------------------------------------------------------------------------------------


def _index(folder: Path, weight_map: Any) -> Path:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 16}, "weight_map": weight_map}))
    return folder / INDEX_NAME


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    (tmp_path / "one.safetensors").write_bytes(_bytes({"a": F32, "b": {**F32, "data_offsets": [8, 16]}}, bytes(16)))
    (tmp_path / "two.safetensors").write_bytes(_bytes({"c": F32}, bytes(8)))
    _index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    return tmp_path


def test_shards(shards: Path) -> None:
    infos = read_folder(shards)
    assert infos == read_index(shards / INDEX_NAME)
    assert {name: info.file.name for name, info in infos.items()} == {
        "a": "one.safetensors",
        "b": "one.safetensors",
        "c": "two.safetensors",
    }


def test_the_index_says_which_files_belong(shards: Path) -> None:
    """Not a glob: another file beside the shards, or even model.safetensors, is none of them."""
    (shards / "three.safetensors").write_bytes(_bytes({"d": F32}, bytes(8)))
    (shards / FILE_NAME).write_bytes(_bytes({"e": F32}, bytes(8)))
    assert set(read_folder(shards)) == {"a", "b", "c"}


def test_folder_of_one_file(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(GOOD)
    assert set(read_folder(tmp_path)) == {"a"}


@pytest.mark.parametrize(
    "shard", ["../one.safetensors", "/etc/hostname", "sub/one.safetensors", "..", ".", "", "a\0b", "\ud800"]
)
def test_shard_that_is_not_beside_the_index(shard: str, shards: Path) -> None:
    (shards / "sub").mkdir()
    (shards / "sub" / "one.safetensors").write_bytes(_bytes({"a": F32}, bytes(8)))
    (shards.parent / "one.safetensors").write_bytes(_bytes({"a": F32}, bytes(8)))
    with pytest.raises(CorruptError):
        read_index(_index(shards, {"a": shard}))


def test_missing_shard(shards: Path) -> None:
    (shards / "two.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"two\.safetensors"):
        read_folder(shards)


def test_missing_shards_are_counted_and_how_to_get_them_is_said(shards: Path) -> None:
    for file in shards.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(NotFoundError, match=r"lacks 2 of 2 shards that its index names: .*one.* and others") as raised:
        read_folder(shards)
    assert "models pull" in raised.value.hint


def test_shards_without_their_index(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(NotFoundError, match=rf"no {INDEX_NAME}"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "name"),
    [
        ({"a": "one.safetensors", "c": "two.safetensors"}, "b"),
        ({"a": "one.safetensors", "b": "one.safetensors", "x": "one.safetensors", "c": "two.safetensors"}, "x"),
        ({"a": "two.safetensors", "b": "one.safetensors", "c": "two.safetensors"}, "a"),
    ],
)
def test_shard_that_disagrees(weight_map: dict[str, str], name: str, shards: Path) -> None:
    _index(shards, weight_map)
    with pytest.raises(CorruptError, match=rf"do not agree on {name}"):
        read_folder(shards)


def test_broken_shard_is_named(shards: Path) -> None:
    (shards / "two.safetensors").write_bytes(GOOD[:-1])
    with pytest.raises(CorruptError, match=r"two\.safetensors"):
        read_folder(shards)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"null", b'{"weight_map": []}', b'{"weight_map": 3}', b"\xff", b"[" * 99_999]
)
def test_broken_index(content: bytes, tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_bytes(content)
    with pytest.raises(CorruptError, match="weight_map"):
        read_folder(tmp_path)


def test_no_index(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"index\.json"):
        read_index(tmp_path / INDEX_NAME)


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=FILE_NAME):
        read_folder(tmp_path)


def test_folder_with_a_pickle_only(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(NotFoundError, match="pickle"):
        read_folder(tmp_path)
