"""Teach the tower and the projector to name what stands in each cell, before the language model
listens.

Every projected patch token is asked for the object, the colour, the row and the column of the cell
that it lies in, by its likeness to the embeddings of those words (which learn along). So an image
token is close to the words that it will be asked for, and both looking up a place and searching for
a thing are one matching of vectors. Without this the language model spends most of its budget on
learning to look. Crowded scenes, drawn without any law, show more objects per image.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from mlalign.microworld.model import PATCH_SIZE
from mlalign.microworld.render import render
from mlalign.microworld.scenes import CELL, COLORS, GRID, IMAGE_SIZE, OBJECTS, SCENES, Scene, place

_CROWDED = 0.7
"""Chance that a cell of a warm-up scene holds an object."""


def crowded_scene(rng: random.Random) -> Scene:
    """A scene of any kind with any objects in most cells."""
    cells = [cell for cell in range(GRID * GRID) if rng.random() < _CROWDED]
    objects = [place(rng.choice(OBJECTS), rng.choice(COLORS), cell, rng) for cell in cells]
    return Scene(rng.choice(list(SCENES)), tuple(objects), rng.randrange(64))


NAMES = (*OBJECTS, "nothing")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
GROUPS = (NAMES, COLORS, ROWS, COLUMNS)
"""The words that a patch is asked for, one of each group."""
_SKIP = -100


def patch_labels(scene: Scene) -> np.ndarray:
    """Index into each of GROUPS for every patch in raster order, int64 [patches, 4]; -100 for the
    colour of an empty cell."""
    cells = np.array([[len(OBJECTS), _SKIP, c // GRID, c % GRID] for c in range(GRID * GRID)])
    for placed in scene.objects:
        cells[placed.cell, :2] = OBJECTS.index(placed.name), COLORS.index(placed.color)
    side = np.arange(IMAGE_SIZE // PATCH_SIZE) * PATCH_SIZE // CELL
    return cells[(side[:, None] * GRID + side[None, :]).reshape(-1)]


def warm_up(
    model: Any,
    tokenizer: Any,
    steps: int,
    batch: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> float:
    """Train tower, projector and word embeddings of ``model`` in place. Returns the last 50 steps'
    share of patches whose object and colour were both right."""
    torch.manual_seed(seed)
    rng = random.Random(f"microworld/warm-up/{seed}")
    embedding = model.get_input_embeddings().weight
    ids = [tokenizer.convert_tokens_to_ids(["▁" + word for word in group]) for group in GROUPS]
    weights = [
        *model.model.vision_tower.parameters(),
        *model.model.multi_modal_projector.parameters(),
        embedding,
    ]
    optimizer = torch.optim.AdamW(weights, learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    right: list[float] = []
    started = time.monotonic()
    for step in range(steps):
        pixels, labels = _batch(rng, batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen = torch.stack(model.model.get_image_features(pixels).pooler_output)
        seen = F.rms_norm(seen.float(), seen.shape[-1:])
        logits = [(seen @ embedding[group].T).flatten(0, 1) for group in ids]
        truth = labels.flatten(0, 1).unbind(-1)
        pairs = list(zip(logits, truth, strict=True))
        loss = torch.stack([F.cross_entropy(x, t, ignore_index=_SKIP) for x, t in pairs]).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        hits = [(x.argmax(-1) == t) | (t == _SKIP) for x, t in pairs[:2]]
        right.append((hits[0] & hits[1]).float().mean().item())
        if step % 50 == 49 or step == steps - 1:
            log(
                f"warm-up {step + 1}/{steps}  loss {loss.item():.3f}  "
                f"patches right {np.mean(right[-50:]):.3f}  {time.monotonic() - started:.0f} s"
            )
    return float(np.mean(right[-50:]))


def _batch(rng: random.Random, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [B, 3, H, W] as the processor gives them, labels [B, patches, 4]."""
    scenes = [crowded_scene(rng) for _ in range(batch)]
    images = np.stack([np.asarray(render(scene)) for scene in scenes])
    labels = np.stack([patch_labels(scene) for scene in scenes])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.25)
    return pixels, torch.from_numpy(labels)
