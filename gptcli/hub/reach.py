"""The Hub as gptcli reaches it: endpoint, token and proxy as huggingface_hub finds them, its failures as our errors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from gptcli.errors import AccessError, CorruptError, GptcliError, NetworkError, NotFoundError, UsageError
from gptcli.spec.library import hub_is_offline, is_hub_id

_HUB = "https://huggingface.co"  # where HF_ENDPOINT is set to nothing
_TIMEOUT = 30.0  # seconds until a server that says nothing counts as gone


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its size in bytes and the hash that names its blob, as far as the Hub tells them.

    The hash is SHA-256 for a large file (Git LFS) and git's SHA-1 for a small one.
    """

    name: str
    size: int | None
    digest: str | None


@dataclass(frozen=True)
class Listing:
    """The files of one commit."""

    name: str
    revision: str  # as it was asked for
    commit: str
    files: Mapping[str, RemoteFile]


class Hub:
    """A way to the Hub. Raises NotFoundError where the network is forbidden or huggingface_hub is not installed."""

    def __init__(self, *, offline: bool = False) -> None:
        if offline or hub_is_offline():
            why = "--offline was given" if offline else "HF_HUB_OFFLINE is set"
            raise NotFoundError(f"this needs the Hub, and {why}", "allow the network, or name a model that is here")
        if address := os.environ.get("HF_ENDPOINT"):  # the library's own files fall over some while they are imported
            _check_address(address)
        try:
            from huggingface_hub import HfApi, constants, get_token
            from huggingface_hub.utils import disable_progress_bars, get_session, logging
        except ImportError:
            message = "the Hub is reached through huggingface_hub, which is not installed"
            raise NotFoundError(message, "pip install 'gptcli[hub]'") from None
        if not (get_token() or "").isascii():
            raise AccessError("the token holds characters that no token has", f"copy it again, then {_HOW_TO_TELL}")
        logging.set_verbosity_error()  # gptcli says itself what is wrong, and shows its own bar
        disable_progress_bars()
        self.endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT or _HUB).rstrip("/")
        self._api = HfApi(endpoint=self.endpoint, library_name="gptcli")
        self.session: Any = get_session()

    def listing(self, name: str, revision: str | None) -> Listing:
        """The commit that a revision (a branch, a tag, a commit; None: main) stands for, and its files; one request."""
        if not is_hub_id(name):
            raise UsageError(f"{name!r} is not the name of a model on the Hub", "it should be owner/name")
        with self.failures(name, revision):
            info = self._api.model_info(name, revision=revision, files_metadata=True, timeout=_TIMEOUT)
        files = {}
        for entry in info.siblings or ():
            digest = entry.lfs.sha256 if entry.lfs else entry.blob_id
            if _is_tame(entry.rfilename):
                known = digest if digest and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest) else None
                files[entry.rfilename] = RemoteFile(entry.rfilename, entry.size, known)
        if not info.sha or not re.fullmatch(r"[0-9a-f]{40}", info.sha):
            raise CorruptError(f"{self.endpoint} does not say which commit of {name} it has", "check HF_ENDPOINT")
        return Listing(name, revision or "main", info.sha, files)

    def read(self, listing: Listing, file: str, begin: int = 0, end: int | None = None) -> tuple[bytes, int]:
        """Bytes ``begin`` up to ``end`` (None: the last) of a file, and the whole file's size; one request."""
        headers = self.headers()
        if begin or end is not None:
            headers["Range"] = f"bytes={begin}-{'' if end is None else end - 1}"
        with self.failures(listing.name, listing.revision, file):
            from huggingface_hub.utils import hf_raise_for_status

            url, limit = self.url(listing, file), None if end is None else end - begin
            # Streamed, since a server that knows no ranges would send gigabytes.
            with self.session.stream("GET", url, headers=headers, timeout=_TIMEOUT, follow_redirects=True) as response:
                if response.status_code >= 400:
                    response.read()
                hf_raise_for_status(response)
                data, skip = bytearray(), 0 if response.status_code == 206 else begin
                for block in response.iter_bytes():
                    data += block
                    if limit is not None and len(data) >= skip + limit:
                        break
                said = response.headers.get("Content-Range", "").rpartition("/")[2]
                size = said if said.isdigit() else response.headers.get("Content-Length", "")
        whole = int(size) if size.isdigit() else listing.files[file].size or begin + len(data)
        return bytes(data[skip : None if limit is None else skip + limit]), whole

    def read_json(self, listing: Listing, file: str) -> Any:
        """A small file's JSON. Raises CorruptError for anything else."""
        try:
            return json.loads(self.read(listing, file)[0])
        except (ValueError, RecursionError):
            raise CorruptError(f"{file} of {listing.name} is not JSON", "ask its owner to mend it") from None

    def url(self, listing: Listing, file: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(listing.name, file, revision=listing.commit, endpoint=self.endpoint)

    def headers(self) -> dict[str, str]:
        """What goes with every request: who asks, and the token if there is one; the session keeps it on the Hub."""
        from huggingface_hub.utils import build_hf_headers

        return {**build_hf_headers(library_name="gptcli"), "Accept-Encoding": "identity"}

    def link(self, listing: Listing, file: str, cache: str) -> None:
        """Give a file its name in the cache; its bytes are fetched only if no blob has its hash."""
        from huggingface_hub import hf_hub_download

        with self.failures(listing.name, listing.revision, file):
            hf_hub_download(
                listing.name,
                file,
                revision=listing.commit,
                cache_dir=cache,
                endpoint=self.endpoint,
                library_name="gptcli",
            )

    @contextmanager
    def failures(self, name: str, revision: str | None = None, file: str | None = None) -> Iterator[None]:
        """What goes wrong within, as an error that says what to do; none holds the token or what the server wrote."""
        try:
            yield
        except GptcliError:
            raise
        except Exception as error:
            if known := self._known(error, name, revision or "main", file):
                raise known from None
            raise

    def _known(self, error: BaseException, name: str, revision: str, file: str | None) -> GptcliError | None:
        from huggingface_hub import errors, get_token

        if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
            error = error.__cause__
        page = f"{self.endpoint}/{name}"
        sent = get_token() is not None
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.GatedRepoError):
            hint = f"agree to its terms at {page}, then "
            hint += (
                "try again: the token that was sent has no access yet" if sent else "set HF_TOKEN, or `hf auth login`"
            )
            return AccessError(f"{name} is gated: only who has agreed to its terms may get it", hint)
        if isinstance(error, errors.DisabledRepoError):
            return AccessError(f"{name} has been disabled on the Hub", f"see {page}")
        if isinstance(error, errors.RevisionNotFoundError):
            hint = f"{page} shows its branches and tags; without --revision it is main"
            return NotFoundError(f"{name} has no revision {revision!r}", hint)
        if isinstance(error, errors.EntryNotFoundError) and status is not None:
            return NotFoundError(f"{name} has no file {file} in revision {revision}", f"see {page}")
        if status == 401 and sent and not isinstance(error, errors.RepositoryNotFoundError):
            return AccessError("the Hub does not take the token", f"make a new one, then {_HOW_TO_TELL}")
        if isinstance(error, errors.RepositoryNotFoundError):
            hint = "check the name" + ("" if sent else f"; for a private or gated one {_HOW_TO_TELL}")
            message = f"there is no public model {name} on {self.endpoint}"
            return NotFoundError(message + (", nor one that the token may see" if sent else ""), hint)
        if status in (401, 403):
            return AccessError(f"the Hub refuses {name}" + (" to this token" if sent else ""), "check HF_TOKEN")
        if status == 404:
            return NotFoundError(f"{page} is not there", "check the name and HF_ENDPOINT")
        if status == 429:
            return NetworkError("the Hub wants fewer requests just now", "wait a few minutes, or set HF_TOKEN")
        if status is not None:
            return NetworkError(f"{self.endpoint} answers with the status {status}", "try again later")
        if isinstance(error, errors.OfflineModeIsEnabled):
            return NotFoundError("this needs the Hub, and the network is forbidden", "unset HF_HUB_OFFLINE")
        if isinstance(error, errors.HFValidationError):
            return UsageError(f"{name!r} is not the name of a model on the Hub", "it should be owner/name")
        if isinstance(error, errors.FileMetadataError):
            return NetworkError(f"{self.endpoint} does not answer as a Hub does", "check HF_ENDPOINT and the proxy")
        if is_of_transport(error):
            return NetworkError(f"{self.endpoint} can't be reached: {_reason(error)}", _ROADS)
        return None


_HOW_TO_TELL = "set HF_TOKEN, or run `hf auth login`"
_ROADS = "check the connection, HF_ENDPOINT, and HTTPS_PROXY if there is a proxy"


def _check_address(address: str) -> None:
    """Raise UsageError for an HF_ENDPOINT that is no address."""
    try:
        parts = urlsplit(address)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0  # a bad port raises
    except ValueError:
        good = False
    if not good:
        raise UsageError(f"HF_ENDPOINT is no address: {address}", "it should be like https://huggingface.co")


def is_of_transport(error: BaseException) -> bool:
    """Whether the connection failed; httpx goes by several names in the versions of huggingface_hub."""
    roots = {base.__module__.partition(".")[0] for base in type(error).__mro__}
    return bool(roots & {"httpx", "httpx2", "httpcore", "httpcore2"}) or isinstance(error, ConnectionError)


def _reason(error: BaseException) -> str:
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()
    return f"{name}: {error}" if str(error) else name


def _is_tame(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and name.isprintable() and not path.is_absolute() and ".." not in path.parts and "\\" not in name
