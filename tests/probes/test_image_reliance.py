"""Planted truths and invariances of image_reliance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mlalign.objects import vocabulary
from mlalign.probes._pass import ProbePass
from mlalign.probes._records import COMPLETIONS
from mlalign.probes.image_reliance import METHOD, _preferences
from tests.probes import tiny


def test_a_projector_of_zeros_relies_on_nothing() -> None:
    vlm = tiny.new_vlm()
    with torch.no_grad():
        for parameter in vlm.core.model.multi_modal_projector.parameters():
            parameter.zero_()
    readings = tiny.run(vlm, METHOD())
    for metric in ("blank", "blank_per_token", "swapped", "swapped_per_token"):
        assert {r.value for r in tiny.pick(readings, metric=metric)} == {0.0}
    for view in ("blank", "swapped"):
        assert tiny.one(readings, f"kept_{view}", side="adapted").value == 1


def test_equals_two_forwards_by_hand() -> None:
    vlm = tiny.new_vlm()
    probes = tiny.new_pass(vlm, [METHOD()])
    readings = probes.run(0)
    item = probes._batches[0].items[1]
    own, other = (i.tensors["pixel_values"][0] for i in (item.image, item.swapped))
    images = {"image": own, "blank": torch.zeros_like(own), "swapped": other}
    for completion, group in zip(item.completions, COMPLETIONS, strict=True):
        ids = torch.tensor([item.prefix + completion])
        sums = {}
        for view, pixels in images.items():
            with torch.no_grad():
                logits = vlm.model(input_ids=ids, pixel_values=pixels[None]).logits[0]
            logps = logits[len(item.prefix) - 1 : -1].log_softmax(-1)
            picked = logps.gather(-1, torch.tensor(completion)[:, None])
            sums[view] = float(picked.sum())
        for view in ("blank", "swapped"):
            gap = sums["image"] - sums[view]
            fixed = {"record": item.record.id, "side": "adapted", "group": group}
            assert abs(gap) > 1e-3
            assert tiny.one(readings, view, **fixed).value == pytest.approx(gap, abs=1e-3)
            per_token = tiny.one(readings, f"{view}_per_token", **fixed).value
            assert per_token == pytest.approx(gap / len(completion), abs=1e-4)


def test_a_fresh_adapter_prefers_nothing_over_the_base() -> None:
    readings = tiny.run(tiny.with_lora(tiny.new_vlm()), METHOD())
    assert {r.value for r in tiny.pick(readings, side="delta", metric="blank")} == {0.0}
    kept = tiny.one(readings, "kept_blank", side="delta")
    assert kept.n == 0 and math.isnan(kept.value)
    assert tiny.one(readings, "kept_blank", side="adapted").n == 4


def test_delta_is_adapted_minus_base_above_the_floor() -> None:
    readings = tiny.run(tiny.with_lora(tiny.new_vlm(), b_std=0.2), METHOD())
    sides = {s: tiny.one(readings, "margin_image", side=s).value for s in ("base", "adapted")}
    delta = tiny.one(readings, "margin_image", side="delta").value
    assert delta == pytest.approx(sides["adapted"] - sides["base"], abs=1e-4)
    for group in COMPLETIONS:
        reading = tiny.one(readings, "swapped", side="delta", group=group)
        assert reading.noise < 1e-3 and reading.n == 4


def test_batches_do_not_matter() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    alone, together = (tiny.run(vlm, METHOD(), batch_size=size) for size in (1, 4))
    for one, other in zip(alone, together, strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-3, nan_ok=True)


def record(name: str, image: float, blank: float, swapped: float) -> dict:
    margins = {"image": image, "blank": blank, "swapped": swapped}
    sums = {view: np.array([0.0, margin, 0.0]) for view, margin in margins.items()}
    return {"id": name, "base": sums, "adapted": sums}


def test_shares_of_planted_margins() -> None:
    records = [
        record("same", 2.0, 1.0, 3.0),
        record("lost", 2.0, -1.0, 1.0),
        record("wrong way round, kept", -1.0, -2.0, -0.1),
        record("no sign", 0.0, 1.0, 1.0),
    ]
    fixed = {"step": 0, "probe": METHOD.name, "side": "adapted"}
    turned = record("turned", -2.0, 1.0, -3.0)
    repeats = [{**records[0], "adapted": turned["adapted"]}, records[1]]
    readings = _preferences(fixed, records, repeats)
    assert tiny.one(readings, "preferred").value == pytest.approx(2 / 3)
    assert tiny.one(readings, "kept_blank").value == pytest.approx(2 / 3)
    assert tiny.one(readings, "kept_swapped").value == 1
    kept = tiny.one(readings, "kept_blank")
    assert (kept.n, kept.lo, kept.hi) == (3, 0, 1)
    # The first pair's margins are 2 in one run and -2 in the other, the second's the same in both.
    assert tiny.one(readings, "margin_image").noise == 2
    assert tiny.one(readings, "preferred").noise == 0.5
    assert kept.noise == 0.5 and tiny.one(readings, "kept_swapped").noise == 0


@pytest.mark.parametrize("count", [1, 2], ids=["one record", "one image"])
def test_one_image_cannot_be_swapped(count: int) -> None:
    records = [tiny.records(1)[0]] * count
    probes = ProbePass(tiny.new_vlm(), records, [METHOD()], vocabulary("microworld"), 2)
    readings = probes.run(0)
    assert {r.metric for r in readings} == {
        "blank",
        "blank_per_token",
        "margin_image",
        "margin_blank",
        "preferred",
        "kept_blank",
    }
    assert all(math.isfinite(r.value) for r in tiny.pick(readings, side="adapted"))
    probes.run(1)
    assert [note.startswith("the probe set has one image") for note in probes.notes].count(
        True
    ) == 1
