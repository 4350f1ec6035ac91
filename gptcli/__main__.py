"""``gptcli`` and ``python -m gptcli`` (what torchrun launches)."""

import sys


def run() -> None:
    """The console script. Nothing is imported before Ctrl-C is quiet."""
    try:
        from gptcli.cli import main

        code = main()
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    run()
