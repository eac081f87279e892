"""Planted truths and invariances of attention_grounding."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from mlalign.branching.layout import lay_out
from mlalign.probes import attention_grounding as grounding
from mlalign.probes.attention_grounding import METHOD, Settings, box_statistics, row_statistics
from tests.probes import tiny


def test_no_query_means_uniform_over_what_is_visible() -> None:
    vlm = tiny.new_vlm()
    with torch.no_grad():
        vlm.core.model.language_model.layers[1].self_attn.q_proj.weight.zero_()
    probes = tiny.new_pass(vlm, [METHOD()])
    readings = probes.run(0)
    for item in (item for batch in probes._batches for item in batch.items):
        # The row that produces token j of a completion sees the prefix and j tokens of its own.
        visible = [len(item.prefix) + j for ids in item.completions for j in range(len(ids))]
        fixed = {"record": item.record.id, "layer": 1, "side": "base", "group": "response"}
        mass = tiny.one(readings, "image_mass", **fixed)
        entropy = tiny.one(readings, "row_entropy", **fixed)
        assert mass.value == pytest.approx(sum(36 / v for v in visible) / len(visible), abs=1e-5)
        expected = sum(math.log(v) for v in visible) / len(visible)
        assert entropy.value == pytest.approx(expected, abs=1e-5)
        assert mass.n == len(visible)
        assert tiny.one(readings, "entropy", **fixed).value == pytest.approx(1, abs=1e-5)
        other = {**fixed, "layer": 0}
        assert tiny.one(readings, "entropy", **other).value < 0.999
        lift = tiny.one(readings, "box_lift", **{**fixed, "group": "real"})
        assert lift.value == pytest.approx(1, abs=1e-4)


def test_rows_are_those_that_produce_the_tokens() -> None:
    vlm = tiny.new_vlm()
    probes = tiny.new_pass(vlm, [METHOD()])
    readings = probes.run(0)
    item = probes._batches[1].items[0]
    masses = {-1: [], 0: []}
    vlm.core.set_attn_implementation("eager")
    for completion in item.completions:
        ids = torch.tensor([item.prefix + completion])
        with torch.no_grad():
            out = vlm.model(
                input_ids=ids,
                pixel_values=item.image.tensors["pixel_values"],
                output_attentions=True,
            )
        image = ids[0] == vlm.image_token_id
        for shift, into in masses.items():
            for t in range(len(item.prefix), ids.shape[1]):
                rows_LH = torch.stack([w[0, :, t + shift, image].sum(-1) for w in out.attentions])
                into.append(rows_LH)
    right, wrong = (torch.stack(masses[shift]).mean((0, 2)) for shift in (-1, 0))
    for layer in range(tiny.LAYERS):
        fixed = {"record": item.record.id, "layer": layer, "side": "adapted", "group": "response"}
        value = tiny.one(readings, "image_mass", **fixed).value
        assert value == pytest.approx(float(right[layer]), abs=1e-5)
        assert abs(value - float(wrong[layer])) > 1e-4, "a shift by one must show"


def test_all_mass_on_one_patch() -> None:
    weights = torch.zeros(2, 3, 10)
    image = torch.tensor([False] * 2 + [True] * 6 + [False] * 2)
    weights[..., 4] = 1
    inside = torch.tensor([False, False, True, True, False, False])
    share, lift = box_statistics(weights[..., image], inside)
    assert (share == 1).all() and (lift - 3).abs().max() < 1e-6
    share, lift = box_statistics(weights[..., image], ~inside)
    assert (share == 0).all() and (lift == 0).all()
    metrics = dict(zip(grounding.ROW_METRICS, row_statistics(weights, image), strict=True))
    assert (metrics["image_mass"] == 1).all() and (metrics["sink_image"] == 1).all()
    assert (metrics["entropy"] == 0).all() and (metrics["sink_first"] == 0).all()


def test_uniform_attention_and_a_first_token_sink() -> None:
    image = torch.tensor([False] * 2 + [True] * 6 + [False] * 2)
    inside = torch.tensor([True] * 3 + [False] * 3)
    uniform = torch.full((2, 3, 10), 0.1)
    share, lift = box_statistics(uniform[..., image], inside)
    assert (share - 0.5).abs().max() < 1e-6 and (lift - 1).abs().max() < 1e-6
    sink = torch.full((1, 1, 10), 0.5 / 9)
    sink[..., 0] = 0.5
    metrics = dict(zip(grounding.ROW_METRICS, row_statistics(sink, image), strict=True))
    assert metrics["sink_first"].item() == pytest.approx(0.5)
    assert metrics["image_mass"].item() == pytest.approx(6 * 0.5 / 9)
    assert metrics["image_mass_no_first"].item() == pytest.approx(6 / 9)


def test_a_fresh_adapter_changes_nothing() -> None:
    readings = tiny.run(tiny.with_lora(tiny.new_vlm()), METHOD())
    deltas = [r for r in tiny.pick(readings, side="delta") if not math.isnan(r.value)]
    assert deltas and all(r.value == 0 for r in deltas)


def test_an_adapter_moves_attention_above_the_floor() -> None:
    readings = tiny.run(tiny.with_lora(tiny.new_vlm(), b_std=0.2), METHOD())
    delta = tiny.one(readings, "image_mass", side="delta", group="response")
    base, adapted = (
        tiny.one(readings, "image_mass", side=side, group="response").value
        for side in ("base", "adapted")
    )
    assert delta.value == pytest.approx(adapted - base, abs=1e-6)
    assert delta.noise < 1e-5 < abs(delta.value)


def test_batches_and_padding_do_not_matter() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    alone, together = (tiny.run(vlm, METHOD(), batch_size=size) for size in (1, 4))
    assert len(alone) == len(together)
    for one, other in zip(alone, together, strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-5, nan_ok=True)


def test_heads_average_to_the_layer() -> None:
    readings = tiny.run(tiny.new_vlm(), METHOD())
    fixed = {"metric": "image_mass", "side": "base", "group": "response", "record": ""}
    heads = [r.value for r in tiny.pick(readings, **fixed) if r.head >= 0]
    assert len(heads) == tiny.LAYERS * tiny.HEADS
    whole = tiny.one(readings, "image_mass", side="base", group="response")
    assert whole.value == pytest.approx(sum(heads) / len(heads), abs=1e-6)
    assert whole.lo < whole.value < whole.hi
    for head in tiny.pick(readings, **fixed):
        assert head.lo <= head.value <= head.hi


def test_words_are_counted_and_mapped() -> None:
    probes = tiny.new_pass(tiny.new_vlm(), [METHOD(Settings(maps_by_layer=True))])
    readings = probes.run(0)
    rows = probes.tables["attention_maps"]
    real = tiny.one(readings, "words_real").value
    absent = tiny.one(readings, "words_absent").value
    assert absent >= 4, "each rejected text names one absent object"
    assert len(rows) == 2 * (real + absent)
    assert len(probes.tables["attention_maps_by_layer"]) == tiny.LAYERS * len(rows)
    texts = {record.id: record for record in tiny.records(4)}
    for row in rows:
        assert len(row["values"]) == row["grid_rows"] * row["grid_cols"] == 36
        text = getattr(texts[row["record"]], row["completion"])
        assert row["word"] in text[row["start"] : row["end"]]
        assert row["real"] == (row["word"] in texts[row["record"]].facts.names())
    both = [
        sum(sum(row["values"]) for row in rows if row["side"] == "base" and row["real"] == kind)
        for kind in (True, False)
    ]
    for total, group, count in zip(both, ("real", "absent"), (real, absent), strict=True):
        mass = tiny.one(readings, "image_mass", side="base", group=group)
        assert mass.value == pytest.approx(total / count, abs=1e-5)
        assert mass.n == count


def test_separation_stands_for_every_layer() -> None:
    readings = tiny.run(tiny.new_vlm(), METHOD())
    found = tiny.pick(readings, metric="real_vs_absent_auroc", side="adapted")
    assert [r.layer for r in found] == [-1, 0, 1, 2]
    assert all(0 <= r.value <= 1 for r in found)


def test_a_box_out_of_view_is_no_box() -> None:
    vlm = tiny.new_vlm()
    probes = tiny.new_pass(vlm, [METHOD()])
    for batch in probes._batches:
        for item in batch.items:
            item.boxes.clear()
    readings = probes.run(0)
    assert tiny.one(readings, "box_lift", side="base", group="real").n == 0
    assert math.isnan(tiny.one(readings, "box_lift", side="base", group="real").value)
    lost = tiny.one(readings, "words_real_without_box").value
    assert lost == tiny.one(readings, "words_real").value


def test_queries_of_a_laid_out_row() -> None:
    batch = lay_out([[7, 8, 9]], [[[1, 2], [3, 4, 5]]], pad_id=0)
    made = grounding.ProbeBatch(items=[], rows=batch, image_RT=batch.input_ids_RT == 8)
    first, second = (q.tolist() for q in made.queries(0))
    assert first == [2, 3] and second == [2, 5, 6]
    assert all(later - earlier >= 1 for earlier, later in pairwise(second))
    groups = {name: index.tolist() for name, index in made.groups(0).items()}
    assert groups == {"image": [1], "prompt": [0, 2], "response": [3, 4, 5, 6, 7]}
