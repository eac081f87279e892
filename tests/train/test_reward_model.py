"""The reward model: scores against plain forwards, the loss in float64, training, what is saved."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText

from data_builders.edits import edit_segments
from mlalign import store
from mlalign.images import open_image
from mlalign.models._scalar import ScalarModel, load_head
from mlalign.models.loading import load_vlm_from, lora_config
from mlalign.recipe import from_dict
from mlalign.records import Facts, RecordError, Segment
from mlalign.sections import LoraSection
from mlalign.train._scored import Asking, ScoreCollator, pair_rows
from mlalign.train.algorithms.reward_model import METHOD, figures
from mlalign.train.reward_trainer import LossSettings, losses
from tests.train.pairs import make_pairs


@pytest.fixture(scope="module")
def scalar(tiny_llava: Path) -> tuple[Any, ScalarModel]:
    """A model with a non-zero adapter and head."""
    vlm = load_vlm_from(tiny_llava, dtype="float32")
    torch.manual_seed(0)
    vlm.model = get_peft_model(vlm.model, lora_config(LoraSection(rank=4), vlm))
    for name, parameter in vlm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return vlm, ScalarModel(vlm.model).eval()


@pytest.mark.parametrize("form", ["answer", "sentence"])
def test_scores_are_those_of_plain_forwards(scalar: Any, form: Any) -> None:
    vlm, model = scalar
    pairs = [_two_sentences(pair) for pair in make_pairs(3)]
    asking = Asking(form=form)
    rows, skips = pair_rows(vlm, pairs, asking, None)
    assert not skips
    batch = ScoreCollator(vlm, rows).collate(rows)
    with torch.no_grad():
        score_M = model(vlm.encode(batch.rows), batch.row_M, batch.position_M)
    expected = []
    for pair in pairs:
        size = open_image(pair.image, pair.id).size
        pixels = vlm.image(open_image(pair.image, pair.id)).tensors["pixel_values"]
        for text in (pair.chosen, pair.rejected):
            prefix, (ids,) = vlm.branch_ids(pair.prompt, [text], size)
            inner = vlm.core.model
            with torch.no_grad():
                hidden = inner(
                    input_ids=torch.tensor([prefix + ids]), pixel_values=pixels
                ).last_hidden_state[0]
            value = model.score(hidden)[:, 0].detach()
            if form == "answer":
                expected.append(float(value[-1]))
                continue
            # A sentence ends at its full stop; the end of turn behind the last one is not scored.
            dots = [i for i, token in enumerate(ids) if vlm.tokenizer.decode([token]) == "."]
            expected += [float(value[len(prefix) + i]) for i in dots]
    assert score_M.tolist() == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == len(expected)
    sums_C = batch.sums_C(score_M)
    per = 1 if form == "answer" else 2
    assert sums_C.tolist() == pytest.approx(
        [sum(expected[i : i + per]) for i in range(0, len(expected), per)], abs=1e-5
    )


def test_the_loss_in_float64() -> None:
    rng = np.random.default_rng(0)
    for case in range(50):
        pairs = int(rng.integers(1, 5))
        completion = np.repeat(np.arange(2 * pairs), rng.integers(1, 4, 2 * pairs))
        score, label = rng.normal(size=len(completion)), rng.integers(0, 2, len(completion)) * 1.0
        label[rng.random(len(label)) < 0.4] = np.nan
        form = ("square", "abs_mean")[case % 2]
        settings = LossSettings(
            pair_weight=(1.0, 0.4, 0.0)[case % 3],
            centering=0.3,
            centering_form=form,  # type: ignore[arg-type]
            sentence_weight=0.7,
        )
        sums = np.array([score[completion == c].sum() for c in range(2 * pairs)])
        both = sums[0::2] + sums[1::2]
        wanted = []
        for n in range(pairs):
            loss = math.log1p(math.exp(-(sums[2 * n] - sums[2 * n + 1]))) * settings.pair_weight
            loss += 0.3 * (both[n] ** 2 if form == "square" else abs(both.mean()))
            own = [
                math.log1p(math.exp(-s)) + (1 - y) * s
                for s, y, c in zip(score, label, completion, strict=True)
                if c // 2 == n and not math.isnan(y)
            ]
            wanted.append(loss + (0.7 * sum(own) / len(own) if own else 0.0))
        given = losses(
            settings,
            torch.tensor(sums),
            torch.tensor(score),
            torch.tensor(label),
            torch.tensor(completion),
        )
        assert given.tolist() == pytest.approx(wanted, abs=1e-9)


def test_swapping_a_pair_negates_its_margin_and_ln_2_at_a_tie() -> None:
    nothing = torch.empty(0)
    tie = losses(LossSettings(), torch.tensor([1.0, 1.0]), nothing, nothing, nothing)
    assert float(tie) == pytest.approx(math.log(2))


def test_wrong_sentences_are_those_that_a_segment_touches(scalar: Any) -> None:
    vlm, _ = scalar
    pair = make_pairs(1)[0]
    good = f"{pair.chosen} {pair.chosen}"
    bad = f"{pair.chosen} A red kettle."
    pair = replace(pair, chosen=good, rejected=bad, segments=edit_segments(good, bad))
    (row,), _ = pair_rows(vlm, [pair], Asking(form="sentence"), None)
    assert row.labels == [[1.0, 1.0], [1.0, 0.0]]
    (plain,), _ = pair_rows(vlm, [replace(pair, segments=())], Asking(form="sentence"), None)
    assert plain.labels is None


def test_rated_sentences_are_labels_of_both_sides(scalar: Any) -> None:
    vlm, _ = scalar
    pair = _two_sentences(make_pairs(1)[0])
    asking = Asking(form="sentence")
    chosen, rejected = asking.spans(pair.chosen), asking.spans(pair.rejected)
    segments = [
        Segment(side="chosen", start=chosen[0][0], end=chosen[0][1], label="sentence", weight=0.0),
        *(
            Segment(side="rejected", start=start, end=end, label="sentence", weight=weight)
            for (start, end), weight in zip(rejected, (1.0, 0.0), strict=True)
        ),
    ]
    (row,), _ = pair_rows(vlm, [replace(pair, segments=tuple(segments))], asking, None)
    assert row.labels is not None and row.labels[1] == [1.0, 0.0]
    # Of a sentence that nobody rated nothing is learned.
    assert row.labels[0][0] == 0.0 and math.isnan(row.labels[0][1])


def test_ratings_alone(tiny_llava: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    made = [replace(_two_sentences(pair), segments=()) for pair in make_pairs(12)]
    made[1:] = [_rated(pair) for pair in made[1:]]
    store.write_preferences(pairs, made, {})
    raw = _recipe(tiny_llava, pairs, 1)
    raw["train"]["save_every"] = 0
    ratings = {"form": "sentence", "pair_weight": 0.0, "heldout": 0.2}
    raw["train"]["algorithm"] = {"name": "reward_model", **ratings}
    _train(raw, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert any("reward/sentence_accuracy" in row for row in lines)
    assert not any("reward/accuracy" in row or "heldout/accuracy" in row for row in lines)
    held = json.loads((tmp_path / "run/arm/heldout.json").read_text())
    assert {"heldout/sentence_accuracy", "heldout/sentence_right", "heldout/sentence_auc"} <= set(
        held
    )
    events = (tmp_path / "run").glob("*.jsonl")
    assert any("no sentence of it is rated" in file.read_text() for file in events)
    with pytest.raises(ValueError, match="pair_weight: 0 leaves nothing to learn from"):
        METHOD.Settings(pair_weight=0.0)


def test_facts_go_into_the_prompt_and_their_absence_is_named(scalar: Any) -> None:
    vlm, _ = scalar
    pair = make_pairs(1)[0]
    asking = Asking(facts=True, template="{prompt} {facts}")
    shown = asking.prompt(pair.prompt, pair.facts, pair.id)
    assert shown.startswith(pair.prompt) and all(c in shown for c in pair.facts.captions)
    (row,), _ = pair_rows(vlm, [pair], asking, None)
    (without,), _ = pair_rows(vlm, [pair], Asking(), None)
    assert len(row.prefix) > len(without.prefix) and row.completions == without.completions
    with pytest.raises(RecordError, match=r"pair-0.*no captions.*facts: false"):
        pair_rows(vlm, [replace(pair, facts=Facts())], asking, None)


def test_an_answer_that_would_be_cut_is_a_skip(scalar: Any) -> None:
    vlm, _ = scalar
    rows, skips = pair_rows(vlm, make_pairs(2), Asking(), 45)
    assert not rows and [s.id for s in skips] == ["pair-0", "pair-1"]
    assert "Raise train.max_length" in skips[0].detail


def test_held_out_figures() -> None:
    score = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 3.0]])
    found = figures(score, torch.tensor([[1.0, -1.0, 2.0], [1.0, 0.0, 0.0]]))
    assert found["heldout/accuracy"] == pytest.approx(0.5)
    assert found["heldout/margin"] == pytest.approx(1 / 3)
    # Each in a bin of its own: |0.8808 - 1|, |0.7311 - 0|, |0.5 - 0.5|.
    assert found["heldout/calibration_error"] == pytest.approx((0.1192 + 0.7311) / 3, abs=1e-4)
    assert found["heldout/sentence_accuracy"] == pytest.approx(2 / 3)
    assert found["heldout/sentence_right"] == pytest.approx(1 / 3)
    # The right one scores above one of the two wrong ones.
    assert found["heldout/sentence_auc"] == pytest.approx(0.5)
    alone = figures(score, torch.tensor([[1.0], [1.0]]), compared=False)
    assert set(alone) == {
        "heldout/pairs",
        "heldout/sentences",
        "heldout/sentence_accuracy",
        "heldout/sentence_right",
    }


def test_trains_resumes_and_reloads(tiny_llava: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    store.write_preferences(pairs, make_pairs(24), {})
    # A stopped run: five steps with a checkpoint, then the same to the end.
    whole = _train(_recipe(tiny_llava, pairs, 10), tmp_path / "whole")
    _train(_recipe(tiny_llava, pairs, 5), tmp_path / "half")
    resumed = _train(_recipe(tiny_llava, pairs, 10), tmp_path / "half")
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").open()]
    rows = [row for row in lines if "loss" in row]
    assert len(rows) == 10 and rows[-1]["loss"] < rows[0]["loss"] - 0.05
    assert "heldout/accuracy" in lines[-1]
    for name, value in _trained(whole).items():
        torch.testing.assert_close(_trained(resumed)[name], value, atol=1e-6, rtol=0)
    # Stock peft and the head give the trained scores.
    base = AutoModelForImageTextToText.from_pretrained(tiny_llava, dtype=torch.float32)
    adapter = tmp_path / "whole/arm/adapter"
    model = ScalarModel(PeftModel.from_pretrained(base, adapter)).eval()
    load_head(model, adapter)
    vlm = whole.vlm
    picked, _ = pair_rows(vlm, make_pairs(2), Asking(), None)
    batch = ScoreCollator(vlm, picked).collate(picked)
    features = vlm.encode(batch.rows)
    with torch.no_grad():
        again = model(features, batch.row_M, batch.position_M, "dense")
        whole.model.eval()
        ours = whole.model(features, batch.row_M, batch.position_M)
    torch.testing.assert_close(again, ours, atol=1e-5, rtol=0)
    assert json.loads((adapter / "reward_model.json").read_text())["form"] == "answer"


def test_micro_batches_add_up_to_the_step(tiny_llava: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    store.write_preferences(pairs, make_pairs(12), {})
    trained = []
    for size in (4, 1):
        raw = _recipe(tiny_llava, pairs, 2)
        raw["train"] |= {"micro_batch_size": size, "save_every": 0}
        raw["train"]["algorithm"]["heldout"] = 0.0
        # The gradient's norm shows a loss that is scaled wrongly; Adam's steps would hide it.
        raw["train"]["max_grad_norm"] = 1e9
        trainer = _train(raw, tmp_path / str(size))
        lines = [json.loads(line) for line in (tmp_path / str(size) / "metrics.jsonl").open()]
        trained.append([row["grad_norm"] for row in lines if "grad_norm" in row])
        assert trainer.state.global_step == 2
    assert trained[0] == pytest.approx(trained[1], rel=1e-3)


def test_a_model_without_an_adapter_is_refused(tiny_llava: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    store.write_preferences(pairs, make_pairs(4), {})
    recipe = from_dict(
        _recipe(tiny_llava, pairs, 2) | {"model": {"path": str(tiny_llava), "adapter": "none"}}
    )
    with pytest.raises(ValueError, match=r"model\.adapter: none.*Give model\.adapter"):
        METHOD(METHOD.Settings()).train(recipe, "arm", tmp_path)


def _two_sentences(pair: Any) -> Any:
    return replace(
        pair,
        chosen=f"{pair.chosen} A red kettle.",
        rejected=f"{pair.rejected} {pair.chosen}",
    )


def _rated(pair: Any) -> Any:
    """Every sentence with its rating: those of the chosen answer are right, no others."""
    asking = Asking(form="sentence")
    segments = [
        Segment(side=side, start=a, end=b, label="sentence", weight=float(side == "chosen"))  # type: ignore[arg-type]
        for side in ("chosen", "rejected")
        for a, b in asking.spans(getattr(pair, side))
    ]
    return replace(pair, segments=tuple(segments))


def _recipe(model: Path, pairs: Path, steps: int) -> dict[str, Any]:
    return {
        "name": "rm",
        "seed": 3,
        "model": {"path": str(model), "dtype": "float32", "adapter": {"rank": 4, "alpha": 16}},
        "data": {"pairs": {"arm": str(pairs)}},
        "train": {
            "algorithm": {"name": "reward_model", "heldout": 0.2, "centering": 1e-3},
            "learning_rate": 2e-3,
            "batch_size": 4,
            "micro_batch_size": 2,
            "steps": steps,
            "schedule": "constant",
            "save_every": 5,
        },
        "launch": {"launcher": "none"},
    }


def _train(raw: dict[str, Any], run: Path) -> Any:
    recipe = from_dict(raw)
    ref = recipe.train.algorithm
    return METHOD(METHOD.Settings(**ref.settings())).train(recipe, "arm", run)


def _trained(trainer: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
