"""Planted truths and invariances of visual_attention_ratio."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlalign.probes._attention_rows import RowSums
from mlalign.probes._probe import means
from mlalign.probes.visual_attention_ratio import METHOD, Settings, svar_range
from tests.probes import eager, tiny


def test_default_range_is_the_papers_share_of_the_layers() -> None:
    assert svar_range(32) == (5, 18)
    assert svar_range(28) == (4, 15)
    assert svar_range(3) == (0, 1)
    assert svar_range(1) == (0, 0)
    assert svar_range(40, first=0) == (0, 22)


def test_a_range_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="last: 3"):
        tiny.new_pass(tiny.new_vlm(), [METHOD(Settings(last=3))])
    with pytest.raises(ValueError, match="first: 2"):
        svar_range(4, first=2, last=1)


def test_equals_eager_at_an_object_word_and_a_shift_by_one_shows() -> None:
    vlm = tiny.new_vlm()
    probe = METHOD(Settings(first=1, last=2))
    probes = tiny.new_pass(vlm, [probe])
    readings = probes.run(0)
    item = probes._batches[0].items[1]
    svar: dict[int, list[float]] = {-1: [], 0: []}
    for completion, mentions in enumerate(item.mentions):
        weights_LHTT = eager.attention(vlm, item, completion)
        image_T = eager.image_columns(vlm, item, completion)
        var_LHT = weights_LHTT[..., image_T].sum(-1)
        for mention in mentions:
            if mention.real:
                rows = np.array(mention.tokens) + len(item.prefix)
                for shift, into in svar.items():
                    into.append(float(var_LHT[1:3, :, rows + shift].mean((1, 2)).sum()))
    fixed = {"record": item.record.id, "group": "real", "side": "adapted"}
    reading = tiny.one(readings, "svar", **fixed)
    assert reading.n == len(svar[-1])
    assert reading.value == pytest.approx(np.mean(svar[-1]), abs=1e-5)
    assert abs(reading.value - np.mean(svar[0])) > 1e-4


def planted(real: list[bool], var_WLH: np.ndarray) -> dict[str, Any]:
    kinds = np.array(real)
    side = RowSums(words=var_WLH[:, :, None].astype(np.float32))
    for group, chosen in (("real", kinds), ("absent", ~kinds), ("response", kinds | ~kinds)):
        side.sums[group] = var_WLH[chosen].sum(0)[:, None]
        side.counts[group] = np.full((3, 1), chosen.sum())
    return {"id": "one", "real": kinds, "base": side, "adapted": side}


def test_a_head_that_parts_the_words_is_found() -> None:
    generator = np.random.default_rng(0)
    values = []
    for number in range(6):
        real = [True, False, True, number % 2 == 0]
        var = generator.random((4, 3, 2)) * 0.01
        var[:, 1, 1] = np.where(real, 0.9, 0.5)
        values.append({**planted(real, var), "id": str(number)})
    probe = METHOD()
    probe.layers, probe._range = 3, (0, 1)
    readings = probe.readings(0, [values[:4], values[4:]], [values[:2]], None)
    for layer, head in np.ndindex(3, 2):
        reading = tiny.one(readings, "var_auroc", layer=layer, head=head, side="base")
        assert (reading.value == 1) == ((layer, head) == (1, 1))
    assert tiny.one(readings, "svar_auroc", side="base").value == 1
    real, absent = (tiny.one(readings, "svar", group=g, side="base") for g in ("real", "absent"))
    # The mean over two heads, summed over two layers: 0.9 / 2 and three means of up to 0.01.
    assert 0.45 < real.value < 0.47 and 0.25 < absent.value < 0.27
    assert means([probe], readings), "every scalar has a name of its own"


def test_fresh_adapter_batches_and_floor() -> None:
    fresh = tiny.run(tiny.with_lora(tiny.new_vlm()), METHOD(), count=2)
    assert {r.value for r in tiny.pick(fresh, side="delta", metric="svar") if r.n} == {0.0}
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    alone, together = (tiny.run(vlm, METHOD(), count=3, batch_size=size) for size in (1, 3))
    for one, other in zip(alone, together, strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-5, nan_ok=True)
    delta = tiny.one(alone, "svar", side="delta", group="response")
    assert delta.noise < 1e-5 < abs(delta.value)
