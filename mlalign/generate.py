"""Text from a model: batches of prompts, with an image or without; greedy or sampled; the same text
in any batch.

Sampling draws ``argmax(logits / temperature + Gumbel noise)`` over the top-p set, which is an exact
draw from that distribution. The noise of a row comes from a generator of its own, seeded by (seed,
record id, sample number), so a text depends on neither its batch-mates nor the order of requests
nor their chunking, up to rounding in the forward pass.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from mlalign.images import open_image
from mlalign.models._family import ImageInputs
from mlalign.models._vlm import VLM
from mlalign.records import ImageRef, RecordError


@dataclass(frozen=True)
class Request:
    """One image, or none, and one prompt to be answered."""

    id: str
    """Record id: it seeds the samples and names the record in errors."""
    image: ImageRef | None
    """None: the prompt stands alone."""
    prompt: str


class Decoding(BaseModel):
    """How text is drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    max_new_tokens: int = Field(default=64, ge=1)
    """Tokens at most, the end-of-turn token included."""
    temperature: float = Field(default=0.0, ge=0)
    """0: greedy. Logits are divided by it before top_p."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Smallest set of likeliest tokens with at least this mass is kept."""
    samples: int = Field(default=1, ge=1)
    """Texts per request; greedy ones would all be equal, so more than one needs a temperature."""
    seed: int = 0


def generate(
    vlm: VLM,
    requests: Sequence[Request],
    decoding: Decoding,
    *,
    batch_size: int = 32,
    desc: str = "generating",
) -> list[list[str]]:
    """``[request][sample]`` in the order of requests: text without special tokens, stripped.

    ``batch_size`` is sequences per forward pass; an image is encoded once per batch, whatever
    the number of its sequences. Modes and the global random state are left as they were. Raises
    RecordError for an image that cannot be read.
    """
    sampled = generate_ids(vlm, requests, decoding, batch_size=batch_size, desc=desc)
    ends = end_ids(vlm)
    return [[_text(vlm, ids, ends) for ids in each] for each in sampled]


def generate_ids(
    vlm: VLM,
    requests: Sequence[Request],
    decoding: Decoding,
    *,
    batch_size: int = 32,
    desc: str = "generating",
    never: Sequence[int] = (),
) -> list[list[list[int]]]:
    """As ``generate``, the token ids as they were sampled: up to and with the end of turn, without
    it where the text ran into ``max_new_tokens``. ``never``: token ids that no text may hold."""
    if decoding.samples > 1 and decoding.temperature == 0:
        raise ValueError("samples > 1 with temperature 0 draws the same text: set a temperature")
    rows = [(i, sample) for i in range(len(requests)) for sample in range(decoding.samples)]
    sampled: list[list[list[int]]] = [[] for _ in requests]
    bar = tqdm(total=len(rows), desc=desc, unit="text", disable=len(rows) <= batch_size)
    with bar, undisturbed(vlm):
        for chunk in _chunks(requests, rows, batch_size):
            picked = [(requests[i], n) for i, n in chunk]
            answers = _generate_batch(vlm, picked, decoding, never)
            for (i, _), answer in zip(chunk, answers, strict=True):
                sampled[i].append(answer)
            bar.update(len(chunk))
    return sampled


def end_ids(vlm: VLM) -> list[int]:
    """Token ids that end a turn: the tokenizer's, and those of the model's generation config."""
    ids = {vlm.tokenizer.eos_token_id}
    configured = vlm.core.generation_config.eos_token_id
    ids.update(configured if isinstance(configured, list) else [configured])
    ids.discard(None)
    if not ids:
        raise ValueError("the tokenizer names no eos_token: set it to the end-of-turn token")
    return sorted(ids)


class GumbelNoise(LogitsProcessor):
    """Turns greedy decoding into sampling, one random generator per row."""

    def __init__(self, decoding: Decoding, keys: Sequence[tuple[str, int]]) -> None:
        self.temperature, self.top_p = decoding.temperature, decoding.top_p
        # The generators live on the CPU, so that a seed means the same on every device.
        self.generators = [
            torch.Generator().manual_seed(row_seed(decoding.seed, record, sample))
            for record, sample in keys
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(R, V) scores -> noisy float32 scores whose argmax is the draw."""
        logits = nucleus(scores.float() / self.temperature, self.top_p)
        width = logits.shape[-1]
        noise = torch.stack(
            [
                -torch.empty(width, dtype=torch.float64).exponential_(generator=g).log()
                for g in self.generators
            ]
        )
        return logits + noise.to(logits)


def nucleus(logits_RV: Tensor, top_p: float) -> Tensor:
    """Logits with everything outside the smallest set of mass >= ``top_p`` at minus infinity."""
    if top_p >= 1:
        return logits_RV
    ordered, index = logits_RV.sort(dim=-1, descending=True)
    mass = ordered.softmax(-1)
    before = mass.cumsum(-1) - mass
    dropped = torch.zeros_like(before, dtype=torch.bool)
    dropped.scatter_(-1, index, before >= top_p)
    # Rounding must never empty the set.
    dropped.scatter_(-1, index[..., :1], False)
    return logits_RV.masked_fill(dropped, float("-inf"))


def row_seed(seed: int, record_id: str, sample: int) -> int:
    """63 bits from (seed, record id, sample number), the same everywhere."""
    digest = hashlib.sha256(f"{seed}\x1f{record_id}\x1f{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _chunks(
    requests: Sequence[Request], rows: Sequence[tuple[int, int]], size: int
) -> Iterator[list[tuple[int, int]]]:
    """Rows with an image, then those without: a batch is of one kind."""
    for seen in (True, False):
        kind = [row for row in rows if (requests[row[0]].image is not None) == seen]
        for start in range(0, len(kind), size):
            yield kind[start : start + size]


def _generate_batch(
    vlm: VLM,
    rows: Sequence[tuple[Request, int]],
    decoding: Decoding,
    never: Sequence[int] = (),
) -> list[list[int]]:
    """One completion per (request, sample number); every request has an image, or none has."""
    inputs: dict[ImageRef, ImageInputs] = {}
    for request, _ in rows:
        if request.image is not None and request.image not in inputs:
            inputs[request.image] = vlm.image(open_image(request.image, request.id))
    seen = [inputs[request.image] for request, _ in rows if request.image is not None]
    if seen:
        prefixes = [
            vlm.prefix_ids(request.prompt, image.size)
            for (request, _), image in zip(rows, seen, strict=True)
        ]
    else:
        prefixes = [_text_ids(vlm, request) for request, _ in rows]
    width = max(map(len, prefixes))
    ends = end_ids(vlm)
    ids = torch.full((len(rows), width), vlm.pad_id)
    mask = torch.zeros_like(ids)
    for row, prefix in enumerate(prefixes):
        ids[row, width - len(prefix) :] = torch.tensor(prefix)
        mask[row, width - len(prefix) :] = 1
    pictures: dict[str, Any] = {}
    if seen:
        pictures = {"mm_encoder_outputs": {"image": vlm.features(seen)}}
        pictures |= vlm.family.generation(ids.to(vlm.device), vlm.image_token_id, seen)
    processors = LogitsProcessorList()
    if decoding.temperature > 0:
        processors.append(GumbelNoise(decoding, [(request.id, n) for request, n in rows]))
    with torch.no_grad():
        out = vlm.model.generate(
            input_ids=ids.to(vlm.device),
            attention_mask=mask.to(vlm.device),
            **pictures,
            logits_processor=processors,
            generation_config=_plain_config(decoding, ends, vlm.pad_id, never),
        )
    return [_cut(row, ends) for row in out[:, width:].tolist()]


def _text_ids(vlm: VLM, request: Request) -> list[int]:
    """Ids of the chat template over a prompt without an image, up to the assistant's header."""
    placeholder = vlm.family.placeholder(vlm.processor)
    if placeholder in request.prompt:
        raise RecordError(
            request.id,
            "prompt",
            f"holds {placeholder}, but no image goes with it",
            "Remove the tag, or give the image",
        )
    message = {"role": "user", "content": [{"type": "text", "text": request.prompt}]}
    # No placeholder is expanded, so the size does not matter.
    return vlm.family.template_ids(vlm.processor, [message], True, (64, 64))


def _plain_config(
    decoding: Decoding, ends: list[int], pad_id: int, never: Sequence[int]
) -> GenerationConfig:
    """Greedy and nothing else. What is left unset here, the checkpoint's own config fills in."""
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        min_new_tokens=0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=pad_id,
        suppress_tokens=list(never) or None,
    )


def _cut(ids: list[int], ends: list[int]) -> list[int]:
    """Up to and with the first end-of-turn token; what a batch pads with stands behind it."""
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))]


def _text(vlm: VLM, ids: list[int], ends: list[int]) -> str:
    """The text up to the first end-of-turn token."""
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return vlm.tokenizer.decode(ids[:stop], skip_special_tokens=True).strip()


@contextlib.contextmanager
def undisturbed(vlm: VLM) -> Iterator[None]:
    """Eval mode inside; each module's own mode and the global random state restored after."""
    modes: list[tuple[Any, bool]] = [(m, m.training) for m in vlm.model.modules()]
    devices = [vlm.device] if vlm.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        vlm.model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
