"""Dialogues -> batches for the SFT stage, and which of their tokens carry loss.

The assistant's tokens carry it, the end-of-turn token included; the image and the user's words do
not. Which tokens those are is read off the chat template, rendered turn by turn. Nothing is ever
truncated: a dialogue that is too long is an error, as a cut one would lose its image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mlalign.images import open_image
from mlalign.models._family import adds_bos
from mlalign.records import Dialogue, RecordError
from mlalign.train.sft_features import FeatureCache

IGNORE = -100
"""Label of a token without loss."""


class SftCollator:
    """Dialogues -> padded tensors: input_ids, attention_mask, labels [B, L]; pixel_values
    [B, 3, H, W], or with a feature cache the keys of the images and the pixels not yet seen."""

    def __init__(
        self, processor: Any, max_length: int | None = None, cache: FeatureCache | None = None
    ) -> None:
        self.processor, self.max_length, self.cache = processor, max_length, cache
        self.pad = processor.tokenizer.pad_token_id
        self.image_id = processor.image_token_id

    def __call__(self, dialogues: Sequence[Dialogue]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        if self.cache is None:
            batch["pixel_values"] = self._pixels(dialogues)
            count = image_token_count(self.processor, batch["pixel_values"])
        else:
            batch["image_keys"] = [d.image_sha256 for d in dialogues]
            new = list(
                {d.image_sha256: d for d in dialogues if d.image_sha256 not in self.cache}.values()
            )
            if new:
                batch["pixel_values"] = self._pixels(new)
                batch["pixel_keys"] = [d.image_sha256 for d in new]
                self.cache.tokens = image_token_count(self.processor, batch["pixel_values"])
            count = self.cache.tokens
        rows = [self._row(d, count) for d in dialogues]
        length = max(len(ids) for ids, _ in rows)
        batch["input_ids"] = torch.full((len(rows), length), self.pad)
        batch["labels"] = torch.full((len(rows), length), IGNORE)
        batch["attention_mask"] = torch.zeros((len(rows), length), dtype=torch.long)
        for i, (ids, labels) in enumerate(rows):  # right padding: positions start at 0
            batch["input_ids"][i, : len(ids)] = torch.tensor(ids)
            batch["labels"][i, : len(ids)] = torch.tensor(labels)
            batch["attention_mask"][i, : len(ids)] = 1
        return batch

    def _pixels(self, dialogues: Sequence[Dialogue]) -> torch.Tensor:
        images = [open_image(d.image, d.id) for d in dialogues]
        return self.processor.image_processor(images, return_tensors="pt")["pixel_values"]

    def _row(self, dialogue: Dialogue, image_tokens: int) -> tuple[list[int], list[int]]:
        ids, supervised = tokenize_dialogue(self.processor, dialogue)
        at = ids.index(self.image_id)
        ids[at : at + 1] = [self.image_id] * image_tokens
        supervised[at : at + 1] = [False] * image_tokens
        if self.max_length is not None and len(ids) > self.max_length:
            raise RecordError(
                dialogue.id,
                "turns",
                f"{len(ids)} tokens, more than max_length {self.max_length}",
                "Raise sft.max_length or split the dialogue",
            )
        return ids, [i if s else IGNORE for i, s in zip(ids, supervised, strict=True)]


def tokenize_dialogue(processor: Any, dialogue: Dialogue) -> tuple[list[int], list[bool]]:
    """Token ids with one image token, and which of them are the assistant's.

    The template is rendered up to the start and up to the end of every answer; what lies between
    is the answer, its end-of-turn mark included. The whole text is tokenized once.
    """
    messages: list[dict[str, Any]] = []
    spans: list[tuple[int, int]] = []
    text = ""
    for turn, (user, assistant) in enumerate(dialogue.turns):
        content = [{"type": "image"}] if turn == 0 else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": user}]})
        before = processor.apply_chat_template(messages, add_generation_prompt=True)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": assistant}]})
        after = processor.apply_chat_template(messages)
        if not (before.startswith(text) and after.startswith(before)):
            raise RecordError(
                dialogue.id,
                "turns",
                f"the chat template changes earlier turns at turn {turn + 1}",
                "Use a template that only adds to what it wrote, or dialogues of one turn",
            )
        spans.append((len(before), len(after)))
        text = after
    tokenizer = processor.tokenizer
    special = adds_bos(tokenizer, text)
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    if ids.count(processor.image_token_id) != 1:
        raise RecordError(
            dialogue.id,
            "turns",
            f"{ids.count(processor.image_token_id)} image tokens after the chat template",
            "The template must place the image once, and no text may contain the image token",
        )
    supervised = [
        any(start <= first < end for start, end in spans) for first, _ in encoded["offset_mapping"]
    ]
    return ids, supervised


def image_token_count(processor: Any, pixel_values: torch.Tensor) -> int:
    """Image tokens that the processor would write for one image of this batch."""
    text = processor.replace_image_token({"pixel_values": pixel_values[:1].cpu().numpy()}, 0)
    return text.count(processor.image_token)
