"""Which files of a repository are the model: configuration, weights as safetensors, tokenizer; never a pickle."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from gptcli.errors import CorruptError, NotFoundError, UnsupportedError
from gptcli.hub.reach import Listing
from gptcli.spec.config import ModelConfig, from_hf
from gptcli.spec.files import BESIDE, UNREAD, VOCABULARY
from gptcli.spec.index import FILE_NAME, INDEX_NAME, parse_index

_BESIDE_THE_WEIGHTS = (
    "config.json",
    "generation_config.json",
    *VOCABULARY,
    *UNREAD,
    *BESIDE,
    "additional_chat_templates/*.jinja",
    "README.md",
    "LICENSE*",
)
# What is, or may hold, a pickle: loading one runs whatever code is in it.
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".npz", ".h5", ".keras"}

Read = Callable[[str], bytes]


def is_pickle(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in _PICKLES


def choose(listing: Listing, include: Sequence[str], read: Read) -> list[str]:
    """The files to get, by name; with ``include`` those that match one of its globs, pickles left out.

    ``read`` gives the bytes of a small file. Raises NotFoundError where nothing matches, UnsupportedError where there
    are pickles alone or no weights that gptcli reads, CorruptError for an index that names shards which are not there.
    """
    if include:
        matching = [name for name in listing.files if any(_matches(name, glob) for glob in include)]
        if not matching:
            asked = " or ".join(include)
            raise NotFoundError(f"no file of {listing.name} matches {asked}", "quote globs: --include '*.json'")
        chosen = [name for name in matching if not is_pickle(name)]
        if not chosen:
            raise _pickles_only(listing, matching[0])
        return sorted(chosen)
    beside = [name for name in listing.files if any(fnmatchcase(name, glob) for glob in _BESIDE_THE_WEIGHTS)]
    return sorted([*beside, *weights(listing, read)])


def weights(listing: Listing, read: Read) -> list[str]:
    """The weight file, or the index and the shards that it names; raises like ``choose``."""
    if FILE_NAME in listing.files:
        return [FILE_NAME]
    if INDEX_NAME in listing.files:
        shards = list(dict.fromkeys(shards_by_tensor(listing, read).values()))
        if missing := [shard for shard in shards if shard not in listing.files]:
            raise CorruptError(f"{INDEX_NAME} of {listing.name} names {missing[0]}, which is not there", _SEE_ITS_PAGE)
        return [INDEX_NAME, *shards]
    if pickles := [name for name in listing.files if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        raise _pickles_only(listing, pickles[0])
    others = sorted({PurePosixPath(name).suffix for name in listing.files if name.endswith((".safetensors", ".gguf"))})
    has = f" (it has other {' and '.join(others)} files)" if others else ""
    raise UnsupportedError(f"{listing.name} holds no {FILE_NAME} or index of shards{has}", _SEE_ITS_PAGE)


def shards_by_tensor(listing: Listing, read: Read) -> dict[str, str]:
    """The index of a repository."""
    return parse_index(Path(f"{listing.name}/{INDEX_NAME}"), read(INDEX_NAME))


def read_config_of(listing: Listing, read: Read) -> ModelConfig:
    """The configuration of a repository; raises as ``from_hf`` does, and NotFoundError where there is none."""
    if "config.json" not in listing.files:
        raise NotFoundError(f"{listing.name} holds no config.json", "it is not a model in the Hugging Face layout")
    where = f"{listing.name}/config.json"
    try:
        raw = json.loads(read("config.json"))
    except (ValueError, RecursionError):
        raise CorruptError(f"{where} is not JSON", _SEE_ITS_PAGE) from None
    if not isinstance(raw, dict):
        raise CorruptError(f"{where} is not an object", _SEE_ITS_PAGE)
    return from_hf(raw, where)


_SEE_ITS_PAGE = "see the model's page for a revision or a repository that has them as safetensors"


def _pickles_only(listing: Listing, example: str) -> UnsupportedError:
    return UnsupportedError(
        f"{listing.name} holds its weights as a pickle ({example}), which can run code and is never fetched",
        "look on its page for a pull request that adds safetensors (--revision refs/pr/N), or convert it with "
        "transformers (save_pretrained) where you trust it",
    )


def _matches(name: str, glob: str) -> bool:
    """As in ``hf download``: over the whole path, ``*`` crossing folders, and ``folder/`` for all below it."""
    return fnmatchcase(name, glob + "*" if glob.endswith("/") else glob)
