"""What the tests of families that cut images into tiles share: a small tokenizer, stock batches."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from mlalign.branching.attention import use
from mlalign.branching.logps import completion_logps
from mlalign.generate import Decoding, Request, end_ids, generate
from mlalign.models._vlm import VLM
from mlalign.models.loading import load_vlm_from
from mlalign.records import ImageRef
from tests.models import exact

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
MARKS = r"\w+|[^\w\s]|\s"


def tokenizer(marks: dict[str, str], *, bos: bool, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """Every word, mark and blank a token, so that text comes back as it was.

    ``marks``: special tokens by the attribute that they have. ``bos``: put <s> first, as Llama's
    tokenizers do by themselves and their chat templates therefore do not.
    """
    texts = " ".join([*exact.PROMPTS, *(text for each in exact.ANSWERS for text in each)])
    words = dict.fromkeys(re.findall(MARKS, texts + "\nUSER ASSISTANT user assistant system"))
    special = dict.fromkeys([*SPECIAL, eos, *marks.values()])
    ids = {token: number for number, token in enumerate([*special, *words])}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(MARKS), behavior="isolated")  # type: ignore[assignment]
    made.decoder = decoders.Fuse()  # type: ignore[assignment]
    if bos:
        made.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="<s> $A", special_tokens=[("<s>", ids["<s>"])]
        )
    made.add_special_tokens([token for token in special if token not in marks.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>" if bos else None,
        eos_token=eos,
        extra_special_tokens=marks,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def loud(model: nn.Module, seed: int = 3, std: float = 0.15) -> Any:
    """The model with weights so large that log-probs differ by more than rounding."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith("image_newline"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def adapted(folder: Path, dtype: str = "float32") -> VLM:
    """The folder's model with an adapter that is not zero, always the same one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return exact.with_adapter(load_vlm_from(folder, dtype=dtype), getattr(torch, dtype))


def unfreeze(vlm: VLM, *parts: str) -> list[str]:
    """Names of the parameters of the inner model's ``parts``, which train from now on."""
    named = {
        name: parameter
        for name, parameter in vlm.core.model.named_parameters()
        if name.startswith(parts)
    }
    for parameter in named.values():
        parameter.requires_grad_(True)
    return list(named)


def messages(prompt: str, answer: str | None = None) -> list[dict[str, Any]]:
    """A conversation about one image."""
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return turns


def padded(vlm: VLM, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask of rows padded at the left, as stock generation has them."""
    width = max(map(len, rows))
    ids = torch.tensor([[vlm.pad_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def stock_pixels(vlm: VLM, images: Sequence[Image.Image], **keys: Any) -> dict[str, Tensor]:
    """The image processor's own batch of several images, as the model's forward takes it."""
    made = vlm.processor.image_processor(images=list(images), return_tensors="pt", **keys)
    dtype = vlm.core.get_input_embeddings().weight.dtype
    return {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in made.items()
        if key in vlm.family.keys(made)
    }


def assert_generates(vlm: VLM, sizes: Sequence[tuple[int, int]], **keys: Any) -> None:
    """Our greedy text equals stock ``generate`` on pixels, two unequal rows in one batch."""
    images = [exact.picture(*size, seed) for seed, size in enumerate(sizes)]
    prompts = exact.PROMPTS[: len(images)]
    requests = []
    for number, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        data = io.BytesIO()
        image.save(data, "PNG")
        requests.append(Request(f"r{number}", ImageRef(data=data.getvalue()), prompt))
    ours = [texts[0] for texts in generate(vlm, requests, Decoding(max_new_tokens=8))]
    rows = [vlm.prefix_ids(p, i.size) for p, i in zip(prompts, images, strict=True)]
    assert len({len(row) for row in rows}) == len(rows)
    ids, mask = padded(vlm, rows)
    out = vlm.model.generate(
        input_ids=ids,
        attention_mask=mask,
        **stock_pixels(vlm, images, **keys),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=vlm.pad_id,
        eos_token_id=end_ids(vlm),
    )
    wanted = vlm.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    assert ours == [text.strip() for text in wanted]
    assert all(ours) and ours[0] != ours[1]


def bfloat16_errors(vlm: VLM, sizes: tuple[tuple[int, int], ...]) -> dict[str, float]:
    """Largest distance of per-token log-probs, in nats, from the same weights in float32.

    dense, split: branches in bfloat16. alone: the stock forward in bfloat16, one completion at a
    time; what the arithmetic costs without branches.
    """
    full = replace(vlm, model=copy.deepcopy(vlm.model).float())
    made = exact.case(vlm, sizes)
    found: dict[str, list[Tensor]] = {"dense": [], "split": [], "alone": []}
    wanted: list[Tensor] = []
    with torch.no_grad():
        batch = vlm.encode(vlm.rows(made.prefixes, made.completions, made.inputs))
        use(vlm.core)
        for path in ("dense", "split"):
            out = completion_logps(vlm.model, batch, path)
            found[path] = [out.logps_CS[out.mask_CS]]
        for prefix, branches, image in zip(
            made.prefixes, made.completions, made.images, strict=True
        ):
            for branch in branches:
                for model, taken in ((full, wanted), (vlm, found["alone"])):
                    whole = exact.stock_logps(model, prefix, branch, image)[len(prefix) - 1 : -1]
                    taken.append(whole.gather(1, torch.tensor(branch)[:, None])[:, 0])
    return {
        name: float((torch.cat(taken) - torch.cat(wanted)).abs().max())
        for name, taken in found.items()
    }


def assert_bfloat16(vlm: VLM, sizes: tuple[tuple[int, int], ...], most: float) -> None:
    """Branches in bfloat16 are as near to float32 as the stock forward alone, and within ``most``
    nats. Half as much again is allowed: other kernels round in another order."""
    errors = bfloat16_errors(vlm, sizes)
    assert 0 < errors["alone"] < most, errors
    assert max(errors["dense"], errors["split"]) <= 1.5 * errors["alone"], errors


Box = tuple[float, float, float, float]


def pixels(share: Box, size: tuple[int, int]) -> Box:
    """A box in shares of width and height, on whole pixels."""
    return tuple(float(round(s * size[axis % 2])) for axis, s in enumerate(share))  # type: ignore[return-value]


def painted(size: tuple[int, int], box: Box) -> tuple[Image.Image, Image.Image]:
    """A plain image, and the same with a box of another colour."""
    plain = Image.new("RGB", size, (120, 120, 120))
    marked = plain.copy()
    x0, y0, x1, y1 = box
    ImageDraw.Draw(marked).rectangle((x0, y0, x1 - 1, y1 - 1), fill=(250, 0, 0))
    return plain, marked


def assert_boxes(mask: Tensor, share: Tensor, tokens: int) -> None:
    """``mask`` against the share of pixels that really changed, token by token (NaN: no pixels)."""
    assert mask.shape == (tokens,) == share.shape
    assert mask.any() and not mask.all()
    # Resampling blurs an edge by a pixel or two: judge tokens clearly in or out.
    assert mask[share > 0.3].all() and not mask[share == 0].any() and not mask[share.isnan()].any()


def changed(vlm: VLM, size: tuple[int, int], box: Box, patch: int) -> Tensor:
    """(tiles, tokens): share of each patch's pixels, of every tile, that the box changed."""
    plain, marked = (vlm.image(image).tensors["pixel_values"] for image in painted(size, box))
    far = (plain - marked).abs().amax(-3) > 0.5
    far = far.reshape(-1, *far.shape[-2:]).double()
    side = far.shape[-1] // patch
    kept = far[:, : side * patch, : side * patch]
    return kept.reshape(-1, side, patch, side, patch).mean((2, 4)).flatten(1)


def save(folder: Path, model: Any, *parts: Any) -> Path:
    """The folder with a model and its processor in it."""
    for part in (model, *parts):
        part.save_pretrained(folder)
    return folder
