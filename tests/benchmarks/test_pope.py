"""POPE: parsers, negatives, metrics, and polling by a shared prefix."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from mlalign.benchmarks import pope
from mlalign.benchmarks.pope import METHOD as Pope
from mlalign.microworld import world
from mlalign.models._vlm import VLM
from mlalign.models.loading import load_vlm_from
from mlalign.objects import vocabulary, with_article
from mlalign.records import Example, Facts, ImageRef, ObjectFact

MICRO = vocabulary("microworld")
SPLITS = ("random", "popular", "adversarial")


def make(**settings: object) -> Pope:
    return Pope(Pope.Settings(**settings))  # type: ignore[arg-type]


def example(name: str, present: list[str]) -> Example:
    facts = Facts(objects=tuple(ObjectFact(name=n) for n in present), exhaustive=True)
    return Example(
        id=name, image=ImageRef(path=f"{name}.png"), image_sha256="", prompt="Describe.",
        facts=facts, source="test",
    )  # fmt: skip


@pytest.fixture(scope="module")
def scenes() -> list[Example]:
    return [world.example("heldout", i) for i in range(24)]


@pytest.mark.parametrize(
    ("answer", "official", "strict"),
    [
        ("No!", "yes", "no"),
        ("NO", "yes", "no"),
        ("no\n", "yes", "no"),
        ("", "yes", None),
        ("There is none", "yes", None),
        ("I cannot see a dog", "yes", None),
        ("There isn't any", "yes", None),
        ("The image shows a cat. There is no dog.", "yes", "no"),
        ("Yes, there is no doubt a dog", "no", "yes"),
        ("Yes", "yes", "yes"),
        ("No, there is a cat", "no", "no"),
        ("There is not a dog.", "no", None),
        ("It says yes and no", "no", None),
        ("Certainly yes.", "yes", "yes"),
        ("Nothing", "yes", None),
    ],
)
def test_parsers(answer: str, official: str, strict: str | None) -> None:
    assert pope.official(answer) == official
    assert pope.strict(answer) == strict


def test_questions_are_balanced_and_true(scenes: list[Example]) -> None:
    items = make().items(scenes, MICRO, 0)
    present = {e.id: e.facts.names() for e in scenes}
    for item in items:
        name = item.meta["object"]
        assert (name in present[item.example_id]) == (item.gold == "yes")
        assert item.prompt == f"Is there {with_article(name)} in the image?"
    counts = Counter((i.example_id, i.meta["split"], i.gold) for i in items)
    for scene in scenes:
        expected = min(3, len(scene.facts.names()))
        assert {counts[scene.id, split, gold] for split in SPLITS for gold in ("yes", "no")} == {
            expected
        }
    asked = Counter((i.example_id, i.meta["split"], i.meta["object"]) for i in items)
    assert max(asked.values()) == 1
    assert len({i.id for i in items}) == len(items)


def test_positives_are_the_same_in_every_split(scenes: list[Example]) -> None:
    items = make().items(scenes, MICRO, 0)
    by_split = [
        [
            (i.example_id, i.meta["object"])
            for i in items
            if i.meta["split"] == s and i.gold == "yes"
        ]
        for s in SPLITS
    ]
    assert by_split[0] == by_split[1] == by_split[2]


def test_seed_decides_and_other_examples_do_not(scenes: list[Example]) -> None:
    def random_split(examples: list[Example], seed: int) -> list[tuple[str, str]]:
        items = make(splits=("random",)).items(examples, MICRO, seed)
        return [(i.id, i.prompt) for i in items if i.example_id == scenes[3].id]

    assert random_split(scenes, 1) == random_split(scenes[3:4], 1)
    assert random_split(scenes, 1) != random_split(scenes, 2)


def test_popular_and_adversarial_by_hand() -> None:
    present = [["pot", "dog"], ["pot", "kettle"], ["dog", "kettle"], ["dog", "tree"], ["boat"]]
    chooser = pope.Negatives(present, MICRO.names)
    rng = random.Random(0)
    assert chooser.choose("popular", ["boat"], ["boat"], rng) == ["dog"]
    assert chooser.choose("popular", ["dog", "boat"], ["dog", "boat"], rng) == ["pot", "kettle"]
    # With the dog were seen the pot, the kettle and the tree, once each: the pot is the most
    # frequent of them and first in the vocabulary. With the boat nothing was: the most frequent.
    assert chooser.choose("adversarial", ["dog", "boat"], ["dog", "boat"], rng) == ["pot", "kettle"]
    assert chooser.choose("adversarial", ["pot", "dog"], ["dog", "pot"], rng) == ["kettle", "tree"]


def test_a_full_or_empty_image() -> None:
    everything = example("full", list(MICRO.names))
    nothing = example("empty", [])
    few = example("few", list(MICRO.names[:-1]))
    items = make().items([everything, nothing, few], MICRO, 0)
    assert {i.example_id for i in items} == {"few"} and len(items) == 6
    with pytest.raises(ValueError, match=r"data\.vocabulary"):
        make().items([nothing], MICRO, 0)


def metrics(golds: list[str], answers: list[str], **settings: object) -> dict[str, float]:
    benchmark = make(splits=("random",), **settings)
    examples = [example(f"e{i}", ["pot"]) for i in range(len(golds))]
    items = [
        benchmark._item(e, "random", 0, "pot", g) for e, g in zip(examples, golds, strict=True)
    ]
    found = benchmark.metrics(benchmark.score(items, answers, MICRO))
    return {key: metric.value() for key, metric in found.items()}


def test_metrics_against_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

    rng = random.Random(1)
    golds = [rng.choice(("yes", "no")) for _ in range(200)]
    said = [rng.choice(("yes", "no")) for _ in range(200)]
    found = metrics(golds, said)
    truth, guess = [g == "yes" for g in golds], [s == "yes" for s in said]
    assert found["pope/accuracy"] == pytest.approx(accuracy_score(truth, guess))
    assert found["pope/precision"] == pytest.approx(precision_score(truth, guess))
    assert found["pope/recall"] == pytest.approx(recall_score(truth, guess))
    assert found["pope/f1"] == pytest.approx(f1_score(truth, guess))
    assert found["pope/random/f1"] == found["pope/f1"]
    assert found["pope/yes_rate"] == pytest.approx(sum(guess) / 200)
    assert found["pope/unparsed_rate"] == 0


def test_never_yes_and_never_understood() -> None:
    never = metrics(["yes", "no"], ["no", "no"])
    assert never["pope/f1"] == never["pope/precision"] == never["pope/recall"] == 0
    assert never["pope/accuracy"] == 0.5 and never["pope/yes_rate"] == 0
    babble = metrics(["yes", "no", "yes"], ["perhaps", "", "yes"])
    assert babble["pope/unparsed_rate"] == pytest.approx(2 / 3)
    assert babble["pope/accuracy"] == pytest.approx(1 / 3)
    assert babble["pope/recall"] == 0.5 and babble["pope/yes_rate"] == pytest.approx(1 / 3)
    official = metrics(["yes", "no", "yes"], ["perhaps", "", "yes"], parser="official")
    assert official["pope/yes_rate"] == 1 and official["pope/recall"] == 1
    assert official["pope/unparsed_rate"] == pytest.approx(2 / 3)


def test_mean_over_splits(scenes: list[Example]) -> None:
    benchmark = make()
    items = benchmark.items(scenes, MICRO, 0)
    answers = [random.Random(i.id).choice(("Yes", "No")) for i in items]
    found = {
        k: m.value() for k, m in benchmark.metrics(benchmark.score(items, answers, MICRO)).items()
    }
    for name in ("accuracy", "f1", "yes_rate"):
        mean = sum(found[f"pope/{split}/{name}"] for split in SPLITS) / 3
        assert found[f"pope/{name}"] == pytest.approx(mean)


@pytest.fixture(scope="module")
def vlm(tiny_llava: Path) -> VLM:
    loaded = load_vlm_from(tiny_llava)
    loaded.model.double()
    return loaded


def test_polling_behind_one_prefix_is_asking_one_by_one(vlm: VLM, scenes: list[Example]) -> None:
    from mlalign.images import open_image

    items = make().items(scenes[:4], MICRO, 0)
    polled = make().answer(vlm, items, 3)
    for item, answer in zip(items, polled, strict=True):
        with torch.no_grad():
            out = vlm.model(
                input_ids=torch.tensor([vlm.prefix_ids(item.prompt, (96, 96))]),
                pixel_values=vlm.image(open_image(item.image, item.id))
                .tensors["pixel_values"]
                .double(),
            )
        token = int(out.logits[0, -1].argmax())
        assert vlm.tokenizer.decode([token], skip_special_tokens=True).strip() == answer
    assert len(set(polled)) > 1
    generated = make(mode="generate", max_new_tokens=1).answer(vlm, items, 5)
    assert generated == polled


def test_one_question_alone_can_be_polled(vlm: VLM, scenes: list[Example]) -> None:
    items = make().items(scenes[:1], MICRO, 0)
    together = make().answer(vlm, items, 4)
    assert make().answer(vlm, items[:1], 4) == together[:1]
    vlm.model.train()
    make().answer(vlm, items[:1], 4)
    assert vlm.model.training
    vlm.model.eval()


@pytest.mark.parametrize("source", ["coco", "aokvqa", "gqa"])
@pytest.mark.parametrize("split", SPLITS)
def test_released_questions_parse_and_are_balanced(
    shared_data: Path, source: str, split: str
) -> None:
    file = shared_data / "benchmarks" / "pope" / f"{source}_pope_{split}.json"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 3000
    assert Counter(row["label"] for row in rows) == {"yes": 1500, "no": 1500}
    if source == "coco":
        coco = vocabulary("coco")
        asked = {row["text"].removesuffix(" in the image?").split(" ", 3)[3] for row in rows}
        assert asked <= set(coco.names)
