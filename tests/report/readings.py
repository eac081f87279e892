"""Made-up probe readings of a run, with a planted truth: what a page shows can be worked out."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlalign.microworld import world
from mlalign.runlog import RunLog

Row = dict[str, Any]

BY_HEAD = (
    ("image_mass", "real", 0.3, 0.15),
    ("image_mass", "absent", 0.15, 0.02),
    ("image_mass", "response", 0.2, 0.05),
    ("box_lift", "real", 1.4, 1.1),
)
"""(metric, group, base, what training adds to the base by the last step)."""
OTHERS = ("image_mass_no_first", "entropy", "row_entropy", "sink_first", "sink_image")
GRID = 7
STEPS = 120


@dataclass(frozen=True)
class Shape:
    """Of the model and of its training."""

    layers: int = 4
    heads: int = 8
    passes: int = 5
    every_metric: bool = False
    """All twenty maps of heads instead of four."""

    def by_head(self) -> list[tuple[str, str, float, float]]:
        """Maps of heads that the probe reads."""
        more = [(m, g, 0.4, 0.1) for m in OTHERS for g in ("real", "absent", "response")]
        return [*BY_HEAD, *(more if self.every_metric else []), ("box_share", "real", 0.2, 0.1)]


def write(log: RunLog, arm: str, number: int, step: int, shape: Shape) -> None:
    """All tables of one pass."""
    rng = random.Random(100 * number + step)
    log.probe(arm, step, "attention_grounding", _grounding(step, shape))
    log.probe(arm, step, "neuron_drift", _drift(step, shape))
    log.probe(arm, step, "image_reliance", _reliance(step, number))
    log.probe(arm, step, "brand_new", _brand_new(step, shape))
    log.probe(arm, step, "top_drifted", _top(step))
    log.probe(arm, step, "neurons", _neurons(step, shape))
    log.probe(arm, step, "attention_maps", _maps(rng))
    if step in (0, STEPS):
        log.probe(arm, step, "attention_knockout", _knockout(step))
        log.probe(arm, step, "lens_words", _lens(shape, words=True))
        log.probe(arm, step, "lens_maps", _lens(shape, words=False))


def head_value(base: float, gain: float, layer: int, head: int, step: int) -> tuple[float, float]:
    """Base and change of one head: later layers and heads gain more."""
    return base * (1 + 0.1 * layer + 0.01 * head), gain * step / STEPS * (layer + 1) / (head + 1)


def _row(step: int, probe: str, metric: str, side: str, value: float, **more: Any) -> Row:
    fixed = {"step": step, "probe": probe, "metric": metric, "side": side, "n": 40}
    return {**fixed, "value": value, **more}


def _sides(
    step: int, probe: str, metric: str, base: float, change: float, **more: Any
) -> Iterator[Row]:
    """Base, adapted and change with intervals, and the floor beside the change."""
    for side, value in (("base", base), ("adapted", base + change), ("delta", change)):
        ends = {"lo": value - 0.03, "hi": value + 0.04}
        noise = 0.004 if side == "delta" else math.nan
        yield _row(step, probe, metric, side, value, **ends, noise=noise, **more)


def _grounding(step: int, shape: Shape) -> Iterator[Row]:
    name = "attention_grounding"
    for metric, group, base, gain in shape.by_head():
        yield from _sides(step, name, metric, base, gain * step / STEPS, group=group)
        for layer in range(shape.layers):
            for head in range(shape.heads):
                at, change = head_value(base, gain, layer, head, step)
                more = {"group": group, "layer": layer, "head": head}
                yield _row(step, name, metric, "base", at, **more)
                yield _row(step, name, metric, "adapted", at + change, **more)
                yield _row(step, name, metric, "delta", change, noise=0.002, **more)
            for i in range(6):
                at, change = head_value(base, gain, layer, i, step)
                more = {"group": group, "layer": layer, "record": f"microworld-train-{i}/ha_dpo"}
                yield _row(step, name, metric, "base", at, **more)
                yield _row(step, name, metric, "adapted", at + change, **more)


def _drift(step: int, shape: Shape) -> Iterator[Row]:
    done = step / STEPS
    for group, size in (("image", 0.3), ("prompt", 0.6), ("response", 1.0)):
        for metric, most in (("rms", 0.4), ("offset", 0.1), ("firing_rate_change", 0.05)):
            for layer in range(-1, shape.layers):
                value = most * size * done * (0.5 + 0.2 * layer) + 0.002
                ends = {"lo": 0.9 * value, "hi": 1.1 * value, "noise": 0.003}
                more = {"layer": layer, "group": group, **ends}
                yield _row(step, "neuron_drift", metric, "delta", value, **more)
        for layer in range(shape.layers):
            more = {"layer": layer, "group": group, "noise": 1.0}
            value = 1 - 0.1 * size * done * layer / shape.layers
            yield _row(step, "neuron_drift", "cka", "delta", value, **more)
    for layer in range(shape.layers):
        for place, module in enumerate(("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")):
            for metric, most in (("lora_norm", 0.05), ("lora_effective_rank", 9.0)):
                value = most * done * (1 + layer) / (1 + place)
                more = {"layer": layer, "group": module}
                yield _row(step, "neuron_drift", metric, "delta", value, **more)


def _reliance(step: int, number: int) -> Iterator[Row]:
    done, name = step / STEPS, "image_reliance"
    for view in ("blank_per_token", "swapped_per_token"):
        for group in ("own", "chosen", "rejected"):
            yield from _sides(step, name, view, 0.8, 0.2 * done * (1 - number), group=group)
    for metric, side, at in (
        ("preferred", "adapted", 0.5 + 0.4 * done),
        ("kept_blank", "delta", 0.9 - 0.3 * done),
        ("kept_swapped", "delta", 0.8 - 0.3 * done),
    ):
        if side == "adapted" or step:
            yield _row(step, name, metric, side, at, lo=at - 0.1, hi=min(at + 0.1, 1.0))


def _knockout(step: int) -> Iterator[Row]:
    for place, block in enumerate(("early", "middle", "late", "all")):
        metric = f"drop_{block}_per_token"
        more = {"group": "chosen"}
        yield from _sides(step, "attention_knockout", metric, 0.2 + 0.1 * place, 0.1, **more)


def _brand_new(step: int, shape: Shape) -> Iterator[Row]:
    """A probe that the report does not know: numbers, by layer, by head, and one not a number."""
    name = "brand_new"
    yield from _sides(step, name, "novelty", 1.0, 0.5 * step / STEPS)
    yield _row(step, name, "of_the_pair", "delta", 0.1, noise=0.02)
    yield _row(step, name, "undefined", "base", math.nan, n=0)
    for layer in range(shape.layers):
        yield from _sides(step, name, "novelty", 1.0 + layer, 0.1 * step / STEPS, layer=layer)
        for head in range(shape.heads):
            more = {"layer": layer, "head": head, "lo": -1.0, "hi": 1.0}
            yield _row(step, name, "pattern", "delta", 0.01 * head, **more)


def _top(step: int) -> Iterator[Row]:
    for metric, value in (("top_kept_last", 0.6), ("top_kept_last_random", 0.01)):
        yield _row(step, "top_drifted", metric, "delta", value, lo=value / 2, hi=2 * value)


def _neurons(step: int, shape: Shape) -> Iterator[Row]:
    """Neuron 7 of layer 1 leads in every pass; the others change from pass to pass."""
    for rank in range(24 if step else 0):
        layer, neuron = (1, 7) if rank == 0 else (rank % shape.layers, 100 + rank + step)
        yield {
            "step": step,
            "rank": rank,
            "layer": layer,
            "neuron": neuron,
            "score": (1.0 - 0.03 * rank) * step / STEPS,
            "relative": 0.5 / (1 + rank),
            "noise": 0.001,
            "written": ["dog", " dogs", " "] if rank == 0 else [f"w{rank}", "<b>", "red"],
        }


def _lens(shape: Shape, *, words: bool) -> Iterator[Row]:
    for i in range(3):
        example = world.example("train", i)
        name = example.facts.objects[0].name
        for side in ("base", "adapted"):
            for layer in (shape.layers // 2, shape.layers - 1):
                row: Row = {"record": f"{example.id}/ha_dpo", "side": side, "layer": layer}
                row |= {"grid_rows": GRID, "grid_cols": GRID}
                odd = [k for k in range(GRID * GRID) if k % 2]
                # The aligned model reads the object at every second patch, the base at every sixth.
                here = set(odd if side == "adapted" else odd[::3])
                p = [0.9 if k in here else 0.1 for k in range(GRID * GRID)]
                if words:
                    said = [name if k in here else "sky" for k in range(GRID * GRID)]
                    yield {**row, "words": said, "values": p}
                else:
                    yield {**row, "word": name, "real": True, "values": p}
                    yield {**row, "word": "unicorn", "real": False, "values": [0.01] * len(p)}


def _maps(rng: random.Random) -> Iterator[Row]:
    for i in range(6):
        example = world.example("train", i)
        for name, real in ((example.facts.objects[0].name, True), ("unicorn", False)):
            for side in ("base", "adapted"):
                yield {
                    "record": f"{example.id}/ha_dpo",
                    "side": side,
                    "completion": "own",
                    "word": name,
                    "start": 0,
                    "end": len(name),
                    "real": real,
                    "grid_rows": GRID,
                    "grid_cols": GRID,
                    "values": [rng.random() ** 6 * 0.05 for _ in range(GRID * GRID)],
                }
