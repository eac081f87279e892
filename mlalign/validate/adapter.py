"""What will train: the modules that the adapter wraps, what it must not wrap, and the counts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mlalign.models._vlm import VLM
from mlalign.models.loading import ModelError, lora_config
from mlalign.sections import LoraSection, ModelSection
from mlalign.validate.findings import Finding, fault, split_mend

_BLOCK = re.compile(r".*\.layers\.\d+\.(?:.*\.)?([a-z_]+)$")


@dataclass
class Group:
    """Modules of one kind."""

    name: str
    """Part of the model, and the kind of module in its blocks."""
    modules: int = 0
    """Linears of the kind."""
    wrapped: int = 0
    """Those that get an adapter."""
    trained: int = 0
    """Parameters that the optimiser steps, adapters included."""
    total: int = 0
    """Parameters of the model itself."""


def adapter_faults(section: LoraSection | str, vlm: VLM, where: str) -> list[Finding]:
    """Targets that hit nothing or leave the language model, and modules that do not exist."""
    if not isinstance(section, LoraSection):
        return []
    findings = _unknown_modules(section, vlm, where)
    try:
        hit = targeted(section, vlm)
    except re.error as error:
        problem = f"{section.targets!r} is no regular expression ({error})"
        return [*findings, fault(where, "model.adapter.targets", problem)]
    strays: dict[str, list[str]] = {}
    for name in hit:
        if vlm.family.language_model not in name.split("."):
            strays.setdefault(part_of(name, vlm), []).append(name)
    for part, names in strays.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        problem = f"{section.targets!r} leaves the language model: {part}, {names[0]}{more}"
        mend = "Narrow it; name the projector in modules_to_save; the tower is frozen"
        findings.append(fault(where, "model.adapter.targets", problem, mend))
    if not findings:
        try:
            lora_config(section, vlm)
        except ModelError as error:
            key, _, rest = str(error).partition(": ")
            findings.append(fault(where, key, *split_mend(rest)))
    return findings


def targeted(section: LoraSection, vlm: VLM) -> list[str]:
    """Names of the linears that the targets match. Raises re.error."""
    pattern = re.compile(section.targets or vlm.family.lora_targets(vlm.core))
    linears = (n for n, m in vlm.core.named_modules() if isinstance(m, nn.Linear))
    return [name for name in linears if pattern.fullmatch(name)]


def part_of(name: str, vlm: VLM) -> str:
    """The part of the model that a module or parameter belongs to."""
    parts = name.split(".")
    known = (*vlm.family.towers, vlm.family.language_model)
    inner = next((each for each in known if each in parts), None)
    if inner is not None:
        return inner
    return next((part for part in parts if part not in ("model", "base_model")), name)


def groups(section: ModelSection, vlm: VLM, faulty: bool) -> list[Group]:
    """The model's modules by part and kind, with what trains; ``faulty``: nothing is known of that.

    Counts are read off the model that PEFT wraps, on the meta device. The vlm's model is wrapped.
    """
    core = vlm.core
    found: dict[str, Group] = {}
    for name, module in core.named_modules():
        if isinstance(module, nn.Linear):
            _group(found, name, vlm).modules += 1
    for name, parameter in core.named_parameters():
        _group(found, name.rpartition(".")[0], vlm).total += parameter.numel()
    if isinstance(section.adapter, LoraSection):
        try:
            hit = targeted(section.adapter, vlm)
        except re.error:
            hit = []
        for name in hit:
            _group(found, name, vlm).wrapped += 1
    if not faulty:
        for name, count in _trained(section, vlm):
            _group(found, name, vlm).trained += count
    return sorted(found.values(), key=lambda group: _order(group.name, vlm))


def _trained(section: ModelSection, vlm: VLM) -> list[tuple[str, int]]:
    """(module, parameters) of everything that has a gradient in training."""
    core = vlm.core
    if not isinstance(section.adapter, LoraSection):
        # As in training: the tower sees no preference and stays as it was.
        vlm.family.frozen_towers(core)[0].requires_grad_(False)
        parameters = [(n, p) for n, p in core.named_parameters() if p.requires_grad]
        return [(name.rpartition(".")[0], p.numel()) for name, p in parameters]
    from peft import get_peft_model

    wrapped: Any = get_peft_model(core, lora_config(section.adapter, vlm))
    found = []
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            module = name.removeprefix("base_model.model.").rpartition(".")[0]
            module = re.split(r"\.(?:lora_\w+|modules_to_save)(?:\.|$)", module)[0]
            found.append((module, parameter.numel()))
    return found


def _group(found: dict[str, Group], module: str, vlm: VLM) -> Group:
    name = part_of(module, vlm)
    if name == vlm.family.language_model:
        inside = _BLOCK.match(module)
        last = module.rpartition(".")[2]
        kind = inside.group(1) if inside else last
        name = f"{name} {'norms' if 'norm' in kind else kind}"
    return found.setdefault(name, Group(name=name))


def _order(name: str, vlm: VLM) -> tuple[int, str]:
    """Tower, projector, language model, and what is left."""
    known = (*vlm.family.towers, vlm.family.language_model)
    part = name.partition(" ")[0]
    return (known.index(part) if part in known else len(known), "")


def _unknown_modules(section: LoraSection, vlm: VLM, where: str) -> list[Finding]:
    import difflib

    names = [name for name, _ in vlm.core.named_modules() if name]
    lasts = sorted({name.rpartition(".")[2] for name in names})
    findings = []
    for wanted in section.modules_to_save:
        # As PEFT finds them; one that is not there it passes over without a word.
        if any(name == wanted or name.endswith(f".{wanted}") for name in names):
            continue
        near = difflib.get_close_matches(wanted.rpartition(".")[2], lasts, n=1)
        mend = f"Did you mean {near[0]!r}?" if near else "Give a module's name"
        problem = f"{vlm.name} has no module {wanted!r}"
        findings.append(fault(where, "model.adapter.modules_to_save", problem, mend))
    return findings


def totals(table: Sequence[Group]) -> Group:
    """The sum over groups."""
    return Group(
        name="total",
        modules=sum(group.modules for group in table),
        wrapped=sum(group.wrapped for group in table),
        trained=sum(group.trained for group in table),
        total=sum(group.total for group in table),
    )
