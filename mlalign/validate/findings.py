"""One thing that was found: a fault, or a note. Standard library only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is wrong or worth knowing, where, and the mend."""

    level: Literal["fault", "note"]
    """fault: the run would stop, or train on something else than was meant. note: it would not."""
    where: str
    """File that it stands in; of a recipe's key, the recipe."""
    key: str
    """Key of the recipe or of the row."""
    problem: str
    mend: str = ""
    row: int | None = None
    """Row of the file from 1: the line of JSON lines, the row of a Parquet file."""
    record: str | None = None
    """Record id; None where the row has none."""
    kind: str = ""
    """The same words for the same cause, to count by; "" where there is one of it."""
    absent: bool = False
    """Something that the recipe names is not on this machine; elsewhere it may be."""

    @property
    def text(self) -> str:
        """Key, problem and mend, on one line."""
        return f"{self.key}: {self.problem}" + (f". {self.mend}" if self.mend else "")

    @property
    def group(self) -> str:
        """What it is counted under."""
        return self.kind or f"{self.key}: {self.problem}"

    def to_json(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)


def fault(where: str, key: str, problem: str, mend: str = "", **more: Any) -> Finding:
    """A Finding that fails the check; ``more``: further fields."""
    return Finding(level="fault", where=where, key=key, problem=problem, mend=mend, **more)


def note(where: str, key: str, problem: str, mend: str = "", **more: Any) -> Finding:
    """A Finding that does not."""
    return Finding(level="note", where=where, key=key, problem=problem, mend=mend, **more)


def split_mend(message: str) -> tuple[str, str]:
    """A message of ours as (problem, mend): the mend is what follows the last full stop."""
    problem, _, mend = message.rstrip(". ").rpartition(". ")
    return (problem, mend) if problem else (mend, "")
