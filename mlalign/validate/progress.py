"""A progress bar that is there only for what takes long."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PATIENCE = 2.0
"""Seconds before a bar comes."""

Item = TypeVar("Item")


def late(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """The items, with a bar on the error stream from the third second on, on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True
    )
    start, shown = time.monotonic(), False
    task = progress.add_task(description, total=total)
    try:
        for number, item in enumerate(items):
            if not shown and time.monotonic() - start > PATIENCE and progress.console.is_terminal:
                progress.start()
                shown = True
            if shown:
                progress.update(task, completed=number)
            yield item
    finally:
        if shown:
            progress.stop()
