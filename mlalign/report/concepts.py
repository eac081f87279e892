"""Section: one image as the model's own head reads it, patch by patch; base against aligned."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mlalign.report import figures as fg
from mlalign.report import gallery, pictures
from mlalign.report.folder import Run
from mlalign.report.maps import thin
from mlalign.report.pack import pack, pack_indices
from mlalign.report.section import Section

WORDS, MAPS = "lens_words", "lens_maps"
PROBE = "lens_confidence"
RECORDS, LAYERS = 6, 6
"""Images and layers shown at most, evenly spaced."""
SIDE = 320
"""Pixels of the picture on the page."""
NOTE = (
    "Logit lens on image tokens: each patch has the word that the model's own head finds likeliest "
    "there. Or choose an object word of the answers to see its probability over the patches. What "
    "can be read off a patch is not what the answer uses."
)


def section(run: Run, figures: fg.Figures) -> Section:
    """The view of each chosen record with its choices."""
    rows = _rows(run, WORDS)
    album = gallery.album_of(run)
    records = []
    for identity in dict.fromkeys(row["record"] for row in rows):
        known = album.index.by_id.get(identity)
        image, _ = album.image(known) if known else (None, "")
        if image is not None:
            records.append((identity, image))
    records = gallery.spread(records, RECORDS)
    if not records:
        empty = f"no labelled patches were logged: {PROBE} did not run, or its images are gone"
        return Section(id="concepts", title="What patches say", empty=empty)
    layers = sorted({row["layer"] for row in rows})
    shown = thin(layers, LAYERS)
    data = _data(run, records, shown, rows)
    note = NOTE
    if len(shown) < len(layers):
        note += f" {len(shown)} of the {len(layers)} layers that were read are shown."
    html = figures.widget("concepts", data, "patches labelled by the lens")
    return Section(id="concepts", title="What patches say", note=note, html=html)


def _rows(run: Run, table: str) -> list[dict[str, Any]]:
    """Of each arm's last pass."""
    return run.probe(table, last=True)


def _data(
    run: Run, records: Sequence[tuple[str, Image.Image]], layers: Sequence[int], rows: list[Any]
) -> dict[str, Any]:
    chosen = {identity for identity, _ in records}
    kept = [r for r in rows if r["record"] in chosen and r["layer"] in layers]
    vocabulary = sorted({word for row in kept for word in row["words"]})
    places = {word: i for i, word in enumerate(vocabulary)}
    mode = str((run.recipe.get("model") or {}).get("image", "crop"))
    views: dict[str, dict[str, Any]] = {}
    for row in kept:
        views[_key(row)] = {
            "words": pack_indices([places[word] for word in row["words"]]),
            "values": pack(np.asarray(row["values"]), 1),
        }
    found: dict[str, dict[str, bool]] = defaultdict(dict)
    for row in _rows(run, MAPS):
        if row["record"] in chosen and row["layer"] in layers:
            views[_key(row)] = {"values": pack(np.asarray(row["values"]), 1)}
            found[row["record"]][row["word"]] = bool(row["real"])
    grids = {row["record"]: (row["grid_rows"], row["grid_cols"]) for row in kept}
    return {
        "arms": list(dict.fromkeys(row["arm"] for row in kept)),
        "layers": list(layers),
        "vocabulary": vocabulary,
        "records": [
            {
                "id": identity,
                "image": pictures.data_uri(pictures.seen(image, mode, grids[identity], SIDE)),
                "grid": grids[identity],
                "objects": sorted(found[identity].items()),
            }
            for identity, image in records
        ],
        "views": views,
    }


def _key(row: dict[str, Any]) -> str:
    """Under which the page finds a view: record, layer, arm ("" for the base, which is the same for
    every arm), word ("" for the likeliest of each patch)."""
    arm = "" if row["side"] == "base" else row["arm"]
    return "\n".join([row["record"], str(row["layer"]), arm, row.get("word", "")])
