"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: rows of branches against separate stock forwards."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mlalign.branching.attention import use
from mlalign.branching.layout import LayoutError
from mlalign.branching.logps import completion_logps
from mlalign.generate import Decoding, Request, generate
from mlalign.models import _vision
from mlalign.models._vlm import VLM
from mlalign.models.loading import load_vlm_from
from mlalign.records import ImageRef
from tests.models import exact, qwen

SIZES = ((96, 96), (160, 84))
"""3 x 3 and 3 x 6 tokens of 28 pixels, or 3 x 3 and 3 x 5 of 32."""


@pytest.fixture(scope="module", params=list(qwen.FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen.FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(autouse=True)
def _same_adapter() -> None:
    torch.manual_seed(0)


@pytest.fixture
def vlm(folder: Path) -> VLM:
    return load_vlm_from(folder, dtype="float32")


@pytest.fixture
def stock(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> Any:
    return qwen.stock_processor(vlm, monkeypatch)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("attention", ["dense", "split"])
def test_branches_are_exact(vlm: VLM, attention: str, packed: bool) -> None:
    exact.with_adapter(vlm)
    made = exact.case(vlm, SIZES)
    assert len({len(each.tensors["pixel_values"]) for each in made.inputs}) == 2
    exact.assert_exact(vlm, made, attention, packed=packed)


def test_a_trained_merger_is_exact_too(vlm: VLM) -> None:
    """Gradients of the merger, through features that several branches share."""
    exact.with_adapter(vlm)
    vlm.family.frozen_towers(vlm.core)[1].requires_grad_(True)
    exact.assert_exact(vlm, exact.case(vlm, SIZES), "split")


def test_sliding_windows_count_places(tmp_path: Path) -> None:
    """A window that ends inside the prefix: exact under the mask, and refused without one."""
    text = {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}
    vlm = exact.with_adapter(load_vlm_from(qwen.qwen2_vl(tmp_path, **text), dtype="float32"))
    assert vlm.core.config.text_config.layer_types == ["full_attention"] + 2 * ["sliding_attention"]
    made = exact.case(vlm, SIZES)
    assert min(map(len, made.prefixes)) > 40
    exact.assert_exact(vlm, made, "dense")
    with pytest.raises(ValueError, match="split is not possible"):
        exact.assert_exact(vlm, made, "split")


def test_bfloat16_is_within_its_own_noise(folder: Path) -> None:
    """From the stock bfloat16 forward no further than that forward is from float32.

    That distance is 0.05 to 0.07 at most and 0.02 in the mean. Left padding alone moves the stock
    forward by up to 0.036 (mean 0.003); rows of branches measured 0.01 (mean 0.0006). Positions
    that count every token move it by 0.3 in the mean.
    """
    full, half = (load_vlm_from(folder, dtype=name) for name in ("float32", "bfloat16"))
    exact.with_adapter(full)
    exact.with_adapter(half, torch.bfloat16)
    half.model.load_state_dict(full.model.state_dict())
    made = exact.case(half, SIZES)
    use(half.core)
    batch = half.encode(half.rows(made.prefixes, made.completions, made.inputs))
    plain = dataclasses.replace(batch, position_ids=batch.place_RT.expand(3, -1, -1))
    with torch.no_grad():
        dense, split, wrong = (
            completion_logps(half.model, each, path).logps_CS[batch.mask_CS]
            for each, path in ((batch, "dense"), (batch, "split"), (plain, "split"))
        )
    alone = _stock_logps(half, made)
    noise = (alone - _stock_logps(full, made)).abs()
    for ours in (dense, split):
        apart = (ours - alone).abs()
        assert apart.max() <= noise.max() and apart.mean() <= noise.mean() / 2
    assert (wrong - alone).abs().mean() > 5 * noise.mean()


@torch.no_grad()
def _stock_logps(vlm: VLM, made: exact.Case) -> Tensor:
    """Log-probs of every completion token, each completion in a stock forward of its own."""
    found = []
    for prefix, branches, image in zip(made.prefixes, made.completions, made.images, strict=True):
        for branch in branches:
            whole = exact.stock_logps(vlm, prefix, branch, image)
            found.append(whole[len(prefix) - 1 : -1].gather(1, torch.tensor(branch)[:, None])[:, 0])
    return torch.cat(found)


def test_layout_faults_would_be_seen(vlm: VLM) -> None:
    """Planted: positions that count every token, other images, a blank image, no deepstack."""
    use(vlm.core)
    made = exact.case(vlm, SIZES)
    batch = vlm.encode(vlm.rows(made.prefixes, made.completions, made.inputs))
    blank = [vlm.blank(image) for image in made.inputs]
    faults = [
        dataclasses.replace(batch, position_ids=batch.place_RT.expand(3, -1, -1)),
        vlm.encode(vlm.rows(made.prefixes, made.completions, blank)),
    ]
    if hasattr(batch.features, "deepstack_features"):
        levels = [
            [torch.zeros_like(x) for x in level] for level in batch.features.deepstack_features
        ]
        without = type(batch.features)(
            pooler_output=batch.features.pooler_output, deepstack_features=levels
        )
        faults.append(dataclasses.replace(batch, features=without))
    assert len(faults) == (3 if vlm.core.config.model_type == "qwen3_vl" else 2)
    with torch.no_grad():
        right = completion_logps(vlm.model, batch).logps_CS
        for fault in faults:
            wrong = completion_logps(vlm.model, fault).logps_CS
            assert (right - wrong).abs().amax(1).min() > 1e-2


@pytest.mark.parametrize("fault", ["fewer", "two runs", "none"])
def test_image_tokens_that_do_not_fit_are_refused(vlm: VLM, fault: str) -> None:
    made = exact.case(vlm, SIZES)
    right = made.prefixes[1]
    at = right.index(vlm.image_token_id)
    wrong, message = {
        "fewer": (right[:at] + right[at + 1 :], "image tokens in the prompt, but"),
        "two runs": ([right[at], *right[:at], *right[at + 1 :]], "do not stand in one run"),
        "none": ([token for token in right if token != right[at]], "0 image tokens"),
    }[fault]
    prefixes = [made.prefixes[0], wrong, made.prefixes[2]]
    ids = [[f"record-{n}"] * len(c) for n, c in enumerate(made.completions)]
    with pytest.raises(LayoutError, match=f"^record-1: .*{message}"):
        vlm.rows(prefixes, made.completions, made.inputs, ids=ids)


def test_generation_is_the_stock_models(vlm: VLM, stock: Any) -> None:
    images = [exact.picture(*size, seed) for seed, size in enumerate(SIZES)]
    prompts = exact.PROMPTS[:2]
    texts = [qwen.prompt_text(stock, prompt) for prompt in prompts]
    inputs = stock(images=images, text=texts, padding=True, return_tensors="pt")
    lengths = inputs["attention_mask"].sum(1).tolist()
    assert lengths[0] != lengths[1]
    out = vlm.core.generate(**inputs, max_new_tokens=12, do_sample=False)
    answers = stock.batch_decode(out[:, max(lengths) :], skip_special_tokens=True)
    found = _generate(vlm, images, prompts)
    assert found == [answer.strip() for answer in answers]
    other = _generate(
        vlm, [exact.picture(*size, seed + 7) for seed, size in enumerate(SIZES)], prompts
    )
    assert other[0] != found[0] and other[1] != found[1]


def _generate(vlm: VLM, images: list[Image.Image], prompts: tuple[str, ...]) -> list[str]:
    requests = []
    for number, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        requests.append(Request(f"r{number}", ImageRef(data=buffer.getvalue()), prompt))
    return [row[0] for row in generate(vlm, requests, Decoding(max_new_tokens=12))]


def test_merger_trains_while_the_tower_is_frozen(vlm: VLM) -> None:
    """The merger's gradient is a plain forward's, and no graph is kept for the frozen blocks."""
    visual = vlm.core.model.visual
    tower, merger = vlm.family.frozen_towers(vlm.core)
    listed = [*tower.parameters(), *merger.parameters()]
    assert sorted(map(id, listed)) == sorted(map(id, visual.parameters()))
    visual.requires_grad_(False)
    assert vlm.sees_frozen
    merger.requires_grad_(True)
    assert not vlm.sees_frozen
    made = exact.case(vlm, SIZES)
    images = vlm.family.collate(made.inputs[:2])

    def gradients(found: Any) -> list[Tensor]:
        levels = [found.pooler_output, *getattr(found, "deepstack_features", ())]
        total = torch.stack([torch.cat(list(level)).square().sum() for level in levels]).sum()
        return list(torch.autograd.grad(total, list(merger.parameters())))

    wanted = gradients(vlm.core.model.get_image_features(**images, return_dict=True))
    # As gradient checkpointing does: the patches' embedding asks for gradients.
    visual.patch_embed.register_forward_hook(lambda _m, _i, out: out.requires_grad_(True))
    kept: list[bool] = []
    visual.blocks[-1].register_forward_hook(lambda _m, _i, out: kept.append(out.requires_grad))
    found = gradients(_vision.features(vlm.core, vlm.family, images))
    assert kept == [False]
    torch.testing.assert_close(found, wanted)
