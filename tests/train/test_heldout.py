"""Held-out pairs: never trained on, the same by image, and the best weights are those kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from safetensors.torch import load_file

from mlalign import store
from mlalign.data.collate import TokenisedPair
from mlalign.data.reader import DataError
from mlalign.recipe import from_dict
from mlalign.sections import TrainSection
from mlalign.train import preference
from mlalign.train.heldout import image_of, split
from tests.train.pairs import make_pairs

PAIRS = make_pairs(16)


def raw(folder: Path, model: Path, **train: Any) -> dict[str, Any]:
    return {
        "name": "x",
        "model": {"path": str(model), "dtype": "float32", "adapter": {"rank": 4}},
        "data": {"pairs": {"arm": str(folder / "pairs")}},
        "train": {
            "objective": "dpo",
            "learning_rate": 2e-2,
            "batch_size": 3,
            "micro_batch_size": 3,
            "schedule": "constant",
            "heldout": 0.3,
            **train,
        },
        "launch": {"launcher": "none"},
    }


def train(folder: Path, model: Path, **keys: Any) -> Path:
    folder.mkdir(parents=True)
    store.write_preferences(folder / "pairs", PAIRS, {})
    preference.train_arm(from_dict(raw(folder, model, **keys)), "arm", folder / "run")
    return folder / "run"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_split_is_by_image() -> None:
    pairs = [TokenisedPair(pair, [1], [2], [3]) for pair in PAIRS]
    twice = [TokenisedPair(dataclasses.replace(p, id=p.id + "b"), [1], [2], [3]) for p in PAIRS]
    kept, held = split([*pairs, *twice], 0.3, 0, image_of)
    assert len(kept) + len(held) == 32 and held and kept
    images = [{p.pair.image_sha256 for p in side} for side in (kept, held)]
    assert not images[0] & images[1] and len(held) == 2 * len(images[1])
    assert {p.pair.id for p in split(twice, 0.3, 0, image_of)[1]} == {
        p.pair.id + "b" for p in split(pairs, 0.3, 0, image_of)[1]
    }
    assert split(pairs, 0.3, 1, image_of)[1] != split(pairs, 0.3, 0, image_of)[1]
    assert split(pairs, 0.0, 0, image_of) == (pairs, [])


def test_the_best_weights_are_kept_and_nothing_held_out_is_seen(
    tiny_llava: Path, tmp_path: Path
) -> None:
    run = train(tmp_path / "best", tiny_llava, steps=8, save_every=1, choose="best")
    losses = {
        row["step"]: row["heldout/loss"]
        for row in lines(run / "metrics.jsonl")
        if "heldout/loss" in row
    }
    assert sorted(losses) == list(range(1, 9))
    best = min(losses, key=lambda step: losses[step])
    assert best < 8, "the last step is the best: the test would not tell them apart"
    (event,) = (row for row in lines(run / "events.jsonl") if "chosen on held-out" in row["event"])
    assert event["step"] == best and event["heldout/loss"] == losses[best]

    seen = {row["id"] for row in lines(run / "pairs.jsonl")}
    held = {row.id for row in PAIRS} - seen
    assert len(held) == event["heldout/pairs"] > 0

    short = train(tmp_path / "short", tiny_llava, steps=best, save_every=0)
    found, expected = (
        load_file(folder / "arm/adapter/adapter_model.safetensors") for folder in (run, short)
    )
    assert found.keys() == expected.keys()
    assert all(bool((found[key] == expected[key]).all()) for key in expected)


def test_the_loss_is_that_of_the_pairs(tiny_llava: Path, tmp_path: Path) -> None:
    """Before the first step it would be ln 2; measured after the last only."""
    run = train(tmp_path / "x", tiny_llava, steps=2, learning_rate=1e-9)
    (row,) = (row for row in lines(run / "metrics.jsonl") if "heldout/loss" in row)
    assert row["step"] == 2 and row["heldout/loss"] == pytest.approx(0.693147, abs=1e-4)
    assert not (run / "arm/best").exists() and (run / "arm/adapter").is_dir()


def test_refusals(tiny_llava: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="needs heldout"):
        TrainSection.model_validate(
            {"objective": "dpo", "learning_rate": 1, "batch_size": 1, "steps": 1, "choose": "best"}
        )
    with pytest.raises(DataError, match="holds out no pair"):
        train(tmp_path / "x", tiny_llava, steps=1, heldout=1e-9)
