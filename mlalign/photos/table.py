"""Runs of one recipe with several seeds -> one Markdown table of base and aligned models.

    python -m mlalign.photos.table runs/photos-0 runs/photos-1 runs/photos-2

Each cell is the mean over seeds; below it, each seed's 95 % bootstrap interval over images. A
second table gives the paired change of each arm against its own base, with its interval, and marks
the changes whose interval excludes zero in every seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = {
    "halluc/chair_s": "CHAIR_s",
    "halluc/chair_i": "CHAIR_i",
    "halluc/recall": "recall",
    "halluc/length": "words",
    "halluc/mentions": "mentions",
    "pope/accuracy": "POPE accuracy",
    "pope/f1": "POPE F1",
    "pope/yes_rate": "yes rate",
    "pope/unparsed_rate": "unparsed",
    "lm/clean_caption_nll": "caption NLL",
}
"""Key of summary.json -> heading."""


def markdown(summaries: Sequence[dict[str, Any]]) -> str:
    """Both tables. Arms that some run lacks are left out."""
    arms = [a for a in summaries[0]["builders"] if all(a in s["builders"] for s in summaries)]
    first = [s["builders"][arms[0]]["before"] for s in summaries]
    sides = {"base": first}
    changes = {}
    for arm in arms:
        sides[arm] = [s["builders"][arm]["after"] for s in summaries]
        changes[arm] = [s["builders"][arm]["change"] for s in summaries]
    seeds = ", ".join(str(s["seed"]) for s in summaries)
    images = sorted({side["n"] for each in sides.values() for side in each})
    note = f"Seeds {seeds}; {'/'.join(map(str, images))} photographs; [95 % interval of each seed]."
    return "\n\n".join([note, _table(sides, False), "Change against base:", _table(changes, True)])


def _table(sides: dict[str, list[dict[str, Any]]], signed: bool) -> str:
    keys = [k for k in COLUMNS if all(k in one for each in sides.values() for one in each)]
    lines = ["| | " + " | ".join(COLUMNS[k] for k in keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for name, each in sides.items():
        cells = [_cell([side[k] for side in each], _intervals(each, k), signed) for k in keys]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _intervals(sides: Sequence[dict[str, Any]], key: str) -> list[list[float]]:
    return [side[f"{key}_ci95"] for side in sides]


def _cell(values: list[float], intervals: list[list[float]], signed: bool) -> str:
    plus = "+" if signed else ""
    digits = 1 if max(map(abs, values)) > 5 else 3
    mean = f"{sum(values) / len(values):{plus}.{digits}f}"
    clear = signed and all(
        low * high > 0 and low * v > 0 for v, (low, high) in zip(values, intervals, strict=True)
    )
    shown = "<br>".join(f"[{low:.{digits}f}, {high:.{digits}f}]" for low, high in intervals)
    return f"{f'**{mean}**' if clear else mean}<br>{shown}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    files = [run / "summary.json" for run in parser.parse_args().runs]
    print(markdown([json.loads(file.read_text(encoding="utf-8")) for file in files]))


if __name__ == "__main__":
    main()
