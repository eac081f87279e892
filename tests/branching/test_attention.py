"""Rows that are recomputed equal eager attention; nothing else changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mlalign.branching import attention, split
from mlalign.branching.layout import attention_mask, lay_out
from mlalign.branching.logps import additive_mask
from mlalign.models._vlm import VLM
from tests.probes import tiny


def rows_of(vlm: VLM, positions: list[Tensor], **inputs: Any) -> tuple[dict[Any, Tensor], Tensor]:
    """(layer, row) -> captured weights, and the logits."""
    held: dict[Any, Tensor] = {}
    with (
        torch.no_grad(),
        attention.using(vlm.core),
        attention.capture_rows(vlm.layers, positions, lambda a, r, w: held.update({(a, r): w})),
    ):
        logits = vlm.model(**inputs, use_cache=False).logits
    return held, logits


def eager(vlm: VLM, **inputs: Any) -> tuple[Any, Tensor]:
    vlm.core.set_attn_implementation("eager")
    with torch.no_grad():
        out = vlm.model(**inputs, output_attentions=True, use_cache=False)
    vlm.core.set_attn_implementation("sdpa")
    return out.attentions, out.logits


def padded_inputs(vlm: VLM, side: str) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Two texts of unequal length with their images, padded on one side; and the real positions."""
    prefix, (short, long) = vlm.branch_ids(
        "describe the picture", ["a dog", "a red dog and a cat"], (96, 96)
    )
    texts = [prefix + short, prefix + long]
    width = max(map(len, texts))
    ids = torch.full((2, width), vlm.pad_id)
    mask = torch.zeros(2, width, dtype=torch.long)
    real = []
    for row, text in enumerate(texts):
        start = width - len(text) if side == "left" else 0
        ids[row, start : start + len(text)] = torch.tensor(text)
        mask[row, start : start + len(text)] = 1
        real.append(list(range(start, start + len(text))))
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 96, 96)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}, real


@pytest.mark.parametrize("kv_heads", [2, 4], ids=["grouped", "full"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_equal_eager(kv_heads: int, side: str) -> None:
    vlm = tiny.new_vlm(kv_heads)
    inputs, real = padded_inputs(vlm, side)
    positions = [torch.tensor([row[0], row[5], row[-1]]) for row in real]
    held, logits = rows_of(vlm, positions, **inputs)
    weights, expected = eager(vlm, **inputs)
    assert len(held) == tiny.LAYERS * 2
    for (layer, row), rows_HQT in held.items():
        assert (rows_HQT - weights[layer][row][:, positions[row]]).abs().max() < 1e-6
        assert (rows_HQT.sum(-1) - 1).abs().max() < 1e-6
        later = torch.arange(rows_HQT.shape[-1]) > positions[row][:, None]
        assert rows_HQT.masked_select(later).abs().max() == 0
        pads = inputs["attention_mask"][row] == 0
        assert rows_HQT[..., pads].sum() == 0
    for row, kept in enumerate(real):
        assert (logits[row, kept] - expected[row, kept]).abs().max() < 1e-4


def test_no_mask_means_causal() -> None:
    vlm = tiny.new_vlm()
    inputs, _ = padded_inputs(vlm, "right")
    inputs = {key: value[1:] for key, value in inputs.items()}
    del inputs["attention_mask"]
    positions = torch.arange(inputs["input_ids"].shape[1])
    held, _ = rows_of(vlm, [positions], **inputs)
    weights, _ = eager(vlm, **inputs)
    for (layer, _), rows_HQT in held.items():
        assert (rows_HQT - weights[layer][0]).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_rows_under_the_shared_prefix_mask(kind: str) -> None:
    vlm = tiny.new_vlm()
    # What enters the later layers differs by rounding between the two functions; not in float64.
    vlm.model.double()
    made = [vlm.branch_ids(r.prompt, r.texts, (96, 96)) for r in tiny.records(2)]
    batch = lay_out(
        [prefix for prefix, _ in made],
        [completions for _, completions in made],
        pad_id=vlm.pad_id,
        images={"pixel_values": torch.randn(2, 3, 96, 96).double()},
    )
    seen = attention_mask(batch)
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids_RT,
        "position_ids": batch.position_ids,
        "pixel_values": batch.images["pixel_values"],
    }
    additive = additive_mask(batch, torch.float64)
    weights, _ = eager(vlm, **inputs, attention_mask=additive)
    every = torch.arange(seen.shape[-1])
    mask = seen if kind == "bool" else additive
    held, _ = rows_of(vlm, [every, every], **inputs, attention_mask=mask)
    for (layer, row), rows_HQT in held.items():
        assert (rows_HQT - weights[layer][row]).abs().max() < 1e-6
        assert rows_HQT.masked_select(~seen[row]).sum() == 0


def test_rows_on_the_split_path_equal_eager_under_the_mask() -> None:
    vlm = tiny.new_vlm()
    vlm.model.double()
    made = [vlm.branch_ids(r.prompt, r.texts, (96, 96)) for r in tiny.records(2)]
    batch = lay_out(
        [prefix for prefix, _ in made],
        [completions for _, completions in made],
        pad_id=vlm.pad_id,
        images={"pixel_values": torch.randn(2, 3, 96, 96).double()},
        rows=[[0, 1]],
    )
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids_RT,
        "position_ids": batch.position_ids,
        "pixel_values": batch.images["pixel_values"],
    }
    weights, _ = eager(vlm, **inputs, attention_mask=additive_mask(batch, torch.float64))
    wanted = batch.source_CS[batch.mask_CS]
    with attention.using(vlm.core):
        assert split.choose(vlm.core, batch) == "split"
    keywords = {"attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool)}
    held, _ = rows_of(vlm, [wanted], **inputs, **keywords, branches=split.Branches(batch))
    assert len(held) == tiny.LAYERS
    for (layer, row), rows_HQT in held.items():
        assert (rows_HQT - weights[layer][row][:, wanted]).abs().max() < 1e-6


def test_output_is_sdpa_and_the_tower_is_left_alone() -> None:
    vlm = tiny.new_vlm()
    inputs, _ = padded_inputs(vlm, "left")
    with torch.no_grad():
        before = vlm.model(**inputs).logits
        attention.use(vlm.core)
        after = vlm.model(**inputs).logits
    assert torch.equal(before, after)
    assert vlm.core.config.text_config._attn_implementation == attention.NAME
    assert vlm.core.config.vision_config._attn_implementation == "sdpa"


def test_using_puts_the_implementation_back() -> None:
    vlm = tiny.new_vlm()
    with attention.using(vlm.core):
        assert vlm.core.config.text_config._attn_implementation == attention.NAME
    assert vlm.core.config.text_config._attn_implementation == "sdpa"


def test_nothing_is_handed_out_after_the_context() -> None:
    vlm = tiny.new_vlm()
    inputs, real = padded_inputs(vlm, "left")
    calls: list[int] = []
    attention.use(vlm.core)
    positions = [torch.tensor([row[-1]]) for row in real]
    with (
        pytest.raises(RuntimeError, match="stop"),
        attention.capture_rows(vlm.layers, positions, lambda *_: calls.append(1)),
    ):
        raise RuntimeError("stop")
    with torch.no_grad():
        vlm.model(**inputs)
    assert not calls
    with attention.capture_rows(vlm.layers[:1], positions, lambda *_: calls.append(1)):
        with (
            pytest.raises(RuntimeError, match="already open"),
            attention.capture_rows(vlm.layers, positions, lambda *_: None),
        ):
            pass
        with torch.no_grad():
            vlm.model(**inputs)
    assert len(calls) == 2, "one selected layer, two rows"


def test_planted_query_puts_all_mass_on_its_key() -> None:
    key_GTd = torch.nn.functional.normalize(torch.randn(1, 9, 16), dim=-1)
    query_HTd = torch.zeros(2, 9, 16)
    query_HTd[:, 8] = 200 * key_GTd[0, 3]
    weights = attention.attention_rows(query_HTd, key_GTd, None, torch.tensor([8]), 1.0)
    assert (weights[:, 0, 3] - 1).abs().max() < 1e-6


@dataclass
class _Text:
    model_type: str = "odd"
    attn_logit_softcapping: float | None = None


class _Sinks(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sinks = torch.nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (_Text(attn_logit_softcapping=50.0), "softcap"),
        (_Text(), "sinks"),
    ],
)
def test_refuses_by_name(text: _Text, name: str) -> None:
    core = torch.nn.Module()
    core.config = type("Config", (), {"get_text_config": lambda _: text})()  # type: ignore[assignment]
    core.attention = _Sinks() if name == "sinks" else torch.nn.Identity()
    with pytest.raises(ValueError, match=f"odd: .*{name}"):
        attention.use(core)
