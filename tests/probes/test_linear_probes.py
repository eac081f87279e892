"""Planted truths and invariances of linear_probes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeCV
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import KFold

from mlalign.probes.linear_probes import (
    FOLDS,
    METHOD,
    PENALTIES,
    Settings,
    balanced,
    held_out,
    in_own_span,
    questions,
)
from tests.probes import tiny
from tests.probes.ranks import equal, gathered

COUNT, WIDTH = 40, 64


def planted(change: Any, strength: float = 8.0) -> list[dict[str, Any]]:
    """Records whose base states hold two objects along two axes; nothing of attributes."""
    rng = np.random.default_rng(0)
    has = rng.permutation(np.arange(COUNT * 2) % 2).reshape(COUNT, 2)
    base = rng.normal(size=(COUNT, 1, 2, WIDTH))
    base[:, 0, :, :2] += strength * has[:, None, :]
    return [
        {
            "index": i,
            "facts": {
                "object": frozenset(n for n, h in zip("ab", has[i], strict=True) if h) or None,
                "attribute": None,
                "position": frozenset({"left" if i < 3 else "right"}),
            },
            "base": base[i],
            "adapted": change(base[i]),
        }
        for i in range(COUNT)
    ]


def read(values: list[dict[str, Any]]) -> list[Any]:
    probe = METHOD()
    probe._layers = [3]
    return probe.readings(0, [values], [], None)


def test_what_is_there_is_read_and_shuffled_labels_are_not() -> None:
    readings = read(planted(lambda states: states))
    for side in ("base", "adapted"):
        assert tiny.one(readings, "image", side=side, group="object").value > 0.97
        control = tiny.one(readings, "image_control", side=side, group="object")
        assert 0.25 < control.value < 0.75 and control.lo < control.value < control.hi
    fixed = tiny.one(readings, "prompt_fixed", side="adapted", group="object")
    refitted = tiny.one(readings, "prompt", side="adapted", group="object")
    assert fixed.value == refitted.value
    assert tiny.one(readings, "image", side="delta", group="object").value == 0
    layer = tiny.one(readings, "image", side="base", group="object", layer=3)
    assert layer.value == tiny.one(readings, "image", side="base", group="object").value


def test_a_fact_that_is_written_otherwise_is_lost_to_the_fixed_probe_only() -> None:
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(WIDTH, WIDTH)))[0]
    readings = read(planted(lambda states: states @ turn))
    assert tiny.one(readings, "image", side="adapted", group="object").value > 0.97
    assert tiny.one(readings, "image_fixed", side="adapted", group="object").value < 0.75


def test_a_fact_that_is_gone_is_lost_to_both() -> None:
    readings = read(planted(lambda states: states * (np.arange(WIDTH) >= 2)))
    for metric in ("image", "image_fixed"):
        assert tiny.one(readings, metric, side="adapted", group="object").value < 0.75
    delta = tiny.one(readings, "image", side="delta", group="object")
    assert delta.lo <= delta.value <= delta.hi < 0


def test_equals_scikit_learn_on_all_features_one_question_at_a_time() -> None:
    rng = np.random.default_rng(1)
    states = rng.normal(size=(COUNT, 100))
    labels = np.stack([np.arange(COUNT) % 3 // 2, rng.integers(0, 2, COUNT)])
    states[:, 0] += 1.5 * labels[0]
    old, _ = in_own_span(states, rng.normal(size=states.shape))
    (right,) = held_out(old, [old], labels)
    expected = np.zeros_like(labels)
    for train, test in KFold(FOLDS, shuffle=True, random_state=0).split(states):
        middle = states[train].mean(0)
        scale = np.linalg.norm(states[train] - middle, axis=1).mean()
        inputs, asked = ((states[part] - middle) / scale for part in (train, test))
        for v, each in enumerate(labels):
            probe = RidgeCV(alphas=PENALTIES).fit(inputs, 2 * each[train] - 1)
            scores = probe.predict(inputs)
            bar = np.mean([scores[each[train] == kind].mean() for kind in (0, 1)])
            expected[v, test] = probe.predict(asked) > bar
    assert (right == (expected == labels)).all()
    score = balanced(right, labels, np.ones((1, COUNT)))[0]
    each = [balanced_accuracy_score(y, p) for y, p in zip(labels, expected, strict=True)]
    assert score == pytest.approx(np.mean(each))


def test_a_rare_fact_is_not_answered_by_its_rarity() -> None:
    rng = np.random.default_rng(2)
    states = rng.normal(size=(200, 30))
    labels = (np.arange(200) % 10 == 0).astype(int)[None]
    (right,) = held_out(states, [states], labels)
    assert balanced(right, labels, np.ones((1, 200)))[0] == pytest.approx(0.5, abs=0.15)
    assert right[labels == 1].mean() > 0.2, "always saying no would be right nine times of ten"


def test_questions_need_records_of_both_kinds() -> None:
    facts = [frozenset({"a", "b"} if i < 6 else {"a"}) for i in range(12)]
    asked, left_out = questions([*facts, None], 5, 6)
    assert list(asked) == ["b"] and left_out == 1
    assert asked["b"].tolist() == [1] * 6 + [0] * 6 + [-1]
    assert questions(facts, 7, 6) == ({}, 2)
    many = [frozenset({"a"} if i % 2 else {"b", "c"} if i % 3 else {"c"}) for i in range(30)]
    assert list(questions(many, 5, 2)[0]) == ["a", "c"]


def test_what_is_not_known_is_left_out_and_counted() -> None:
    readings = read(planted(lambda states: states))
    for kind, counts in (
        ("attribute", {"values_read": 0, "values_left_out": 0, "records_without": COUNT}),
        ("position", {"values_read": 0, "values_left_out": 2, "records_without": 0}),
    ):
        for metric, value in counts.items():
            assert tiny.one(readings, metric, group=kind).value == value
        none = tiny.one(readings, "image", side="adapted", group=kind)
        assert none.n == 0 and math.isnan(none.value)
    without = tiny.one(readings, "records_without", group="object").value
    assert tiny.one(readings, "image", side="base", group="object").n == COUNT - without
    assert without > 0


def small() -> Any:
    return METHOD(Settings(layers=1, minimum=2, values=2))


def test_states_are_those_of_the_image_and_the_last_prompt_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    (values,), readings = gathered(monkeypatch, vlm, small, count=6)
    item = tiny.new_pass(vlm, [small()], count=6)._batches[1].items[0]

    held: list[torch.Tensor] = []
    hook = vlm.layers[-1].register_forward_hook(lambda _m, _a, out: held.append(out[0]))
    ids = torch.tensor([item.prefix])
    with torch.no_grad():
        vlm.model(input_ids=ids, pixel_values=item.image.tensors["pixel_values"])
    hook.remove()
    image = ids[0] == vlm.image_token_id
    found = next(v for v in values if v["index"] == item.index)["adapted"][0]
    assert found[0] == pytest.approx(held[0][image].mean(0).numpy(), abs=1e-4)
    assert found[1] == pytest.approx(held[0][-1].numpy(), abs=1e-4)
    assert tiny.one(readings, "values_read", group="position").value == 2


def test_batches_and_ranks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    alone = tiny.run(vlm, small(), batch_size=1, count=6)
    assert math.isfinite(tiny.one(alone, "image", side="delta", group="position").value)
    equal(alone, gathered(monkeypatch, vlm, small, world=2, count=6, batch_size=3)[1])


def test_too_few_records_are_no_number() -> None:
    readings = tiny.run(tiny.new_vlm(), METHOD(), count=2)
    for kind in ("object", "attribute", "position"):
        none = tiny.one(readings, "prompt", side="adapted", group=kind)
        assert none.n == 0 and math.isnan(none.value)


def test_states_that_are_not_finite_are_no_number() -> None:
    values = [replace_nan(v) for v in planted(lambda states: states)]
    assert math.isnan(tiny.one(read(values), "image", side="base", group="object").value)


def replace_nan(value: dict[str, Any]) -> dict[str, Any]:
    return {**value, "adapted": value["adapted"] * (math.nan if value["index"] == 4 else 1)}
