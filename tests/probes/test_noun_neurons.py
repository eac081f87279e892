"""Planted truths and invariances of noun_neurons."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mlalign.models._vlm import VLM
from mlalign.probes import noun_neurons
from mlalign.probes._probe import Item
from mlalign.probes._word_neurons import top_sets
from mlalign.probes.noun_neurons import METHOD, Settings
from tests.probes import tiny
from tests.probes.ranks import equal, gathered


def every() -> Any:
    return METHOD(Settings(words=100))


def by_hand(vlm: VLM, item: Item, number: int, token: int, shift: int = -1) -> np.ndarray:
    """(L, F): a(row) * (W_U W_down)[v] from a plain forward; the row is token + ``shift``."""
    held: list[torch.Tensor] = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _m, args: held.append(args[0][0]))
        for layer in vlm.layers
    ]
    ids = torch.tensor([item.prefix + item.completions[number]])
    with torch.no_grad():
        vlm.model(input_ids=ids, pixel_values=item.image.tensors["pixel_values"])
    for hook in hooks:
        hook.remove()
    row = len(item.prefix) + token + shift
    head_VD = vlm.core.get_output_embeddings().weight.detach()
    scores = []
    for layer, a_TF in zip(vlm.layers, held, strict=True):
        down = layer.mlp.down_proj
        weight_DF = down.get_delta_weight("default") + down.get_base_layer().weight
        scores.append(a_TF[row] * (head_VD @ weight_DF)[item.completions[number][token]])
    return torch.stack(scores).detach().numpy()


def test_scores_are_those_of_the_row_that_produces_the_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    (records,), _ = gathered(monkeypatch, vlm, every)
    items = [i for b in tiny.new_pass(vlm, [every()])._batches for i in b.items]
    checked = 0
    for item, record in zip(items, records, strict=True):
        words = noun_neurons.words_of(item, 100)
        assert record["words"] == [(word.name, word.real) for word in words]
        for word, found in list(zip(words, record["adapted"], strict=True))[:3]:
            right, wrong = (by_hand(vlm, item, word.completion, word.token, s) for s in (-1, 0))
            assert found["score_L"] == pytest.approx(right.sum(1), abs=1e-4)
            assert np.abs(found["score_L"] - wrong.sum(1)).max() > 1e-3, "a shift by one must show"
            expected = np.sort(np.argsort(-right, axis=None)[:20])
            assert found["top"].tolist() == expected.tolist()
            assert found["scores"] == pytest.approx(right.ravel()[expected], abs=1e-4)
            checked += 1
    assert checked >= 8


def test_a_neuron_that_writes_the_word_is_the_first() -> None:
    vlm = tiny.with_lora(tiny.new_vlm())
    probes = tiny.new_pass(vlm, [every()])
    items = [item for batch in probes._batches for item in batch.items]
    word = noun_neurons.words_of(items[0], 100)[0]
    with torch.no_grad():
        head = vlm.core.get_output_embeddings().weight
        weight = vlm.layers[2].mlp.down_proj.get_base_layer().weight
        # The coefficient has a sign in that row: the neuron must add to the word, not take away.
        held: list[torch.Tensor] = []
        hook = vlm.layers[2].mlp.down_proj.register_forward_pre_hook(
            lambda _m, args: held.append(args[0][0])
        )
        ids = torch.tensor([items[0].prefix + items[0].completions[word.completion]])
        vlm.model(input_ids=ids, pixel_values=items[0].image.tensors["pixel_values"])
        hook.remove()
        a = held[0][len(items[0].prefix) + word.token - 1, 11]
        weight[:, 11] = 50 * torch.sign(a) * head[word.vocabulary]
    probes.run(0)
    rows = [r for r in probes.tables["noun_neurons"] if r["word"] == word.name]
    planted = [r for r in rows if (r["layer"], r["neuron"]) == (2, 11)]
    assert [r["side"] for r in planted] == ["base", "adapted"]
    assert all(r["count"] >= 1 and r["of"] >= r["count"] for r in planted)


def test_shares_of_planted_scores() -> None:
    scores = np.zeros((2, 1, 10))
    scores[0, 0, :3] = (6, -5, 1)
    scores[1, 0, 4] = 3
    (found,) = top_sets(scores, 2)
    assert found["top"].tolist() == [0, 14]
    assert found["top_share"] == pytest.approx(0.9)
    # One of ten neurons of either layer: 7 / 10 and 3 / 10 of the positive sum of 10.
    assert found["top_share_random"] == pytest.approx(0.1)
    assert found["score_L"].tolist() == [2, 3]


def test_a_fresh_adapter_keeps_every_set() -> None:
    readings = tiny.run(tiny.with_lora(tiny.new_vlm()), every())
    for group in ("real", "absent"):
        kept = tiny.one(readings, "kept", side="delta", group=group)
        chance = tiny.one(readings, "kept_random", side="delta", group=group)
        assert kept.value == 1 and chance.hi < 1 and kept.n > 0
        assert tiny.one(readings, "score", side="delta", group=group).value == 0


def test_the_same_noun_shares_more_neurons_than_another() -> None:
    vlm = tiny.new_vlm()
    readings = tiny.run(vlm, every(), count=8)
    same = tiny.one(readings, "overlap_same_word", side="base", group="real")
    other = tiny.one(readings, "overlap_other_word", side="base", group="real")
    assert same.value > other.value and 0 < same.n <= other.n
    assert same.lo <= same.value <= same.hi
    share = tiny.one(readings, "top_share", side="base", group="real").value
    assert share > tiny.one(readings, "top_share_random", side="base", group="real").value


def test_an_adapter_moves_scores_above_the_floor() -> None:
    readings = tiny.run(tiny.with_lora(tiny.new_vlm(), b_std=0.2), every())
    score = tiny.one(readings, "score", side="delta", group="absent")
    assert score.noise < 1e-3 < abs(score.value)
    layers = tiny.pick(readings, metric="score", side="delta", group="absent", record="")
    assert sum(r.value for r in layers if r.layer >= 0) == pytest.approx(score.value, abs=1e-4)
    assert tiny.one(readings, "kept", side="delta", group="real").value < 1


def test_no_words_are_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = tiny.new_pass(tiny.new_vlm(), [every()])
    for batch in probes._batches:
        batch.items = [replace(item, mentions=((), (), ())) for item in batch.items]
    readings = probes.run(0)
    none = tiny.one(readings, "score", side="adapted", group="real")
    assert none.n == 0 and math.isnan(none.value)


def test_words_are_limited_and_counted_once() -> None:
    item = tiny.new_pass(tiny.new_vlm(), [every()])._batches[0].items[0]
    words = noun_neurons.words_of(item, 100)
    tokens = [tuple(item.completions[w.completion][: w.token + 1]) for w in words]
    assert len(set(tokens)) == len(tokens)
    assert {word.real for word in words} == {True, False}
    assert len(noun_neurons.words_of(item, 2)) == 2


def test_batches_and_ranks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    alone = tiny.run(vlm, METHOD(), batch_size=1)
    equal(alone, tiny.run(vlm, METHOD(), batch_size=4), abs=1e-3)
    equal(alone, gathered(monkeypatch, vlm, METHOD, world=2)[1], abs=1e-3)


def test_full_fine_tuning_is_compared_with_step_0() -> None:
    vlm = tiny.new_vlm()
    probes = tiny.new_pass(vlm, [every()])
    started = probes.run(0)
    with torch.no_grad():
        vlm.layers[2].mlp.down_proj.weight.mul_(2)
    readings = probes.run(1)
    fixed = {"group": "real", "layer": 2}
    old = tiny.one(started, "score", side="base", **fixed).value
    assert tiny.one(readings, "score", side="base", **fixed).value == pytest.approx(old)
    new = tiny.one(readings, "score", side="adapted", **fixed).value
    assert new == pytest.approx(2 * old, rel=1e-4)
