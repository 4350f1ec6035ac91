"""Where what can be made again is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptcli.cli.caches import native_cache, token_cache


def test_prepared_data_is_kept_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert token_cache() == Path("/somewhere/gptcli/tokens")
    assert native_cache() == Path("/somewhere/gptcli/native")
    monkeypatch.setenv("HOME", "/home/someone")
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("XDG_CACHE_HOME")
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert token_cache() == Path("/home/someone/.cache/gptcli/tokens")
