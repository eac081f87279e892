"""Write microworld scenes the way a user's own data lies on disk.

    python -m mlalign.microworld.export FOLDER

    FOLDER/pairs.jsonl               TRL's columns: images (paths), prompt, chosen, rejected
    FOLDER/images/                   their images
    FOLDER/pictures/captions.jsonl   {"image", "captions"} of pictures that no pair uses
    FOLDER/pictures/images/

The rejected side claims an absent object in the place of one that is there, so both sides mention
equally many. Nothing of ours stands in the files: no record id, no facts. No torch.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mlalign.microworld import language, world
from mlalign.microworld.language import Mention
from mlalign.microworld.scenes import OBJECTS, Scene, make_scene, typical
from mlalign.records import Example
from mlalign.store import write_text_atomic

Row = Callable[[str], dict[str, Any]]
"""The row of an image, given the image's path."""


def export(folder: str | Path, *, pairs: int = 64, pictures: int = 96, seed: int = 0) -> Path:
    """Write pairs, and pictures for probes and evaluation, into ``folder``; returns it."""
    target = Path(folder)
    _write(target, "pairs.jsonl", (pair(index, seed) for index in range(pairs)))
    captions = (captioned(index, seed) for index in range(pictures))
    _write(target / "pictures", "captions.jsonl", captions)
    return target


def pair(index: int, seed: int = 0) -> tuple[Example, Row]:
    """A scene and its row, once the image's path is known."""
    scene = make_scene("pairs", index, seed)
    example = world.example("pairs", index, seed)
    mentions = language.true_mentions(scene)
    chosen = language.caption(scene.kind, mentions)
    rejected = language.caption(scene.kind, _falsified(scene, mentions, index, seed))
    messages = {
        "prompt": [{"role": "user", "content": example.prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
    return example, lambda image: {"images": [image], **messages}


def captioned(index: int, seed: int = 0) -> tuple[Example, Row]:
    """A picture with its caption, and its row once the image's path is known."""
    example = world.example("heldout", index, seed)
    captions = list(example.facts.captions)
    # A captions file names pictures inside its images folder.
    return example, lambda image: {"image": Path(image).name, "captions": captions}


def _falsified(scene: Scene, mentions: list[Mention], index: int, seed: int) -> list[Mention]:
    rng = random.Random(f"microworld/export/{seed}/{index}")
    at = rng.randrange(len(mentions))
    absent = [name for name in typical(scene.kind) if name not in scene.names()]
    absent = absent or [name for name in OBJECTS if name not in scene.names()]
    wrong = Mention(mentions[at].position, mentions[at].color, rng.choice(absent))
    return [*mentions[:at], wrong, *mentions[at + 1 :]]


def _write(folder: Path, name: str, rows: Iterable[tuple[Example, Row]]) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for example, row in rows:
        image = f"images/{example.id}.png"
        (folder / image).write_bytes(example.image.read())
        lines.append(json.dumps(row(image), ensure_ascii=False) + "\n")
    write_text_atomic(folder / name, "".join(lines))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="mlalign.microworld.export", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    print(f"wrote {export(options.pop('folder'), **options)}")


if __name__ == "__main__":
    main()
