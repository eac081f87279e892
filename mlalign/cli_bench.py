"""``mlalign bench``: our step beside stock TRL's and the best padded pair, in one process."""

from __future__ import annotations

import json as json_text
import math
from pathlib import Path
from typing import Annotated, Any

import typer

Works = Annotated[
    list[str] | None,
    typer.Argument(
        help="dpo-cached dpo-live dpo-ragged dpo-400 dpo-next grpo grpo-kl judge pope memory; "
        "or all"
    ),
]


def bench(
    works: Works = None,
    rounds: Annotated[int, typer.Option(help="Counted rounds of alternating sides.")] = 7,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write rows and setting here.")
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's own choice.")] = 0,
    layers: Annotated[int, typer.Option(help="Decoder blocks.")] = 8,
    width: Annotated[int, typer.Option(help="Width of the decoder.")] = 1024,
    tower_layers: Annotated[int, typer.Option(help="Blocks of the vision tower.")] = 4,
    tower_width: Annotated[int, typer.Option(help="Width of the vision tower.")] = 256,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 16,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    checkpointing: Annotated[
        bool, typer.Option(help="Gradient checkpointing on all sides.")
    ] = False,
) -> None:
    """Speed and memory side by side with stock TRL; exit status 1 where a row is invalid."""
    import torch

    from mlalign.bench.setting import Setting
    from mlalign.bench.works import vision_share
    from mlalign.bench.works import works as known

    if threads:
        torch.set_num_threads(threads)
    setting = Setting(
        layers=layers,
        width=width,
        intermediate=-(-width * 11 // 4 // 64) * 64,
        heads=max(1, width // 64),
        tower_layers=tower_layers,
        tower_width=tower_width,
        rank=rank,
        dtype=dtype,
        checkpointing=checkpointing,
    )
    calls = known(setting)
    unknown = sorted(set(works or []) - calls.keys())
    if unknown:
        raise typer.BadParameter(f"no work {unknown[0]!r}; there are: {', '.join(calls)}")
    about = {**setting.describe(), "vision_share": vision_share(setting), "rounds": rounds}
    about |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    found: list[Any] = []
    for name in works or calls:
        found += calls[name](rounds)
        if json is not None:
            # After every work: an interrupted hour keeps what it measured.
            _write(json, found, about)
    _print(found, about)
    if any(row.invalid for row in found):
        raise typer.Exit(1)


def _write(file: Path, rows: list[Any], about: dict[str, Any]) -> None:
    made = {"rows": [_finite(row.to_json()) for row in rows], "setting": about}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json_text.dumps(made, indent=1) + "\n", encoding="utf-8")


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: what was not measured is null."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}


def _print(rows: list[Any], about: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"vision {about['vision_share']:.1%} of the language model's forward")
    columns = ("work", "against", "times faster", "range", "ceiling", "of it", "memory")
    for number, column in enumerate((*columns, "logps differ", "ours, s", "theirs, s", "")):
        table.add_column(column, justify="left" if number < 2 else "right")
    for row in rows:
        share = row.ratio_median / row.ceiling if row.ceiling else None
        cells = [row.work, row.opponent, _number(row.ratio_median)]
        low, high = _number(row.ratio_min), _number(row.ratio_max)
        cells += [f"{low}-{high}" if low else "", _number(row.ceiling), _number(share)]
        cells += [_number(row.peak_memory_ratio)]
        differ = row.logps_max_abs_diff
        cells += ["" if differ is None else f"{differ:.0e}"]
        cells += [_number(row.ours_seconds), _number(row.opponent_seconds)]
        table.add_row(*cells, f"invalid: {row.invalid}" if row.invalid else "")
    Console(width=132).print(table)


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.2f}"
