"""Probe records made ready for the model: items, their batches, and what each view shows."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from mlalign.branching.batch import PADDING, PrefixBatch
from mlalign.branching.views import noised
from mlalign.images import open_image
from mlalign.models._family import ImageInputs
from mlalign.models._vlm import VLM
from mlalign.probes._lens import Lens
from mlalign.probes._probe import BLANK, KNOCKOUTS, NOISED, SWAPPED, Item, ProbeBatch
from mlalign.probes._records import COMPLETIONS, FindsObjects, ProbeRecord, mentions

REPEATED = 4
"""Records of the repeat, at most."""
LONGER_TAIL = 8
"""Padded tokens added for it."""
NOISE_STEP = 500
"""Diffusion step of ``NOISED``, of 1000."""


def make_item(
    vlm: VLM,
    records: Sequence[ProbeRecord],
    index: int,
    vocabulary: FindsObjects,
    needs: Collection[str],
) -> Item:
    """Record ``index`` of the set, tokenised, with the images that ``needs`` name."""
    record = records[index]
    image = open_image(record.image, record.id)
    prefix, completions = vlm.branch_ids(record.prompt, record.texts, image.size, record.id)
    boxes: dict[str, Tensor] = {}
    for fact in record.facts.objects:
        if fact.box is not None:
            # A family whose image tokens have no grid has no boxes; the other probes run.
            with contextlib.suppress(NotImplementedError):
                mask = vlm.patch_mask(fact.box, image.size)
                if mask.any():
                    boxes[fact.name] = boxes.get(fact.name, torch.zeros_like(mask)) | mask
    return Item(
        index=index,
        record=record,
        prefix=prefix,
        completions=completions,
        image=vlm.image(image),
        swapped=_swapped(vlm, records, index, image) if SWAPPED in needs else None,
        # Seeded by the record alone: every pass of every run shows the same noise.
        noised=vlm.image(noised(image, NOISE_STEP, False, 0, record.id))
        if NOISED in needs
        else None,
        mentions=tuple(
            tuple(mentions(text, record.facts, vocabulary, vlm.tokenizer, ids, record.id))
            for text, ids in zip(record.texts, completions, strict=True)
        ),
        boxes=boxes,
    )


def make_batch(
    vlm: VLM, items: list[Item], lens: Lens | None = None, longer: int = 0
) -> ProbeBatch:
    """Items as rows on the model's device, ``longer`` padded tokens added. Pixels stay where they
    are until they are encoded."""
    rows = vlm.rows(
        [item.prefix for item in items],
        [item.completions for item in items],
        [item.image for item in items],
        ids=[[item.record.id] * len(COMPLETIONS) for item in items],
        sides=[list(COMPLETIONS)] * len(items),
    )
    if longer:
        rows = _padded(rows, longer, vlm.pad_id)
    image_RT = (rows.input_ids_RT == vlm.image_token_id) & (rows.segment_RT != PADDING)
    on_device = replace(rows, images={}).to(vlm.device)
    return ProbeBatch(
        items=items, rows=replace(on_device, images=rows.images), image_RT=image_RT, lens=lens
    )


def rearranged(vlm: VLM, batch: ProbeBatch) -> tuple[ProbeBatch, ProbeBatch]:
    """The batch's first items, as they stand in it, and the same in another batch: fewer rows, in
    reverse order, with a longer padded tail, and attending under a T x T mask.

    The same in exact arithmetic. The mask is what makes rounding show on a CPU, where a row's
    products do not depend on the rows beside it: completions are then summed over other stretches
    of keys. So a set of one record has its floor too. On a CPU what is read of the prefix alone
    still comes out as exactly 0, and so does everything of a model that always attends under a mask
    (sliding windows, image blocks): there the same bits are computed twice.
    """
    first = replace(batch, items=batch.items[:REPEATED])
    again = make_batch(vlm, first.items[::-1], batch.lens, LONGER_TAIL)
    return first, replace(again, attention="dense")


def seeing(vlm: VLM, batch: ProbeBatch, view: str) -> PrefixBatch | None:
    """The rows with the images of a view; None where an item has no such image."""
    if view == "image" or view in KNOCKOUTS:
        return batch.rows
    shown = {BLANK: lambda i: vlm.blank(i.image), SWAPPED: lambda i: i.swapped}
    find = {**shown, NOISED: lambda i: i.noised}[view]
    images = [find(item) for item in batch.items]
    if any(image is None for image in images):
        return None
    order = tuple(range(len(images)))
    return replace(batch.rows, images=vlm.family.collate(images), image_G=order)


def _swapped(
    vlm: VLM, records: Sequence[ProbeRecord], index: int, image: Image.Image
) -> ImageInputs | None:
    """The next record's image that is another one; None where the set has only one image."""
    own = records[index].image.sha256()
    later = [*records[index + 1 :], *records[:index]]
    record = next((r for r in later if r.image.sha256() != own), None)
    if record is None:
        return None
    other = open_image(record.image, record.id)
    # Resized where the family would give it another number of tokens.
    texts = {vlm.family.image_text(vlm.processor, each.size) for each in (other, image)}
    return vlm.image(other if len(texts) == 1 else other.resize(image.size))


def _padded(rows: PrefixBatch, by: int, pad_id: int) -> PrefixBatch:
    def longer(value_RT: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(value_RT, (0, by), value=fill)

    return replace(
        rows,
        input_ids_RT=longer(rows.input_ids_RT, pad_id),
        position_ids=longer(rows.position_ids, 0),
        segment_RT=longer(rows.segment_RT, PADDING),
        group_RT=longer(rows.group_RT, PADDING),
        place_RT=longer(rows.place_RT, 0),
        block_RT=None if rows.block_RT is None else longer(rows.block_RT, -1),
    )
