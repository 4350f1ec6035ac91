"""Pulling and removing models as a person sees it, in a real terminal."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from gptcli.spec.library import resolve
from tests.cli.tmux import gptcli_in_tmux, needs_tmux
from tests.hub.standin import StandIn

NAME = "owner/tiny"
_HUB = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "NO_PROXY", "HOME")


@needs_tmux
def test_a_bar_while_it_comes_and_a_question_before_it_goes(hub: StandIn, tiny_folder: Path) -> None:
    hub.add(NAME, tiny_folder)
    looked = threading.Event()
    hub.holds["model.safetensors"] = (
        5000,
        lambda: looked.wait(120) if len(hub.seen("GET", ".safetensors")) > 2 else None,
    )
    settings = {name: os.environ[name] for name in _HUB}
    with gptcli_in_tmux("models", "pull", NAME, environment=settings) as tmux:
        shown = tmux.wait(lambda screen: any("kB" in line for line in screen.splitlines() if line.startswith("all ")))
        assert "3 files to get, 155.1 kB" in shown
        looked.set()
        shown = tmux.wait("[ended with 0]")
        assert "note: got 155.1 kB" in shown
        assert not [line for line in shown.splitlines() if line.startswith("all ")]  # the bar went
    with gptcli_in_tmux("models", "rm", NAME, environment=settings) as tmux:
        tmux.wait("Remove owner/tiny from the Hub's cache (155.1 kB)? [y/N]:")
        tmux.press("Enter")
        assert "nothing was removed" in tmux.wait("[ended with 2]")
        assert resolve(NAME)
    with gptcli_in_tmux("models", "rm", NAME, environment=settings) as tmux:
        tmux.wait("[y/N]:")
        tmux.type("y")
        tmux.press("Enter")
        assert "removed owner/tiny: 155.1 kB" in tmux.wait("[ended with 0]")
