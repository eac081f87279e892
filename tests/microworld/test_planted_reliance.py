"""The planted experiment in small: its direction, its data, and what its tables say."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mlalign.microworld import planted_reliance as planted
from mlalign.microworld.planted_reliance import IGNORES, RELIANCE, USES, Experiment, captions


def test_arms_differ_in_the_image_alone() -> None:
    uses, ignores = (captions(3, 16, arm) for arm in (USES, IGNORES))
    assert [d.turns for d in uses] == [d.turns for d in ignores]
    assert [d.id for d in uses] == [d.id for d in ignores]
    assert sorted(d.image_sha256 for d in uses) == sorted(d.image_sha256 for d in ignores)
    for one, other in zip(uses, ignores, strict=True):
        assert one.image_sha256 == one.image.sha256()
        assert other.image_sha256 == other.image.sha256() != one.image_sha256
    assert not {d.id for d in uses} & {d.id for d in captions(4, 16, USES)}


def test_few_steps_tell_the_adapters_apart() -> None:
    how = Experiment(steps=5, batch=4, learning_rate=3e-3, records=4, probes=("image_reliance",))
    probes = planted.new_pass(planted.with_adapter(how), how)
    for item in (item for batch in probes._batches for item in batch.items):
        record = item.record
        assert record.rejected != record.chosen == record.facts.captions[0]
        assert [m.real for m in item.mentions[1]] == [True] * len(item.mentions[1])
        assert [m.real for m in item.mentions[2]].count(False) == 1
    found = planted.run_seed(0, probes, how)
    row = found["measures"][RELIANCE.label]
    assert row["apart"] == "+" and row["lo"] > 0.5
    assert row[USES] > 1.5 * row[IGNORES]
    losses = {arm: found["arms"][arm]["loss"] for arm in (USES, IGNORES)}
    assert losses[IGNORES][0] > 1 > losses[USES][0], "the wrong image does not tell the caption"
    base = [found["arms"][arm]["scalars"][_BASE] for arm in (USES, IGNORES)]
    assert base[0] == base[1], "both adapters stand on the same base"
    json.dumps(found, allow_nan=False)
    again = planted.train(probes.vlm, 0, USES, replace(how, steps=1))
    assert again == losses[USES][:1], "an adapter starts from the seed, not from the one before it"


_BASE = "probe/image_reliance/swapped_per_token/chosen/base"


def test_summary_of_planted_seeds() -> None:
    records = {"a": 3.0, "b": 5.0}
    seeds = []
    for seed, shift in enumerate((1.0, 0.0, -4.0)):
        lower = {name: value - shift for name, value in records.items()}
        seeds.append({"seed": seed, "measures": {RELIANCE.label: planted.compare(records, lower)}})
    assert [s["measures"][RELIANCE.label]["apart"] for s in seeds] == ["+", "", "-"]
    summary = planted.summarise(seeds)
    row = summary[RELIANCE.label]
    assert (row[USES], row[IGNORES]) == ([4.0, 4.0], [3.0, 8.0])
    assert (row["more"], row["less"], row["overlap"]) == (1, 1, True)
    text = planted.markdown(seeds, summary)
    assert "| 125% | 1 / 1 | yes |" in text and "-4.000 [-4.000, -4.000]" in text
    with pytest.raises(ValueError, match="same records"):
        planted.compare(records, {"a": 1.0})
