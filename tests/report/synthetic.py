"""A run folder as a run leaves it, of made-up numbers and real microworld scenes. No model."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from mlalign import store
from mlalign.microworld import language, scenes, world
from mlalign.records import Example, Preference, Segment, to_json
from mlalign.runlog import RunLog
from tests.report import readings
from tests.report.readings import Shape

ARMS = ("ha_dpo", "povid", "rlaif_v")
STEPS = 120
HELDOUT = 30
NASTY = 'A <script>alert("x")</script> & </textarea>'
"""Model text that must not reach the page as markup."""

Row = dict[str, Any]


def write_run(folder: Path, *, paired: bool = True, shape: Shape | None = None) -> Path:
    """Write the whole folder; the same for the same arguments."""
    shape = shape or Shape()
    rng = random.Random(7)
    log = RunLog(folder)
    store.write_text_atomic(folder / "recipe.yaml", RECIPE)
    store.write_json_atomic(folder / "manifest.json", MANIFEST)
    store.write_json_atomic(folder / "summary.json", summary(paired))
    heldout = [world.example("heldout", i) for i in range(HELDOUT)]
    store.write_examples(folder / "data" / "heldout", heldout, {"source": "microworld", "seed": 0})
    for number, arm in enumerate(ARMS):
        pairs = [pair(arm, i) for i in range(24)]
        store.write_preferences(folder / "data" / arm, pairs, build_manifest(arm))
        _training(log, arm, number, pairs, rng)
        for step in range(0, STEPS + 1, STEPS // (shape.passes - 1)):
            readings.write(log, arm, number, step, shape)
    _probe_set(folder)
    _evals(folder, heldout, rng)
    log.event(ARMS[0], "resumed", step=60)
    return folder


def false_caption(kind: str, mentions: list[language.Mention]) -> str:
    """The caption with its last object replaced by one that is not there."""
    names = {m.name for m in mentions}
    other = next(n for n in scenes.OBJECTS if n not in names)
    last = mentions[-1]
    return language.caption(
        kind, [*mentions[:-1], language.Mention(last.position, last.color, other)]
    )


def pair(arm: str, index: int) -> Preference:
    """A pair over training scene ``index``; povid's with segments, the others' without."""
    scene = scenes.make_scene("train", index, 0)
    example = world.example("train", index)
    mentions = language.true_mentions(scene)
    chosen, rejected = language.caption(scene.kind, mentions), false_caption(scene.kind, mentions)
    segments: tuple[Segment, ...] = ()
    if arm == "povid":
        at = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        segments = (
            Segment(side="chosen", start=at, end=len(chosen) - 1, label="object"),
            Segment(side="rejected", start=at, end=len(rejected) - 1, label="object"),
        )
    return Preference(
        id=f"{example.id}/{arm}",
        image=example.image,
        image_sha256=example.image_sha256,
        prompt=example.prompt,
        chosen=NASTY if (arm, index) == ("ha_dpo", 0) else chosen,
        rejected=rejected,
        segments=segments,
        scores={"chosen": 0.0, "rejected": -1.0},
        facts=example.facts,
        origin={
            "builder": arm,
            "how": "rule",
            "source": "microworld",
            "example": example.id,
            "seed": 0,
        },
    )


def build_manifest(arm: str) -> Row:
    """What the engine writes beside the pairs."""
    return {
        "builder": arm,
        "records": 40,
        "skipped": {
            "nothing wrong in any sample": {"count": 12, "expected": True, "first_ids": ["a"]},
            "image cannot be read": {"count": 1, "expected": False, "first_ids": ["b"]},
        },
        "equal_mention_share": 0.86,
        "mean_words_chosen": 24.1,
        "mean_words_rejected": 24.3,
    }


def summary(paired: bool) -> Row:
    """Base and three arms: one better, one that lost recall, one that only became timid."""
    before = _side(0.21, 0.44, 0.93, 24.2, 0.81, 0.58, 0.03, 0.62)
    after = {
        "ha_dpo": _side(0.08, 0.17, 0.925, 24.0, 0.88, 0.52, 0.02, 0.63),
        "povid": _side(0.05, 0.10, 0.83, 20.9, 0.85, 0.45, 0.02, 0.66),
        "rlaif_v": _side(0.20, 0.43, 0.931, 24.3, 0.82, 0.57, 0.09, 0.72),
    }
    builders: Row = {arm: {"before": before, "after": side} for arm, side in after.items()}
    for sides in builders.values():
        if paired:
            sides["change"] = _differences(sides["before"], sides["after"])
    return {"seed": 0, "builders": builders}


def _side(
    chair_i: float,
    chair_s: float,
    recall: float,
    length: float,
    accuracy: float,
    yes: float,
    unparsed: float,
    nll: float,
) -> Row:
    values = {
        "halluc/chair_s": (chair_s, 0.06),
        "halluc/chair_i": (chair_i, 0.03),
        "halluc/recall": (recall, 0.015),
        "halluc/length": (length, 0.5),
        "halluc/mentions": (length / 6, 0.1),
        "pope/accuracy": (accuracy, 0.02),
        "pope/f1": (accuracy + 0.01, 0.02),
        "pope/yes_rate": (yes, 0.03),
        "pope/unparsed_rate": (unparsed, 0.01),
        "pope/random/accuracy": (accuracy + 0.05, 0.02),
        "pope/adversarial/accuracy": (accuracy - 0.05, 0.02),
        "lm/clean_caption_nll": (nll, 0.02),
    }
    side: Row = {"n": 200}
    for key, (value, half) in values.items():
        side[key] = value
        side[f"{key}_ci95"] = [value - half, value + half]
        side[f"{key}_n"] = 200
    return side


def _differences(before: Row, after: Row) -> Row:
    made: Row = {}
    for key, value in before.items():
        if not key.endswith(("_ci95", "_n")) and key != "n":
            half = 0.6 * (before[f"{key}_ci95"][1] - value)
            made[key] = after[key] - value
            made[f"{key}_ci95"] = [made[key] - half, made[key] + half]
    return made


def _training(
    log: RunLog, arm: str, number: int, pairs: list[Preference], rng: random.Random
) -> None:
    for step in range(1, STEPS + 1):
        done = 1 - math.exp(-step / (30 + 10 * number))
        margin = 3 * done + rng.gauss(0, 0.25)
        log.metrics(
            arm,
            step,
            {
                "loss": 0.693 * (1 - 0.8 * done) + rng.gauss(0, 0.03),
                "rewards/margins": margin,
                "rewards/accuracies": min(1.0, 0.5 + 0.45 * done + rng.gauss(0, 0.04)),
                "logps/chosen": -30 - 2 * done + rng.gauss(0, 1),
                "logps/rejected": -33 - 20 * done + rng.gauss(0, 1),
                "grad_norm": 2 * math.exp(-done) + rng.random() * 0.3,
            },
        )
        one = pairs[step % len(pairs)]
        row = {"id": one.id, "loss": 0.5, "margin": margin, "chosen_logps": -31.0}
        log.pairs(arm, step, [{**row, "rejected_logps": -40.0, "ref_chosen_logps": -30.0}])


def _probe_set(folder: Path) -> None:
    (folder / "probe_set" / "images").mkdir(parents=True)
    lines = []
    for i in range(6):
        one = pair("ha_dpo", i)
        file = f"images/{one.image_sha256}.png"
        (folder / "probe_set" / file).write_bytes(one.image.read())
        texts = {"own": one.rejected, "chosen": one.chosen, "rejected": one.rejected}
        facts = to_json(one.facts)
        lines.append(
            {"id": one.id, "image": {"path": file}, "prompt": one.prompt, **texts, "facts": facts}
        )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    store.write_text_atomic(folder / "probe_set" / "records.jsonl", text)


def _evals(folder: Path, heldout: list[Example], rng: random.Random) -> None:
    for label in ("base", *ARMS):
        rows = []
        for i, example in enumerate(heldout):
            scene = scenes.make_scene("heldout", i, 0)
            mentions = language.true_mentions(scene)
            wrong = rng.random() < (0.45 if label == "base" else 0.2)
            text = false_caption(scene.kind, mentions) if wrong else example.facts.captions[0]
            gold = sorted(example.facts.names())
            row = {
                "id": example.id,
                "example_id": example.id,
                "prompt": example.prompt,
                "gold": gold,
            }
            rows.append({**row, "meta": {}, "benchmark": "chair", "answer": text})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        store.write_text_atomic(folder / "eval" / f"{label}-chair.jsonl", text)


RECIPE = """\
name: synthetic
seed: 0
model: {path: "builtin:microworld", image: crop}
data:
  source: {name: microworld}
  builders: [{name: ha_dpo}, {name: povid}, {name: rlaif_v}]
  vocabulary: microworld
train: {objective: {name: dpo, beta: 0.1}, learning_rate: 0.0005, batch_size: 16, steps: 120}
"""
MANIFEST = {
    "seed": 0,
    "git": {"revision": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
    "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0"},
    "hardware": {"device": "cpu", "cores": 2},
}
