"""Section: how many pairs each builder made, and what it skipped and why."""

from __future__ import annotations

from collections import Counter
from typing import Any

from markupsafe import Markup

from mlalign.report import figures as fg
from mlalign.report.folder import Run
from mlalign.report.metrics import is_number
from mlalign.report.section import Section, render

DASH = "\u2013"


def section(run: Run, figures: fg.Figures) -> Section:
    """Pairs and skips per data folder, out of its manifest."""
    rows = [
        [name, _made(m), _equal(m), _words(m), _reasons(m.get("skipped"))]
        for name, m in run.build_manifests.items()
    ]
    head = ["data", "records", "equal mentions", "words, chosen / rejected", "skipped, by reason"]
    table = render("plain.html.j2", kind="plain", head=head, rows=rows) if rows else Markup("")
    return Section(
        id="builds",
        title="What was built and skipped",
        note="Equal mentions: share of the description pairs whose two sides mention equally many "
        "objects, so that counting does not tell them apart."
        if rows
        else "",
        html=table + _unread(run),
        empty="" if rows else "no data manifests: no pairs were built in this run",
    )


def _made(manifest: dict[str, Any]) -> str:
    made = manifest.get("pairs", manifest.get("examples"))
    kind = "pairs" if "pairs" in manifest else "examples"
    read = f" of {manifest['records']:,} read" if "records" in manifest else ""
    return f"{made:,} {kind}{read}" if isinstance(made, int) else "unknown"


def _equal(manifest: dict[str, Any]) -> str:
    share = manifest.get("equal_mention_share")
    return f"{share * 100:.0f} %" if is_number(share) else DASH


def _words(manifest: dict[str, Any]) -> str:
    sides = [manifest.get(f"mean_words_{side}") for side in ("chosen", "rejected")]
    return " / ".join(f"{s:.1f}" for s in sides if is_number(s)) or DASH


def _reasons(skipped: dict[str, Any] | list[str] | None) -> str:
    if skipped is None:
        return "not counted"
    # A source names each record that it left out, a builder counts by reason.
    told = Counter(skipped) if isinstance(skipped, list) else skipped
    counts = {why: n["count"] if isinstance(n, dict) else n for why, n in told.items()}
    if not counts:
        return "none"
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    parts = [f"{count:,} \u00d7 {reason}" for reason, count in ordered]
    return f"{sum(counts.values()):,}: " + "; ".join(parts)


def _unread(run: Run) -> Markup:
    lines = [Markup("<p class='banner'>{}</p>").format(text) for text in run.unreadable]
    return Markup("").join(lines)
