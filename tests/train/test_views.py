"""Views in training, against separate plain forward passes in float32 with a non-zero adapter."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mlalign import store
from mlalign.branching.batch import ImageView
from mlalign.data.collate import Collator, TokenisedPair, tokenise
from mlalign.data.reader import DataError
from mlalign.data.views import view_image
from mlalign.images import open_image, to_png
from mlalign.models.loading import load_vlm_from
from mlalign.objectives.mdpo import Mdpo, MdpoSettings
from mlalign.objectives.povid import Povid, PovidSettings
from mlalign.recipe import from_dict
from mlalign.records import ImageRef, Preference, Segment
from mlalign.train import preference
from mlalign.train.trainer import PreferenceTrainer
from tests.train.pairs import make_pairs
from tests.train.planted import planted


def loss_of(trainer: PreferenceTrainer) -> float:
    collator: Any = trainer.data_collator
    batch = collator.collate(collator.pairs)
    return float(trainer.compute_loss(trainer.model, {"batch": batch}).detach())


def log_probs(
    trainer: PreferenceTrainer, pair: TokenisedPair, ids: list[int], image: Any
) -> Tensor:
    """(tokens, V): the model's own forward over one plain row, one image."""
    vlm = trainer.vlm
    row = torch.tensor([pair.prefix + ids])
    pixels = vlm.image(image).tensors["pixel_values"]
    with torch.no_grad():
        logits = vlm.model(input_ids=row, pixel_values=pixels.reshape(1, *pixels.shape[-3:])).logits
    return logits[0, len(pair.prefix) - 1 : -1].double().log_softmax(-1)


def pairs_of(trainer: PreferenceTrainer) -> list[TokenisedPair]:
    collator: Any = trainer.data_collator
    return collator.pairs


def said(table: Tensor, ids: Tensor) -> float:
    return float(table.gather(1, ids[:, None]).sum())


def soft(x: float) -> float:
    return float(torch.nn.functional.softplus(torch.tensor(-x, dtype=torch.float64)))


def ratios(trainer: PreferenceTrainer, pair: TokenisedPair, ids: list[int], image: Any) -> float:
    """log pi - log ref of an answer, by two plain forwards."""
    tokens = torch.tensor(ids)
    policy = said(log_probs(trainer, pair, ids, image), tokens)
    with trainer.vlm.model.disable_adapter():
        return policy - said(log_probs(trainer, pair, ids, image), tokens)


@pytest.mark.parametrize(
    "collator", [{}, {"layout": "padded"}, {"pack_to": 400}], ids=["shared", "padded", "packed"]
)
def test_mdpo_is_four_plain_forwards(
    tiny_llava: Path, tmp_path: Path, collator: dict[str, Any]
) -> None:
    trainer = planted(tiny_llava, tmp_path, Mdpo(MdpoSettings(beta=0.3, anchor=0.1)), **collator)
    view: ImageView = trainer.views[0]
    expected, apart = 0.0, 0.0
    for pair in pairs_of(trainer):
        image = open_image(pair.pair.image, pair.pair.id)
        other = view_image(view, pair.pair, image, 4)
        chosen = ratios(trainer, pair, pair.chosen, image)
        rejected = ratios(trainer, pair, pair.rejected, image)
        cropped = ratios(trainer, pair, pair.chosen, other)
        apart = max(apart, abs(chosen - cropped))
        expected += soft(0.3 * (chosen - rejected)) + soft(0.3 * (chosen - cropped))
        expected += soft(0.3 * chosen - 0.1)
    assert apart > 1e-3, "the crop changes nothing: the test would not see a wrong image"
    assert loss_of(trainer) == pytest.approx(expected / 3, abs=1e-5)


@pytest.mark.parametrize("whose", ["own", "policy"])
@pytest.mark.parametrize("form", ["one", "two"])
def test_povid_scores_the_noisy_tokens_on_the_true_image(
    tiny_llava: Path, tmp_path: Path, whose: str, form: str
) -> None:
    settings = {"beta": 0.3, "form": form, "reference_tokens": whose, "noise_step": 900}
    trainer = planted(tiny_llava, tmp_path, Povid(PovidSettings.model_validate(settings)))
    expected, different = 0.0, 0
    vlm = trainer.vlm
    for pair in pairs_of(trainer):
        image = open_image(pair.pair.image, pair.pair.id)
        noisy = view_image(trainer.views[0], pair.pair, image, 4)
        best = log_probs(trainer, pair, pair.chosen, noisy).argmax(-1)
        policy = said(log_probs(trainer, pair, pair.chosen, image), best)
        with vlm.model.disable_adapter():
            own = log_probs(trainer, pair, pair.chosen, noisy).argmax(-1)
            different += int((own != best).sum())
            scored = own if whose == "own" else best
            noise = policy - said(log_probs(trainer, pair, pair.chosen, image), scored)
        chosen = ratios(trainer, pair, pair.chosen, image)
        rejected = ratios(trainer, pair, pair.rejected, image)
        if form == "one":
            expected += soft(0.3 * (chosen - 0.5 * rejected - 0.5 * noise))
        else:
            expected += (soft(0.3 * (chosen - noise)) + soft(0.3 * (chosen - rejected))) / 2
    assert different > 0, "both see the same tokens: the test would not tell whose they are"
    assert loss_of(trainer) == pytest.approx(expected / 3, abs=1e-5)


def test_segments_reach_their_tokens(tiny_llava: Path) -> None:
    """What the weighted tokens decode to is the words of the segment, whatever the tokenizer."""
    vlm = load_vlm_from(tiny_llava, dtype="float32")
    pair = make_pairs(2)[1]
    words = pair.chosen.split()
    start = pair.chosen.index(words[2])
    end = start + len(f"{words[2]} {words[3]}")
    segments = (
        Segment(side="chosen", start=start, end=end, label="edit", weight=2.0),
        Segment(side="rejected", start=0, end=1, label="edit"),
    )
    (found,), _ = tokenise(vlm, [dataclasses.replace(pair, segments=segments)], None, edits=True)
    assert found.edited is not None
    chosen, rejected = found.edited
    assert [len(chosen), len(rejected)] == [len(found.chosen), len(found.rejected)]
    inside = [t for t, w in zip(found.chosen, chosen, strict=True) if w == 2.0]
    assert vlm.tokenizer.decode(inside).split() == words[2:4]
    assert set(chosen) == {0.0, 2.0} and chosen[-1] == 0.0, "the end of turn is in no segment"
    assert rejected[0] == 1.0 and not any(rejected[1:])
    batch = Collator(vlm, [found]).collate([found])
    assert batch.edited_CS is not None
    assert batch.edited_CS[0, : len(chosen)].tolist() == chosen
    assert batch.edited_CS[1, : len(rejected)].tolist() == rejected


def run(folder: Path, model: Path, pairs: list[Preference], objective: Any, **train: Any) -> Any:
    folder.mkdir(parents=True)
    store.write_preferences(folder / "pairs", pairs, {})
    raw = {
        "name": "x",
        "model": {"path": str(model), "dtype": "float32", "adapter": {"rank": 4}},
        "data": {"pairs": {"arm": str(folder / "pairs")}},
        "train": {
            "objective": objective,
            "learning_rate": 1e-3,
            "batch_size": 3,
            "micro_batch_size": 3,
            "epochs": 2,
            "reference_folder": str(folder.parent / "references"),
            **train,
        },
        "launch": {"launcher": "none"},
    }
    trainer = preference.train_arm(from_dict(raw), "arm", folder / "run")
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.long
def test_whole_runs(tiny_llava: Path, tmp_path: Path) -> None:
    pairs = make_pairs(6)
    live = run(tmp_path / "live", tiny_llava, pairs, "mdpo")
    cached = run(tmp_path / "cached", tiny_llava, pairs, "mdpo", reference="cached")
    assert live == pytest.approx(cached, abs=1e-5)
    assert live[0] == pytest.approx(3 * 0.693147, abs=1e-3) and live[-1] < live[0]
    again = run(tmp_path / "again", tiny_llava, pairs, "mdpo", reference="cached")
    assert again == cached
    noisy = run(tmp_path / "povid", tiny_llava, pairs, "povid")
    assert noisy[0] == pytest.approx(0.693147, abs=1e-3) and noisy[-1] < noisy[0]
    other = [
        dataclasses.replace(
            p, rejected_image=ImageRef(path="o.png", data=to_png(open_image(q.image, q.id)))
        )
        for p, q in zip(pairs, pairs[::-1], strict=True)
    ]
    swapped = run(tmp_path / "own", tiny_llava, other, {"name": "mdpo", "image": "record"})
    assert swapped[-1] < swapped[0] and swapped[-1] != live[-1]
    edited = [
        dataclasses.replace(p, segments=(Segment(side="rejected", start=0, end=4, label="edit"),))
        for p in pairs
    ]
    dense = run(tmp_path / "ddpo", tiny_llava, edited, "ddpo")
    assert dense[0] == pytest.approx(0.693147, abs=1e-3) and dense[-1] < dense[0]


def test_refusals(tiny_llava: Path, tmp_path: Path) -> None:
    pairs = make_pairs(3)
    with pytest.raises(DataError, match="no pair has segments"):
        run(tmp_path / "a", tiny_llava, pairs, "ddpo")
    with pytest.raises(ValueError, match="cached cannot serve"):
        run(tmp_path / "b", tiny_llava, pairs, "povid", reference="cached")
    with pytest.raises(DataError, match="has no rejected_image"):
        run(tmp_path / "c", tiny_llava, pairs, {"name": "mdpo", "image": "record"})
