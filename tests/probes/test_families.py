"""Every family gives the probes what they need: rows, knock-out, lens and input gradients."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mlalign.branching.attention import capture_rows, using
from mlalign.branching.batch import PrefixBatch
from mlalign.branching.knockout import hide_columns
from mlalign.branching.logps import completion_logps, model_masks
from mlalign.branching.split import choose
from mlalign.models._vlm import VLM
from mlalign.models.loading import load_vlm_from
from mlalign.probes._forwards import _graph
from mlalign.probes._lens import lens_of
from mlalign.probes._probe import ATTENTION, HIDDEN, KNOCKOUTS, LENS, PROMPT_ATTENTION
from mlalign.probes._serves import refuse_unserved
from tests.models import exact, folders, tiled

SIZES = ((96, 96), (160, 96))


@pytest.fixture(scope="module", params=["llava", *folders.BUILD])
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VLM:
    if request.param == "llava":
        folder = request.getfixturevalue("tiny_llava")
    else:
        folder: Path = folders.BUILD[request.param](tmp_path_factory.mktemp(request.param))
    made = load_vlm_from(folder, dtype="float32")
    # Loud enough that no two positions attend alike; in float64 both paths round alike.
    tiled.loud(made.model, std=0.1).double()
    return made


@pytest.fixture(scope="module")
def batch(vlm: VLM) -> PrefixBatch:
    """Three groups with one to four completions; the third has the first one's image."""
    made = exact.case(vlm, SIZES)
    return vlm.encode(vlm.rows(made.prefixes, made.completions, made.inputs))


def eager(vlm: VLM, batch: PrefixBatch) -> Any:
    vlm.core.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return vlm.model(
                input_ids=batch.input_ids_RT,
                attention_mask=model_masks(batch, torch.float64),
                position_ids=batch.position_ids,
                mm_encoder_outputs={"image": batch.features},
                use_cache=False,
                output_attentions=True,
            )
    finally:
        vlm.core.set_attn_implementation("sdpa")


def image_of(vlm: VLM, batch: PrefixBatch) -> Tensor:
    return (batch.input_ids_RT == vlm.image_token_id) & (batch.segment_RT >= 0)


def test_rows_equal_eager(vlm: VLM, batch: PrefixBatch) -> None:
    weights = eager(vlm, batch).attentions
    rows = range(len(batch.input_ids_RT))
    every = [(batch.segment_RT[row] >= 0).nonzero()[:, 0] for row in rows]
    last = [positions[-3:] for positions in every]
    for path in {"dense", _path(vlm, batch)}:
        held: dict[Any, Tensor] = {}
        also = [(last, lambda layer, row, w: held.update({("last", layer, row): w}))]  # noqa: B023
        sink = lambda layer, row, w: held.update({("every", layer, row): w})  # noqa: B023, E731
        with torch.no_grad(), using(vlm.core), capture_rows(vlm.layers, every, sink, also):
            completion_logps(vlm.model, batch, path)
        assert len(held) == 2 * len(vlm.layers) * len(batch.input_ids_RT)
        for (kind, layer, row), rows_HQT in held.items():
            wanted = (every if kind == "every" else last)[row]
            gap = rows_HQT - weights[layer][row][:, wanted]
            assert gap.abs().max() < 1e-6, (path, kind, layer, row)
            if kind == "last":
                off = rows_HQT - weights[layer][row][:, wanted - 1]
                assert off.abs().max() > 1e-4, "a row off by one would be seen"


def _path(vlm: VLM, batch: PrefixBatch) -> str:
    with using(vlm.core):
        return choose(vlm.core, batch)


def test_hidden_everywhere_the_image_does_not_matter(vlm: VLM, batch: PrefixBatch) -> None:
    made = exact.case(vlm, SIZES)
    blanks = {id(image): vlm.family.blank(image) for image in made.inputs}
    inputs = [blanks[id(image)] for image in made.inputs]
    blank = vlm.encode(vlm.rows(made.prefixes, made.completions, inputs))
    found = {}
    for name, each in (("own", batch), ("blank", blank)):
        for hidden in (False, True):
            layers = vlm.layers if hidden else []
            with (
                torch.no_grad(),
                using(vlm.core),
                hide_columns(layers, image_of(vlm, each)),
            ):
                found[name, hidden] = completion_logps(vlm.model, each).logps_CS
    assert (found["own", False] - found["blank", False]).abs().max() > 1e-3
    assert (found["own", True] - found["blank", True]).abs().max() < 1e-6
    assert (found["own", True] - found["own", False]).abs().max() > 1e-3


def test_the_lens_is_the_model_after_the_last_block(vlm: VLM, batch: PrefixBatch) -> None:
    states: list[Tensor] = []

    def note(_module: Any, _args: Any, out: Any) -> None:
        states.append(out[0] if isinstance(out, tuple) else out)

    hook = vlm.layers[-1].register_forward_hook(note)
    logits_RTV = eager(vlm, batch).logits
    hook.remove()
    lens = lens_of(vlm)
    real = batch.segment_RT >= 0
    found = lens.logits(states[0][real])
    assert (found - logits_RTV[real]).abs().max() < 1e-4 * logits_RTV[real].abs().max()


def test_input_gradients_reach_the_image(vlm: VLM, batch: PrefixBatch) -> None:
    vlm.model.requires_grad_(False)
    with using(vlm.core), torch.enable_grad():
        inputs_RTD, logps_CS = _graph(vlm, batch)
        (found_RTD,) = torch.autograd.grad(logps_CS.sum(), inputs_RTD)
    size_RT = found_RTD.abs().amax(-1)
    assert (size_RT[image_of(vlm, batch)] > 0).any() and torch.isfinite(found_RTD).all()
    assert (size_RT[batch.segment_RT < 0] == 0).all()


def test_every_need_is_served(vlm: VLM) -> None:
    needs = frozenset({ATTENTION, PROMPT_ATTENTION, HIDDEN, LENS, *KNOCKOUTS})
    refuse_unserved(SimpleNamespace(name="all", needs=needs), vlm)  # type: ignore[arg-type]
