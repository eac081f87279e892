"""Launch and memory: what the launcher, DeepSpeed or the hardware would refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlalign.recipe import Recipe
from mlalign.train.launch import LaunchError, accumulation, deepspeed_config
from mlalign.validate.findings import Finding, fault, note, split_mend


def launch_faults(recipe: Recipe, where: str) -> list[Finding]:
    """Batch sizes that do not divide, stages that do not fit the rest, files that are missing."""
    launch, model = recipe.launch, recipe.model
    findings = _batches(recipe, where)
    if launch.launcher == "none" and launch.processes > 1:
        problem = f"{launch.processes} processes, but launcher: none starts one"
        findings.append(fault(where, "launch.processes", problem, "Set launcher: deepspeed"))
    if launch.launcher == "none" and launch.offload:
        problem = "true, but launcher: none starts no DeepSpeed"
        findings.append(fault(where, "launch.offload", problem, "Set launcher: deepspeed"))
    if launch.launcher == "deepspeed":
        try:
            deepspeed_config(launch)
        except (OSError, ValueError) as error:
            findings.append(fault(where, "launch.zero", f"no DeepSpeed file for it ({error})"))
    if launch.hostfile is not None and not Path(launch.hostfile).is_file():
        problem, mend = f"{launch.hostfile} does not exist", "See launch/hostfile.example"
        findings.append(fault(where, "launch.hostfile", problem, mend, absent=True))
    if launch.zero == 3 and launch.launcher == "deepspeed" and model.quantize != "none":
        problem = f"3, but {model.quantize} weights load whole on every process"
        findings.append(note(where, "launch.zero", problem, "ZeRO-2 asks for no more memory"))
    return findings + _numbers(recipe, where) + _devices(recipe, where)


def _batches(recipe: Recipe, where: str) -> list[Finding]:
    findings = []
    sizes: dict[tuple[int, int], list[str]] = {}
    for arm in recipe.arms():
        train = recipe.train_of(arm)
        sizes.setdefault((train.batch_size, train.micro_batch_size), []).append(arm)
    for (batch, micro), arms in sizes.items():
        try:
            accumulation(batch, micro, recipe.launch.processes)
        except LaunchError as error:
            problem, mend = split_mend(str(error))
            of = "" if len(sizes) == 1 else f" ({', '.join(arms)})"
            problem = problem.removeprefix("train.batch_size ") + of
            findings.append(fault(where, "train.batch_size", problem, mend))
    return findings


def _numbers(recipe: Recipe, where: str) -> list[Finding]:
    model = recipe.model
    findings = []
    if model.dtype == "float16":
        problem = "float16 would train without loss scaling, and small gradients vanish"
        mend = "Set bfloat16, or float32 where the hardware has none"
        findings.append(fault(where, "model.dtype", problem, mend))
    if model.quantize != "none" and model.adapter == "none":
        problem = f"{model.quantize} weights do not train"
        findings.append(fault(where, "model.quantize", problem, "Give model.adapter, or none here"))
    if model.start_adapter is not None:
        if model.quantize != "none":
            problem = "cannot be merged into a quantised model"
            findings.append(fault(where, "model.start_adapter", problem, "Merge it first"))
        if not (Path(model.start_adapter) / "adapter_config.json").is_file():
            problem = f"{model.start_adapter} holds no adapter_config.json"
            mend = "Give the folder of a PEFT adapter"
            findings.append(fault(where, "model.start_adapter", problem, mend, absent=True))
    return findings


def _devices(recipe: Recipe, where: str) -> list[Finding]:
    import torch

    launch = recipe.launch
    here = torch.cuda.device_count()
    if launch.hostfile is not None or not 0 < here < launch.processes:
        return []
    problem = f"{launch.processes} processes, but this machine has {here} GPU(s)"
    return [note(where, "launch.processes", problem, "Lower it, if you train here")]


def memory(
    recipe: Recipe, config: Any, longest: tuple[int, int, int] | None, where: str
) -> tuple[dict[str, Any] | None, list[Finding]]:
    """Bytes of a step at its highest against what is free here, and what is wrong with that.

    ``longest``: tokens of the longest pair's prefix, chosen and rejected; None assumes lengths.
    The numbers are None where the model cannot be estimated, which a note says.
    """
    import torch

    from mlalign.estimate import auto, geometry
    from mlalign.estimate.memory import estimate
    from mlalign.estimate.plan import plan_of
    from mlalign.estimate.rows import PlanError, Rows

    try:
        shape = geometry.read(config)
        rows = None
        if longest is not None:
            prefix, *completions = longest
            rows = Rows(prefix=prefix, completions=tuple(completions), layout=recipe.train.layout)
        attention = "dense" if recipe.train.attention == "dense" else "split"
        live = recipe.train.reference == "live"
        free = auto.free_bytes(recipe.launch.processes)
        asked = recipe.train.gradient_checkpointing
        settings: dict[str, Any] = {"rows": rows, "reference_live": live, "attention": attention}
        dropped = auto.holds(shape, plan_of(recipe, shape, **settings), free)
        chosen = not dropped if asked == "auto" else bool(asked)
        need = estimate(shape, plan_of(recipe, shape, checkpointing=chosen, **settings))
    except (geometry.GeometryError, PlanError) as error:
        return None, [note(where, "memory", "not estimated: " + str(error))]
    numbers = {
        "peak_bytes": need.total,
        "free_bytes": free,
        "host_bytes": need.host,
        "checkpointing": chosen,
        "assumed_lengths": longest is None,
    }
    if need.total <= free:
        return numbers, []
    problem = f"a step takes {_size(need.total)} at its highest, but {_size(free)} are free here"
    mend = "Lower train.micro_batch_size or train.max_length; `mlalign estimate` has the parts"
    # Without a GPU this is seldom the machine that trains.
    level = fault if torch.cuda.is_available() else note
    return numbers, [level(where, "memory", problem, mend)]


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
