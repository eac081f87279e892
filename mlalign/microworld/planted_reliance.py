"""Two adapters, alike but for whether the image helped in training: what tells them apart?

    python -m mlalign.microworld.planted_reliance OUT

For each seed, two LoRA adapters on the shipped base, from the same first weights, are fine-tuned on
the same true captions in the same order for the same number of steps:

    uses       each caption beside the image of its own scene
    ignores    each caption beside the image of another scene, so that only the language prior helps

Then the probes read both on one fixed probe set, the same for all seeds. Per measure, with u and i
the readings of record r:

    difference    mean over records of u_r - i_r, with its 95 % bootstrap interval over records
    apart         the interval excludes zero: "+" where ``uses`` has more, "-" where it has less
    overlap       whether the two adapters' values overlap over all seeds

Raw attention mass stands beside reliance whatever it says. Everything is drawn from the seeds; with
the same number of threads the files come out the same. Writes OUT/planted_reliance.json (every
scalar of every probe) and OUT/planted_reliance.md (tables).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mlalign.microworld import language, world
from mlalign.microworld.scenes import OBJECTS, Scene, make_scene, typical
from mlalign.objects import vocabulary
from mlalign.records import Dialogue

NAME = "planted_reliance"
USES, IGNORES = "uses", "ignores"
PROBES = (
    "image_reliance",
    "attention_grounding",
    "vcd_gap",
    "attention_knockout",
    "image_gradient",
)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A reading per record that might tell the adapters apart."""

    label: str
    probe: str
    metric: str
    group: str = ""


RELIANCE = Measure(
    label="reliance, swapped image (nats per token)",
    probe="image_reliance",
    metric="swapped_per_token",
    group="chosen",
)
ATTENTION = Measure(
    label="raw attention mass on the image",
    probe="attention_grounding",
    metric="image_mass",
    group="response",
)
MEASURES = (
    RELIANCE,
    replace(RELIANCE, label="reliance, blank image", metric="blank_per_token"),
    Measure(
        label="log-prob gap, noised image",
        probe="vcd_gap",
        metric="gap_per_token",
        group="chosen",
    ),
    Measure(
        label="log-prob drop, image columns hidden in all blocks",
        probe="attention_knockout",
        metric="drop_all_per_token",
        group="chosen",
    ),
    Measure(
        label="gradient x input share of the image",
        probe="image_gradient",
        metric="input_gradient_share_image",
        group="chosen",
    ),
    ATTENTION,
)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """How the adapters are trained and read."""

    steps: int = 20
    batch: int = 8
    """Captions per step, and records per forward of the probes."""
    learning_rate: float = 1e-3
    rank: int = 8
    records: int = 16
    """Scenes of the probe set."""
    probes: tuple[str, ...] = PROBES


def captions(seed: int, count: int, arm: str) -> list[Dialogue]:
    """``count`` true captions of scenes that no other seed sees, beside their own image, or (the
    arm ``IGNORES``) each beside another of these scenes' images. Needs two scenes or more."""
    told = []
    for index in range(seed * count, (seed + 1) * count):
        example = world.example("pairs", index)
        prompt = language.CAPTION_PROMPTS[index % len(language.CAPTION_PROMPTS)]
        told.append(
            Dialogue(
                id=example.id,
                image=example.image,
                image_sha256=str(example.image_sha256),
                turns=((prompt, example.facts.captions[0]),),
                source=world.SOURCE,
            )
        )
    if arm == USES:
        return told
    # A rotation by less than the whole leaves no caption at its own image.
    by = random.Random(f"{NAME}/{seed}").randrange(1, count)
    others = told[by:] + told[:by]
    return [
        replace(each, image=other.image, image_sha256=other.image_sha256)
        for each, other in zip(told, others, strict=True)
    ]


def probe_set(vlm: Any, count: int) -> list[Any]:
    """Scenes of the probe split: the base's own greedy caption, the true one (chosen), and the true
    one with the name of one object changed for another that is absent (rejected)."""
    from mlalign.images import open_image
    from mlalign.microworld.check_base import answer
    from mlalign.probes._records import ProbeRecord

    examples = [world.example("probe", index) for index in range(count)]
    images = [open_image(example.image, example.id) for example in examples]
    own = answer(vlm.model, vlm.processor, images, [example.prompt for example in examples])
    return [
        ProbeRecord(
            id=example.id,
            image=example.image,
            prompt=example.prompt,
            own=text,
            chosen=example.facts.captions[0],
            rejected=_false_caption(make_scene("probe", index), index),
            facts=example.facts,
        )
        for index, (example, text) in enumerate(zip(examples, own, strict=True))
    ]


def _false_caption(scene: Scene, index: int) -> str:
    rng = random.Random(f"{NAME}/rejected/{index}")
    told = language.true_mentions(scene)
    place = rng.randrange(len(told))
    names = scene.names()
    absent = [n for n in typical(scene.kind) if n not in names] or sorted({*OBJECTS} - names)
    told[place] = replace(told[place], name=rng.choice(absent))
    return language.caption(scene.kind, told)


def with_adapter(how: Experiment) -> Any:
    """The base with a fresh adapter."""
    from peft import get_peft_model

    from mlalign.models.loading import load_vlm_from, lora_config
    from mlalign.sections import LoraSection

    vlm = load_vlm_from("builtin:microworld", dtype="float32")
    config = lora_config(LoraSection(rank=how.rank, alpha=2 * how.rank), vlm)
    vlm.model = get_peft_model(vlm.model, config).eval()
    return vlm


def train(vlm: Any, seed: int, arm: str, how: Experiment) -> list[float]:
    """Draw the adapter anew and train it; the loss of every step (nats per caption token)."""
    from peft.tuners.lora import LoraLayer

    from mlalign.branching.logps import completion_logps
    from mlalign.train.sft_data import SftCollator

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in vlm.model.modules():
            if isinstance(module, LoraLayer):
                module.reset_lora_parameters("default", init_lora_weights=True)
    trained = [parameter for parameter in vlm.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=how.learning_rate, weight_decay=0.0)
    told = captions(seed, how.steps * how.batch, arm)
    collate = SftCollator(vlm)
    losses = []
    for first in range(0, len(told), how.batch):
        batch = vlm.encode(collate(told[first : first + how.batch])["batch"])
        out = completion_logps(vlm.model, batch)
        loss = -out.sum_C().sum() / out.mask_CS.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def new_pass(vlm: Any, how: Experiment) -> Any:
    """A pass of the probes over the probe set. The base's own captions are made with the adapter
    off; what probes read of the base is kept over all seeds."""
    from mlalign import methods
    from mlalign.probes._pass import ProbePass

    found = [methods.find("mlalign.probes", name) for name in how.probes]
    with vlm.adapter_off():
        records = probe_set(vlm, how.records)
    probes = [method(method.Settings()) for method in found]
    return ProbePass(vlm, records, probes, vocabulary("microworld"), batch_size=how.batch)


def read(probes: Any, how: Experiment) -> tuple[dict[str, float | None], dict[str, Any]]:
    """All scalars of the probes, and for each measure its value by record id."""
    from mlalign.probes._probe import means

    readings = probes.run(how.steps)
    by_record: dict[str, dict[str, float]] = {}
    for measure in MEASURES:
        by_record[measure.label] = {
            r.record: r.value
            for r in readings
            if (r.probe, r.metric, r.group) == (measure.probe, measure.metric, measure.group)
            and (r.side, r.layer, r.head, bool(r.record)) == ("adapted", -1, -1, True)
        }
    scalars = means(probes.methods, readings)
    # What is undefined (no pair with a sign, say) is null: JSON has no NaN.
    return {k: v if math.isfinite(v) else None for k, v in scalars.items()}, by_record


def run_seed(seed: int, probes: Any, how: Experiment) -> dict[str, Any]:
    """Both adapters of one seed, read by a pass and compared."""
    arms, values = {}, {}
    for arm in (USES, IGNORES):
        losses = train(probes.vlm, seed, arm, how)
        scalars, values[arm] = read(probes, how)
        arms[arm] = {"loss": losses, "scalars": scalars}
    measures = {
        measure.label: compare(values[USES][measure.label], values[IGNORES][measure.label])
        for measure in MEASURES
        if measure.probe in how.probes
    }
    return {"seed": seed, "arms": arms, "measures": measures}


def compare(uses: dict[str, float], ignores: dict[str, float]) -> dict[str, Any]:
    """Means of both, and of their difference by record with its interval."""
    from mlalign.probes._stats import interval

    if not uses or uses.keys() != ignores.keys():
        raise ValueError("both adapters must be read on the same records, one or more")
    differences = [uses[record] - ignores[record] for record in uses]
    low, high = interval(differences, [1] * len(differences))
    count = len(differences)
    return {
        USES: math.fsum(uses.values()) / count,
        IGNORES: math.fsum(ignores.values()) / count,
        "difference": math.fsum(differences) / count,
        "lo": low,
        "hi": high,
        "apart": "+" if low > 0 else "-" if high < 0 else "",
    }


def summarise(seeds: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per measure, over the seeds: the ranges of both adapters, the share of it that is left after
    ignoring (ratio of the means), in how many seeds they are apart and in which direction, and
    whether the ranges overlap."""
    table = {}
    for label in seeds[0]["measures"]:
        each = [seed["measures"][label] for seed in seeds]
        spans = {arm: [f([e[arm] for e in each]) for f in (min, max)] for arm in (USES, IGNORES)}
        below = spans[IGNORES][1] < spans[USES][0]
        table[label] = {
            **spans,
            "left": math.fsum(e[IGNORES] for e in each) / math.fsum(e[USES] for e in each),
            "more": sum(e["apart"] == "+" for e in each),
            "less": sum(e["apart"] == "-" for e in each),
            "overlap": not (below or spans[USES][1] < spans[IGNORES][0]),
        }
    return table


def markdown(seeds: Sequence[dict[str, Any]], summary: dict[str, dict[str, Any]]) -> str:
    """Two tables: measures over all seeds, and the two that matter most seed by seed."""
    lines = [
        "| measure | trained to use the image | trained to ignore it | left | more / less "
        f"in seeds, of {len(seeds)} | ranges overlap |",
        "|---|---|---|---|---|---|",
    ]
    for label, row in summary.items():
        cells = [f"{row[arm][0]:.3f} to {row[arm][1]:.3f}" for arm in (USES, IGNORES)]
        cells += [f"{row['left']:.0%}", f"{row['more']} / {row['less']}"]
        lines.append(f"| {label} | {' | '.join(cells)} | {'yes' if row['overlap'] else 'no'} |")
    shown = [measure.label for measure in (RELIANCE, ATTENTION) if measure.label in summary]
    heads = [f"{label}: uses | ignores | difference" for label in shown]
    lines += ["", "| seed | " + " | ".join(heads) + " |", "|---" * (1 + 3 * len(shown)) + "|"]
    for seed in seeds:
        cells = [str(seed["seed"])]
        for label in shown:
            row = seed["measures"][label]
            gap = f"{row['difference']:+.3f} [{row['lo']:+.3f}, {row['hi']:+.3f}]"
            cells += [f"{row[USES]:.3f}", f"{row[IGNORES]:.3f}", gap]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog=f"mlalign.microworld.{NAME}", description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=Experiment.steps)
    parser.add_argument("--records", type=int, default=Experiment.records)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 0: torch's choice")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    how = Experiment(steps=args.steps, records=args.records)
    args.out.mkdir(parents=True, exist_ok=True)
    probes = new_pass(with_adapter(how), how)
    seeds = []
    for seed in range(args.seeds):
        seeds.append(run_seed(seed, probes, how))
        row = seeds[-1]["measures"][RELIANCE.label]
        print(f"seed {seed}: {row[USES]:.3f}, {row[IGNORES]:.3f}", file=sys.stderr, flush=True)
        summary = summarise(seeds)
        written = {"experiment": asdict(how), "seeds": seeds, "summary": summary}
        text = json.dumps(written, indent=1, allow_nan=False)
        (args.out / f"{NAME}.json").write_text(text + "\n")
        (args.out / f"{NAME}.md").write_text(markdown(seeds, summary))
    print(markdown(seeds, summarise(seeds)), end="")


if __name__ == "__main__":
    main()
