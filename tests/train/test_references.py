"""The step-0 gate and the reference cache, in real training runs of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mlalign import store
from mlalign.branching.reference_key import StaleEntry
from mlalign.recipe import from_dict
from mlalign.train import preference
from mlalign.train.gate import GateError
from mlalign.train.references import References
from mlalign.train.trainer import PreferenceTrainer
from tests.train.pairs import make_pairs


def train(folder: Path, model: Path, pairs: list[Any], **train_keys: Any) -> PreferenceTrainer:
    """A run of six pairs; the trainer after it."""
    data = folder / "pairs.parquet"
    folder.mkdir(parents=True)
    store.write_preferences(data, pairs, {})
    raw = {
        "name": "x",
        "model": {"path": str(model), "dtype": "float32", "adapter": {"rank": 4}},
        "data": {"pairs": {"arm": str(data)}},
        "train": {
            "objective": {"name": "dpo", "beta": 0.1},
            "learning_rate": 1e-3,
            "batch_size": 3,
            "micro_batch_size": 3,
            "epochs": 2,
            "reference_folder": str(folder.parent / "references"),
            **train_keys,
        },
        "launch": {"launcher": "none"},
    }
    return preference.train_arm(from_dict(raw), "arm", folder / "run")


def losses(folder: Path) -> list[float]:
    rows = (folder / "run/metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, rows) if "loss" in row]


def events(folder: Path, what: str) -> list[dict[str, Any]]:
    rows = (folder / "run/events.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, rows) if row["event"] == what]


def test_cached_is_live_and_is_used_again(tiny_llava: Path, tmp_path: Path) -> None:
    pairs = make_pairs(6)
    live = train(tmp_path / "live", tiny_llava, pairs)
    first = train(tmp_path / "first", tiny_llava, pairs, reference="cached")
    assert live.references is None and first.references is not None
    # Two epochs of two batches: the second epoch finds all that its batches hold.
    assert first.references.hits + first.references.misses == 4
    assert first.references.hits == 2 and len(first.references.cache) == 12
    again = train(
        tmp_path / "again",
        tiny_llava,
        pairs,
        reference="cached",
        objective={"name": "dpo", "beta": 1},
    )
    assert again.references is not None and again.references.misses == 0
    assert losses(tmp_path / "first") == pytest.approx(losses(tmp_path / "live"), abs=1e-6)
    assert losses(tmp_path / "again") != pytest.approx(losses(tmp_path / "live"), abs=1e-3)
    (gate,) = events(tmp_path / "again", "step-0 gate")
    assert gate["difference"] <= gate["bound"] and gate["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_a_changed_record_is_refused_by_name(tiny_llava: Path, tmp_path: Path) -> None:
    pairs = make_pairs(6)
    train(tmp_path / "first", tiny_llava, pairs, reference="cached")
    import dataclasses

    other = dataclasses.replace(pairs[2], chosen="Something else stands there.")
    changed = [*pairs[:2], other, *pairs[3:]]
    with pytest.raises(StaleEntry, match=pairs[2].id):
        train(tmp_path / "second", tiny_llava, changed, reference="cached")


def test_the_gate_stops_a_foreign_reference(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = References.get

    def off_by_a_bit(self: References, batch: Any, compute: Any) -> Any:
        import dataclasses

        found = real(self, batch, compute)
        wrong = found.logps_CS + 0.01 * found.mask_CS
        return dataclasses.replace(found, logps_CS=wrong)

    monkeypatch.setattr(References, "get", off_by_a_bit)
    with pytest.raises(GateError, match="reference_folder") as caught:
        train(tmp_path / "run", tiny_llava, make_pairs(6), reference="cached")
    assert "pair-" in str(caught.value)
    assert not (tmp_path / "run/run/arm/adapter").exists()


def test_checkpointing_is_dropped_where_memory_allows(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = make_pairs(6)
    train(tmp_path / "roomy", tiny_llava, pairs)
    monkeypatch.setattr("mlalign.train.checkpointing.free_bytes", lambda _: 2**20)
    short = train(tmp_path / "short", tiny_llava, pairs)
    choices = [events(tmp_path / name, "gradient checkpointing") for name in ("roomy", "short")]
    assert [choice["on"] for (choice,) in choices] == [False, True]
    assert short.args.gradient_checkpointing
    assert losses(tmp_path / "short") == pytest.approx(losses(tmp_path / "roomy"), abs=1e-6)


def test_packed_rows_train_to_the_same_losses(tiny_llava: Path, tmp_path: Path) -> None:
    pairs = make_pairs(6)
    train(tmp_path / "plain", tiny_llava, pairs)
    packed = train(tmp_path / "packed", tiny_llava, pairs, pack_to=400)
    made = packed.data_collator.collate(packed.data_collator.pairs[:3])  # type: ignore[union-attr]
    assert len(made.input_ids_RT) < 3 and made.num_pairs == 3
    for attention in ("dense", "split"):
        train(tmp_path / attention, tiny_llava, pairs, attention=attention)
        assert losses(tmp_path / attention) == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)


def test_a_record_with_infinite_log_probs_is_named_and_no_step_is_taken(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlalign.models._vlm import VLM

    real = VLM.encode

    def broken(self: VLM, batch: Any, model: Any = None) -> Any:
        made = real(self, batch, model)
        for feature in made.features.pooler_output:
            feature.fill_(float("nan"))
        return made

    monkeypatch.setattr(VLM, "encode", broken)
    stepped: list[int] = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: stepped.append(1))
    with pytest.raises(FloatingPointError, match="pair-"):
        train(tmp_path / "run", tiny_llava, make_pairs(6))
    assert not stepped
