"""Dialogues -> batches for the SFT stage, and which of their tokens carry loss.

The assistant's tokens carry it, the end-of-turn token included; the image and the user's words do
not. Which tokens those are is read off the chat template, rendered turn by turn. Nothing is ever
truncated: a dialogue that is too long is an error, as a cut one would lose its image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from mlalign.branching.layout import common_prefix
from mlalign.images import image_size, open_image
from mlalign.models._family import adds_bos
from mlalign.models._vlm import VLM
from mlalign.records import Dialogue, RecordError


class SftCollator:
    """Dialogues -> ``batch``, a row of one prefix and one completion for each, and ``image_keys``.

    The prefix ends where the first answer starts; the completion is everything after it, and
    ``mask_CS`` is True at its tokens that carry loss. An image that comes twice is encoded once.
    """

    def __init__(self, vlm: VLM, max_length: int | None = None) -> None:
        self.vlm, self.max_length = vlm, max_length

    def __call__(self, dialogues: Sequence[Dialogue]) -> dict[str, Any]:
        """Raises RecordError, naming the dialogue, for one that cannot be used."""
        keys = [d.image_sha256 or d.image.sha256() for d in dialogues]
        images = {
            key: self.vlm.image(open_image(d.image, d.id))
            for key, d in dict(zip(keys, dialogues, strict=True)).items()
        }
        rows = [self._row(dialogue) for dialogue in dialogues]
        starts = [supervised.index(True) for _, supervised in rows]
        batch = self.vlm.rows(
            [ids[:start] for (ids, _), start in zip(rows, starts, strict=True)],
            [[ids[start:]] for (ids, _), start in zip(rows, starts, strict=True)],
            [images[key] for key in keys],
            ids=[[d.id] for d in dialogues],
        )
        mask_CS = torch.zeros_like(batch.mask_CS)
        for row, ((_, supervised), start) in enumerate(zip(rows, starts, strict=True)):
            mask_CS[row, : len(supervised) - start] = torch.tensor(supervised[start:])
        return {"batch": replace(batch, mask_CS=mask_CS), "image_keys": list(images)}

    def _row(self, dialogue: Dialogue) -> tuple[list[int], list[bool]]:
        ids, supervised = tokenize_dialogue(self.vlm, dialogue)
        if self.max_length is not None and len(ids) > self.max_length:
            raise RecordError(
                dialogue.id,
                "turns",
                f"{len(ids)} tokens, more than max_length {self.max_length}",
                "Raise sft.max_length or split the dialogue",
            )
        return ids, supervised


def tokenize_dialogue(vlm: VLM, dialogue: Dialogue) -> tuple[list[int], list[bool]]:
    """Token ids, image tokens expanded, and which of them are the assistant's.

    The template is rendered up to the start and up to the end of every answer; what lies between
    is the answer, its end-of-turn mark included. The whole text is tokenized once.
    """
    size = image_size(dialogue.image, dialogue.id)
    messages: list[dict[str, Any]] = []
    spans: list[tuple[int, int]] = []
    text = ""
    for turn, (user, assistant) in enumerate(dialogue.turns):
        content = [{"type": "image"}] if turn == 0 else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": user}]})
        before = vlm.family.template_text(vlm.processor, messages, True, size)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": assistant}]})
        after = vlm.family.template_text(vlm.processor, messages, False, size)
        # LLaVA-OneVision's prompt ends in "assistant\n", its answer stands after "assistant \n".
        common = common_prefix([before, after])
        if not before.startswith(text) or before[common:].strip():
            raise RecordError(
                dialogue.id,
                "turns",
                f"the chat template changes earlier turns at turn {turn + 1}",
                "Use a template that only adds to what it wrote, or dialogues of one turn",
            )
        words = len(after) - len(after[common:].lstrip())
        spans.append((common if common == len(before) else words, len(after)))
        text = after
    bos = adds_bos(vlm.tokenizer, text)
    encoded = vlm.tokenizer(text, add_special_tokens=bos, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    _check_image(vlm, dialogue, ids, size)
    supervised = [
        any(start <= first < end for start, end in spans) for first, _ in encoded["offset_mapping"]
    ]
    return ids, supervised


def _check_image(vlm: VLM, dialogue: Dialogue, ids: list[int], size: tuple[int, int]) -> None:
    """Raise RecordError where the ids do not hold the image's tokens once."""
    alone = vlm.tokenizer(vlm.family.image_text(vlm.processor, size), add_special_tokens=False)
    wanted = list(alone["input_ids"]).count(vlm.image_token_id)
    found = ids.count(vlm.image_token_id)
    if found != wanted:
        raise RecordError(
            dialogue.id,
            "turns",
            f"{found} image tokens after the chat template, but its image takes {wanted}",
            "The template must place the image once, and no text may contain the image token",
        )
