"""FLOPs against torch's own counter, against brute force over the mask, and against published
arithmetic for LLaVA-1.5-7B."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig

from mlalign.estimate import flops
from mlalign.estimate.flops import Conventions
from mlalign.estimate.geometry import Geometry, read
from mlalign.estimate.plan import Plan, adapter_of
from mlalign.estimate.rows import PlanError, Rows
from mlalign.sections import LoraSection
from tests.estimate import tiny

SEVEN = LlavaConfig(text_config=LlamaConfig(vocab_size=32064))
ROWS = Rows(prefix=40, completions=(9, 14))


@given(
    st.integers(1, 12),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.sampled_from(["shared", "padded", "separate"]),
)
def test_attended_pairs_by_brute_force(prefix: int, completions: list[int], layout: Any) -> None:
    rows = Rows(prefix=prefix, completions=tuple(completions), layout=layout)
    if layout == "shared":
        mask = tiny.shared_row(
            Rows(prefix=prefix + 16, completions=tuple(completions)), torch.float
        )
        seen = mask["attention_mask"][0, 0, 16:, 16:] == 0
        assert rows.tokens == seen.shape[0]
        assert rows.attended == int(seen.sum())
        return
    lengths = [max(completions) if layout == "padded" else n for n in completions]
    assert rows.tokens == sum(prefix + n for n in lengths)
    assert rows.attended == sum(q + 1 for n in lengths for q in range(prefix + n))
    assert rows.scored == sum(completions)


@pytest.mark.parametrize(
    "lora",
    [
        LoraSection(rank=4),
        LoraSection(rank=4, modules_to_save=("multi_modal_projector",)),
        LoraSection(rank=4, targets=r".*language_model\.layers\.[0-3]\.self_attn\.(q|v)_proj"),
        LoraSection(rank=4, targets=r".*language_model\.layers\.[23]\.mlp\.(gate|down)_proj"),
        LoraSection(rank=4, targets=r".*language_model\.layers\.1\.self_attn\.o_proj"),
        LoraSection(rank=4, targets=r".*language_model\.layers\.2\.mlp\.down_proj"),
        None,
    ],
    ids=["all", "projector", "q and v", "late mlp", "one o", "one down", "full"],
)
def test_matrix_products_equal_torchs_own_count(lora: LoraSection | None) -> None:
    model, geometry, plan = tiny.model_and_plan(tiny.config(), ROWS, lora=lora)
    inputs = tiny.shared_row(ROWS, torch.float32)
    trained = lora is None or bool(lora.modules_to_save)
    with FlopCounterMode(display=False) as ahead:
        states = tiny.hidden(model, inputs, trained_projector=trained)
        # The head runs at completion positions; any as many positions cost the same.
        loss = tiny.core_of(model).lm_head(states[:, : ROWS.scored]).sum()
    with FlopCounterMode(display=False) as back:
        loss.backward()
    expected = flops.forward(geometry, ROWS, plan.adapter) + flops.vision(geometry)
    tower_attention = 4 * 17**2 * 64 * 3
    assert products(ahead) == expected.total - expected.attention - tower_attention
    expected = flops.backward(geometry, plan)
    assert products(back) == expected.total - expected.attention


def products(counter: FlopCounterMode) -> float:
    """FLOPs of linears and convolutions; attention is counted by its mask, which torch cannot."""
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if "attention" not in str(op))


@pytest.mark.parametrize(
    ("completion", "stock", "shared", "cached", "kept"),
    [
        (100, 76.8, 1.80, 2.40, 3.57),
        (200, 87.7, 1.64, 2.18, 3.25),
        (300, 98.5, 1.53, 2.04, 3.04),
        (400, 109.5, 1.45, 1.94, 2.89),
    ],
)
def test_llava_7b_under_the_conventions_of_the_published_table(
    completion: int, stock: float, shared: float, cached: float, kept: float
) -> None:
    """Backward 1 x forward in every part, the head run again under checkpointing, 23 layers of the
    tower, adapter left out; stock TRL passes two images through the tower four times."""
    geometry = read(SEVEN)
    ours, theirs = _conventions(1), _conventions(8)
    padded = _plan(geometry, Rows(prefix=600, completions=(completion,) * 2, layout="padded"))
    row = replace(padded, rows=replace(padded.rows, layout="shared"))
    assert flops.step(geometry, padded, theirs).total / 1e12 == pytest.approx(stock, rel=0.01)
    cases = [
        (row, shared),
        (replace(row, reference_live=False), cached),
        (replace(row, reference_live=False, checkpointing=False), kept),
    ]
    for plan, ratio in cases:
        found = flops.ceiling(geometry, plan, padded, ours, theirs)
        assert found == pytest.approx(ratio, abs=0.012)


@pytest.mark.parametrize(("completion", "ratio"), [(100, 2.00), (200, 1.94), (300, 1.88)])
def test_llava_next_under_the_same_conventions(completion: int, ratio: float) -> None:
    geometry = read(LlavaNextConfig(text_config=LlamaConfig(vocab_size=32064)))
    rows = Rows(prefix=2900, completions=(completion,) * 2, layout="padded", tiles=5)
    padded = _plan(geometry, rows)
    row = replace(padded, rows=replace(rows, layout="shared"))
    found = flops.ceiling(geometry, row, padded, _conventions(1), _conventions(8))
    assert found == pytest.approx(ratio, abs=0.02)


def test_what_the_parts_of_llava_7b_cost() -> None:
    geometry = read(SEVEN)
    one = flops.forward(geometry, Rows(prefix=1, completions=(1,), layout="separate"))
    assert one.linear / 2 == pytest.approx(12.95e9, rel=1e-3)
    assert one.head == pytest.approx(0.263e9, rel=2e-3)
    assert flops.vision(geometry, layers=23).total == pytest.approx(0.390e12, rel=2e-3)


def test_checkpointing_and_a_live_reference_add_a_forward_each() -> None:
    geometry = read(tiny.config())
    plan = replace(_plan(geometry, ROWS), checkpointing=False, reference_live=False)
    once = flops.forward(geometry, ROWS, plan.adapter)
    bare = flops.step(geometry, plan, WHOLE)
    again = flops.step(geometry, replace(plan, checkpointing=True), WHOLE)
    assert again.total - bare.total == pytest.approx(once.total - once.head)
    live = flops.step(geometry, replace(plan, reference_live=True), WHOLE)
    assert live.total - bare.total == pytest.approx(once.total - once.adapter)


def test_the_ceiling_grows_with_the_prefix_towards_the_number_of_completions() -> None:
    geometry = read(SEVEN)
    found = []
    for prefix in (100, 1000, 4000):
        rows = Rows(prefix=prefix, completions=(20,) * 8, layout="padded")
        padded = _plan(geometry, rows)
        row = replace(padded, rows=replace(rows, layout="shared"))
        found.append(flops.ceiling(geometry, row, padded))
    assert found == sorted(found) and found[0] > 1 and found[-1] < 8


@pytest.mark.parametrize("completions", [(), (3, 0)])
def test_rows_without_a_token_are_refused(completions: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="at least one token"):
        Rows(prefix=4, completions=completions)


def test_layers_of_a_counted_tower_cannot_be_left_out() -> None:
    geometry = read(SEVEN)
    counted = replace(geometry, tower=replace(geometry.tower, layer_flops=0, kind="other"))
    with pytest.raises(ValueError, match="other"):
        flops.vision(counted, layers=3)


def test_a_tower_that_is_counted_equals_the_closed_form() -> None:
    from mlalign.estimate import tower

    made = CLIPVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    closed, counted = tower.read_tower(made), tower._counted(made)
    assert counted.parameters == closed.parameters
    # On the meta device torch counts the same products, attention included.
    assert counted.flops == closed.flops


WHOLE = Conventions(whole_first_block=True)


def _conventions(passes: int) -> Conventions:
    return Conventions(
        attention_backward=1.0,
        head_recomputed=True,
        tower_passes=passes,
        tower_layers=23,
        adapter=False,
        whole_first_block=True,
    )


def _plan(geometry: Geometry, rows: Rows) -> Plan:
    adapter = adapter_of(LoraSection(rank=128), geometry.decoder)
    return Plan(rows=rows, adapter=adapter, checkpointing=True)
