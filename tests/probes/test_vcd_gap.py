"""Planted truths, references and invariances of vcd_gap and of the gaps that it shares."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr
from sklearn.metrics import roc_auc_score

from mlalign.branching.views import noised
from mlalign.images import open_image
from mlalign.objects import vocabulary
from mlalign.probes._gaps import Entries, preferences, spread, words_apart
from mlalign.probes._lens import CHUNK, Lens
from mlalign.probes._pass import ProbePass
from mlalign.probes._records import COMPLETIONS
from mlalign.probes.attention_knockout import AttentionKnockout
from mlalign.probes.vcd_gap import METHOD, divergence
from tests.probes import tiny

FIXED = {"step": 0, "probe": METHOD.name}


def test_divergence_is_that_of_the_whole_vocabulary_in_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    seen, changed = torch.randn(2, CHUNK + 3, 8, generator=generator)
    changed[0] = seen[0]
    head_VD = torch.randn(40, 8, generator=generator)
    lens = Lens(norm=lambda states: 100 * states, head_VD=head_VD)
    found = divergence(lens, seen, changed).numpy()
    p, q = (np.exp(log_softmax((x @ head_VD.T).double().numpy(), -1)) for x in (seen, changed))
    assert found == pytest.approx(rel_entr(p, q).sum(-1), rel=1e-4, abs=1e-6)
    assert found[0] == 0 and found[1:].min() > 0


def test_a_projector_of_zeros_sees_no_noise() -> None:
    vlm = tiny.new_vlm()
    with torch.no_grad():
        for parameter in vlm.core.model.multi_modal_projector.parameters():
            parameter.zero_()
    readings = tiny.run(vlm, METHOD())
    for metric in ("kl_per_token", "gap", "gap_per_token"):
        assert {r.value for r in tiny.pick(readings, metric=metric) if r.n} == {0.0}
    assert tiny.one(readings, "kept_noised", side="adapted").value == 1


def test_equals_two_forwards_by_hand() -> None:
    vlm = tiny.new_vlm()
    probes = tiny.new_pass(vlm, [METHOD()])
    readings = probes.run(0)
    item = probes._batches[0].items[1]
    picture = open_image(item.record.image, item.record.id)
    images = (picture, noised(picture, 500, False, 0, item.record.id))
    for k, (completion, group) in enumerate(zip(item.completions, COMPLETIONS, strict=True)):
        ids = torch.tensor([item.prefix + completion])
        logps = []
        for image in images:
            pixels = vlm.image(image).tensors["pixel_values"]
            with torch.no_grad():
                logits = vlm.model(input_ids=ids, pixel_values=pixels).logits[0]
            # The row that produces a token stands one before it.
            logps.append(log_softmax(logits[len(item.prefix) - 1 : -1].double().numpy(), -1))
        kl_S = rel_entr(np.exp(logps[0]), np.exp(logps[1])).sum(-1)
        gap_S = (logps[0] - logps[1])[range(len(completion)), completion]
        fixed = {"record": item.record.id, "side": "adapted"}
        read = {
            m: tiny.one(readings, m, group=group, **fixed).value for m in ("gap", "kl_per_token")
        }
        assert abs(gap_S.sum()) > 1e-3
        assert read["gap"] == pytest.approx(gap_S.sum(), abs=1e-3)
        assert read["kl_per_token"] == pytest.approx(kl_S.mean(), rel=1e-3)
        shifted = np.roll(kl_S, 1)
        if group == "rejected":
            absent = next(m for m in item.mentions[k] if not m.real)
            wanted, other = (float(each[list(absent.tokens)].mean()) for each in (kl_S, shifted))
            found = tiny.one(readings, "kl_per_token", group="absent", **fixed)
            assert found.n == 1 and found.value == pytest.approx(wanted, rel=1e-3)
            assert found.value != pytest.approx(other, rel=1e-1), "not the next token's"


def test_batches_order_and_padding_do_not_matter() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    alone, together = (tiny.run(vlm, METHOD(), batch_size=size) for size in (1, 4))
    for one, other in zip(alone, together, strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-3, nan_ok=True), one
    records = tiny.records(4)[::-1]
    reverse = ProbePass(vlm, records, [METHOD()], vocabulary("microworld"), 2).run(0)
    for metric in ("gap_per_token", "kl_auroc", "margin_noised"):
        for reading in tiny.pick(together, metric=metric, record=""):
            fixed = {"side": reading.side, "group": reading.group}
            assert tiny.one(reverse, metric, **fixed).value == pytest.approx(
                reading.value, abs=1e-3
            )


def test_delta_and_noise_floor() -> None:
    readings = tiny.run(tiny.with_lora(tiny.new_vlm(), b_std=0.2), METHOD())
    for metric in ("kl_per_token", "gap_per_token"):
        for group in (*COMPLETIONS, "real", "absent"):
            base, adapted, delta = (
                tiny.one(readings, metric, side=side, group=group)
                for side in ("base", "adapted", "delta")
            )
            assert delta.value == pytest.approx(adapted.value - base.value, abs=1e-9)
            assert delta.value != 0 and delta.noise < 1e-3
            assert adapted.lo <= adapted.value <= adapted.hi
    assert tiny.one(readings, "kl_auroc", side="adapted").n > 4


def entry(name: str, real: list[float], absent: list[float], **sums: list[float]) -> Entries:
    """A record of words of two tokens each, whose quantity per token is given."""
    groups = [*COMPLETIONS, *["real"] * len(real), *["absent"] * len(absent)]
    tokens = np.array([4.0] * 3 + [2.0] * (len(real) + len(absent)))
    words = [2 * value for value in (*real, *absent)]
    side = {view: np.array([*each, *words]) for view, each in sums.items()}
    return Entries(id=name, groups=np.array(groups), tokens=tokens, base=side, adapted=side)


def test_groups_of_planted_words() -> None:
    records = [
        entry("two real", [1.0, 3.0], [2.0], q=[4.0, 8.0, 12.0]),
        entry("no absent", [5.0], [], q=[8.0, 8.0, 8.0]),
    ]
    readings = spread(FIXED, "q", records, [], lambda kept: kept["q"], per_token=True)
    own, real = (tiny.one(readings, "q", side="base", group=g) for g in ("own", "real"))
    assert (own.value, own.n) == (1.5, 2) and (real.value, real.n) == (3.0, 3)
    assert tiny.one(readings, "q", side="base", group="real", record="two real").value == 2
    assert not tiny.pick(readings, group="absent", record="no absent")
    sums = spread(FIXED, "q", records, [], lambda kept: kept["q"], per_token=False)
    assert tiny.one(sums, "q", side="base", group="own").value == 6
    assert {r.group for r in sums} == set(COMPLETIONS)


def test_separation_is_that_of_scikit_learn() -> None:
    draw = np.random.default_rng(0)
    records = [
        entry(str(i), draw.normal(1, 1, 3).tolist(), draw.normal(0, 1, i % 3).tolist(), q=[0.0] * 3)
        for i in range(12)
    ]
    values = np.concatenate([(r.base["q"] / r.tokens)[3:] for r in records])
    labels = np.concatenate([r.groups[3:] == "real" for r in records])
    reading = words_apart(FIXED, "a", records, [], lambda kept: kept["q"])[0]
    assert reading.value == pytest.approx(roc_auc_score(labels, values))
    assert reading.n == len(labels) and reading.lo < reading.value < reading.hi


def test_without_absent_words_or_with_one_record() -> None:
    records = [replace(r, rejected=r.chosen + " " + r.chosen) for r in tiny.records(3)]
    probes = ProbePass(tiny.new_vlm(), records, [METHOD()], vocabulary("microworld"), 2)
    readings = probes.run(0)
    auroc = tiny.one(readings, "kl_auroc", side="adapted")
    assert auroc.n == 0 and math.isnan(auroc.value)
    absent = tiny.one(readings, "kl_per_token", side="adapted", group="absent")
    assert absent.n == 0 and math.isnan(absent.value)
    alone = spread(
        FIXED, "q", [entry("x", [1.0], [], q=[1.0] * 3)], [], lambda kept: kept["q"], per_token=True
    )
    assert tiny.one(alone, "q", side="base", group="own").lo == 0.25


@pytest.mark.parametrize("method", [METHOD, AttentionKnockout])
def test_activations_that_are_not_finite_are_nan_and_nothing_fails(method: Any) -> None:
    vlm = tiny.new_vlm()
    with torch.no_grad():
        vlm.layers[1].mlp.down_proj.weight[0, 0] = math.nan  # type: ignore[index, union-attr]
    readings = tiny.run(vlm, method())
    assert readings and all(math.isnan(r.value) for r in readings)


def test_shares_of_planted_margins() -> None:
    margins = [(2.0, 1.0), (2.0, -1.0), (-1.0, -2.0), (0.0, 1.0)]
    records = [
        entry(str(i), [], [], image=[0.0, seen, 0.0], v=[0.0, changed, 0.0])
        for i, (seen, changed) in enumerate(margins)
    ]
    readings = preferences(FIXED, records, [], "v", "without")
    kept = tiny.one(readings, "kept_without", side="base")
    assert kept.n == 3 and kept.value == pytest.approx(2 / 3)
    assert tiny.one(readings, "margin_without", side="base").value == pytest.approx(-0.25)
    assert tiny.one(readings, "kept_without", side="delta").n == 0, "no difference has a sign"
