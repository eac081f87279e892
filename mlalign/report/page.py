"""The report: one self-contained HTML file that opens without a network."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from mlalign.report import (
    builds,
    curves,
    drift,
    gallery,
    grounding,
    provenance,
    reliance,
    results,
    verdict,
)
from mlalign.report import figures as fg
from mlalign.report.folder import Run
from mlalign.report.section import Section, render
from mlalign.store import write_text_atomic

SECTIONS: tuple[Callable[[Run, fg.Figures], Section], ...] = (
    results.section,
    curves.section,
    grounding.section,
    drift.section,
    reliance.section,
    gallery.answers_section,
    gallery.looks_section,
    gallery.pairs_section,
    builds.section,
    provenance.section,
)


def write(run_folder: Path) -> Path:
    """Write ``report.html`` into the run folder; returns its path.

    Whatever the folder does not hold is named in one line where it would stand. Raises
    NoRunFolder where there is no such folder.
    """
    target = Path(run_folder) / "report.html"
    write_text_atomic(target, html(Run(Path(run_folder))))
    return target


def html(run: Run) -> str:
    """The whole page as text."""
    figures = fg.Figures()
    found = verdict.verdicts(run.summary)
    sections = [make(run, figures) for make in SECTIONS]
    return render(
        "page.html.j2",
        name=run.recipe.get("name") or run.folder.resolve().name,
        model=(run.recipe.get("model") or {}).get("path", ""),
        objective=_name((run.recipe.get("train") or {}).get("objective")),
        headline=verdict.headline(found),
        banners=_banners(run),
        verdicts=[
            {
                "arm": v.arm,
                "colour": fg.colour(run.arms.index(v.arm)),
                "sentence": v.sentence,
                "warnings": v.warnings,
            }
            for v in found
        ],
        sections=sections,
        style=Markup(_asset("style.css")),
        script=Markup(_asset("page.js")),
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
    return texts


def _name(ref: Any) -> str:
    return str(ref.get("name", "")) if isinstance(ref, dict) else str(ref or "")


def _asset(name: str) -> str:
    return (resources.files("mlalign.report") / "assets" / name).read_text(encoding="utf-8")
