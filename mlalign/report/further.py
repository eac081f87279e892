"""Section: every probe that has no section of its own. A new probe file shows up here by itself."""

from __future__ import annotations

from mlalign.report import drift, grounding, neurons, reliance, series
from mlalign.report import figures as fg
from mlalign.report.folder import Run
from mlalign.report.section import Group, Section

SHOWN = frozenset({grounding.PROBE, drift.PROBE, neurons.PROBE, *reliance.PROBES})
NOTE = (
    "Readings over the whole probe set. Bands and brackets are 95 % intervals over records, grey "
    "is the noise floor: the same model read twice. In the tables a change is bold where its "
    "interval leaves out zero and it is more than the floor. A row is drawn when it is chosen."
)


def section(run: Run, figures: fg.Figures) -> Section:
    """One tab per probe: its numbers over the steps, and what it reads by layer."""
    probes = list(dict.fromkeys(t.probe for t in run.reading_tables if t.probe not in SHOWN))
    groups = []
    for probe in probes:
        html = series.block(run, figures, probe)
        html += series.layers(run, figures, probe, "By layer over the steps")
        if html:
            groups.append(Group(name=probe.replace("_", " "), html=html))
    return Section(
        id="further",
        title="Further probes",
        note=NOTE if groups else "",
        groups=tuple(groups),
        empty="" if groups else "no further probes were logged",
    )
