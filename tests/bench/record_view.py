"""A recording of the live view of ``gptcli train`` as an SVG, from the metrics of a real run.

python tests/bench/record_view.py RUN [--at 0.6] [--width 100] [--height 34] [--output docs/train.svg]

RUN is a folder that gptcli train wrote, or its metrics.jsonl; ``--at`` is the part of it (0 to 1) that is shown.
The same metrics give the same bytes, by the same rich.
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from gptcli.cli.metrics import read_events
from gptcli.cli.train_picture import TrainPicture

DOCS = Path(__file__).parent.parent.parent / "docs"


def record(events: Sequence[dict[str, Any]], name: str, at: float, width: int, height: int) -> str:
    """The SVG of the view as it stood when the part ``at`` of the run was done."""
    picture = TrainPicture(name, clock=lambda: 0.0)  # time stands still between two events
    last = max((event["progress"] for event in events if event["event"] == "step"), default=0.0)
    for event in events:
        if event["event"] == "step" and event["progress"] > at * last:
            break
        picture.show(event)
    console = Console(
        file=io.StringIO(), record=True, width=width, height=height, force_terminal=True, color_system="standard"
    )
    for line in picture.frame(console, width, height):
        console.print(line)
    svg = console.export_svg(title=f"gptcli train … -o {name}", unique_id="gptcli-train")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # a picture that asks no server for its fonts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--at", type=float, default=0.6)
    parser.add_argument("--width", type=int, default=100)
    parser.add_argument("--height", type=int, default=34)
    parser.add_argument("--name", help="How the run is called in the picture; its folder's name by default.")
    parser.add_argument("--output", type=Path, default=DOCS / "train.svg")
    args = parser.parse_args()
    folder = args.run.parent if args.run.is_file() else args.run
    name = args.name or folder.resolve().name
    args.output.write_text(record(read_events(args.run), name, args.at, args.width, args.height), encoding="utf-8")
    print(args.output)


if __name__ == "__main__":
    main()
