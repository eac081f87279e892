"""FLOPs of probe passes: against torch's own count of real ones, and what they are at 7B."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig, LlavaConfig

from mlalign import methods
from mlalign.cli_estimate import facts
from mlalign.estimate import flops, passes
from mlalign.estimate.geometry import Geometry, read
from mlalign.estimate.plan import Adapter, Plan, adapter_of
from mlalign.estimate.rows import Rows
from mlalign.probes import _forwards, _items, _probe
from mlalign.probes._pass import ProbePass
from mlalign.recipe import from_dict
from mlalign.sections import PROBE_EVERY, LoraSection
from tests.probes import tiny

ROWS = ("attention", "prompt_attention")
RECORDS = 2


def find(*names: str) -> list[Any]:
    return [methods.find("mlalign.probes", name)() for name in names]


def all_probes(tier: str) -> list[Any]:
    found = find(*methods.names("mlalign.probes"))
    return [probe for probe in found if probe.tier in ("every", tier)]


def test_the_needs_are_those_of_the_probes() -> None:
    assert {_probe.BLANK, _probe.SWAPPED, _probe.NOISED} == passes.PIXELS
    assert set(_forwards.VIEWS) == passes.PIXELS | set(_probe.KNOCKOUTS)
    assert all(need.startswith("knockout.") for need in _probe.KNOCKOUTS)
    names = (_probe.ATTENTION, _probe.PROMPT_ATTENTION, _probe.HIDDEN, _probe.GRADIENT)
    assert names == ("attention", "prompt_attention", "hidden", "gradient")
    assert len(_items.COMPLETIONS) == passes.ANSWERS
    assert _items.REPEATED == passes.REPEATED


@pytest.mark.parametrize(
    "names",
    [
        ["image_reliance", "neuron_drift"],
        ["attention_sinks", "information_flow", "vcd_gap"],
        ["attention_knockout", "image_gradient"],
        ["layer_entropy", "lens_confidence"],
    ],
    ids="+".join,
)
def test_a_pass_costs_what_torch_counts(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """First pass and a later one; the repeated batch without its longer tail."""
    monkeypatch.setattr(_items, "LONGER_TAIL", 0)
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.1)
    geometry = read(vlm.core.config)
    adapter = adapter_of(LoraSection(rank=4), geometry.decoder)
    probes = find(*names)
    for probe in probes:
        # Statistics over records are numpy's, and no part of the count.
        monkeypatch.setattr(type(probe), "readings", lambda *_: [])
    real = tiny.new_pass(vlm, probes, count=RECORDS, batch_size=1)
    rows = mean_rows(real)
    for first in (True, False):
        with Products() as counter:
            real.run(int(not first))
        # What the fused kernels do is counted by the mask, which torch cannot.
        expected = products(geometry, rows, probes, adapter, first)
        assert counter.total == pytest.approx(expected, rel=0.03), first


class Products(TorchDispatchMode):
    """Torch's formulae over what runs, attention left out; its own mode follows modules, and no
    gradient can be taken of an input inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket
        if name in flop_registry and "attention" not in str(name):
            self.total += flop_registry[name](*args, **(kwargs or {}), out_val=out)
        return out


def mean_rows(real: ProbePass) -> Rows:
    """One record of average length: every part but attention is linear in the tokens."""
    items = [item for batch in real._batches for item in batch.items]
    lengths = [sum(len(each) for each in item.completions) for item in items]
    whole = sum(lengths) / len(items)
    prefix = sum(len(item.prefix) for item in items) / len(items)
    third = round(whole / 3)
    return Rows(prefix=round(prefix), completions=(third, third, round(whole) - 2 * third))


def products(
    geometry: Geometry, rows: Rows, probes: list[Any], adapter: Adapter, first: bool
) -> float:
    """Linears, convolutions, and the rows of attention that probes read."""
    fixed: dict[str, Any] = {
        "records": RECORDS,
        "batch_size": 1,
        "adapter": adapter,
        "first": first,
    }
    whole = passes.one_pass(geometry, rows, probes, **fixed)
    blind: list[Any] = [
        SimpleNamespace(name=p.name, settings=p.settings, needs=p.needs - {*ROWS}) for p in probes
    ]
    kernels = passes.one_pass(geometry, rows, blind, **fixed).attention
    tower = geometry.tower
    seen = (whole.vision / flops.vision(geometry).vision) if whole.vision else 0
    patches = geometry.image_tokens + 1
    return whole.total - kernels - seen * 4 * patches**2 * 16 * tower.layers


@pytest.fixture
def seven() -> tuple[Geometry, Adapter]:
    geometry = read(LlavaConfig(text_config=LlamaConfig(vocab_size=32064)))
    return geometry, adapter_of(LoraSection(rank=16), geometry.decoder)


def test_the_default_cadence_at_7b(seven: tuple[Geometry, Adapter]) -> None:
    """The whole suite over 16 records, steps of 8 pairs of 200 tokens with a live reference: at
    most 2 % of the steps between two passes, whether or not they checkpoint."""
    geometry, adapter = seven
    rows = Rows(prefix=600, completions=(200, 200))
    record = passes.rows_of_probes(rows)
    cost = passes.one_pass(
        geometry, record, all_probes("every"), records=16, batch_size=4, adapter=adapter
    ).total
    assert cost / 1e15 == pytest.approx(1.6, abs=0.15)
    for checkpointing in (True, False):
        plan = Plan(rows=rows, adapter=adapter, checkpointing=checkpointing)
        assert cost / (PROBE_EVERY * 8 * flops.step(geometry, plan).total) <= 0.02


def test_parts_of_a_pass(seven: tuple[Geometry, Adapter]) -> None:
    geometry, adapter = seven
    rows = Rows(prefix=600, completions=(100, 100, 100))
    once = flops.forward(geometry, rows, adapter) + flops.vision(geometry)
    base = flops.forward(geometry, rows) + flops.vision(geometry)

    def cost(*names: str, **keys: Any) -> float:
        fixed: dict[str, Any] = {"records": 8, "batch_size": 4, "adapter": adapter, **keys}
        return passes.one_pass(geometry, rows, find(*names), **fixed).total

    # Log-probs of the base are kept, its activations are not.
    assert cost("image_reliance") == pytest.approx(3 * once.total * 12)
    assert cost("neuron_drift") == pytest.approx(once.total * 12 + base.total * 8)
    assert cost("neuron_drift", adapter=None) == pytest.approx(base.total * 12)
    first = cost("image_reliance", first=True)
    assert first == pytest.approx(3 * once.total * 12 + 3 * base.total * 8)
    # A knock-out needs no tower; rows of attention are a hundredth of a forward.
    knockout = cost("attention_knockout") / 12
    assert knockout == pytest.approx(5 * once.total - 4 * flops.vision(geometry).total)
    assert 0.001 < cost("attention_grounding") / 12 / once.total - 1 < 0.01


def recipe(**probes: Any) -> Any:
    return from_dict(
        {
            "name": "r",
            "model": {"path": "builtin:microworld", "dtype": "float32"},
            "data": {"pairs": {"arm": "x"}, "vocabulary": "microworld"},
            "train": {
                "objective": "dpo",
                "learning_rate": 1e-4,
                "batch_size": 8,
                "steps": 100,
                "save_every": 40,
            },
            "probes": probes,
        }
    )


def found(**probes: Any) -> dict[str, Any]:
    return facts(recipe(**probes), 24, 200, reference_live=True)


def test_what_estimate_says_of_a_recipe() -> None:
    names = ["image_reliance", "attention_knockout"]
    whole = found(methods=names, every=20)
    said, step = whole["probes"], whole["flops_per_step"]
    common, rare, first = said["flops"].values()
    assert common < rare < first
    assert said["share_between"] == pytest.approx(common / (20 * step))
    # Passes at 0, 20, 40, 60, 80 and 100; checkpoints at 40 and 80.
    assert said["share_of_run"] == pytest.approx((first + 3 * rare + 2 * common) / (100 * step))
    wanted = said["every_for_2_percent"]
    assert common / (wanted * step) <= 0.02 < common / ((wanted - 1) * step)

    assert found()["probes"] == {}
    ends = found(methods=names, every=0)["probes"]
    assert ends["share_between"] is None
    assert ends["share_of_run"] == pytest.approx((first + rare) / (100 * step))
    timed = found(methods=names, share=0.02)["probes"]
    assert timed["share_between"] is timed["share_of_run"] is None
    without = found(methods=names, every=20, rare=False)["probes"]["flops"]
    assert without["rare"] == without["common"] == common


def test_a_row_of_probes() -> None:
    row = passes.rows_of_probes(Rows(prefix=10, completions=(3, 5), layout="padded", tiles=2))
    assert row == replace(Rows(prefix=10, completions=(5, 5, 5)), tiles=2)
