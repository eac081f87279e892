"""What the pass runs twice, what it need not run, and what it keeps: the noise floor, the base at
step 0, nothing large."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mlalign import methods
from mlalign.models.llava import Llava
from mlalign.probes import _pass
from mlalign.probes._alike import adds_nothing
from mlalign.probes._items import REPEATED
from mlalign.probes._probe import HIDDEN
from tests.probes import tiny
from tests.probes.spy import Spy

FLOORS = {
    "image_reliance": ("margin_image", "margin_blank", "blank_per_token"),
    "attention_grounding": ("image_mass", "row_entropy"),
    "neuron_drift": ("rms",),
}


def suite(*names: str) -> list[Any]:
    return [methods.find("mlalign.probes", name)() for name in names]


@pytest.mark.parametrize("count", [1, 3])
def test_the_floor_is_rounding_and_not_nothing(count: int) -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    readings = tiny.new_pass(vlm, suite(*FLOORS), count=count).run(0)
    for probe, metrics in FLOORS.items():
        floors = []
        for metric in metrics:
            of_set = tiny.pick(readings, probe=probe, metric=metric, record="")
            size = max(abs(each.value) for each in of_set if math.isfinite(each.value))
            own = [each.noise for each in of_set if math.isfinite(each.noise)]
            # One record has few words: not every group need have moved.
            assert max(own) < 1e-4 * size, (probe, metric)
            floors += own
        assert max(floors) > 0, probe


def test_the_repeat_is_the_first_records_in_another_batch() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    spy = Spy({HIDDEN})
    tiny.new_pass(vlm, [spy], count=6, batch_size=5).run(0)
    adapted, repeat = spy.watches[1:3]
    indices = [item.index for item in repeat.batch.items]
    assert indices == list(range(REPEATED))[::-1] and len(adapted.batch.items) == 5
    assert repeat.batch.rows.input_ids_RT.shape[1] > adapted.batch.rows.input_ids_RT.shape[1]
    assert (adapted.batch.attention, repeat.batch.attention) == ("auto", "dense")
    for row, index in enumerate(indices):
        one, other = (
            watch.views["image"].logps_CS[3 * place : 3 * place + 3].sum(1)
            for watch, place in ((repeat, row), (adapted, index))
        )
        assert torch.allclose(one, other, rtol=1e-5)
    last = tiny.LAYERS - 1, "residual"
    width = min(len(each.states[last][0]) for each in (adapted, repeat))
    gap = adapted.states[last][0, :width] - repeat.states[last][indices.index(0), :width]
    real = adapted.batch.rows.segment_RT[0, :width] >= 0
    assert 0 < gap[real].abs().max() < 1e-3


def test_before_the_first_step_one_side_stands_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny.with_lora(tiny.new_vlm())
    spy = Spy()
    once = tiny.new_pass(vlm, [spy, *suite(*FLOORS)], count=2).run(0)
    assert len(spy.watches) == 2, "adapted and repeat"
    monkeypatch.setattr(_pass, "adds_nothing", lambda _: False)
    twice = tiny.new_pass(vlm, [spy, *suite(*FLOORS)], count=2).run(0)
    assert len(spy.watches) == 2 + 3
    for one, other in zip(once, twice, strict=True):
        for name in ("value", "lo", "hi", "noise", "n"):
            a, b = getattr(one, name), getattr(other, name)
            assert a == b or (math.isnan(a) and math.isnan(b)), (name, one, other)


def test_what_counts_as_one_side() -> None:
    assert adds_nothing(tiny.new_vlm())
    vlm = tiny.with_lora(tiny.new_vlm())
    assert adds_nothing(vlm)
    parameter = next(p for name, p in vlm.model.named_parameters() if "lora_B" in name)
    # Under ZeRO-3 a rank holds a part, and the parameter itself is empty.
    parameter.ds_tensor = torch.ones(1)  # type: ignore[attr-defined]
    assert not adds_nothing(vlm)
    del parameter.ds_tensor  # type: ignore[attr-defined]
    with torch.no_grad():
        parameter[0, 0] = 1e-9
    assert not adds_nothing(vlm)


@pytest.mark.parametrize("more", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_what_is_not_a_plain_lora_is_read_on_both_sides(more: dict[str, Any]) -> None:
    vlm = tiny.new_vlm()
    config = LoraConfig(r=2, target_modules=Llava.lora_targets(vlm.core), **more)
    vlm.model = get_peft_model(vlm.model, config).eval()
    assert not adds_nothing(vlm)


def test_nothing_large_is_kept_between_passes() -> None:
    vlm = tiny.with_lora(tiny.new_vlm())
    probes = tiny.new_pass(vlm, suite(*methods.names("mlalign.probes")), count=4)
    probes.run(0)
    before = held_bytes()
    del probes
    # Images and boxes of the items (three of 96 x 96 each), and what watches keep by record.
    assert before - held_bytes() < 4 * 3 * 3 * 96 * 96 * 4 * 1.5


def held_bytes() -> int:
    """Bytes of all tensors that live."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor) and each.device.type == "cpu":
            storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(storages.values())
