"""Closed questions by polling: all questions of an image in one row, behind their common prefix.

Serves every benchmark that asks several short questions of one image (POPE, AMBER, MME): the image
is computed once, and the answer is the likeliest next token after each question.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from mlalign.benchmarks._items import Item
from mlalign.branching.logps import next_token_logps
from mlalign.generate import undisturbed
from mlalign.images import open_image
from mlalign.models._vlm import VLM


def poll(vlm: VLM, items: Sequence[Item], batch_size: int) -> list[str]:
    """The likeliest first token of each answer, as text. All items of an image share its prefix.

    ``batch_size``: images per forward pass.
    """
    places: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        places.setdefault(item.example_id, []).append(place)
    images = list(places.values())
    answers = [""] * len(items)
    bar = tqdm(total=len(images), desc="polling", unit="image", disable=len(images) <= batch_size)
    with bar, undisturbed(vlm):
        for start in range(0, len(images), batch_size):
            chunk = images[start : start + batch_size]
            for place, text in _poll_batch(vlm, items, chunk):
                answers[place] = text
            bar.update(len(chunk))
    return answers


def _poll_batch(
    vlm: VLM, items: Sequence[Item], images: Sequence[Sequence[int]]
) -> list[tuple[int, str]]:
    """(place of the item, answer) for the items of each image."""
    first = [items[group[0]] for group in images]
    seen = [vlm.image(open_image(item.image, item.example_id)) for item in first]
    asked = [
        vlm.question_ids([items[place].prompt for place in group], inputs.size)
        for group, inputs in zip(images, seen, strict=True)
    ]
    batch = vlm.rows(
        [prefix for prefix, _ in asked],
        [branches for _, branches in asked],
        seen,
        ids=[[items[place].id for place in group] for group in images],
    )
    with torch.no_grad():
        batch = vlm.encode(batch.to(vlm.device))
    tokens = next_token_logps(vlm.model, batch).argmax(-1).tolist()
    order = [place for group in images for place in group]
    return [
        (place, vlm.tokenizer.decode([token], skip_special_tokens=True).strip())
        for place, token in zip(order, tokens, strict=True)
    ]
