"""The pass shares forwards, puts everything back, and is the same on one rank and on several."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from mlalign import methods
from mlalign.branching.batch import ProbeReading
from mlalign.probes import _pass
from mlalign.probes._pass import ProbeError, ProbePass
from mlalign.probes._probe import Watch, means
from tests.probes import tiny

NAMES = ["attention_grounding", "image_reliance", "neuron_drift"]


def every() -> list[Any]:
    return [methods.find("mlalign.probes", name)() for name in NAMES]


def rows(readings: list[ProbeReading]) -> list[tuple[Any, ...]]:
    return [(r.probe, r.metric, r.side, r.record, r.layer, r.head, r.group, r.n) for r in readings]


def count_forwards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    real = _pass.completion_logps

    def counted(model: Any, batch: Any) -> Any:
        calls.append(batch.ids_C[0])
        return real(model, batch)

    monkeypatch.setattr(_pass, "completion_logps", counted)
    return calls


def test_the_room_holds_the_three_probes() -> None:
    assert methods.names("mlalign.probes") == NAMES


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
        before = _pass.completion_logps(vlm.model, vlm.encode(batch.rows)).logps_CS
        tiny.run(vlm, every()[2])
        after = _pass.completion_logps(vlm.model, vlm.encode(batch.rows)).logps_CS
    assert torch.equal(before, after)


def test_forwards_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_forwards(monkeypatch)
    probes = tiny.new_pass(tiny.with_lora(tiny.new_vlm()), every())
    probes.run(0)
    # Two batches: base and adapted with three views each; three views of the repeated batch.
    assert len(calls) == 2 * (3 + 3) + 3
    calls.clear()
    probes.run(1)
    # Later only the base's activations are read again; its log-probs do not change.
    assert len(calls) == 2 * (3 + 1) + 3
    calls.clear()
    tiny.new_pass(tiny.with_lora(tiny.new_vlm()), every()[:1]).run(0)
    assert len(calls) == 2 * 2 + 1


def test_the_same_numbers_together_and_alone() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    together = tiny.new_pass(vlm, every()).run(5)
    alone = [r for probe in every() for r in tiny.new_pass(vlm, [probe]).run(5)]
    assert rows(together) == rows(alone)
    for one, other in zip(together, alone, strict=True):
        assert one.value == other.value or (one.value != one.value and other.value != other.value)


def test_two_ranks_read_what_one_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    single = tiny.new_pass(vlm, every(), count=5).run(3)
    ranks = [tiny.new_pass(vlm, every(), count=5, rank=r, world=2) for r in (0, 1)]
    calls = count_forwards(monkeypatch)
    gathered, counts = [], []
    for each in ranks:
        monkeypatch.setattr(_pass, "_gather", lambda value: gathered.append(value) or [value])
        each.run(3)
        counts.append(len(calls))
        calls.clear()
    assert counts[0] == counts[1], "unequal forwards would hang under ZeRO-3"
    monkeypatch.setattr(_pass, "_gather", lambda value: gathered)
    double = tiny.new_pass(vlm, every(), count=5, rank=1, world=2).run(3)
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
