"""The whole evaluation on an untrained model; scoring again; intervals against scipy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from mlalign.benchmarks import _bootstrap, evaluate
from mlalign.benchmarks._items import Metric, mean_of, ratio
from mlalign.microworld import world
from mlalign.models._vlm import VLM
from mlalign.models.loading import load_vlm_from
from mlalign.objects import vocabulary
from mlalign.recipe import MethodRef
from mlalign.records import Example
from mlalign.sections import EvalSection

MICRO = vocabulary("microworld")
WANTED = (
    "halluc/chair_s", "halluc/chair_i", "halluc/recall", "halluc/length", "halluc/mentions",
    "pope/accuracy", "pope/f1", "pope/yes_rate", "pope/unparsed_rate", "lm/clean_caption_nll",
)  # fmt: skip


def section(**keys: Any) -> EvalSection:
    chair = {"name": "chair", "max_new_tokens": 8}
    return EvalSection(**{"benchmarks": (chair, "pope"), "images": 6, "bootstrap": 200, **keys})


@pytest.fixture(scope="module")
def vlm(tiny_llava: Path) -> VLM:
    return load_vlm_from(tiny_llava)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return [world.example("heldout", i) for i in range(8)]


@pytest.fixture(scope="module")
def run(
    vlm: VLM, examples: list[Example], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("run")
    flat = evaluate.evaluate(vlm, examples, section(), MICRO, label="base", folder=folder, seed=3)
    return folder, flat


def test_summary_has_every_key(run: tuple[Path, dict]) -> None:
    _, flat = run
    assert flat["n"] == 6
    for key in WANTED:
        low, high = flat[f"{key}_ci95"]
        assert isinstance(flat[key], float) and low <= flat[key] <= high, key
        assert 0 < flat[f"{key}_n"] <= 6
    json.dumps(flat, allow_nan=False)


def test_files_hold_raw_answers(run: tuple[Path, dict]) -> None:
    folder, _ = run
    rows = [json.loads(x) for x in (folder / "eval" / "base-chair.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert {"id", "example_id", "prompt", "gold", "answer"} <= rows[0].keys()
    about = json.loads((folder / "eval" / "base-chair.meta.json").read_text())
    assert about["settings"]["max_new_tokens"] == 8 and about["seed"] == 3 and about["images"] == 6


def test_scoring_again_gives_the_same(run: tuple[Path, dict]) -> None:
    folder, flat = run
    assert evaluate.rescore(folder, "base", section(), MICRO, seed=3) == flat
    lines = (folder / "eval" / "base-pope.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    truthful = folder / "eval" / "truth-pope.jsonl"
    truthful.write_text("\n".join(json.dumps({**r, "answer": r["gold"]}) for r in rows))
    for name in ("chair", "nll"):
        text = (folder / "eval" / f"base-{name}.jsonl").read_text()
        (folder / "eval" / f"truth-{name}.jsonl").write_text(text)
    found = evaluate.rescore(folder, "truth", section(), MICRO, seed=3)
    assert found["pope/f1"] == found["pope/accuracy"] == 1 and found["pope/yes_rate"] == 0.5
    base = evaluate.load_scores(folder, "base", section(), MICRO)
    truth = evaluate.load_scores(folder, "truth", section(), MICRO)
    change = evaluate.compare(base, truth, resamples=200, seed=0)
    assert change["pope/accuracy"] == pytest.approx(1 - flat["pope/accuracy"])
    assert change["halluc/chair_i"] == 0 and change["halluc/chair_i_ci95"] == [0, 0]


def test_clean_caption_loss_is_transformers_own(
    vlm: VLM, examples: list[Example], run: tuple[Path, dict]
) -> None:
    from mlalign.images import open_image

    nats = tokens = 0.0
    for example in examples[:6]:
        prefix, (completion,) = vlm.branch_ids(
            example.prompt, [example.facts.captions[0]], (96, 96)
        )
        ids = torch.tensor([prefix + completion])
        labels = ids.clone()
        labels[:, : len(prefix)] = -100
        pixels = vlm.image(open_image(example.image, example.id)).tensors["pixel_values"]
        with torch.no_grad():
            loss = vlm.model(input_ids=ids, pixel_values=pixels, labels=labels).loss
        nats, tokens = nats + float(loss) * len(completion), tokens + len(completion)
    assert run[1]["lm/clean_caption_nll"] == pytest.approx(nats / tokens, rel=1e-5)


def test_refusals(vlm: VLM, examples: list[Example], run: tuple[Path, dict]) -> None:
    folder, _ = run
    bad = {"name": "chair", "max_tokens": 8}
    with pytest.raises(ValueError, match=r"chair.*max_tokens.*It takes: prompt, max_new_tokens"):
        evaluate.build(MethodRef(**bad))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="second time"):
        evaluate.load_scores(folder, "base", section(benchmarks=("pope", "pope")), MICRO)
    with pytest.raises(ValueError, match="no example"):
        evaluate.evaluate(vlm, [], section(), MICRO, label="x", folder=folder, seed=0)
    base = evaluate.load_scores(folder, "base", section(), MICRO)
    other = evaluate.Scores(
        metrics=base.metrics, image_ids=dict.fromkeys(base.image_ids, ("another",))
    )
    with pytest.raises(ValueError, match="same images"):
        evaluate.compare(base, other, resamples=100, seed=0)


def test_interval_of_a_mean_is_scipy_s() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=80)
    ours = _bootstrap.summarise({"m": ratio(values.tolist(), [1.0] * 80)}, 20_000, seed=1)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours["m"] == pytest.approx(values.mean())
    width = theirs.high - theirs.low
    assert ours["m_ci95"] == pytest.approx([theirs.low, theirs.high], abs=0.02 * width)


def test_ratios_are_recomputed_on_each_resample() -> None:
    rng = np.random.default_rng(5)
    numerator, denominator = rng.integers(0, 4, 30), rng.integers(1, 6, 30)
    metric = ratio(numerator.tolist(), denominator.tolist())
    drawn = _bootstrap.weights(30, 50, 7)
    assert (drawn.sum(1) == 30).all()
    for weight, value in zip(drawn, metric.resampled(drawn), strict=True):
        index = np.repeat(np.arange(30), weight.astype(int))
        assert value == pytest.approx(numerator[index].sum() / denominator[index].sum())


def test_empty_denominators() -> None:
    zero = ratio([0.0, 0.0], [0.0, 0.0])
    assert zero.value() == 0 and zero.images == 0
    undefined = ratio([0.0], [0.0], float("nan"))
    assert _bootstrap.summarise({"x": undefined}, 100, 0) == {}
    sometimes = ratio([1.0, 0.0], [1.0, 0.0], float("nan"))
    assert _bootstrap.summarise({"x": sometimes}, 100, 0)["x_ci95"] == [1.0, 1.0]
    assert mean_of([ratio([1.0], [1.0]), ratio([0.0], [1.0])]).value() == 0.5


def test_paired_interval_uses_the_same_draws() -> None:
    """A constant shift on every image has no spread, whatever the spread between images."""
    values = np.random.default_rng(3).normal(size=40)
    before = {"m": ratio(values.tolist(), [1.0] * 40)}
    after = {"m": ratio((values + 0.25).tolist(), [1.0] * 40)}
    change = _bootstrap.differences(before, after, 500, 0)
    assert change["m"] == pytest.approx(0.25)
    assert change["m_ci95"] == pytest.approx([0.25, 0.25])
    short: dict[str, Metric] = {"m": ratio([1.0], [1.0])}
    with pytest.raises(ValueError, match="same images"):
        _bootstrap.differences(before, short, 100, 0)
