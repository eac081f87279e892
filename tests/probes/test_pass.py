"""The pass shares forwards, puts everything back, and is the same on one rank and on several."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mlalign import methods
from mlalign.branching.batch import ProbeReading
from mlalign.images import open_image
from mlalign.objects import vocabulary
from mlalign.probes import _forwards, _pass
from mlalign.probes._pass import ProbeError, ProbePass
from mlalign.probes._probe import ATTENTION, BLANK, KNOCKOUTS, PROMPT_ATTENTION, Watch, means
from mlalign.probes._records import ProbeRecord
from tests.probes import tiny
from tests.probes.spy import Spy

NAMES = ["attention_grounding", "image_reliance", "neuron_drift"]


def every() -> list[Any]:
    return [methods.find("mlalign.probes", name)() for name in NAMES]


def rows(readings: list[ProbeReading]) -> list[tuple[Any, ...]]:
    return [(r.probe, r.metric, r.side, r.record, r.layer, r.head, r.group, r.n) for r in readings]


def count_forwards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    real = _forwards.completion_logps

    def counted(model: Any, batch: Any, **keywords: Any) -> Any:
        calls.append(batch.ids_C[0])
        return real(model, batch, **keywords)

    monkeypatch.setattr(_forwards, "completion_logps", counted)
    return calls


def test_the_room_holds_the_three_probes() -> None:
    assert set(NAMES) <= set(methods.names("mlalign.probes"))


def test_everything_is_put_back() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    model = vlm.model
    # The first pass imports libraries, and transformers adds a hook of its own at it.
    tiny.new_pass(vlm, every()).run(0)
    model.train()
    model.get_base_model().gradient_checkpointing_enable()
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.LayerNorm))
    frozen.eval()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    tiny.new_pass(vlm, every()).run(0)
    assert states[0] == random.getstate()
    for before, after in zip(states[1], np.random.get_state(), strict=True):
        assert np.array_equal(before, after)
    assert torch.equal(states[2], torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert grads == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert vlm.core.config.text_config._attn_implementation == "sdpa"
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_adapter_is_on_again() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    batch = tiny.new_pass(vlm, [])._batches[0]
    with torch.no_grad():
        before = _forwards.completion_logps(vlm.model, vlm.encode(batch.rows)).logps_CS
        tiny.run(vlm, every()[2])
        after = _forwards.completion_logps(vlm.model, vlm.encode(batch.rows)).logps_CS
    assert torch.equal(before, after)


def test_forwards_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_forwards(monkeypatch)
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    probes = tiny.new_pass(vlm, every())
    probes.run(0)
    # Two batches: base and adapted with three views each; three views of the repeated batch.
    assert len(calls) == 2 * (3 + 3) + 3
    calls.clear()
    probes.run(1)
    # Later only the base's activations are read again; its log-probs do not change.
    assert len(calls) == 2 * (3 + 1) + 3
    calls.clear()
    tiny.new_pass(vlm, every()[:1]).run(0)
    assert len(calls) == 2 * 2 + 1


def test_the_same_numbers_together_and_alone() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    together = tiny.new_pass(vlm, every()).run(5)
    alone = [r for probe in every() for r in tiny.new_pass(vlm, [probe]).run(5)]
    assert rows(together) == rows(alone)
    for one, other in zip(together, alone, strict=True):
        assert one.value == other.value or (one.value != one.value and other.value != other.value)


# One more record than an even number, so that the second rank repeats one; or it has none at all.
@pytest.mark.parametrize("count", [5, 3, 1])
def test_two_ranks_read_what_one_reads(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    single = tiny.new_pass(vlm, every(), count=count).run(3)
    # Not strict: a rank without a record of its own has nothing to read until all is gathered.
    of_two = {"count": count, "world": 2, "strict": False}
    ranks = [tiny.new_pass(vlm, every(), rank=r, **of_two) for r in (0, 1)]
    calls = count_forwards(monkeypatch)
    gathered, counts = [], []
    for each in ranks:
        monkeypatch.setattr(_pass, "_gather", lambda value: gathered.append(value) or [value])
        each.run(3)
        counts.append(len(calls))
        calls.clear()
    assert counts[0] == counts[1], "unequal forwards would hang under ZeRO-3"
    monkeypatch.setattr(_pass, "_gather", lambda value: gathered)
    double = tiny.new_pass(vlm, every(), count=count, rank=1, world=2).run(3)
    assert rows(double) == rows(single)
    for one, other in zip(double, single, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-3, abs=1e-3, nan_ok=True), one


class Broken(tiny.Probe):
    """A probe that raises where it is told to."""

    name = "broken"
    prefix = "probe/broken"
    headline = "adapted"
    needs = frozenset({"attention", "hidden"})

    def __init__(self, where: str) -> None:
        self.where = where

    def watch(self, vlm: Any, batch: Any) -> Watch:
        watch = Watch(batch)
        if self.where == "watch":
            raise KeyError("planted")
        if self.where in ("attention", "hidden", "logps"):
            setattr(watch, self.where, self.fail)
        return watch

    def compare(self, batch: Any, before: Watch, after: Watch) -> list[Any]:
        return self.fail() if self.where == "compare" else [None] * len(batch.items)

    def readings(self, *args: Any) -> list[ProbeReading]:
        return self.fail() if self.where == "readings" else []

    def fail(self, *args: Any) -> Any:
        raise KeyError("planted")


@pytest.mark.parametrize("where", ["watch", "attention", "hidden", "logps", "compare", "readings"])
def test_a_probe_that_raises_is_named_and_left_out(where: str) -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    lenient = tiny.new_pass(vlm, [Broken(where), every()[1]], strict=False)
    readings = lenient.run(0)
    assert list(lenient.failed) == ["broken"] and "planted" in lenient.failed["broken"]
    assert {r.probe for r in readings} == {"image_reliance"}
    assert {r.probe for r in lenient.run(1)} == {"image_reliance"}
    with pytest.raises(ProbeError, match="probe broken: KeyError: 'planted'"):
        tiny.new_pass(vlm, [Broken(where)]).run(0)


def test_without_an_adapter_the_base_is_step_0(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny.new_vlm()
    with pytest.raises(ValueError, match="step 7 of a model without an adapter"):
        tiny.new_pass(vlm, every()).run(7)
    probes = tiny.new_pass(vlm, every())
    probes.run(0)
    calls = count_forwards(monkeypatch)
    with torch.no_grad():
        vlm.core.lm_head.weight.mul_(1.5)
    readings = probes.run(1)
    assert len(calls) == 2 * 3 + 3, "the base is not run again"
    assert tiny.one(readings, "margin_image", side="delta").value != 0


def test_means_have_one_name_each() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    probes = tiny.new_pass(vlm, every())
    scalars = means(probes.methods, probes.run(0))
    for name in (
        "grounding/image_mass/response",
        "grounding/image_mass/response/base",
        "grounding/image_mass/response/delta/noise",
        "grounding/box_lift/real",
        "grounding/real_vs_absent_auroc",
        "drift/rms/image",
        "drift/rms/response/noise",
        "drift/cka/prompt",
        "drift/lora_norm",
        "probe/image_reliance/blank_per_token/own",
        "probe/image_reliance/kept_swapped/delta",
    ):
        assert name in scalars, sorted(scalars)


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one record"):
        ProbePass(tiny.new_vlm(), [], every(), None, 2)  # type: ignore[arg-type]


def suite() -> list[Any]:
    """Every probe of the room."""
    return [methods.find("mlalign.probes", name)() for name in methods.names("mlalign.probes")]


def bare(record: ProbeRecord) -> ProbeRecord:
    """Without boxes, and without a word for an object that is not there."""
    objects = tuple(replace(fact, box=None) for fact in record.facts.objects)
    facts = replace(record.facts, objects=objects)
    return replace(record, facts=facts, rejected=record.own)


@pytest.mark.parametrize("kind", ["bare", "no words", "one"])
def test_every_probe_runs_over_a_poor_set(kind: str) -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    records = tiny.records(1 if kind == "one" else 3)
    if kind == "bare":
        records = [bare(record) for record in records]
    if kind == "no words":
        words = {"own": "yes", "chosen": "no", "rejected": "yes"}
        records = [replace(record, **words) for record in records]
    probes = ProbePass(vlm, records, suite(), vocabulary("microworld"), 2, strict=False)
    readings = probes.run(0)
    assert not probes.failed, probes.failed
    assert means(probes.methods, readings)
    wanted = {
        "bare": ["no box", "no word for an absent"],
        "no words": ["no word for a real", "no word for an absent"],
        "one": ["one record", "one image"],
    }[kind]
    assert len(probes.notes) == len(wanted), probes.notes
    for text in wanted:
        assert any(f"the probe set has {text}" in note for note in probes.notes)
    said = list(probes.notes)
    probes.run(1)
    assert probes.notes == said, "said once"


def poison(vlm: Any, layer: int, row_of: str) -> Any:
    """A NaN in one block's output of the rows whose prefix holds the record's image."""
    wanted = vlm.image(open_image(next(r for r in tiny.records(4) if r.id == row_of).image, row_of))
    seen: list[bool] = []

    def note(_module: Any, args: Any) -> None:
        own = wanted.tensors["pixel_values"][0]
        seen[:] = [torch.equal(each, own) for each in args[0]]

    def spoil(_module: Any, _args: Any, output: Any) -> Any:
        output = output.clone()
        for row, bad in enumerate(seen):
            if bad:
                output[row, 3, 0] = math.nan
        return output

    tower = vlm.core.model.vision_tower
    # By keyword or not, as the model calls it.
    return [
        tower.register_forward_pre_hook(
            lambda m, a, k: note(m, a or (k["pixel_values"],)), with_kwargs=True
        ),
        vlm.layers[layer].register_forward_hook(spoil),
    ]


def test_activations_that_are_not_finite_are_named_and_stay_nan() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    named = [probe for probe in suite() if probe.name in NAMES]
    clean = tiny.new_pass(vlm, named, count=4).run(0)
    before_bad, bad = (record.id for record in tiny.records(4)[1:3])
    hooks = poison(vlm, 1, bad)
    probes = tiny.new_pass(vlm, suite(), count=4, strict=False)
    readings = probes.run(0)
    for hook in hooks:
        hook.remove()
    assert not probes.failed, probes.failed
    for name in ("attention_grounding", "image_reliance", "neuron_drift"):
        for side in ("base", "adapted"):
            said = f"probe {name}: activations are not finite on side {side}, view image: record "
            assert any(note.startswith(f"{said}{bad} (from layer 1 on)") for note in probes.notes)
    inert = {(p.name, m) for p in probes.methods for m in p.inert}
    spoiled, kept = 0, 0
    before = {key(r): r.value for r in clean}
    for reading in readings:
        if reading.probe not in NAMES or (reading.probe, reading.metric) in inert:
            continue
        # The record before it is shown its image in its own's place.
        seen = {"", bad, before_bad} if reading.probe == "image_reliance" else {"", bad}
        enters = reading.record in seen and (reading.layer < 0 or reading.layer >= 1)
        if enters:
            assert math.isnan(reading.value) and math.isnan(reading.lo), reading
            spoiled += 1
        elif math.isfinite(before[key(reading)]):
            assert math.isfinite(reading.value), reading
            kept += 1
    assert spoiled > 100 and kept > 100
    lora = tiny.one(readings, "lora_norm")
    assert math.isfinite(lora.value), "weights are read all the same"


def key(reading: ProbeReading) -> tuple[Any, ...]:
    return rows([reading])[0][:-1]


def test_a_model_that_a_probe_cannot_serve_is_named() -> None:
    def new() -> Any:
        vlm = tiny.new_vlm()
        vlm.layers[1].mlp = torch.nn.Linear(tiny.WIDTH, tiny.WIDTH)
        return vlm

    with pytest.raises(ValueError, match=r"neuron_drift: layer 1 has no mlp.gate_proj"):
        tiny.new_pass(new(), every())
    probes = tiny.new_pass(new(), every(), strict=False)
    assert list(probes.failed) == ["neuron_drift"]
    assert {r.probe for r in probes.run(0)} == {"attention_grounding", "image_reliance"}


@pytest.mark.parametrize("need", [ATTENTION, PROMPT_ATTENTION, *KNOCKOUTS[:1]])
def test_attention_that_cannot_be_reproduced_is_refused(need: str) -> None:
    vlm = tiny.new_vlm()
    vlm.core.config.text_config.attn_logit_softcapping = 30.0
    spy, other = Spy({need}), Spy({BLANK}, name="other")
    with pytest.raises(ValueError, match="spy: llama: soft-capped attention scores"):
        tiny.new_pass(vlm, [spy, other])
    probes = tiny.new_pass(vlm, [spy, other], strict=False)
    assert {r.probe for r in probes.run(0)} == {"other"} and list(probes.failed) == ["spy"]


class Remembers(Spy):
    """Counts its passes, over resumes."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = np.zeros(1, dtype=np.int64)

    def readings(self, *args: Any) -> list[ProbeReading]:
        self.passes = self.passes + 1
        return []

    def remember(self) -> dict[str, np.ndarray]:
        return {"passes": self.passes}

    def recall(self, kept: dict[str, np.ndarray]) -> None:
        self.passes = kept["passes"]


def test_what_probes_remember_is_handed_back() -> None:
    vlm = tiny.with_lora(tiny.new_vlm())
    first = tiny.new_pass(vlm, [Remembers(), Spy(name="other")], count=2)
    first.run(0)
    first.run(1)
    kept = first.remembered()
    assert list(kept) == ["spy"] and kept["spy"]["passes"] == 2
    resumed = tiny.new_pass(vlm, [Remembers(), Spy(name="other")], count=2)
    resumed.recall({**kept, "gone": {}})
    resumed.run(2)
    assert resumed.remembered()["spy"]["passes"] == 3


def test_a_probe_that_raises_over_its_weights_is_left_out() -> None:
    class Heavy(Spy):
        def weights(self, vlm: Any) -> Any:
            raise KeyError("planted")

    probes = tiny.new_pass(tiny.new_vlm(), [Heavy(), Spy(name="other")], count=2, strict=False)
    assert {r.probe for r in probes.run(0)} == {"other"} and "planted" in probes.failed["spy"]
