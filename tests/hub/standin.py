"""A stand-in for the Hub that serves real folders on this machine, and for the CDN that keeps its large files.

It speaks what huggingface_hub asks: a model's info with its files, ``resolve`` with ETag, X-Repo-Commit and X-Linked-*
headers, HEAD, ranges, redirects to another host, error codes in X-Error-Code. It writes down every request, and can
break connections, change bytes, and refuse whoever has no token.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit


class Request(NamedTuple):
    """What somebody asked for; ``host`` is ``hub`` or ``cdn``."""

    host: str
    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Repo:
    """A model: its commits by hash and what names them; a file of ``large`` suffix is kept on the CDN."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    needs_token: str | None = None  # gated: only who sends it gets files
    private: bool = False

    def commit(self, files: Mapping[str, bytes], *refs: str) -> str:
        digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[digest] = dict(files)
        self.refs.update(dict.fromkeys(refs or ("main",), digest))
        return digest


LARGE = (".safetensors", ".bin", ".npz")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def etag(name: str, data: bytes) -> str:
    return sha256(data) if name.endswith(LARGE) else git_sha1(data)


class StandIn:
    """The two servers, what they hold, and what was asked of them."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.changed: dict[str, bytes] = {}  # file -> the bytes that are served instead
        # file -> bytes of a body after which the connection ends (None: never), of one answer after the other; the
        # last goes on.
        self.breaks: dict[str, list[int | None]] = {}
        self.holds: dict[str, tuple[int, Callable[[], None]]] = {}  # file -> what is called after so many bytes
        self.status: dict[str, int] = {}  # file -> an error that the CDN or Hub answers its GET with
        self.no_ranges = False
        self.hub = self.cdn = ""
        self.lock = threading.Lock()

    def add(self, name: str, files: Path | Mapping[str, bytes], *refs: str) -> str:
        """A commit of a model, of a folder or of bytes by name; returns its hash."""
        if isinstance(files, Path):
            root = files
            files = {f.relative_to(root).as_posix(): f.read_bytes() for f in sorted(root.rglob("*")) if f.is_file()}
        return self.repos.setdefault(name, Repo()).commit(files, *refs)

    def seen(self, method: str = "", path: str = "") -> list[Request]:
        return [request for request in self.requests if method in request.method and path in request.path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    standin: StandIn
    host: str

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        with self.standin.lock:
            self.standin.requests.append(Request(self.host, self.command, path, self.headers.get("Range"), token))
        if self.host == "cdn":
            _, name, commit, file = path.split("/", 3)
            repo = self.standin.repos[name.replace("--", "/")]
            return self._bytes(file, repo.commits[commit][file], {"ETag": '"an-etag-of-the-cdn"'})
        if found := re.fullmatch(r"/api/models/([^/]+(?:/[^/]+)?)(?:/revision/(.+))?", path):
            return self._info(found[1], found[2] or "main", token)
        if found := re.fullmatch(r"/([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)", path):
            return self._resolve(found[1], found[2], found[3], token)
        return self._refuse(404, "", "not found")

    def _repo(self, name: str, revision: str, token: str | None) -> tuple[Repo, str] | None:
        repo = self.standin.repos.get(name)
        if repo is None or (repo.private and token != repo.needs_token):
            self._refuse(401 if token is None else 404, "RepoNotFound", "Repository not found")
            return None
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo, commit

    def _info(self, name: str, revision: str, token: str | None) -> None:
        if not (found := self._repo(name, revision, token)):
            return
        repo, commit = found
        siblings: list[dict[str, Any]] = []
        for file, data in sorted(repo.commits[commit].items()):
            entry = {"rfilename": file, "size": len(data), "blobId": git_sha1(data)}
            if file.endswith(LARGE):
                entry |= {"blobId": "0" * 40, "lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 134}}
            siblings.append(entry)
        told = {"id": name, "modelId": name, "sha": commit, "private": repo.private, "siblings": siblings, "tags": []}
        body = json.dumps({**told, "gated": "auto" if repo.needs_token else False, "downloads": 0, "likes": 0}).encode()
        self._send(200, body, {"Content-Type": "application/json"})

    def _resolve(self, name: str, revision: str, file: str, token: str | None) -> None:
        if not (found := self._repo(name, revision, token)):
            return
        repo, commit = found
        if repo.needs_token and token != repo.needs_token:
            self._refuse(401 if token is None else 403, "GatedRepo", "Access to this model is restricted")
        elif file not in repo.commits[commit]:
            self._refuse(404, "EntryNotFound", "Entry not found")
        else:
            data = repo.commits[commit][file]
            known = {"X-Repo-Commit": commit, "ETag": f'"{etag(file, data)}"'}
            if file.endswith(LARGE):
                known |= {"X-Linked-Etag": f'"{etag(file, data)}"', "X-Linked-Size": str(len(data))}
                known["Location"] = f"{self.standin.cdn}/{name.replace('/', '--')}/{commit}/{file}"
                self._send(302, b"", known)
            else:
                self._bytes(file, data, known)

    def _bytes(self, file: str, data: bytes, headers: dict[str, str]) -> None:
        if self.command == "GET" and file in self.standin.status:
            self._refuse(self.standin.status[file], "", "no")
            return
        data = self.standin.changed.get(file, data)
        status, asked = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and not self.standin.no_ranges:
            begin, end = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1) + 1
            if begin >= len(data):
                self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            status, headers = 206, {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}
            data = data[begin:end]
        self._send(status, data, headers, file if self.command == "GET" else "")

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], file: str = "") -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        begun = 0
        if file in self.standin.holds:
            begun, act = self.standin.holds[file]
            self.wfile.write(body[:begun])
            self.wfile.flush()
            act()
        breaks = self.standin.breaks.get(file, [None])
        with self.standin.lock:
            length = breaks.pop(0) if len(breaks) > 1 else breaks[0]
        with suppress(ConnectionError):  # whoever asked may be gone
            self.wfile.write(body[begun:length])
            if length is not None and length < len(body):
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked may hang up; to say so would be said on the stderr that a test looks at."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serving() -> Iterator[StandIn]:
    """A stand-in, for as long as the block takes; the CDN is another host, as it is in the world."""
    standin = StandIn()
    servers = []
    for host in ("hub", "cdn"):
        handler = type("Handler", (_Handler,), {"standin": standin, "host": host})
        server = _Server(("127.0.0.1", 0), handler)
        # By another name, too: some versions of huggingface_hub tell hosts apart by that alone.
        setattr(standin, host, f"http://{'127.0.0.1' if host == 'hub' else 'localhost'}:{server.server_port}")
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
    try:
        yield standin
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
