"""Memory by part: against the bytes of real tensors, and against a process's measured peak."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig

from mlalign.estimate import activations, memory
from mlalign.estimate.geometry import Geometry, read
from mlalign.estimate.memory import estimate
from mlalign.estimate.plan import Plan, adapter_of
from mlalign.estimate.rows import Rows
from mlalign.sections import LoraSection
from tests._syntax import REPOSITORY
from tests.estimate import peak, tiny

ROWS = Rows(prefix=90, completions=(20, 31))
SEVEN = LlavaConfig(text_config=LlamaConfig(vocab_size=32064))


def test_peak_of_a_process_within_15_percent() -> None:
    """With every tensor mapped apart: on glibc's heap the same step is resident at 2.2 times."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.estimate.peak"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == set(peak.CASES)
    for case, (measured, estimated) in found.items():
        assert estimated == pytest.approx(measured, rel=0.15), case


@pytest.mark.parametrize(
    "lora",
    [LoraSection(rank=4), LoraSection(rank=4, modules_to_save=("multi_modal_projector",)), None],
    ids=["lora", "projector", "full"],
)
def test_weights_gradients_and_moments_of_a_real_step(lora: LoraSection | None) -> None:
    model, geometry, plan = tiny.model_and_plan(tiny.config(), ROWS, lora=lora)
    trained = [each for each in model.parameters() if each.requires_grad]
    frozen = [each for each in model.parameters() if not each.requires_grad]
    for each in trained:
        each.grad = torch.zeros_like(each)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    moments = [
        value
        for state in optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    ]
    need = estimate(geometry, plan)
    assert need.weights == bytes_of(frozen)
    assert need.trained == need.gradients == bytes_of(trained)
    assert need.optimizer == bytes_of(moments)
    assert need.reference == (bytes_of(frozen + trained) if lora is None else 0)
    assert memory.trained_parameters(geometry, plan) == sum(each.numel() for each in trained)


def test_bytes_of_quantised_linears() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear4bit(1024, 2048, bias=False, compress_statistics=True, quant_type="nf4")
    weight = made.to("cpu").weight
    made(torch.zeros(1, 1024))
    weight = made.weight
    state = weight.quant_state
    held = bytes_of([weight.data, state.absmax, state.state2.absmax])
    assert held == pytest.approx(memory.BITS_NF4 / 8 * 1024 * 2048, rel=1e-3)
    assert pytest.approx(4.127, abs=5e-4) == memory.BITS_NF4


def test_what_quantisation_takes_and_leaves() -> None:
    geometry = read(SEVEN)
    plan = _plan(geometry, dtype_bytes=2, trained_bytes=2)
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    other = (geometry.parameters - linear) * 2
    four, _ = memory.weight_bytes(geometry, replace(plan, quantize="4bit"))
    assert four == other + round(linear * memory.BITS_NF4 / 8)
    eight, _ = memory.weight_bytes(geometry, replace(plan, quantize="8bit"))
    outputs = 5 * 4096 + 2 * 11008
    assert eight == other + linear + 32 * outputs * 4
    assert memory.weight_bytes(geometry, plan)[0] == geometry.parameters * 2


def test_zero_shards_what_its_stage_says() -> None:
    geometry = read(tiny.config())
    full = replace(_plan(geometry, dtype_bytes=2, trained_bytes=2), adapter=None)
    count = memory.trained_parameters(geometry, full)
    two = estimate(geometry, replace(full, zero=2, processes=4))
    assert (two.trained, two.gradients) == (2 * count, -(-2 * count // 4))
    assert two.optimizer == -(-12 * count // 4)
    three = estimate(geometry, replace(full, zero=3, processes=4))
    assert three.trained == -(-2 * count // 4) and three.optimizer == two.optimizer
    assert three.reference == -(-2 * geometry.parameters // 4)
    assert three.sharding >= 2 * geometry.parameters
    away = estimate(geometry, replace(full, zero=3, processes=4, offload=True))
    assert away.weights == away.trained == away.optimizer == 0
    assert away.host == three.loaded + three.optimizer
    plain = estimate(geometry, replace(full, processes=4))
    assert plain.sharding == plain.gradients == 2 * count


def test_the_peak_is_the_larger_of_head_and_block() -> None:
    geometry = read(tiny.config())
    plan = _plan(geometry)
    wide = replace(geometry, decoder=replace(geometry.decoder, vocabulary=500_000))
    assert estimate(geometry, plan).peak == activations.working(geometry, plan)
    # However many completion tokens there are, one tile of logits is there at a time.
    assert estimate(wide, plan).peak == 2 * (2**23 // 500_000) * 500_000 * 4
    few = replace(plan, rows=Rows(prefix=9, completions=(3, 4)))
    assert estimate(wide, few).peak == 2 * 7 * 500_000 * 4


def test_checkpointing_trades_activations_for_one_block() -> None:
    geometry = read(SEVEN)
    plan = _plan(geometry, dtype_bytes=2, trained_bytes=2)
    kept, dropped = estimate(geometry, plan), estimate(geometry, replace(plan, checkpointing=True))
    assert dropped.activations < kept.activations / 10
    block = activations.inside(geometry, plan) + activations.working(geometry, plan)
    assert dropped.peak == block
    # One block of 32, and the norm and the mask that blocks share.
    assert activations.inside(geometry, plan) == pytest.approx(kept.activations / 32, rel=0.02)
    per_token = kept.activations / plan.rows.tokens
    # Five to six megabytes a token: 32 blocks, float32 norms, four inner activations.
    assert 5e6 < per_token < 6e6


def bytes_of(tensors: Any) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


def _plan(geometry: Geometry, **keys: Any) -> Plan:
    adapter = adapter_of(LoraSection(rank=16), geometry.decoder)
    return Plan(rows=keys.pop("rows", ROWS), adapter=adapter, **keys)
