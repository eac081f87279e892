"""Are branches exact for a family? Rows of ours against separate, unpadded, stock forwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from PIL import Image
from torch import Tensor

from mlalign.branching.layout import pack
from mlalign.branching.logps import completion_logps, next_token_logps
from mlalign.models._vlm import VLM
from mlalign.models.loading import lora_config
from mlalign.sections import LoraSection

ANSWERS = (
    ("A red kettle stands on a table.", "A dog."),
    ("No.",),
    ("Two boats and a red kettle.", "Nothing.", "A blue boat on the table.", "A table."),
)
PROMPTS = ("Describe this image.", "Is there a dog in the image?", "What do you see here?")


@dataclass
class Case:
    """Groups of one prefix and K completions, K mixed; the first image comes twice."""

    prefixes: list[list[int]]
    completions: list[list[list[int]]]
    images: list[Image.Image]
    inputs: list[Any]


def picture(width: int, height: int, seed: int) -> Image.Image:
    """A picture with structure, of any shape."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (6, 8, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(small.numpy()).resize((width, height), Image.Resampling.BICUBIC)


def case(vlm: VLM, sizes: tuple[tuple[int, int], ...]) -> Case:
    """Three groups; the third has the first one's image."""
    images = [picture(*size, seed) for seed, size in enumerate(sizes[:2])]
    images.append(images[0])
    seen = {id(image): vlm.image(image) for image in images}
    rows = [
        vlm.branch_ids(prompt, list(answers), image.size)
        for prompt, answers, image in zip(PROMPTS, ANSWERS, images, strict=True)
    ]
    return Case([p for p, _ in rows], [c for _, c in rows], images, [seen[id(i)] for i in images])


def with_adapter(vlm: VLM, dtype: torch.dtype = torch.float32) -> VLM:
    """A LoRA adapter that is not zero: a fresh one makes any layout agree."""
    vlm.model = get_peft_model(vlm.model, lora_config(LoraSection(rank=4, alpha=32), vlm))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in vlm.model.named_parameters():
        if "lora_" in name:
            std = 0.02 if "lora_B" in name else 0.1
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
    # The adapter's own dtype only: buffers such as the rotary frequencies stay as they are.
    for name, parameter in vlm.model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    vlm.model.eval()
    return vlm


def stock_logps(vlm: VLM, prefix: list[int], branch: list[int], image: Image.Image) -> Tensor:
    """(tokens, V) log-probs of a plain forward of prefix + completion, nothing of ours but the
    ids: pixels straight from the image processor, positions and masks the model's own."""
    ids = torch.tensor([prefix + branch])
    cut = {"crop_to_patches": True} if "InternVL" in type(vlm.core).__name__ else {}
    made = vlm.processor.image_processor(images=image, return_tensors="pt", **cut)
    keys = vlm.family.keys(made)
    inputs = {key: made[key] for key in keys}
    dtype = vlm.core.get_input_embeddings().weight.dtype
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    kinds = (ids == vlm.image_token_id).long()
    config = type(vlm.core).__name__
    if "Qwen" in config:
        inputs["mm_token_type_ids"] = kinds
    if "Gemma3" in config:
        inputs["token_type_ids"] = kinds
    vlm.core.set_attn_implementation({"text_config": "sdpa"})
    out = vlm.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **inputs)
    return out.logits[0].float().log_softmax(-1)


def take_gradients(vlm: VLM) -> dict[str, Tensor]:
    """LoRA gradients, and none left."""
    taken = {n: p.grad.clone() for n, p in vlm.model.named_parameters() if p.grad is not None}
    vlm.model.zero_grad()
    return taken


def assert_exact(
    vlm: VLM,
    made: Case,
    attention: str,
    *,
    packed: bool = False,
    logps: float = 1e-5,
    gradients: float = 1e-5,
) -> None:
    """Per-token log-probs to ``logps`` and every LoRA gradient to ``gradients`` of its largest
    entry, of all completions together against each alone."""
    from mlalign.branching.attention import use

    use(vlm.core)
    lengths = [
        len(p) + sum(map(len, c)) for p, c in zip(made.prefixes, made.completions, strict=True)
    ]
    rows = pack(lengths, lengths[0] + lengths[1]) if packed else None
    batch = vlm.encode(vlm.rows(made.prefixes, made.completions, made.inputs, rows=rows))
    together = completion_logps(vlm.model, batch, attention)
    together.sum_C().sum().backward()
    shared = take_gradients(vlm)
    after_C = next_token_logps(vlm.model, batch, attention)
    index = 0
    for prefix, branches, image in zip(made.prefixes, made.completions, made.images, strict=True):
        for branch in branches:
            whole = stock_logps(vlm, prefix, branch, image)
            wanted = whole[len(prefix) - 1 : -1].gather(1, torch.tensor(branch)[:, None])[:, 0]
            actual = together.logps_CS[index][together.mask_CS[index]]
            torch.testing.assert_close(actual, wanted, atol=logps, rtol=0)
            torch.testing.assert_close(after_C[index], whole[-1].detach(), atol=logps, rtol=0)
            wanted.sum().backward()
            index += 1
    alone = take_gradients(vlm)
    assert alone and alone.keys() == shared.keys()
    for name, wanted in alone.items():
        assert wanted.abs().max() > 0, name
        assert (shared[name] - wanted).abs().max() <= gradients * wanted.abs().max(), name
