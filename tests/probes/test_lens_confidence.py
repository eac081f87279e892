"""Planted truths and invariances of lens_confidence."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mlalign.objects import vocabulary
from mlalign.probes._lens import Lens
from mlalign.probes._pass import ProbePass
from mlalign.probes._records import Mention
from mlalign.probes._stats import auroc
from mlalign.probes.lens_confidence import (
    METHOD,
    METRICS,
    Settings,
    _Confidence,
    chosen_layers,
    word_statistics,
    words_of,
)
from tests.probes import tiny

LAST = tiny.LAYERS - 1


def test_uniform_maps_have_lift_one_and_a_peak_is_found() -> None:
    inside = torch.zeros(36, dtype=torch.bool)
    inside[[3, 4, 9]] = True
    flat = torch.full((36,), -2.0)
    outside, peak = flat.clone(), flat.clone()
    outside[20], peak[9] = -0.5, -0.1
    table = word_statistics(torch.stack([flat, outside, peak, peak]), [*[inside] * 3, None])
    values = [dict(zip(METRICS, row, strict=True)) for row in table]
    assert values[0]["box_lift"] == pytest.approx(1)
    assert values[0]["confidence"] == pytest.approx(math.exp(-2))
    assert values[1]["box_lift"] < 1 and values[1]["pointing"] == 0
    p = peak.exp()
    assert values[2]["box_lift"] == pytest.approx(float(p[inside].sum() / p.sum()) * 12, rel=1e-5)
    assert values[2]["pointing"] == 1 and values[2]["log_confidence"] == pytest.approx(-0.1)
    assert math.isnan(values[3]["box_lift"]) and math.isnan(values[3]["pointing"])
    tiny_p = word_statistics(peak[None] - 500, [inside])[0]
    assert tiny_p[METRICS.index("box_lift")] == pytest.approx(values[2]["box_lift"], rel=1e-4)


def mention(name: str, real: bool, *tokens: int) -> Mention:
    return Mention(name=name, real=real, start=0, end=1, tokens=tokens)


def test_words_stand_for_the_first_tokens_of_their_spellings() -> None:
    item: Any = SimpleNamespace(
        completions=[[10, 11, 12], [20, 12, 30], [40, 41, 11]],
        mentions=(
            (mention("lamp", True, 0), mention("skateboard", True, 1, 2)),
            (mention("lamp", True, 0), mention("pot", False, 2)),
            (mention("lamp", True, 0), mention("skates", False, 2)),
        ),
    )
    lamp, board, pot, skates = words_of(item)
    assert lamp.ids == (10, 20, 40) and not lamp.several and not lamp.indistinct
    assert board.ids == (11,) and board.several and board.indistinct
    assert pot.ids == (30,) and not pot.indistinct
    assert skates.indistinct and not skates.several


def test_chosen_layers() -> None:
    assert chosen_layers(Settings(), 32) == [7, 15, 23, 31]
    assert chosen_layers(Settings(), 3) == [0, 1, 2]
    assert chosen_layers(Settings(layers=(5, 1, 5)), 6) == [1, 5]
    with pytest.raises(ValueError, match="layers names 6, but the model's blocks are 0 to 5"):
        chosen_layers(Settings(layers=(1, 6)), 6)


def test_a_word_planted_in_one_patch_is_found_there() -> None:
    vlm = tiny.new_vlm()
    probes = tiny.new_pass(vlm, [METHOD()])
    batch = probes._batches[0]
    size = len(vlm.tokenizer)
    head = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    head = head / head.norm(dim=-1, keepdim=True)
    batch.lens = Lens(norm=lambda states: states, head_VD=head)
    word = words_of(batch.items[1])[0]
    states = 0.1 * torch.randn(*batch.image_RT.shape, size)
    places = batch.image_RT[1].nonzero()[:, 0]
    states[1, places[17]] = 40 * head[word.ids[0]]
    found = []
    for order in (torch.arange(36), torch.randperm(36)):
        mixed = states.clone()
        mixed[1, places] = states[1, places[order]]
        watch = _Confidence(batch, [1])
        watch.hidden(0, "residual", mixed * 0)
        watch.hidden(1, "gate", mixed * 0)
        watch.hidden(1, "residual", mixed)
        index = batch.items[1].index
        assert set(watch.words) == {(item.index, 1) for item in batch.items}
        map_P = watch.words[index, 1][0]
        at = int((order == 17).nonzero())
        assert int(map_P.argmax()) == at and map_P[at] > math.log(0.99)
        assert int(watch.top[index, 1][0][at]) == word.ids[0]
        found.append(word_statistics(map_P[None], [None])[0, 0])
    assert found[0] == found[1]


def lens_by_hand(vlm: Any, item: Any, layer: int) -> torch.Tensor:
    """(P, V) log-probs of one block at the image tokens, by a plain forward of the prefix."""
    ids = torch.tensor([item.prefix])
    with torch.no_grad():
        out = vlm.core(
            input_ids=ids,
            pixel_values=item.image.tensors["pixel_values"],
            output_hidden_states=True,
        )
        if layer == LAST:
            logits = out.logits[0]
        else:
            states = out.hidden_states[layer + 1][0]
            logits = vlm.core.lm_head(vlm.core.model.language_model.norm(states))
    return logits[ids[0] == vlm.image_token_id].log_softmax(-1)


def test_equals_plain_forwards_and_the_last_block_the_model_s_own_logits() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    method = METHOD(Settings(map_records=3))
    probes = tiny.new_pass(vlm, [method])
    readings = probes.run(0)
    items = [item for batch in probes._batches for item in batch.items]
    best: dict[bool, list[float]] = {True: [], False: []}
    for item in items:
        maps = {layer: lens_by_hand(vlm, item, layer) for layer in range(tiny.LAYERS)}
        words = words_of(item)
        rows = [r for r in probes.tables["lens_maps"] if r["record"] == item.record.id]
        rows = [r for r in rows if r["side"] == "adapted"]
        assert len(rows) == (len(words) * tiny.LAYERS if item.index < 3 else 0)
        for row in rows:
            (word,) = (w for w in words if (w.name, w.real) == (row["word"], row["real"]))
            expected = maps[row["layer"]][:, list(word.ids)].amax(-1).exp()
            tolerance = 1e-6 if row["layer"] == LAST else 1e-4
            np.testing.assert_allclose(row["values"], expected, rtol=1e-3, atol=tolerance)
            assert row["grid_rows"] * row["grid_cols"] == len(row["values"])
        for row in probes.tables["lens_words"]:
            if (row["record"], row["side"]) == (item.record.id, "adapted"):
                ids = maps[row["layer"]].argmax(-1).tolist()
                assert row["words"] == [vlm.tokenizer.decode([i]).strip() for i in ids]
        for word in words:
            each = [m[:, list(word.ids)].max() for m in maps.values()]
            best[word.real].append(float(max(each)))
    for kind, real in (("real", True), ("absent", False)):
        reading = tiny.one(readings, "log_confidence", side="adapted", group=kind)
        assert reading.n == len(best[real])
        assert reading.value == pytest.approx(np.mean(best[real]), abs=1e-4)
    reading = tiny.one(readings, "real_vs_absent_auroc", side="adapted")
    assert reading.value == pytest.approx(auroc(best[True], best[False]), abs=1e-6)
    assert reading.lo <= reading.value <= reading.hi and reading.noise <= 0.2


def test_a_fresh_adapter_changes_nothing_and_a_moved_one_does() -> None:
    fresh = tiny.run(tiny.with_lora(tiny.new_vlm()), METHOD())
    assert {r.value for r in tiny.pick(fresh, side="delta")} == {0.0}
    moved = tiny.run(tiny.with_lora(tiny.new_vlm(), b_std=0.2), METHOD())
    delta = tiny.one(moved, "log_confidence", side="delta", group="real")
    assert delta.noise < 1e-3 < abs(delta.value)


def test_sets_without_boxes_or_absent_words() -> None:
    records = [
        replace(
            record,
            rejected=record.chosen,
            own=record.chosen,
            facts=replace(
                record.facts, objects=tuple(replace(o, box=None) for o in record.facts.objects)
            ),
        )
        for record in tiny.records(2)
    ]
    probes = ProbePass(tiny.new_vlm(), records, [METHOD()], vocabulary("microworld"), 2)
    readings = probes.run(0)
    for metric, kind in (("box_lift", "real"), ("pointing", "real"), ("confidence", "absent")):
        for reading in tiny.pick(readings, metric=metric, group=kind):
            assert reading.n == 0 and math.isnan(reading.value)
    assert math.isnan(tiny.one(readings, "real_vs_absent_auroc", side="base").value)
    assert math.isfinite(tiny.one(readings, "confidence", side="base", group="real").value)
    words = tiny.one(readings, "words_real").n
    assert tiny.one(readings, "words_absent").n == 0 < words
    assert tiny.one(readings, "words_real_without_box").n == words


def test_blocks_below_what_is_not_finite_are_read() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    with torch.no_grad():
        for name, parameter in vlm.model.named_parameters():
            if "layers.1.self_attn.q_proj.lora_B" in name:
                parameter.fill_(float("nan"))
    readings = tiny.run(vlm, METHOD(), count=2)
    where = {"side": "adapted", "group": "real"}
    for metric in ("confidence", "box_lift"):
        assert math.isfinite(tiny.one(readings, metric, layer=0, **where).value)
        assert math.isnan(tiny.one(readings, metric, layer=1, **where).value)
        assert math.isnan(tiny.one(readings, metric, **where).value)
    assert tiny.one(readings, "words_real").value > 0


def test_batches_and_padding_do_not_matter() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    alone, together = (tiny.run(vlm, METHOD(), batch_size=size) for size in (1, 4))
    for one, other in zip(alone, together, strict=True):
        assert (one.metric, one.record, one.layer) == (other.metric, other.record, other.layer)
        assert one.value == pytest.approx(other.value, rel=1e-3, abs=1e-4, nan_ok=True)
