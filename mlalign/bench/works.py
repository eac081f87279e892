"""What is measured: each work gives rows, one for each opponent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mlalign.bench import dpo, grpo
from mlalign.bench.asking import Asking
from mlalign.bench.peak import measure
from mlalign.bench.rounds import Row, alternate, row_of
from mlalign.bench.setting import Setting, new_vlm
from mlalign.bench.side import compare, steps
from mlalign.estimate import flops
from mlalign.estimate.geometry import Geometry, read
from mlalign.estimate.plan import Plan, adapter_of
from mlalign.estimate.rows import Rows
from mlalign.sections import LoraSection

QUESTION_TOKENS = 20
"""Of a question, template included."""


def dpo_rows(name: str, setting: Setting, cached: bool, rounds: int) -> list[Row]:
    """A DPO step against stock TRL and against the padded pair."""
    made = dpo.sides(setting, cached)
    ours = made["shared"]
    assert isinstance(ours, dpo.Ours)
    pairs = [(len(p.prefix), (len(p.chosen), len(p.rejected))) for p in ours.tokenised]
    top = ceiling(setting, read(ours.trainer.vlm.core.config), pairs, not cached)
    return _step_rows(name, made, top, rounds)


def grpo_rows(name: str, setting: Setting, beta: float, rounds: int) -> list[Row]:
    """The loss step of a group against stock TRL and against one row per completion."""
    made = grpo.sides(setting, beta)
    ours = made["shared"]
    lengths = tuple(map(len, ours.group.completions))
    top = ceiling(
        setting, read(ours.trainer.vlm.core.config), [(setting.prefix, lengths)], beta > 0
    )
    return _step_rows(name, made, top, rounds)


def _step_rows(name: str, made: dict[str, Any], top: float, rounds: int) -> list[Row]:
    """Rows of sides "shared", "stock" and "padded"; ``top``: the ceiling over padded."""
    ours = made["shared"]
    apart = {each: compare(ours, made[each]) for each in ("stock", "padded")}
    margin = ours.margin()
    seconds = alternate(steps(made), rounds, name)
    return [
        row_of(
            name,
            each,
            seconds["shared"],
            seconds[each],
            margin=margin,
            ceiling=top if each == "padded" else None,
            **apart[each],
        )
        for each in ("stock", "padded")
    ]


def ceiling(
    setting: Setting,
    geometry: Geometry,
    groups: Sequence[tuple[int, tuple[int, ...]]],
    live: bool,
) -> float:
    """Closed-form FLOPs of the padded step over the shared one.

    ``groups``: tokens of each prefix, and of the completions behind it. ``live``: whether a
    reference pass is part of the step.
    """
    tiles = 5 if setting.image == "llava_next" else 1
    adapter = adapter_of(LoraSection(rank=setting.rank), geometry.decoder)
    # Stock pads all completions of a batch to the longest one; so does the padded batch.
    longest = max(max(own) for _, own in groups)
    total = {"shared": 0.0, "padded": 0.0}
    for prefix, own in groups:
        shapes = {
            "shared": Rows(prefix=prefix, completions=own, tiles=tiles),
            "padded": Rows(
                prefix=prefix, completions=(longest,) * len(own), layout="padded", tiles=tiles
            ),
        }
        for layout, rows in shapes.items():
            plan = Plan(
                rows=rows,
                adapter=adapter,
                checkpointing=setting.checkpointing,
                reference_live=live,
                attention="split" if layout == "shared" else "causal",
            )
            step = flops.step(geometry, plan)
            if layout == "padded":
                # The head runs at real tokens only, in both.
                step = replace(step, head=step.head * sum(own) / (len(own) * longest))
            total[layout] += step.total
    return total["padded"] / total["shared"]


def asking_rows(name: str, setting: Setting, count: int, rounds: int) -> list[Row]:
    """Questions on one image against one at a time, padded batches and a copied cache."""
    asked = Asking(setting, count, QUESTION_TOKENS)
    sides = asked.sides()
    found = {each: call() for each, call in sides.items()}
    apart = {each: float((v - found["shared"]).abs().max()) for each, v in found.items()}
    geometry = read(asked.vlm.core.config)
    own = tuple(map(len, asked.branches))
    rows = Rows(prefix=len(asked.prefix), completions=own)
    pair = [
        flops.forward(geometry, each) for each in (rows, replace(rows, layout="padded"))
    ]  # one head position a question, which both count as all of them: left out
    shared, padded = (each.linear + each.attention for each in pair)
    tower = flops.vision(geometry).total
    seconds = alternate(sides, rounds, name)
    return [
        row_of(
            name,
            each,
            seconds["shared"],
            seconds[each],
            logps_max_abs_diff=apart[each],
            ceiling=(padded + tower) / (shared + tower) if each == "padded" else None,
        )
        for each in ("single", "padded", "copied")
    ]


def memory_rows(name: str, setting: Setting) -> list[Row]:
    """Peak memory of a step; the seconds are not measured here."""
    peaks = {side: measure(side, setting) for side in dpo.SIDES}
    nothing = float("nan")
    return [
        Row(
            work=name,
            opponent=side,
            ratio_median=nothing,
            ratio_min=nothing,
            ratio_max=nothing,
            ours_seconds=nothing,
            opponent_seconds=nothing,
            peak_memory_ratio=peaks["shared"] / peaks[side],
        )
        for side in ("stock", "padded")
    ]


def vision_share(setting: Setting) -> float:
    """Forward FLOPs of the tower and projector over those of the language model's shared row."""
    geometry = read(new_vlm(setting).core.config)
    rows = Rows(prefix=setting.prefix, completions=setting.completions)
    tiles = 5 if setting.image == "llava_next" else 1
    return flops.vision(geometry, tiles).total / flops.forward(geometry, rows).total


def works(base: Setting) -> dict[str, Callable[[int], list[Row]]]:
    """Name -> call with the number of rounds."""
    live = partial(dpo_rows, cached=False)
    next_tiles = base.at(image="llava_next", prefix=2900)
    made: dict[str, Callable[[int], list[Row]]] = {
        "dpo-cached": lambda n: dpo_rows("dpo-cached", base, True, n),
        "dpo-live": lambda n: live("dpo-live", base, rounds=n),
        "dpo-ragged": lambda n: live(
            "dpo-ragged", base.at(completions=(50, 150), pairs=2), rounds=n
        ),
        "dpo-400": lambda n: live("dpo-400", base.at(completions=(400, 400)), rounds=n),
        "dpo-next": lambda n: live("dpo-next", next_tiles, rounds=n),
        "grpo": lambda n: grpo_rows("grpo", base, 0.0, n),
        "grpo-kl": lambda n: grpo_rows("grpo-kl", base, grpo.KL, n),
        "judge": lambda n: asking_rows("judge", base, 30, n),
        "pope": lambda n: asking_rows("pope", base, 18, n),
        "memory": lambda n: memory_rows("memory", base),
    }
    return made
