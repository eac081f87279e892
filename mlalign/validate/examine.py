"""All checks of a recipe, one after another; none stops at what another found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlalign import methods
from mlalign._rows import StoreError
from mlalign.branching.layout import LayoutError
from mlalign.models._vlm import VLM
from mlalign.objects import vocabulary
from mlalign.recipe import MethodRef, Recipe
from mlalign.validate.adapter import Group, adapter_faults, groups
from mlalign.validate.findings import Finding, fault, note, split_mend
from mlalign.validate.keys import opened
from mlalign.validate.launching import launch_faults, memory
from mlalign.validate.leakage import leaks
from mlalign.validate.methods import method_faults
from mlalign.validate.model import empty_vlm
from mlalign.validate.pairs import PairsRead, PairsReader
from mlalign.validate.report import report_of
from mlalign.validate.sample import Sample, sample_of
from mlalign.validate.sources import first_records


@dataclass
class Outcome:
    """What was found, and what there is to show."""

    recipe: str
    model: str = ""
    findings: list[Finding] = field(default_factory=list)
    sample: Sample | None = None
    trains: list[Group] = field(default_factory=list)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Data report by arm."""
    memory: dict[str, Any] | None = None

    @property
    def faults(self) -> list[Finding]:
        """What fails the check."""
        return [found for found in self.findings if found.level == "fault"]

    @property
    def notes(self) -> list[Finding]:
        """What does not."""
        return [found for found in self.findings if found.level == "note"]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "recipe": self.recipe,
            "passed": not self.faults,
            "faults": [found.to_json() for found in self.faults],
            "notes": [found.to_json() for found in self.notes],
            "trains": [asdict(group) for group in self.trains],
            "arms": self.reports,
            "memory": self.memory,
            "sample": None if self.sample is None else asdict(self.sample),
        }


def examine(file: Path, overrides: Sequence[str] = (), *, runs: Path = Path("runs")) -> Outcome:
    """Everything that can be found without the model's weights. ``runs``: where run folders lie."""
    keys = opened(file, overrides)
    out = Outcome(recipe=str(file), findings=keys.findings)
    recipe, where = keys.recipe, str(file)
    if recipe is None:
        return out
    out.model = recipe.model.path
    out.findings += method_faults(recipe, where)
    out.findings += _needs(recipe, where)
    out.findings += launch_faults(recipe, where)
    vlm = None
    if "model" not in keys.stood_in:
        vlm, found = empty_vlm(recipe.model, where)
        out.findings += found
    reads: list[PairsRead] = []
    run = runs / recipe.name
    if not keys.stood_in & {"data", "name"}:
        reads = _pairs(recipe, run, vlm, where, out)
        out.findings += leaks(recipe, run, reads, where)
    if vlm is not None:
        _model(recipe, vlm, reads, where, out)
    # A source that several sections name is looked at for each.
    out.findings = list(dict.fromkeys(out.findings))
    return out


def _needs(recipe: Recipe, where: str) -> list[Finding]:
    """What sections ask of each other."""
    findings = []
    mend = "Name one that gives images with facts"
    if recipe.eval.benchmarks and not (recipe.eval.source or recipe.data.source):
        findings.append(fault(where, "eval.source", "benchmarks need it, or data.source", mend))
    if recipe.probes.methods and not (recipe.probes.source or recipe.data.source):
        findings.append(fault(where, "probes.source", "probes need it, or data.source", mend))
    try:
        vocabulary(recipe.data.vocabulary)
    except (OSError, ValueError) as error:
        findings.append(fault(where, "data.vocabulary", *split_mend(str(error))))
    return findings


def _pairs(recipe: Recipe, run: Path, vlm: VLM | None, where: str, out: Outcome) -> list[PairsRead]:
    """Read the pairs of every arm that are here; look at the sources of the others."""
    reads, missing = [], []
    for arm in recipe.arms():
        path = recipe.pairs_of(arm, run)
        if not path.exists():
            ready = isinstance(recipe.data.pairs.get(arm), str)
            if ready:
                key, problem = f"data.pairs.{arm}", f"{path} does not exist"
                mend = "Give a Parquet or JSONL file, or a folder of them"
                out.findings.append(fault(where, key, problem, mend, absent=True))
            else:
                missing.append(arm)
                problem = "not built yet: checked after `mlalign build`"
                out.findings.append(note(where, arm, problem, kind="arms not built yet"))
            continue
        train = recipe.train_of(arm)
        skip = recipe.data.bad_records == "skip"
        reader = PairsReader(arm, vlm, train, objective=_objective(train.objective), skip=skip)
        try:
            reads.append(reader.read(path))
        except StoreError as error:
            out.findings.append(fault(str(path), f"data.pairs.{arm}", str(error)))
            continue
        out.findings += reads[-1].findings
        out.reports[arm] = report_of(reads[-1])
    out.findings += first_records(recipe, run, missing, where)
    return reads


def _objective(ref: MethodRef | None) -> Any:
    """The objective, for what it asks of the pairs; None where there is none, or one at fault."""
    if ref is None:
        return None
    try:
        method = methods.find("mlalign.objectives", ref.name)
        return method(method.Settings(**ref.settings()))
    except (ValueError, AttributeError, TypeError):
        return None


def _model(recipe: Recipe, vlm: VLM, reads: Sequence[PairsRead], where: str, out: Outcome) -> None:
    """Sample, memory, adapter. The adapter last: counting wraps the model."""
    sampled = next((read.sample for read in reads if read.sample is not None), None)
    # An image mode that the family refuses is said once.
    if sampled is not None and not any(found.key == "model.image" for found in out.faults):
        try:
            out.sample = sample_of(vlm, sampled, blank=recipe.train.blank_images)
        except (LayoutError, ValueError) as error:
            out.findings.append(fault(where, "sample", str(error)))
    longest = max((read.longest for read in reads if read.longest), key=sum, default=None)
    out.memory, found = memory(recipe, vlm.core.config, longest, where)
    out.findings += found
    found = adapter_faults(recipe.model.adapter, vlm, where)
    out.findings += found
    out.trains = groups(recipe.model, vlm, bool(found))
