"""The report: one self-contained HTML file that opens without a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from mlalign.report import (
    builds,
    concepts,
    curves,
    drift,
    further,
    gallery,
    grounding,
    neurons,
    provenance,
    reliance,
    results,
    rewards,
    verdict,
)
from mlalign.report import figures as fg
from mlalign.report.folder import Run
from mlalign.report.section import Section, render
from mlalign.store import write_text_atomic

SECTIONS: tuple[Callable[[Run, fg.Figures], Section | None], ...] = (
    results.section,
    curves.section,
    rewards.section,
    reliance.section,
    grounding.section,
    drift.section,
    neurons.section,
    concepts.section,
    further.section,
    gallery.answers_section,
    gallery.looks_section,
    gallery.pairs_section,
    builds.section,
    provenance.section,
)
SCRIPTS = (
    "page.js",
    "grids.js",
    "headmap.js",
    "layermap.js",
    "series.js",
    "tables.js",
    "concepts.js",
    "start.js",
)
"""In this order: the first defines what the others use, the last starts them."""


def write(run_folder: Path, out: Path | None = None) -> Path:
    """Write ``out``, by default ``report.html`` in the run folder; returns its path.

    Whatever the folder does not hold is named in one line where it would stand. Raises
    NoRunFolder where there is no such folder.
    """
    target = Path(out or Path(run_folder) / "report.html")
    write_text_atomic(target, html(Run(Path(run_folder))))
    return target


def html(run: Run) -> str:
    """The whole page as text."""
    figures = fg.Figures()
    found = verdict.verdicts(run.summary)
    sections = [made for make in SECTIONS if (made := make(run, figures)) is not None]
    model = (run.recipe.get("model") or {}).get("path", "")
    objective = name_of((run.recipe.get("train") or {}).get("objective"))
    name = run.recipe.get("name") or run.folder.resolve().name
    return whole_page(
        heading=" \u00b7 ".join(part for part in (f"mlalign run {name}", model, objective) if part),
        title=name,
        headline=verdict.headline(found),
        banners=_banners(run),
        sections=sections,
        verdicts=[
            {
                "arm": v.arm,
                "colour": fg.colour(run.arms.index(v.arm)),
                "sentence": v.sentence,
                "warnings": v.warnings,
            }
            for v in found
        ],
    )


def whole_page(
    *,
    heading: str,
    headline: str,
    banners: Sequence[str],
    sections: Sequence[Section],
    title: str = "",
    verdicts: Sequence[dict[str, Any]] = (),
) -> str:
    """Sections as one self-contained HTML file, with the scripts that draw them."""
    return render(
        "page.html.j2",
        title=title or heading,
        heading=heading,
        headline=headline,
        banners=banners,
        verdicts=verdicts,
        sections=sections,
        style=Markup(_asset("style.css")),
        figure_style=fg.shared(),
        script=Markup("\n".join(_asset(name) for name in SCRIPTS)),
        plotly=Markup(get_plotlyjs()),
    )


def _banners(run: Run) -> list[str]:
    texts = []
    if (run.recipe.get("train") or {}).get("blank_images"):
        texts.append(
            "This run trained on blank images. It is the control: what it gains, it gains "
            "without looking."
        )
    if (run.recipe.get("model") or {}).get("path") == "builtin:microworld":
        texts.append(
            "Microworld is a small model of rendered scenes, made for quick checks. Its figures "
            "say nothing about a real model."
        )
    return texts + rewards.warnings(run)


def name_of(ref: Any) -> str:
    """The name of a method as a recipe gives it: alone, or with its settings."""
    return str(ref.get("name", "")) if isinstance(ref, dict) else str(ref or "")


def _asset(name: str) -> str:
    return (resources.files("mlalign.report") / "assets" / name).read_text(encoding="utf-8")
