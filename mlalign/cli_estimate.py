"""``mlalign estimate``: what a step of a recipe costs, from the model's config alone."""

from __future__ import annotations

import json as json_text
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe file (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, e.g. train.micro_batch_size=2")
]
PARTS = ("linear", "attention", "head", "vision", "adapter", "total")


def estimate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    prompt: Annotated[int, typer.Option(help="Tokens of prompt and template.")] = 24,
    completion: Annotated[int, typer.Option(help="Tokens of each completion.")] = 200,
    cached: Annotated[bool, typer.Option(help="Reference log-probs come from a cache.")] = False,
) -> None:
    """Memory and FLOPs of a training step, in closed form; no weights are loaded."""
    from mlalign.recipe import load

    found = facts(load(recipe, overrides or []), prompt, completion, reference_live=not cached)
    if json:
        typer.echo(json_text.dumps(found, indent=1))
    else:
        _print(found)


def facts(recipe: Any, prompt: int, completion: int, *, reference_live: bool) -> dict[str, Any]:
    """Everything that the verb prints: bytes, FLOPs, counts, and what was assumed."""
    from mlalign.estimate import auto, flops, memory, passes
    from mlalign.estimate.geometry import geometry_of
    from mlalign.estimate.plan import plan_of, rows_of
    from mlalign.models.loading import register_towers

    # A tower of this package is known to transformers only once it is registered.
    register_towers()
    geometry = geometry_of(recipe.model)
    rows = rows_of(recipe, geometry, prompt=prompt, completion=completion)
    free = auto.free_bytes(recipe.launch.processes)
    bare = plan_of(recipe, geometry, rows=rows, reference_live=reference_live)
    dropped = auto.holds(geometry, bare, free)
    asked = recipe.train.gradient_checkpointing
    chosen = not dropped if asked == "auto" else bool(asked)
    plan = replace(bare, checkpointing=chosen)
    by_layout = {
        layout: replace(plan, rows=replace(rows, layout=layout)) for layout in ("shared", "padded")
    }
    cost = {layout: flops.step(geometry, each) for layout, each in by_layout.items()}
    mine = flops.step(geometry, plan)
    need = memory.estimate(geometry, plan)
    probed = passes.cost_of(recipe, geometry, rows, mine.total * plan.step_pairs)
    return {
        "model": recipe.model.path,
        "parameters": {
            "total": geometry.parameters,
            "decoder": geometry.decoder.parameters,
            "tower": geometry.tower.parameters,
            "projector": geometry.projector_parameters,
            "trained": memory.trained_parameters(geometry, plan),
        },
        "rows": {**asdict(rows), "tokens": rows.tokens, "image_tokens": geometry.image_tokens},
        "bytes": {**asdict(need), "total": need.total},
        "bytes_total": {
            f"{layout}, checkpointing {'on' if on else 'off'}": memory.estimate(
                geometry, replace(each, checkpointing=on)
            ).total
            for layout, each in by_layout.items()
            for on in (False, True)
        },
        "flops_per_pair": {part: getattr(mine, part) for part in PARTS},
        "flops_per_step": mine.total * plan.step_pairs,
        "probes": _probes(recipe, probed) if probed else {},
        "padded_over_shared": {
            "tokens": by_layout["padded"].rows.tokens / by_layout["shared"].rows.tokens,
            "flops": cost["padded"].total / cost["shared"].total,
        },
        "checkpointing": chosen,
        "auto_checkpointing": not dropped,
        "free_bytes": free,
        "assumed": _assumed(recipe, plan, geometry, prompt, completion),
    }


def _probes(recipe: Any, cost: Any) -> dict[str, Any]:
    """FLOPs of a pass by kind, and the shares of the recipe's own cadence."""
    train, section = recipe.train, recipe.probes
    steps = train.steps
    return {
        "flops": {name: getattr(cost, name) for name in ("common", "rare", "first")},
        "every": section.every,
        "share_between": cost.between,
        "share_of_run": cost.whole(steps, train.save_every) if steps else None,
        "every_for_2_percent": cost.steps_for(0.02),
    }


def _assumed(recipe: Any, plan: Any, geometry: Any, prompt: int, completion: int) -> list[str]:
    rows = plan.rows
    cut = (
        f", cut to {rows.completions[0]} by train.max_length"
        if rows.completions[0] < completion
        else ""
    )
    lines = [
        f"one image of {geometry.image_tokens} tokens (its most), {prompt} of prompt and template, "
        f"completions of {completion}{cut}",
        f"{plan.dtype_bytes}-byte weights and activations (model.dtype: {recipe.model.dtype})",
        "reference computed in every step" if plan.reference_live else "reference cached",
        "the tower runs once for each image; attention's backward is 2.5 times its forward",
        f"{plan.attention} attention; a head in tiles; AdamW",
        "not counted: the framework's own memory, fragmentation, pixels, optimiser arithmetic",
    ]
    if plan.processes > 1:
        lines.append(f"bytes are those of one of {plan.processes} processes of this machine")
    changed = [each.name for each in recipe.data.builders if each.train]
    if changed:
        lines.append(f"train as the recipe has it; these arms change keys: {', '.join(changed)}")
    return lines


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"one training step of {found['model']}", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for part, count in found["parameters"].items():
        table.add_row(f"parameters, {part}", f"{count:,}")
    table.add_section()
    for part, size in found["bytes"].items():
        if size:
            table.add_row(f"memory per process, {part}", _size(size))
    for setting, size in found["bytes_total"].items():
        table.add_row(f"  total if {setting}", _size(size))
    table.add_section()
    for part, count in found["flops_per_pair"].items():
        table.add_row(f"TFLOP per pair, {part}", f"{count / 1e12:.4g}")
    table.add_row("TFLOP per step", f"{found['flops_per_step'] / 1e12:.4g}")
    for name, value in _probe_rows(found["probes"]):
        table.add_row(name, value)
    for kind, ratio in found["padded_over_shared"].items():
        table.add_row(f"padded / shared, {kind}", f"{ratio:.2f}")
    table.add_section()
    table.add_row("free for tensors here", _size(found["free_bytes"]))
    table.add_row("checkpointing in this estimate", _on(found["checkpointing"]))
    table.add_row("checkpointing that auto would choose here", _on(found["auto_checkpointing"]))
    console = Console()
    console.print(table)
    for line in found["assumed"]:
        console.print(f"assumed: {line}", highlight=False)


def _probe_rows(probes: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is printed of the probe passes."""
    if not probes:
        return
    said = {
        "common": "between steps",
        "rare": "of all probes: the last, at checkpoints",
        "first": "the first, base side included",
    }
    for name, count in probes["flops"].items():
        yield f"TFLOP per probe pass, {said[name]}", f"{count / 1e12:.4g}"
    if probes["share_between"] is not None:
        every, share = probes["every"], probes["share_between"]
        yield f"probes, share of the steps at a pass every {every}", f"{share:.2%}"
    if probes["share_of_run"] is not None:
        yield "probes, share of the whole run's steps", f"{probes['share_of_run']:.2%}"
    yield "probes, steps between passes for 2 %", str(probes["every_for_2_percent"])


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _on(value: bool) -> str:
    return "on" if value else "off"
