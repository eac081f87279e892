"""Planted truths and invariances of concept_shift."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from mlalign.probes._lens import Lens
from mlalign.probes._word_rows import writing
from mlalign.probes.concept_shift import METHOD, Settings, clusters, consistencies, shifts
from tests.probes import tiny

RECORDS, STATES, WIDTH, CONCEPTS = 12, 10, 32, 4
WHOLE = np.ones((1, RECORDS * STATES))


def centres(seed: int = 0) -> np.ndarray:
    return 10 * np.linalg.qr(np.random.default_rng(seed).normal(size=(WIDTH, CONCEPTS)))[0].T


def planted(by: np.ndarray, jitter: float = 0.0) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Records with states around four centres, moved by a vector (4, D) each; and the truth."""
    rng = np.random.default_rng(1)
    truth = rng.integers(0, CONCEPTS, (RECORDS, STATES))
    values = []
    for index, row in enumerate(truth):
        base = (centres()[row] + 0.5 * rng.normal(size=(STATES, WIDTH))).astype(np.float32)
        moved = by[row] + jitter * rng.normal(size=base.shape)
        names = [f"thing{k}" for k in row]
        values.append({"index": index, "names": names, "base": base, "adapted": base + moved})
    return values, truth.ravel()


def pool(values: list[dict[str, Any]], side: str) -> np.ndarray:
    return np.concatenate([v[side] for v in values]).astype(np.float64)


def probe(**settings: Any) -> METHOD:  # type: ignore[valid-type]
    return METHOD(Settings(concepts=CONCEPTS, **settings))


def test_planted_shifts_of_each_concept_are_recovered() -> None:
    by = np.random.default_rng(2).normal(size=(CONCEPTS, WIDTH)) * np.arange(1, 5)[:, None]
    values, truth = planted(by, jitter=0.02)
    labels = clusters(pool(values, "base"), CONCEPTS, 0)
    assert adjusted_rand_score(truth, labels) == 1
    readings = probe().readings(3, [values], [values[:2]], None)
    for concept in range(CONCEPTS):
        members = truth[labels == concept]
        (true,) = set(members)
        norm = np.linalg.norm(pool(values, "base")[truth == true], axis=1).mean()
        where = {"layer": 0, "group": f"concept {concept}"}
        found = tiny.one(readings, "shift", **where)
        assert found.value == pytest.approx(np.linalg.norm(by[true]) / norm, rel=0.01)
        assert found.lo < found.value < found.hi and found.n == len(members)
        assert tiny.one(readings, "consistency", **where).value == pytest.approx(1, abs=0.002)
    sizes = [tiny.one(readings, "shift", layer=0, group=f"concept {k}").n for k in range(4)]
    assert sizes == sorted(sizes, reverse=True) and sum(sizes) == RECORDS * STATES
    # Random concepts of the same sizes mix the directions.
    control = tiny.one(readings, "consistency_control")
    assert control.hi < tiny.one(readings, "consistency").lo
    assert tiny.one(readings, "shift_control").hi < tiny.one(readings, "shift").lo


def test_one_shift_for_all_is_common_and_no_concept_s_own() -> None:
    values, _ = planted(np.tile(np.ones(WIDTH), (CONCEPTS, 1)))
    readings = probe().readings(0, [values], [values[:2]], None)
    common = tiny.one(readings, "common_shift").value
    assert tiny.one(readings, "shift").value == pytest.approx(common, rel=1e-6)
    control = tiny.one(readings, "shift_control")
    assert control.value == pytest.approx(common, rel=1e-6)
    assert tiny.one(readings, "reassigned").value == 0


def test_states_that_change_places_are_reassigned() -> None:
    by = np.roll(centres(), 1, axis=0) - centres()
    values, _ = planted(by)
    readings = probe().readings(0, [values], [], None)
    assert tiny.one(readings, "reassigned").value == 1


def test_nothing_moved_is_zero_and_has_no_direction() -> None:
    values, _ = planted(np.zeros((CONCEPTS, WIDTH)))
    readings = probe().readings(0, [values], [values[:2]], None)
    for metric in ("shift", "common_shift", "reassigned", "shift_control"):
        assert {r.value for r in tiny.pick(readings, metric=metric)} == {0.0}
    assert all(math.isnan(r.value) for r in tiny.pick(readings, metric="consistency"))
    assert tiny.one(readings, "shift").noise == 0


def test_random_shifts_have_no_consistency() -> None:
    rng = np.random.default_rng(0)
    moved = rng.normal(size=(RECORDS * STATES, 512))
    labels = rng.integers(0, CONCEPTS, len(moved))
    records = np.arange(len(moved))
    assert abs(consistencies(moved, labels, records, WHOLE)[0]) < 0.005


def test_agrees_with_loops_over_pairs_and_weights() -> None:
    rng = np.random.default_rng(0)
    base, moved = rng.normal(size=(2, 9, 5))
    labels = np.array([0, 0, 1, 1, 1, 2, 2, 2, 2])
    moved[3] = 0
    records = np.array([0, 1, 0, 0, 1, 2, 2, 1, 1])
    counts = np.array([2, 1, 0, 1, 1, 3, 1, 2, 0])
    copies = np.repeat(np.arange(9), counts)
    length = sum(
        np.linalg.norm(moved[[i for i in copies if labels[i] == k]].sum(0)) for k in range(3)
    )
    expected = length / np.linalg.norm(base[copies], axis=1).sum()
    weights = counts[None].astype(float)
    assert shifts(base, moved, labels, weights)[0] == pytest.approx(expected)
    cosines = [
        moved[i] @ moved[j] / np.linalg.norm(moved[i]) / np.linalg.norm(moved[j])
        for i in copies
        for j in copies
        if records[i] != records[j] and labels[i] == labels[j] and 3 not in (i, j)
    ]
    assert consistencies(moved, labels, records, weights)[0] == pytest.approx(np.mean(cosines))


def test_an_empty_concept_is_no_number() -> None:
    values, _ = planted(np.ones((CONCEPTS, WIDTH)))
    few = [{**values[0], **{k: values[0][k][:2] for k in ("names", "base", "adapted")}}]
    readings = probe().readings(0, [few], [few], None)
    for concept in (2, 3):
        found = tiny.one(readings, "shift", layer=0, group=f"concept {concept}")
        assert found.n == 0 and math.isnan(found.value)
    nothing = {"index": 0, "names": [], **{s: np.zeros((0, 8)) for s in ("base", "adapted")}}
    for readings in (probe().readings(0, [[nothing]], [[nothing]], None),):
        assert readings and all(r.n == 0 and math.isnan(r.value) for r in readings)


def test_what_is_not_finite_does_not_break_the_rest() -> None:
    values, _ = planted(np.ones((CONCEPTS, WIDTH)))
    values[2]["adapted"][0, 0] = np.nan
    readings = probe().readings(0, [values], [values[:3]], None)
    assert tiny.one(readings, "shift").n == (RECORDS - 1) * STATES
    assert math.isfinite(tiny.one(readings, "shift").value)


def test_concepts_are_those_of_k_means_whatever_the_order() -> None:
    states = pool(planted(np.zeros((CONCEPTS, WIDTH)))[0], "base")
    labels = clusters(states, CONCEPTS, 0)
    known = KMeans(CONCEPTS, n_init=10, random_state=0).fit_predict(states)  # type: ignore[arg-type]
    assert adjusted_rand_score(known, labels) == 1
    order = np.random.default_rng(0).permutation(len(states))
    assert adjusted_rand_score(labels[order], clusters(states[order], CONCEPTS, 0)) == 1
    assert np.array_equal(labels, clusters(states, CONCEPTS, 0))


def test_a_shift_towards_a_word_writes_that_word() -> None:
    vlm = tiny.new_vlm()
    head = torch.randn(len(vlm.tokenizer), WIDTH, generator=torch.Generator().manual_seed(0))
    head = head / head.norm(dim=-1, keepdim=True)
    word = vlm.tokenizer.convert_tokens_to_ids("▁lamp")
    method = probe()
    method.prepare(vlm)
    method._lens = Lens(norm=lambda states: states, head_VD=head)
    values, _ = planted(np.tile(20 * head[word].numpy(), (CONCEPTS, 1)))
    readings = method.readings(0, [values], [values[:1]], None)
    rows = method.tables()["concept_words"]
    assert len(rows) == CONCEPTS
    for row in rows:
        assert row["after"][0] == "lamp" and row["gained"][0] == "lamp"
        assert "lamp" not in row["lost"] and len(row["objects"]) == 1
        overlap = tiny.one(readings, "word_overlap", layer=row["layer"], group=row["concept"])
        assert 0 <= overlap.value < 1
    assert method._lens is None


def test_states_are_of_the_rows_that_write_the_word() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    kept: list[Any] = []

    class Spy(METHOD):  # type: ignore[misc,valid-type]
        def compare(self, *args: Any) -> list[Any]:
            found = super().compare(*args)
            kept.extend(found)
            return found

    probes = tiny.new_pass(vlm, [Spy(Settings(layer=1))])
    probes.run(0)
    item = probes._batches[0].items[1]
    for row, (completion, token, mention) in enumerate(writing(item, 8)):
        assert token == mention.tokens[0] and kept[1]["names"][row] == mention.name
        ids = torch.tensor([item.prefix + item.completions[completion]])
        held: list[torch.Tensor] = []
        hook = vlm.layers[1].register_forward_hook(lambda _m, _a, out, held=held: held.append(out))
        with torch.no_grad(), vlm.adapter_off():
            vlm.model(input_ids=ids, pixel_values=item.image.tensors["pixel_values"])
        hook.remove()
        mine = torch.from_numpy(kept[1]["base"][row])
        at = len(item.prefix) + token - 1
        torch.testing.assert_close(mine, held[0][0, at], rtol=1e-3, atol=1e-3)
        assert not torch.allclose(mine, held[0][0, at + 1], atol=0.1)


def test_a_fresh_adapter_has_not_moved_and_passes_agree() -> None:
    vlm = tiny.with_lora(tiny.new_vlm())
    method = METHOD(Settings(concepts=3))
    probes = tiny.new_pass(vlm, [method])
    first = probes.run(0)
    rows = probes.tables["concept_words"]
    assert {r.value for r in tiny.pick(first, metric="shift")} == {0.0}
    assert {r.value for r in tiny.pick(first, metric="word_overlap")} == {1.0}
    assert len(rows) == 3 and all(row["gained"] == [] for row in rows)
    with torch.no_grad():
        for name, parameter in vlm.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    second = probes.run(1)
    moved = tiny.one(second, "shift")
    assert moved.value > 0.01 > 100 * moved.noise
    again = probes.tables["concept_words"]
    for row, other in zip(rows, again, strict=True):
        assert (row["objects"], row["before"]) == (other["objects"], other["before"])


def test_batches_do_not_matter() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    alone, together = (
        tiny.run(vlm, METHOD(Settings(concepts=3)), batch_size=size) for size in (1, 4)
    )
    for one, other in zip(alone, together, strict=True):
        assert (one.metric, one.group, one.n) == (other.metric, other.group, other.n)
        assert one.value == pytest.approx(other.value, rel=1e-3, abs=1e-4, nan_ok=True)


def test_refuses_a_block_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="layer is 3, but the model's blocks are 0 to 2"):
        METHOD(Settings(layer=3)).prepare(tiny.new_vlm())
