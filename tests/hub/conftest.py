"""The commands, in this process, for what is best tested through them."""

from tests.cli.conftest import run

__all__ = ["run"]
