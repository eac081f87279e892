"""A stand-in for the model: it says what the microworld's SFT captions say, prior and all."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from data_builders._context import BuildContext
from mlalign.judges import Answer
from mlalign.judges.facts import FactsJudge
from mlalign.microworld import language as grammar
from mlalign.microworld.scenes import make_scene
from mlalign.objects import vocabulary


class NoisyJudge:
    """Says what the facts say, but for every tenth question."""

    def __init__(self, words: str = "microworld") -> None:
        self.facts = FactsJudge(FactsJudge.Settings(), vocabulary=vocabulary(words))

    def ask(self, example, questions):
        out = []
        for question in questions:
            answer = self.facts.ask(example, [question])[0]
            wrong = random.Random(f"{example.id}{question}").random() < 0.1
            yes = bool(answer.verdict) != wrong
            out.append(Answer(0.7, 0.2) if yes else Answer(0.2, 0.7))
        return out

    def ask_many(self, examples, questions):
        return [self.ask(e, asked) for e, asked in zip(examples, questions, strict=True)]


def scene_of(record_id: str):
    _, split, index = record_id.split("-")
    return make_scene(split, int(index))


def say(vlm, requests, decoding, **_):
    """What ``mlalign.generate.generate`` would return for a model with the prior."""
    out = []
    for request in requests:
        scene = scene_of(request.id)
        samples = []
        for sample in range(decoding.samples):
            rng = random.Random(f"{request.id}/{decoding.seed}/{sample}")
            style = 0 if rng.random() < 0.8 else rng.randrange(4)
            samples.append(grammar.caption(scene.kind, grammar.sft_mentions(scene, rng), style))
        out.append(samples)
    return out


@pytest.fixture
def speaking(monkeypatch):
    """ha_dpo and rlaif_v with the stand-in in place of generation and of the model's own judge."""
    for module in ("ha_dpo", "rlaif_v"):
        monkeypatch.setattr(f"data_builders.{module}.generate", say)
        monkeypatch.setattr(f"data_builders.{module}.own_judge", lambda context, name: NoisyJudge())


@pytest.fixture
def context():
    return BuildContext(
        vocabulary=vocabulary("microworld"), language="microworld", seed=0, vlm=object()
    )


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of twelve small images with captions; no file lists."""
    (tmp_path / "images").mkdir()
    lines = []
    for number in range(12):
        image = Image.new("RGB", (32, 32), (number * 20, 90, 120))
        ImageDraw.Draw(image).rectangle((4, 4, 20, 20), fill=(200, number * 20, 10))
        image.save(tmp_path / "images" / f"photo{number}.png")
        captions = ["A black dog runs on the grass .", "a dog chases a red ball"]
        lines.append(json.dumps({"image": f"photo{number}.png", "captions": captions}))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path
