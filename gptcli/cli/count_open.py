"""What a name means to ``count-params``: a configuration, and the headers of a file where there is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptcli.cli.out import Output
from gptcli.errors import GptcliError, NotFoundError, UsageError
from gptcli.spec.config import ModelConfig, read_config
from gptcli.spec.library import Found, local_path, resolve
from gptcli.spec.presets import NAMES, read_preset

if TYPE_CHECKING:
    from gptcli.spec.index import TensorInfo
    from gptcli.spec.match import Matched


@dataclass(frozen=True)
class Counted:
    """A model on paper; ``matched`` is None where no file was there to be looked at."""

    title: str
    config: ModelConfig
    matched: Matched | None = None


def find_config(name: str, out: Output) -> Counted:
    """What a name stands for; a folder or weight file is checked against its headers."""
    from gptcli.spec.match import match, match_folder

    if name in NAMES:
        return Counted(name, read_preset(name))
    path = local_path(name)
    if path is not None and path.is_file():
        infos, config = _of_file(path, out)
        if infos is None:
            return Counted(name, config)
        try:
            return Counted(name, config, match(infos, config, str(path)))
        except GptcliError as error:
            hint = "count the index.json or the folder, not one shard" if "-of-" in path.name else error.hint
            raise type(error)(error.message, hint) from None
    found = _resolved(name)
    config = read_config(found.folder)
    if _has_weights(found.folder):
        return Counted(found.name, config, match_folder(found.folder, config))
    out.note(f"{name} holds no weights; counted from its config.json")
    return Counted(found.name, config)


def find_remote(revision: str | None, offline: bool) -> Callable[[str], Counted]:
    """A look-up on the Hub: the configuration and the headers of the weights, some kilobytes of range requests."""
    from gptcli.hub.headers import read_remote
    from gptcli.hub.reach import Hub
    from gptcli.spec.library import hub_name
    from gptcli.spec.match import match

    hub = Hub(offline=offline)

    def find(name: str) -> Counted:
        hub_id, behind = hub_name(name)
        config, infos = read_remote(hub, hub.listing(hub_id, behind or revision))
        return Counted(name if behind else hub_id, config, match(infos, config, hub_id))

    return find


def is_file(name: str) -> bool:
    """Whether a name is that of a file here."""
    path = local_path(name)
    return path is not None and path.is_file()


def only_config(name: str, out: Output) -> Counted:
    """What a name stands for, its weights left unread where a configuration says what they should be."""
    if name in NAMES:
        return Counted(name, read_preset(name))
    path = local_path(name)
    if path is not None and path.is_file():
        return Counted(name, _of_file(path, out)[1])
    found = _resolved(name)
    return Counted(found.name, read_config(found.folder))


def config_beside(file: str) -> Counted:
    """The configuration that stands beside a weight file, in its folder, or in that of a model's name."""
    path = local_path(file)
    folder = path.parent if path is not None and path.is_file() else _folder_of(file)
    if not (folder / "config.json").is_file():
        raise UsageError(f"there is no config.json beside {file}", "name the model that the file should hold")
    return Counted(str(folder / "config.json"), read_config(folder))


def read_weights(name: str) -> tuple[Path, dict[str, TensorInfo]]:
    """The headers of a weight file, an index, or a folder or model; raises as ``spec/index.py`` does."""
    from gptcli.spec.index import read_folder

    path = local_path(name)
    if path is not None and path.is_file():
        infos = _headers(path)
        if infos is None:
            raise UsageError(f"{path} is no .safetensors file or index", "name the weights that are to be checked")
        return path, infos
    folder = _folder_of(name)
    return folder, read_folder(folder)


def _folder_of(name: str) -> Path:
    path = local_path(name)
    return path if path is not None and path.is_dir() else resolve(name).folder


def _resolved(name: str) -> Found:
    try:
        return resolve(name)
    except NotFoundError as error:
        raise NotFoundError(error.message, f"{error.hint}; presets: {', '.join(NAMES)}") from None


def _has_weights(folder: Path) -> bool:
    from gptcli.spec.index import FILE_NAME, INDEX_NAME

    return (folder / FILE_NAME).exists() or (folder / INDEX_NAME).exists()


def _headers(path: Path) -> dict[str, TensorInfo] | None:
    from gptcli.spec.index import read_header, read_index

    if path.name.endswith(".index.json"):
        return read_index(path)
    return read_header(path) if path.suffix == ".safetensors" else None


def _of_file(path: Path, out: Output) -> tuple[Mapping[str, TensorInfo] | None, ModelConfig]:
    """The headers of a weight file and its configuration: the one beside it, or one that is read off the tensors."""
    infos = _headers(path)
    if infos is None:
        if path.suffix != ".json":
            raise UsageError(f"{path} is no config.json, .safetensors file or index", "see gptcli count-params --help")
        return None, read_config(path)
    beside = path.parent / "config.json"
    if beside.is_file():
        return infos, read_config(beside)
    from gptcli.spec.infer import ASSUMED_HEAD_DIM, infer_config

    config = infer_config(infos, str(path))
    out.note(f"no config.json beside {path.name}: heads of {ASSUMED_HEAD_DIM} are assumed, as in GPT-2")
    return infos, config
