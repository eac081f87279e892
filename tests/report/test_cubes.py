"""Readings as arrays: packing, holes, what fits on a page, files that lack columns."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlalign.report import maps
from mlalign.report.cubes import PARTS, Cube, whole
from mlalign.report.folder import Run
from mlalign.report.pack import pack, pack_indices, size, unpack
from mlalign.report.readings import points
from tests.report.readings import STEPS, head_value


@pytest.mark.parametrize(("width", "steps"), [(2, 65534), (1, 254)])
def test_packed_numbers_come_back_within_half_a_step(width: int, steps: int) -> None:
    values = np.random.default_rng(0).normal(size=(3, 4, 5))
    values[1, 2, 3] = np.nan
    packed = pack(values, width)
    assert packed is not None
    back = unpack(packed).reshape(values.shape)
    assert np.isnan(back[1, 2, 3]) and np.isnan(back).sum() == 1
    step = (np.nanmax(values) - np.nanmin(values)) / steps
    assert np.nanmax(np.abs(back - values)) <= step / 2 + 1e-12


def test_nothing_finite_is_nothing_and_one_value_is_itself() -> None:
    assert pack(np.full(3, np.nan)) is None
    packed = pack(np.array([2.5, 2.5]))
    assert packed is not None and unpack(packed).tolist() == [2.5, 2.5]
    assert unpack(pack_indices([0, 7, 65534])).tolist() == [0, 7, 65534]


def test_cubes_hold_what_was_read(run: Path) -> None:
    found = whole(Run(run))
    cube = next(c for c in found.heads if (c.arm, c.name) == ("povid", "box_lift, real"))
    assert (cube.steps, cube.shape) == ([0, 30, 60, 90, STEPS], (4, 8))
    for layer, head in ((0, 0), (3, 7)):
        base, change = head_value(1.4, 1.1, layer, head, 90)
        got = [cube.sides[s]["value"][3, layer, head] for s in ("base", "adapted", "delta")]
        assert got == pytest.approx([base, base + change, change], rel=1e-5)
    assert cube.sides["delta"]["noise"][3, 1, 1] == pytest.approx(0.002)
    rms = next(c for c in found.layers if (c.metric, c.group) == ("rms", "response"))
    assert rms.shape == (4, 1)
    assert rms.sides["delta"]["lo"][4, 2, 0] == pytest.approx(0.9 * (0.4 * 0.9 + 0.002), rel=1e-5)
    # Layer -1 is over all layers: a number, not a row of the map.
    whole_set = points(found.numbers["neuron_drift"], "rms", group="response", arm="povid")
    assert whole_set[-1].value == pytest.approx(0.4 * 0.3 + 0.002, rel=1e-5)
    assert (whole_set[-1].low, whole_set[-1].high) == pytest.approx((0.1098, 0.1342), rel=1e-4)


def test_files_without_newer_columns_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "probes" / "arm"
    folder.mkdir(parents=True)
    rows = [
        {"metric": "m", "side": "delta", "record": "", "layer": layer, "head": -1, "value": 1.0}
        for layer in (-1, 0, 1)
    ]
    fixed = {"arm": "arm", "step": 5, "probe": "old"}
    pq.write_table(
        pa.Table.from_pylist([{**fixed, **row} for row in rows]), folder / "old-5.parquet"
    )
    found = whole(Run(tmp_path))
    (point,) = points(found.numbers["old"], "m")
    assert (point.value, point.n) == (1.0, 1) and math.isnan(point.low)
    (cube,) = found.layers
    assert cube.shape == (2, 1) and not np.isfinite(cube.sides["delta"]["lo"]).any()


def test_tables_of_other_rows_are_not_readings(run: Path) -> None:
    read = {t.probe for t in Run(run).probe_tables}
    assert {"neurons", "lens_words", "attention_maps", "image_reliance"} <= read
    readings = {t.probe for t in Run(run).reading_tables}
    assert not readings & {"neurons", "lens_words", "attention_maps"}


def big(count: int) -> list[Cube]:
    """Cubes of a model of 32 layers of 32 heads, probed twenty times, with all parts."""
    rng = np.random.default_rng(1)
    made = []
    for number in range(count):
        base = np.repeat(rng.random((1, 32, 32)), 20, 0)
        delta = rng.normal(size=(20, 32, 32))
        nothing = np.full_like(base, np.nan)
        rest = {"lo": delta - 1, "hi": delta + 1, "noise": np.abs(delta)}
        sides = {
            "base": {"value": base, **dict.fromkeys(PARTS[1:], nothing)},
            "adapted": {"value": base + delta, **dict.fromkeys(PARTS[1:], nothing)},
            "delta": {"value": delta, **rest},
        }
        steps = list(range(0, 2000, 100))
        made.append(Cube("arm", "probe", f"m{number}", "", steps, (32, 32), sides))
    return made


def test_large_models_fit_and_what_is_left_out_is_said() -> None:
    kept, said = maps.fit(big(20), maps.HEAD_BYTES)
    assert len(kept) == 20 and maps.FEWEST <= len(kept[0].steps) < 20
    assert kept[0].steps[0] == 0 and kept[0].steps[-1] == 1900
    assert f"{len(kept[0].steps)} of 20 passes are drawn" in said
    data = maps.data_of(kept)
    assert 0.6 * maps.HEAD_BYTES < size(data) <= 1.05 * maps.HEAD_BYTES
    # The adapted side is base and change, so it is not sent.
    assert data["maps"][0]["sides"].keys() == {"base", "delta"}


def test_too_many_maps_are_left_out_by_name() -> None:
    kept, said = maps.fit(big(8), 200_000)
    assert 1 <= len(kept) < 8 and "left out are probe: m" in said
    assert size(maps.data_of(kept)) <= 1.1 * 200_000


def test_small_runs_are_drawn_whole() -> None:
    cubes = big(1)
    kept, said = maps.fit(cubes, maps.HEAD_BYTES)
    assert (kept[0].steps, said) == (cubes[0].steps, "")


@pytest.mark.parametrize("count", [2, 3, 7])
def test_thinning_keeps_both_ends(count: int) -> None:
    steps = [0, 3, 10, 11, 12, 40, 41, 90]
    kept = maps.thin(steps, count)
    assert len(kept) == count and kept[0] == 0 and kept[-1] == 90
    assert kept == sorted(set(kept)) and set(kept) <= set(steps)
