"""Hidden columns equal a mask of their own in every block, on both paths, and nothing more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mlalign.branching import attention
from mlalign.branching.batch import PrefixBatch
from mlalign.branching.knockout import hide_columns
from mlalign.branching.layout import attention_mask
from mlalign.branching.logps import completion_logps
from mlalign.models._vlm import VLM
from tests.probes import tiny

LAYER_SETS = ([], [1], [0, 2], [0, 1, 2])


def batch_of(vlm: VLM, seed: int = 0) -> PrefixBatch:
    """Two rows of unequal length with three completions each."""
    generator = torch.Generator().manual_seed(seed)
    found = [(*vlm.branch_ids(r.prompt, r.texts, (96, 96)), r) for r in tiny.records(2)]
    pixels = torch.randn(2, 3, 96, 96, generator=generator).double()
    batch = vlm.rows(
        [prefix for prefix, _, _ in found],
        [completions for _, completions, _ in found],
        [vlm.blank(), vlm.blank()],
    )
    return vlm.encode(replace(batch, images={"pixel_values": pixels}, image_G=(0, 1)))


def image_of(vlm: VLM, batch: PrefixBatch) -> Tensor:
    return batch.input_ids_RT == vlm.image_token_id


@pytest.fixture(scope="module", params=[2, 4], ids=["grouped", "full"])
def vlm(request: pytest.FixtureRequest) -> VLM:
    made = tiny.new_vlm(request.param)
    # What enters the later layers differs by rounding between two paths; not in float64.
    made.model.double()
    return made


def logps(vlm: VLM, batch: PrefixBatch, path: str, layers: Sequence[int] | None = None) -> Tensor:
    """``layers``: where the image is hidden; None: outside of any context."""
    hidden = contextlib.nullcontext()
    if layers is not None:
        hidden = hide_columns([vlm.layers[n] for n in layers], image_of(vlm, batch))
    with torch.no_grad(), attention.using(vlm.core), hidden:
        return completion_logps(vlm.model, batch, path).logps_CS


@contextlib.contextmanager
def masks_by_layer(vlm: VLM, masks: list[Tensor]) -> Iterator[None]:
    """Every block's attention gets the mask of its number, whatever the model was given."""

    def handed(number: int) -> Any:
        return lambda _m, args, keywords: (args, {**keywords, "attention_mask": masks[number]})

    hooks = [
        layer.self_attn.register_forward_pre_hook(handed(number), with_kwargs=True)  # type: ignore[union-attr]
        for number, layer in enumerate(vlm.layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def by_hand(vlm: VLM, batch: PrefixBatch, layers: Sequence[int]) -> Tensor:
    """Eager attention under a mask of its own in each block."""
    seen = attention_mask(batch)
    image = image_of(vlm, batch)
    less = seen.clone()
    for row, query in (~image).nonzero().tolist():
        less[row, 0, query, image[row]] = False
    masks = [
        torch.zeros(each.shape, dtype=torch.float64).masked_fill(~each, float("-inf"))
        for each in (less if number in layers else seen for number in range(tiny.LAYERS))
    ]
    vlm.core.set_attn_implementation("eager")
    try:
        with torch.no_grad(), masks_by_layer(vlm, masks):
            return completion_logps(vlm.model, batch, "dense").logps_CS
    finally:
        vlm.core.set_attn_implementation("sdpa")


@pytest.mark.parametrize("layers", LAYER_SETS, ids=str)
@pytest.mark.parametrize("path", ["dense", "split"])
def test_equals_a_mask_per_layer(vlm: VLM, path: str, layers: list[int]) -> None:
    batch = batch_of(vlm)
    found, wanted = logps(vlm, batch, path, layers), by_hand(vlm, batch, layers)
    # Eager attention takes its softmax in float32, whatever the model's dtype.
    assert (found - wanted).abs().max() < 5e-6
    moved = (found - logps(vlm, batch, path)).abs().max()
    assert moved == 0 if not layers else moved > 1e-3


@pytest.mark.parametrize("path", ["dense", "split"])
def test_hidden_in_all_blocks_the_pixels_do_not_matter(vlm: VLM, path: str) -> None:
    one, other = batch_of(vlm, seed=0), batch_of(vlm, seed=1)
    assert (logps(vlm, one, path) - logps(vlm, other, path)).abs().max() > 1e-2
    every = range(tiny.LAYERS)
    assert torch.equal(logps(vlm, one, path, every), logps(vlm, other, path, every))
    most = every[1:]
    assert not torch.equal(logps(vlm, one, path, most), logps(vlm, other, path, most))


def test_rows_are_captured_without_the_hidden_columns(vlm: VLM) -> None:
    batch = batch_of(vlm)
    image = image_of(vlm, batch)
    held: dict[tuple[int, int], Tensor] = {}
    positions = [batch.source_CS[batch.mask_CS & (batch.row_C == r)[:, None]] for r in (0, 1)]
    sink = lambda layer, row, weights: held.update({(layer, row): weights})  # noqa: E731
    with attention.using(vlm.core), attention.capture_rows(vlm.layers, positions, sink):
        logps(vlm, batch, "split", [1])
    for (layer, row), weights_HQT in held.items():
        mass = weights_HQT[..., image[row]].sum(-1)
        assert (mass == 0).all() if layer == 1 else (mass > 0).all()
        assert (weights_HQT.sum(-1) - 1).abs().max() < 1e-6


def test_without_any_mask_hidden_means_causal_and_hidden() -> None:
    vlm = tiny.new_vlm()
    ids = torch.tensor([vlm.prefix_ids("describe the picture", (96, 96))])
    image = ids == vlm.image_token_id
    outs = []
    for seed in (0, 1):
        pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad(), attention.using(vlm.core), hide_columns(vlm.layers, image):
            outs.append(vlm.model(input_ids=ids, pixel_values=pixels).logits)
    assert torch.equal(outs[0][~image], outs[1][~image])
    assert not torch.equal(outs[0][image], outs[1][image])


def test_contexts_do_not_nest_and_close_after_errors(vlm: VLM) -> None:
    batch = batch_of(vlm)
    before = logps(vlm, batch, "split")
    image = image_of(vlm, batch)
    with hide_columns(vlm.layers, image), pytest.raises(RuntimeError, match="already"):
        hide_columns(vlm.layers, image).__enter__()
    narrow = hide_columns(vlm.layers, image[:, :4])
    with pytest.raises(ValueError, match=r"columns \(2, 4\), the batch has 2 rows"), narrow:
        logps(vlm, batch, "split")
    assert torch.equal(before, logps(vlm, batch, "split"))
