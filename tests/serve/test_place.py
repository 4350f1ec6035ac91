"""Where a warm process is found: one at a time, and the user's alone."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from gptcli.errors import CorruptError, ResourceError
from gptcli.serve.place import Claim, Place, claim, claim_or_meet, fingerprint, places, runtime_folder
from tests.conftest import PATIENCE


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place.of(runtime_folder({"XDG_RUNTIME_DIR": str(tmp_path)}), tmp_path / "models" / "tiny")


def test_the_folder_is_the_users_alone(tmp_path: Path) -> None:
    folder = runtime_folder({"XDG_RUNTIME_DIR": str(tmp_path)})
    assert folder == tmp_path / "gptcli"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert runtime_folder({"XDG_RUNTIME_DIR": str(tmp_path)}) == folder


def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    folder = runtime_folder({"XDG_RUNTIME_DIR": str(tmp_path)})
    for mode in (0o750, 0o701, 0o777):
        folder.chmod(mode)
        with pytest.raises(CorruptError, match="not a folder of yours alone"):
            runtime_folder({"XDG_RUNTIME_DIR": str(tmp_path)})


def test_a_link_or_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "gptcli").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptError):
        runtime_folder({"XDG_RUNTIME_DIR": str(tmp_path)})


def test_somebody_elses_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime_folder({"XDG_RUNTIME_DIR": str(tmp_path)})
    monkeypatch.setattr("os.getuid", lambda: 4711)
    with pytest.raises(CorruptError):
        runtime_folder({"XDG_RUNTIME_DIR": str(tmp_path)})


# What another user gets to see of a folder and of a socket in it, as lines; run as root, who can become that user.
STRANGER = """
import os, socket, sys
folder, path = sys.argv[1:]
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
def tried(what, act):
    try:
        act()
        print(what, "can")
    except PermissionError:
        print(what, "can't")
tried("list", lambda: os.listdir(folder))
tried("look", lambda: os.stat(path))
tried("connect", lambda: socket.socket(socket.AF_UNIX).connect(path))
tried("replace", lambda: os.rename(path, path + "x"))
"""


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can try as another user")
def test_another_user_can_neither_list_nor_connect() -> None:
    with tempfile.TemporaryDirectory(prefix="gptcli-", dir="/tmp") as above:
        Path(above).chmod(0o755)  # so that nothing but our own modes is in the way
        place = Place.of(runtime_folder({"XDG_RUNTIME_DIR": above}), Path(above) / "tiny")
        held = claim(place)
        assert held

        def stranger() -> dict[str, str]:
            command = [sys.executable, "-c", STRANGER, str(place.folder), str(place.socket)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
            return dict(line.split(" ") for line in done.stdout.splitlines())

        try:
            assert stranger() == dict.fromkeys(("list", "look", "connect", "replace"), "can't")
            place.folder.chmod(0o755)  # and if the folder were open: the socket still is not
            assert stranger() == {"list": "can", "look": "can", "connect": "can't", "replace": "can't"}
            place.socket.chmod(0o666)  # which is what keeps them out
            assert stranger()["connect"] == "can"
        finally:
            held.release()


def test_without_a_runtime_folder_of_the_system_it_is_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert runtime_folder({}).parent == tmp_path


def test_the_socket_listens_at_once_and_only_its_user_may_open_it(place: Place) -> None:
    held = claim(place)
    assert held
    try:
        assert stat.S_IMODE(place.socket.stat().st_mode) == 0o600
        assert stat.S_IMODE(place.lock.stat().st_mode) == 0o600
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(place.socket))
        assert places(place.folder) == [place]
    finally:
        held.release()
    assert not place.socket.exists()


def test_a_place_is_held_once_and_free_again_afterwards(place: Place) -> None:
    first = claim(place)
    assert first
    assert claim(place) is None
    first.release()
    second = claim(place)
    assert second
    second.release()


def _hold_and_die(place: Place, ready: socket.socket) -> None:
    held = claim(place)
    ready.sendall(b"1" if held else b"0")
    ready.recv(1)  # until the test has killed us


def test_what_a_killed_process_leaves_is_taken_over(place: Place) -> None:
    ours, theirs = socket.socketpair()
    child = multiprocessing.get_context("fork").Process(target=_hold_and_die, args=(place, theirs))
    child.start()
    assert ours.recv(1) == b"1"
    assert claim(place) is None
    child.kill()
    child.join()
    assert place.socket.exists()
    with socket.socket(socket.AF_UNIX) as caller, pytest.raises(ConnectionRefusedError):
        caller.connect(str(place.socket))
    held = claim(place)
    assert held
    held.release()


def _race(place: Place, together: Any, told: Any) -> None:
    together.wait(PATIENCE)
    held = claim(place)
    told.put(held is not None)
    together.wait(PATIENCE)  # whoever has it keeps it until all have tried


def test_of_many_that_start_at_once_one_serves(place: Place) -> None:
    context = multiprocessing.get_context("fork")
    together, told = context.Barrier(8), context.Queue()
    children = [context.Process(target=_race, args=(place, together, told)) for _ in range(8)]
    for child in children:
        child.start()
    assert sorted(told.get(timeout=PATIENCE) for _ in children) == [False] * 7 + [True]
    for child in children:
        child.join(PATIENCE)


def test_whoever_comes_second_waits_until_the_first_listens(place: Place) -> None:
    lock = os.open(place.lock, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)  # it is about to listen
    met: list[object] = []
    waiting = threading.Thread(target=lambda: met.append(claim_or_meet(place)))
    waiting.start()
    waiting.join(0.1)
    assert not met
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place.socket))
        listener.listen()
        waiting.join(PATIENCE)
        assert met == [None]
    os.close(lock)


def test_whoever_comes_second_takes_over_from_one_that_never_listened(place: Place) -> None:
    lock = os.open(place.lock, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    met: list[Claim | None] = []
    waiting = threading.Thread(target=lambda: met.append(claim_or_meet(place)))
    waiting.start()
    os.close(lock)
    waiting.join(PATIENCE)
    (held,) = met
    assert held
    held.release()


def test_two_models_have_two_places_and_a_link_to_one_has_its(tmp_path: Path) -> None:
    for name in ("a/tiny", "b/tiny"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a/tiny")
    first, second, link = (Place.of(tmp_path, tmp_path / name) for name in ("a/tiny", "b/tiny", "link"))
    assert first != second
    assert first == link


def test_a_path_too_long_for_a_socket_is_told(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    with pytest.raises(ResourceError, match="too long for a socket"):
        claim(Place(folder, "tiny"))


def test_a_fingerprint_changes_with_the_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    (tmp_path / "notes.md").write_text("not of the model")
    assert fingerprint(tmp_path) == before
    (tmp_path / "config.json").write_text("{ }")
    assert fingerprint(tmp_path) != before
