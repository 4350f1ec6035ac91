"""What all tests share: a machine of their own, tiny models, and gptcli as a person runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from gptcli.core.native_build import Library
    from tests.hub.standin import StandIn

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "data" / "golden"
# Seconds that a test waits for something before it has failed: far beyond what anything takes on a busy machine.
PATIENCE = 300

_SHARED_CACHE = ROOT.parent / "shared" / "tiktoken-cache"
if "TIKTOKEN_CACHE_DIR" not in os.environ and _SHARED_CACHE.is_dir():
    os.environ["TIKTOKEN_CACHE_DIR"] = str(_SHARED_CACHE)

needs_encodings = pytest.mark.skipif(
    not os.environ.get("TIKTOKEN_CACHE_DIR"), reason="needs tiktoken's vocabularies in TIKTOKEN_CACHE_DIR"
)

# The same examples each time, for no change is to fail by an example that it has nothing to do with; and no complaint
# about a machine that is busy. More of them: --hypothesis-profile default.
_BUSY = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("steady", derandomize=True, deadline=None, suppress_health_check=_BUSY)
hypothesis.settings.load_profile("steady")


@pytest.fixture(autouse=True)
def own_machine(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings and no models of whoever runs the tests; nothing from a network."""
    home = tmp_path_factory.mktemp("home")
    for name in [name for name in os.environ if name.startswith(("GPTCLI_", "HF_", "HUGGINGFACE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home / "run"))  # no warm process of theirs
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)


_WORDS = (
    "Once upon a time there was a king who had a daughter, and she went to the forest with the animals and the other "
    "children. One day the king said that he would give her hand to the man who could make her laugh. They were happy."
)

Gptcli = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def gptcli() -> Gptcli:
    """Run gptcli in a process of its own: ``gptcli("generate", "x", stdin=b"...", env={...})``; output is bytes.

    Without ``stdin`` it is /dev/null.
    """

    def run(
        *args: str | bytes, stdin: bytes | None = None, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        source = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
        command = [sys.executable, "-m", "gptcli", *args]
        return subprocess.run(command, capture_output=True, env=environment, cwd=cwd, timeout=PATIENCE, **source)

    return run


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 folder of random weights with a real, tiny tokenizer: 2 layers, width 32, context 64, 300 tokens."""
    from gptcli.core.build import random_model
    from gptcli.core.checkpoint import save_folder
    from gptcli.core.runtime import DTYPES
    from gptcli.spec.config import from_hf

    folder = tmp_path_factory.mktemp("models") / "tiny"
    raw = {
        "model_type": "gpt2",
        "vocab_size": 300,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    save_folder(
        random_model(from_hf(raw), seed=7),
        folder,
        dtype=DTYPES["float32"],
        files={"tokenizer.json": tiny_tokenizer()},
    )
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A stand-in for the Hub, which this process and those that it starts take for it; the cache is ``tmp_path/hf``."""
    import huggingface_hub
    import huggingface_hub.constants

    from tests.hub.standin import serving

    with serving() as standin:
        monkeypatch.setenv("HF_ENDPOINT", standin.hub)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # read when it was imported
        yield standin
        huggingface_hub.close_session()


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a native library that is built once for all tests."""
    from gptcli.core.native_build import build
    from gptcli.errors import ResourceError

    folder = tmp_path_factory.mktemp("native")
    try:
        build(folder)
    except ResourceError as error:
        pytest.skip(f"no native step here: {error.message}")
    return folder


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory, built: Path) -> Library:
    """A native library for a CPU that has nothing special: the ways that this one does not take."""
    from gptcli.core import native_build, runtime

    less = {"x86_64": "-march=x86-64-v3"}.get(runtime.machine(), "-O2")
    library = built_with(tmp_path_factory.mktemp("plain"), *native_build.FLAGS, less)
    assert "VNNI" not in library.features
    return library


@pytest.fixture(scope="session")
def untiled(tmp_path_factory: pytest.TempPathFactory, built: Path) -> Library:
    """A native library for a CPU that is like this one, but for the tiles that this one has."""
    from gptcli.core import native_build

    if not native_build.load(built).tiles:
        pytest.skip("this CPU has no tiles (AMX): its own library is one without")
    library = built_with(tmp_path_factory.mktemp("untiled"), *native_build.flags(), "-mno-amx-tile", "-mno-amx-bf16")
    assert not library.tiles
    return library


def built_with(folder: Path, *flags: str) -> Library:
    """A native library that is compiled with other flags."""
    from gptcli.core import native_build

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_build, "flags", lambda: flags)
        return native_build.build(folder)


def tiny_tokenizer() -> bytes:
    """A tokenizer.json of 300 tokens: <|endoftext|>, the 256 bytes, and 43 merges of the words below."""
    from gptcli.train.data import train_tokenizer

    return train_tokenizer([_WORDS] * 3, 300)
