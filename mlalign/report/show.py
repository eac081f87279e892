"""Everything that a run knows of one record, as plain text for the terminal."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlalign.report import metrics as m
from mlalign.report import readings as rd
from mlalign.report.folder import Run
from mlalign.report.join import Index, Known, answer_of
from mlalign.report.provenance import flat

STEPS = 8
"""Steps shown of each arm and reading: the first, the last and some between."""


class UnknownRecord(ValueError):
    """The run has nothing of this id; the message names the nearest ones."""


def show(run_folder: Path, record_id: str) -> str:
    """What the run has of ``record_id``, from image to margins, probes and answers.

    Raises UnknownRecord naming the nearest ids where the run does not know it.
    """
    run = Run(Path(run_folder))
    index = Index(run)
    if record_id not in index.by_id:
        raise UnknownRecord(_unknown(index, record_id, run.folder))
    known = index.by_id[record_id]
    parts = [_head(known), *_pairs(known), *_logged(known), *_probes(run, known), *_answers(known)]
    made = index.by_example.get(record_id)
    if made:
        parts.append("pairs made of this example\n" + "\n".join(f"  {i}" for i in made[:20]))
    return "\n\n".join(parts) + "\n"


def _head(known: Known) -> str:
    lines = [f"record  {known.id}"]
    if known.image is not None:
        stored = (
            "" if known.image.data is None else f" (stored inside, {len(known.image.data)} bytes)"
        )
        lines.append(f"image   {known.image.path or 'without a name'}{stored}")
    if known.prompt:
        lines.append(f"prompt  {known.prompt}")
    for thing in known.facts.objects:
        box = "" if thing.box is None else " at " + ", ".join(f"{v:.0f}" for v in thing.box)
        lines.append(f"fact    {' '.join([*thing.attributes, thing.name])}{box}")
    lines += [f"fact    caption: {text}" for text in known.facts.captions]
    return "\n".join(lines)


def _pairs(known: Known) -> Iterator[str]:
    for arm, pair in known.pairs.items():
        lines = [f"pair of {arm}", f"  chosen    {pair.chosen}", f"  rejected  {pair.rejected}"]
        for s in pair.segments:
            text = (pair.chosen if s.side == "chosen" else pair.rejected)[s.start : s.end]
            lines.append(f"  {s.label:9} {s.side} {s.start}:{s.end} {text!r}, weight {s.weight:g}")
        lines += [f"  claim     {c.verdict} (p {c.p_yes:.2f}) {c.question}" for c in pair.claims]
        lines += [f"  score     {key} {value:g}" for key, value in pair.scores.items()]
        lines += [f"  origin    {key}: {value}" for key, value in flat(pair.origin)]
        yield "\n".join(lines)
    if known.probe_pair is not None:
        chosen, rejected = known.probe_pair
        yield "\n".join(
            [
                "probe set",
                f"  own       {known.own}",
                f"  chosen    {chosen}",
                f"  rejected  {rejected}",
            ]
        )


def _logged(known: Known) -> Iterator[str]:
    for arm, rows in known.logged.items():
        rows = sorted(rows, key=lambda r: r["step"])
        keys = [k for k in rows[0] if k not in ("arm", "step", "id", "time")]
        kept = _some(rows)
        lines = [f"training, {arm}: seen at {len(rows)} steps"]
        lines.append("  " + "step".rjust(6) + "".join(k.rjust(max(len(k), 9) + 2) for k in keys))
        for row in kept:
            cells = (_number(row.get(k)).rjust(max(len(k), 9) + 2) for k in keys)
            lines.append("  " + str(row["step"]).rjust(6) + "".join(cells))
        yield "\n".join(lines)


def _probes(run: Run, known: Known) -> Iterator[str]:
    """What every probe read of the record, the mean over layers and heads by step."""
    for probe in dict.fromkeys(t.probe for t in run.reading_tables):
        rows = rd.select(run.probe(probe, record=known.id))
        if not rows:
            continue
        lines = [f"probe {probe}: means over layers and heads"]
        # Where a probe gives the mean over layers itself, that is taken.
        whole = {r["metric"] for r in rows if _is_whole(r)}
        rows = [r for r in rows if _is_whole(r) or r["metric"] not in whole]
        pooled = rd.pooled_by(rows, "arm", "metric", "group", "side", "step")
        series: dict[tuple[str, ...], list[str]] = {}
        for (arm, metric, group, side, step), value in pooled.items():
            series.setdefault((arm, metric, group, side), []).append(f"{step}: {value.mean:.3g}")
        for key, values in series.items():
            name = " ".join(part for part in key if part)
            lines.append(f"  {name}  step {', '.join(_some(values))}")
        yield "\n".join(lines)


def _is_whole(row: dict[str, Any]) -> bool:
    return max(row["layer"], row["head"], row["neuron"]) < 0


def _some(values: list[Any]) -> list[Any]:
    """At most ``STEPS`` of the values: the first, the last and some between."""
    if len(values) <= STEPS:
        return values
    return [values[i * (len(values) - 1) // (STEPS - 1)] for i in range(STEPS)]


def _answers(known: Known) -> Iterator[str]:
    for benchmark, by_arm in known.answers.items():
        lines = [f"answers, {benchmark}"]
        for arm, rows in by_arm.items():
            for row in rows:
                asked = "" if row.get("prompt") == known.prompt else f"{row.get('prompt', '')}  "
                lines.append(f"  {arm:9} {asked}{answer_of(row)}")
        yield "\n".join(lines)


def _unknown(index: Index, record_id: str, folder: Path) -> str:
    near = difflib.get_close_matches(record_id, index.by_id, n=3, cutoff=0.4)
    hint = f"Nearest: {', '.join(near)}" if near else f"It knows {len(index.by_id)} records"
    return f"{folder} has no record {record_id!r}. {hint}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if m.is_number(value) else str(value if value is not None else "-")
