"""``python -m gptcli``: the same program as the ``gptcli`` command (and what torchrun launches)."""

from gptcli.cli import run

if __name__ == "__main__":
    run()
