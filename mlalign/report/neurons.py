"""Section: the neurons that moved most, what they write, and how stably they are on the list."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

from mlalign.report import figures as fg
from mlalign.report import series
from mlalign.report.folder import Run
from mlalign.report.metrics import is_number
from mlalign.report.section import Group, Section, render

TABLE, PROBE = "neurons", "top_drifted"
MOST = 200
"""Rows shown per arm."""
OURS = ("arm", "step", "rank", "layer", "neuron", "score", "written")
"""Columns that are shown as such; any other is shown as it is."""
NOTE = (
    "The neurons of each arm's last pass, by score, with the tokens that they write: those whose "
    "logit the neuron's column of the down-projection raises most. On the list: in how many passes "
    "it was among the top; a neuron that is there once is chance. Not a list of responsible "
    "neurons: what alignment changes is spread widely."
)


def section(run: Run, figures: fg.Figures) -> Section:
    """One tab per arm with a table that can be sorted and searched; then the probe's numbers."""
    by_arm: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in run.probe(TABLE):
        by_arm[row["arm"]].append(row)
    groups = [Group(name=arm, html=_table(by_arm[arm])) for arm in run.arms if arm in by_arm]
    numbers = series.block(run, figures, PROBE)
    numbers += series.layers(run, figures, PROBE, "By layer over the steps")
    return Section(
        id="neurons",
        title="Neurons that moved most",
        note=NOTE if groups else "",
        groups=tuple(groups),
        after=numbers,
        empty="" if groups or numbers else f"no table of neurons was logged: {PROBE} did not run",
    )


def _table(rows: list[dict[str, Any]]) -> Markup:
    steps = sorted({row["step"] for row in rows})
    scores: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)
    for row in rows:
        scores[row["layer"], row["neuron"]][row["step"]] = row["score"]
    last = [row for row in rows if row["step"] == steps[-1]]
    last.sort(key=lambda row: -row["score"] if is_number(row["score"]) else 0.0)
    extra = [name for name in last[0] if name not in OURS and _is_shown(row[name] for row in last)]
    # At the first pass nothing has moved yet where training starts from the base.
    passes = [step for step in steps if any(row["score"] for row in rows if row["step"] == step)]
    body = [
        {
            "layer": row["layer"],
            "neuron": row["neuron"],
            "score": row["score"],
            "shown": f"{row['score']:.3g}",
            "passes": sum(step in scores[row["layer"], row["neuron"]] for step in passes),
            "line": sparkline(scores[row["layer"], row["neuron"]], steps),
            "tokens": words(row["written"]),
            "extra": [_extra(row[name]) for name in extra],
        }
        for row in last[:MOST]
    ]
    return render(
        "neurons.html.j2",
        step=steps[-1],
        shown=len(body),
        total=len(last),
        passes=len(passes),
        extra=[name.replace("_", " ") for name in extra],
        rows=body,
    )


def words(tokens: Iterable[str] | None) -> list[str]:
    """Tokens as they can be read: a blank is drawn, so that none is empty."""
    return [token.strip() or "\u2423" for token in tokens or ()]


def sparkline(by_step: dict[int, float], steps: Sequence[int]) -> Markup:
    """The score over the passes, as a line of 72 by 18; a pass in which it was not on the list
    leaves a gap."""
    if len(steps) < 2:
        return Markup("")
    top = max((v for v in by_step.values() if is_number(v)), default=0.0) or 1.0
    span = steps[-1] - steps[0]
    path, pen = "", "M"
    dots = ""
    for step in steps:
        value = by_step.get(step)
        if not is_number(value):
            pen = "M"
            continue
        x, y = 2 + 68 * (step - steps[0]) / span, 16 - 14 * max(value, 0.0) / top
        path, pen = f"{path}{pen}{x:.1f} {y:.1f}", "L"
        dots = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.6"><title>{value:.3g}</title></circle>'
    title = ", ".join(f"step {s}: {by_step[s]:.3g}" for s in steps if is_number(by_step.get(s)))
    return Markup(
        '<svg class="spark" viewBox="0 0 72 18" width="72" height="18"><title>{}</title>'
        '<path d="{}"/>{}</svg>'
    ).format(title, path, Markup(dots))


def _is_shown(values: Iterable[Any]) -> bool:
    return any(value is not None and value == value for value in values)


def _extra(value: Any) -> dict[str, Any]:
    if is_number(value):
        return {"sort": value, "shown": f"{value:.3g}"}
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return {"sort": text, "shown": text}
