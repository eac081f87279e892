"""Section: what the rewards did, beside held-out descriptions; the steps marked as reward hacking.

Only of runs that learn from rewards. A step is marked by ``mlalign.train.watching``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup

from mlalign.report import curves
from mlalign.report import figures as fg
from mlalign.report import metrics as m
from mlalign.report.folder import Run
from mlalign.report.section import Section, panels, render

WATCHED = ("halluc/chair_i", "halluc/recall", "halluc/length", "lm/clean_caption_nll")
"""What held-out descriptions are watched for, under ``watch/`` in metrics.jsonl."""
NOTE = (
    "Reward and terms are means over the answers sampled at a step, each term before its weight. "
    "Below them, greedy descriptions of held-out images. A policy that games its reward says less "
    "while the reward rises: such a step is marked by a red line and a cross."
)
RED = "#b3341b"
_FIRST = 3
"""Marked steps named in a warning."""


@dataclass(frozen=True)
class Marked:
    """A look at which the reward had risen while the answers got worse past the bounds."""

    arm: str
    step: int
    rise: float | None
    """Of the mean reward since the first logged step; None where no event tells it."""
    fell: tuple[str, ...]
    """What fell, from what to what."""


def section(run: Run, figures: fg.Figures) -> Section | None:
    """Curves and marked steps; None where no reward was logged."""
    rows = [r for r in run.metrics if m.is_number(r.get("reward")) or _is_look(r)]
    if not rows:
        return None
    found = marked(run)
    shown = [("reward", "Reward", "weighted sum of the terms"), *_terms(rows)]
    drawn = curves.training(rows, run.arms, shown)
    watched = [m.BY_KEY[key] for key in WATCHED]
    titles = [(f"watch/{x.key}", x.label, "%" if x.unit == "%" else x.unit) for x in watched]
    looks = curves.training(_in_units(rows, watched), run.arms, titles)
    for fig, label in [*drawn, *looks]:
        _mark(fig, found, run.arms, label)
    html = _listed(run, found, watched=bool(looks))
    html += panels(figures, drawn, title="Sampled answers", three=True)
    html += panels(figures, looks, title="Held-out descriptions", three=True)
    return Section(id="rewards", title="Rewards", note=NOTE if looks else "", html=html)


def marked(run: Run) -> list[Marked]:
    """The marked looks, by arm and step, with what their events tell."""
    told = {
        (e.get("arm"), e.get("step")): e for e in run.events if e.get("event") == "reward hacking"
    }
    state = {(r["arm"], r["step"]): r["watch/reward_hacking"] for r in run.metrics if _is_look(r)}
    found = []
    for (arm, step), value in sorted(state.items()):
        if value:
            event = told.get((arm, step), {})
            found.append(Marked(arm, step, event.get("rise"), tuple(event.get("fell", ()))))
    return found


def warnings(run: Run) -> list[str]:
    """One line for each arm with marked steps."""
    found = marked(run)
    lines = []
    for arm in dict.fromkeys(each.arm for each in found):
        own = [each for each in found if each.arm == arm]
        steps = ", ".join(str(each.step) for each in own[:_FIRST])
        more = f" and {len(own) - _FIRST} more" if len(own) > _FIRST else ""
        fell = " and ".join(own[-1].fell) or "recall or length fell"
        lines.append(
            f"Reward hacking: the reward of {arm} rose while its answers got worse, at step "
            f"{steps}{more} (at {own[-1].step}: {fell}). See Rewards."
        )
    return lines


def _is_look(row: dict[str, Any]) -> bool:
    return m.is_number(row.get("watch/reward_hacking"))


def _terms(rows: Iterable[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(metric, title, axis title) of every term of the sum."""
    keys = dict.fromkeys(
        key
        for row in rows
        if "reward" in row
        for key in row
        if key.startswith("rewards/") and key.endswith("/mean") and key.count("/") == 2
    )
    return [(key, key.split("/")[1].replace("_", " "), "score, unweighted") for key in keys]


def _in_units(rows: Iterable[dict[str, Any]], watched: Sequence[m.Metric]) -> list[dict[str, Any]]:
    """The looks, their numbers as they are shown: rates in per cent."""
    return [
        {
            "arm": row["arm"],
            "step": row["step"],
            **{
                key: row[key] * metric.scale
                for metric in watched
                if m.is_number(row.get(key := f"watch/{metric.key}"))
            },
        }
        for row in rows
        if _is_look(row)
    ]


def _mark(fig: go.Figure, found: Sequence[Marked], arms: Sequence[str], label: str) -> None:
    """A line at every marked step, and a cross on the curve of the arm that it belongs to."""
    for step in dict.fromkeys(each.step for each in found):
        fig.add_vline(x=step, line={"color": RED, "width": 1, "dash": "dot"})
    traces: Any = fig.data
    curve = {trace.name: dict(zip(trace.x, trace.y, strict=True)) for trace in traces}
    points = [(each, curve.get(each.arm, {}).get(each.step)) for each in found]
    points = [(each, y) for each, y in points if y is not None]
    if points:
        fig.add_trace(
            go.Scatter(
                x=[each.step for each, _ in points],
                y=[y for _, y in points],
                text=["<br>".join([each.arm, *each.fell]) for each, _ in points],
                mode="markers",
                name="marked",
                marker={"symbol": "x", "size": 10, "color": RED},
                hovertemplate=f"marked, step %{{x}}<br>{label}: %{{y:.4g}}<br>%{{text}}"
                "<extra></extra>",
            )
        )


def _listed(run: Run, found: Sequence[Marked], *, watched: bool) -> Markup:
    """The marked steps in a table, or one line that says there are none."""
    if not watched:
        text = "No held-out images were watched (watch_every: 0): nothing could be marked."
        return Markup('<p class="note">{}</p>').format(text)
    if not found:
        looks = sum(_is_look(row) for row in run.metrics)
        return Markup('<p class="note">None of {} looks is marked as reward hacking.</p>').format(
            looks
        )
    rows = [
        [
            Markup('<span class="arm" style="--arm:{}">{}</span>').format(
                fg.colour(run.arms.index(each.arm)), each.arm
            ),
            each.step,
            "\u2013" if each.rise is None else m.signed(each.rise, 3),
            "; ".join(each.fell) or "\u2013",
        ]
        for each in found
    ]
    head = ["marked", "step", "reward rose by", "what fell"]
    return render("plain.html.j2", kind="plain", head=head, rows=rows)
