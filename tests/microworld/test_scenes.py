"""The law of the scenes: reproducible, disjoint, exact boxes; text does not tell truth."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from mlalign.microworld import language, scenes
from mlalign.microworld.render import render
from mlalign.microworld.scenes import make_scene


def test_same_arguments_same_scene_in_another_process() -> None:
    code = (
        "from mlalign.microworld.scenes import make_scene as m;"
        "print([m('pairs', i, 3) for i in range(5)])"
    )
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert there == str([make_scene("pairs", i, 3) for i in range(5)])


def test_splits_and_seeds_are_disjoint() -> None:
    seen: dict[str, tuple[str, int]] = {}
    for split in scenes.SPLITS:
        for seed in (0, 1):
            for index in range(300):
                key = str(make_scene(split, index, seed))
                assert seen.setdefault(key, (split, seed)) == (split, seed)


def test_unknown_split_lists_the_splits() -> None:
    with pytest.raises(ValueError, match="heldout"):
        make_scene("test", 0)


def test_scenes_hold_two_to_five_different_objects_in_raster_order() -> None:
    counts = Counter()
    for i in range(500):
        scene = make_scene("train", i)
        cells = [o.cell for o in scene.objects]
        assert cells == sorted(set(cells)) and len(scene.names()) == len(cells)
        counts[len(cells)] += 1
    assert set(counts) == {2, 3, 4, 5}


def test_boxes_are_exactly_what_the_object_paints() -> None:
    for i in range(60):
        scene = make_scene("heldout", i)
        whole = np.asarray(render(scene)).astype(int)
        for placed in scene.objects:
            rest = replace(scene, objects=tuple(o for o in scene.objects if o is not placed))
            ys, xs = np.nonzero((whole != np.asarray(render(rest))).any(-1))
            assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == placed.box
            column, row = placed.cell % 3, placed.cell // 3
            assert column * 32 <= placed.box[0] and placed.box[2] <= column * 32 + 32
            assert row * 32 <= placed.box[1] and placed.box[3] <= row * 32 + 32


def test_every_object_and_color_looks_different() -> None:
    drawn = {
        scenes.icons.icon(name, color, 28).tobytes()
        for name in scenes.OBJECTS
        for color in scenes.COLORS
    }
    assert len(drawn) == len(scenes.OBJECTS) * len(scenes.COLORS)
    assert len(scenes.OBJECTS) >= 15 and len(scenes.SCENES) == 5


def test_a_companion_is_there_half_of_the_time() -> None:
    with_trigger = with_companion = filler = 0
    for i in range(4000):
        scene = make_scene("train", i)
        for trigger, companion in scenes.companions(scene.kind).items():
            if trigger in scene.names():
                with_trigger += 1
                with_companion += companion in scene.names()
        if missing := scenes.missing_companion(scene):
            filler += scene.at(missing[2] + 1) is not None
    assert 0.62 < with_trigger / 4000 < 0.70
    assert 0.47 < with_companion / with_trigger < 0.53
    assert 0.63 < filler / (with_trigger - with_companion) < 0.77


def test_false_captions_read_like_true_ones() -> None:
    """Number of mentions, and the place and number of the companion's mention, are distributed
    alike where the companion is there and where it is only claimed."""
    lengths: dict[bool, Counter[int]] = {True: Counter(), False: Counter()}
    places: dict[bool, Counter[int]] = {True: Counter(), False: Counter()}
    for i in range(12000):
        scene = make_scene("train", i)
        pairs = scenes.companions(scene.kind)
        trigger = next((o for o in scene.objects if o.name in pairs), None)
        if trigger is None:
            continue
        mentions = language.sft_mentions(scene, random.Random(i))
        names = [m.name for m in mentions]
        if pairs[trigger.name] in names:
            real = pairs[trigger.name] in scene.names()
            lengths[real][len(names)] += 1
            places[real][names.index(pairs[trigger.name])] += 1
            companion = mentions[names.index(pairs[trigger.name])]
            assert companion.color == trigger.color
    for counts in (lengths, places):
        totals = {real: sum(counts[real].values()) for real in counts}
        for value in set(counts[True]) | set(counts[False]):
            shares = [counts[real][value] / totals[real] for real in (True, False)]
            assert abs(shares[0] - shares[1]) < 0.04, (value, shares)


def test_the_world_loads_no_torch() -> None:
    code = (
        "import sys, mlalign.microworld.world as w; w.example('pairs', 0); w.dialogue('pairs', 0);"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
