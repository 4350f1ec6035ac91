"""From a command's model options to a loaded model, with what is to be said on the way."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gptcli.cli.caches import native_cache
from gptcli.cli.out import Output
from gptcli.errors import NotFoundError
from gptcli.spec.library import DEFAULT_MODEL, Found, resolve

if TYPE_CHECKING:
    from gptcli.core.build import Model
    from gptcli.core.group import Line
    from gptcli.text.tokenizer import Tokenizer


def find(name: str | None) -> Found:
    """The model that a command names, or the shipped one."""
    return resolve(name or DEFAULT_MODEL)


def open_tokenizer(found: Found, out: Output) -> Tokenizer:
    """The tokenizer of a model's folder; a GPT-2 folder without its files takes GPT-2's, and says so."""
    from gptcli.text.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.from_folder(found.folder)
        if tokenizer.reason:
            out.detail(f"{found.name}'s tokenizer works through the {tokenizer.kind} library: {tokenizer.reason}")
        return tokenizer
    except NotFoundError as missing:
        if not _speaks_gpt2(found.folder):
            raise
        try:
            tokenizer = Tokenizer.from_encoding("gpt2")
        except NotFoundError:
            hint = f"{missing.hint}, or set TIKTOKEN_CACHE_DIR to a folder that holds GPT-2's vocabulary"
            raise NotFoundError(missing.message, hint) from None
        out.note(f"{found.name} has no tokenizer files; its vocabulary has GPT-2's size, so GPT-2's are used")
        return tokenizer


def _speaks_gpt2(folder: Path) -> bool:
    from gptcli.spec.config import read_config

    config = read_config(folder)
    return config.family == "gpt2" and config.vocab_size in (50257, 50304)  # 50304: padded to a multiple of 64


def open_for_inference(
    name: str | None,
    out: Output,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str = "none",
    threads: int | None = None,
    compile: bool = False,
    line: Line | None = None,
    offload: bool = False,
) -> Model:
    """Find and load a model; the tokenizer loads while torch is imported.

    ``line`` and ``offload`` are as ``core.build.open_model`` takes them.
    """
    from concurrent.futures import ThreadPoolExecutor

    found = find(name)
    with _uncollected(), ThreadPoolExecutor(1) as pool:
        tokenizer = pool.submit(open_tokenizer, found, out)
        from gptcli.core import runtime
        from gptcli.core.build import open_model

        runtime.set_threads(threads)
        asked = {"device": device, "dtype": dtype, "quantize": quantize}
        model = open_model(
            found.folder,
            tokenizer.result(),
            name=found.name,
            native=native_cache(),
            compile=compile,
            line=line,
            offload=offload,
            **asked,
        )
    if compile:
        out.note("the step is compiled when the first token is made: that takes from seconds to minutes")
    bits = "" if model.quantize == "none" else f", its matrices in {model.quantize}"
    out.detail(f"{model.name} from {found.folder} on {model.device} in {model.dtype_name}{bits}")
    if line is not None:
        out.detail(f"dealt out to {line.ranks} ranks")
    if offload and not model.told:
        out.note(f"--offload: on {model.device} the weights are in the host's memory already; nothing is moved")
    elif model.told:
        out.detail(model.told)
    return model


def link_torch() -> None:
    """Have the system link the largest of torch's libraries, without which ``import torch`` would do it.

    For whoever imports it while somebody types: importing holds the interpreter's lock all the while, up to a second,
    and this does not. It does nothing where it can't; then the import does it all.
    """
    import ctypes
    import os
    from importlib.util import find_spec

    spec = None if "torch" in sys.modules else find_spec("torch")
    if spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent / "lib"
    dlopen = ctypes.CDLL(None).dlopen
    dlopen.argtypes, dlopen.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            dlopen(os.fsencode(folder / name), os.RTLD_NOW | os.RTLD_LOCAL)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Within, no garbage is looked for: importing torch makes objects by the hundred thousand, and all of them stay.

    Looking through them again and again takes a tenth of the import; nor are they looked through afterwards.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
