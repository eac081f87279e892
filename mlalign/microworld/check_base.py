"""Measure a microworld model: ``python -m mlalign.microworld.check_base [FOLDER] [--scenes 500]``.

Greedy captions of held-out scenes against the known objects, and yes/no claim questions. Prints a
table and writes JSON where asked. This is the check of the shipped base, not the benchmark.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mlalign.microworld import language, scenes
from mlalign.microworld.model import base_folder
from mlalign.microworld.questions import MAKERS
from mlalign.microworld.render import render


@torch.no_grad()
def answer(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    max_new: int = 96,
) -> list[str]:
    """Greedy answers to one prompt per image; prompts of one batch are padded on the left."""
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
            add_generation_prompt=True,
        )
        for prompt in prompts
    ]
    processor.tokenizer.padding_side = "left"
    inputs = processor(text=texts, images=list(images), return_tensors="pt", padding=True)
    out = model.generate(**inputs, max_new_tokens=max_new, do_sample=False)
    new = out[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(new, skip_special_tokens=True)


def check_captions(
    model: Any, processor: Any, count: int, split: str = "heldout", batch: int = 50
) -> dict[str, Any]:
    """Shares over ``count`` scenes of greedy captions; see the keys."""
    tally: Counter[str] = Counter()
    examples: list[dict[str, Any]] = []
    for first in tqdm(range(0, count, batch), desc="captions"):
        world = [scenes.make_scene(split, i) for i in range(first, min(first + batch, count))]
        prompts = [language.CAPTION_PROMPTS[0]] * len(world)
        texts = answer(model, processor, [render(s) for s in world], prompts)
        for scene, text in zip(world, texts, strict=True):
            tally.update(_score(scene, text))
            if len(examples) < 8:
                truth = language.caption(scene.kind, language.true_mentions(scene))
                examples.append({"model": text, "truth": truth})
    return {
        "n": tally["n"],
        "recall": tally["found"] / tally["objects"],
        "color_right": tally["color"] / max(1, tally["found"]),
        "position_right": tally["position"] / max(1, tally["found"]),
        "chair_s": tally["n_false"] / tally["n"],
        "chair_i": tally["false"] / max(1, tally["mentions"]),
        "false_typical": tally["false_typical"] / max(1, tally["false"]),
        "false_expected": tally["false_expected"] / max(1, tally["false"]),
        "mentions": tally["mentions"] / tally["n"],
        "objects": tally["objects"] / tally["n"],
        "equal_count": tally["equal_count"] / tally["n"],
        "equal_count_if_false": tally["equal_count_false"] / max(1, tally["n_false"]),
        "clean_grammar": tally["clean"] / tally["n"],
        "default_style": tally["default_style"] / tally["n"],
        "examples": examples,
    }


def _score(scene: scenes.Scene, text: str) -> Counter[str]:
    found, rest = language.parse_caption(text)
    said = {m.name: m for m in reversed(found)}
    real = {o.name: o for o in scene.objects}
    false = [m.name for m in found if m.name not in real]
    missing = scenes.missing_companion(scene)
    right = [(said[name], real[name]) for name in real if name in said]
    rendered = language.caption(scene.kind, [m.mention for m in found])
    equal = len(found) == len(scene.objects)
    return Counter(
        n=1,
        objects=len(real),
        mentions=len(found),
        found=len(right),
        color=sum(m.color == o.color for m, o in right),
        position=sum(m.position == o.position for m, o in right),
        false=len(false),
        n_false=bool(false),
        false_typical=sum(name in scenes.typical(scene.kind) for name in false),
        false_expected=sum(missing is not None and name == missing[1] for name in false),
        equal_count=equal,
        equal_count_false=equal and bool(false),
        clean=not rest and text.endswith("."),
        default_style=text == rendered,
    )


_ASKED = {kind: ask for kind, (ask, _) in MAKERS.items() if not kind.startswith("drill")}


def check_questions(
    model: Any, processor: Any, count: int, split: str = "heldout", batch: int = 100
) -> dict[str, float]:
    """Share of right answers per kind of question, one of each per scene, and to the claim question
    that a false caption makes (``absent_companion``)."""
    right: dict[str, float] = {}
    world = [scenes.make_scene(split, i) for i in range(count)]
    kinds: dict[str, list[tuple[scenes.Scene, str, str]]] = {}
    for kind, ask in _ASKED.items():
        kinds[kind] = [
            (scene, *ask(scene, random.Random(f"check/{kind}/{i}")))
            for i, scene in enumerate(world)
        ]
    kinds["absent_companion"], kinds["absent_companion_presence"] = [], []
    for scene in world:
        if missing := scenes.missing_companion(scene):
            trigger, name, slot = missing
            claim = language.Mention(scenes.POSITIONS[slot], trigger.color, name)
            kinds["absent_companion"].append((scene, language.claim_question(claim), language.NO))
            asked = language.presence_question(name)
            kinds["absent_companion_presence"].append((scene, asked, language.NO))
    for kind, rows in kinds.items():
        hits = 0
        for first in tqdm(range(0, len(rows), batch), desc=kind, leave=False):
            part = rows[first : first + batch]
            images = [render(scene) for scene, _, _ in part]
            texts = answer(model, processor, images, [q for _, q, _ in part], max_new=8)
            hits += sum(text == truth for text, (_, _, truth) in zip(texts, part, strict=True))
        right[kind] = hits / max(1, len(rows))
    return right


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="mlalign.microworld.check_base", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=base_folder())
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument(
        "--questions", type=int, default=300, help="scenes that questions are asked of"
    )
    parser.add_argument("--split", default="heldout", choices=scenes.SPLITS)
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args(argv)
    started = time.monotonic()
    model = LlavaForConditionalGeneration.from_pretrained(args.folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(args.folder)
    captions = check_captions(model, processor, args.scenes, args.split)
    asked = check_questions(model, processor, args.questions, args.split)
    for pair in captions["examples"]:
        print(f"model: {pair['model']}\ntruth: {pair['truth']}\n")
    for key, value in captions.items():
        if key != "examples":
            print(f"{key:32s}{value:10.3f}")
    for key, value in asked.items():
        print(f"right: {key:25s}{value:10.3f}")
    print(f"{time.monotonic() - started:.0f} s")
    if args.json:
        args.json.write_text(
            json.dumps({"captions": captions, "questions": asked}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
