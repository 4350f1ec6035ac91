"""How long a command takes to start, beside the imports that it can't do without.

python tests/bench/startup.py [--rounds 11]
"""

from __future__ import annotations

import argparse
import sys

from common import in_turn, report, seconds_of, summary

COMMANDS = (
    "generate",
    "predict",
    "score",
    "embed",
    "trace",
    "tokenize",
    "count-params",
    "train",
    "models list",
    "bench",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    python, gptcli = [sys.executable, "-c"], [sys.executable, "-m", "gptcli"]
    commands = {
        "import typer, rich": [*python, "import typer, rich"],
        "--help": [*gptcli, "--help"],
        **{f"{name} --help": [*gptcli, *name.split(), "--help"] for name in COMMANDS},
        "count-params gpt3": [*gptcli, "count-params", "gpt3"],
        "tokenize x": [*gptcli, "tokenize", "x"],
        "import torch": [*python, "import torch"],
        "generate -n 1": [*gptcli, "generate", "-n", "1", "x"],
    }
    for command in commands.values():
        seconds_of(command)  # fill the page cache, write the .pyc files
    measured = in_turn(
        {name: (lambda command=command: seconds_of(command)) for name, command in commands.items()}, rounds
    )
    medians = {name: summary(values)["median"] for name, values in measured.items()}
    rows, ratios = {}, {}
    for name, median in medians.items():
        base = "import torch" if name.startswith("generate -n") else "import typer, rich"
        ratios[name] = median / medians[base]
        rows[name] = f"{1000 * median:7.0f} ms   {ratios[name]:5.2f} x `{base}`"
    report(
        "start-up", rows, {"seconds": {name: summary(values) for name, values in measured.items()}, "ratios": ratios}
    )


if __name__ == "__main__":
    main()
