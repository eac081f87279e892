"""Exports: what each framework reads, checked against the framework's own reading of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from data_builders.sources.llama_factory import METHOD as FROM_LLAMA_FACTORY
from data_builders.sources.ms_swift import METHOD as FROM_MS_SWIFT
from data_builders.sources.trl import METHOD as FROM_TRL
from mlalign import methods
from mlalign.cli import app
from mlalign.export import ExportError, export
from mlalign.images import to_png
from mlalign.records import ImageRef, Preference, Segment
from mlalign.store import write_preferences

NEIGHBOURS = {
    "trl": FROM_TRL,
    "llama_factory": FROM_LLAMA_FACTORY,
    "ms_swift": FROM_MS_SWIFT,
}


def picture(number: int, kind: str = "PNG") -> bytes:
    import io

    image = Image.new("RGB", (12, 9), (30 * number % 256, 60, 200))
    if kind == "PNG":
        return to_png(image)
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def pair(number: int, **changed: Any) -> Preference:
    # The last two share an image, and one image is a JPEG.
    data = picture(min(number, 3), "JPEG" if number == 1 else "PNG")
    image = ImageRef(path=f"image{number}.png", data=data)
    given: dict[str, Any] = {
        "id": f"ours-{number}",
        "image": image,
        "image_sha256": image.sha256(),
        "prompt": f"What is number {number}?\nSay it in \u201cquotes\u201d.",
        "chosen": f"A kettle, {number}.",
        "rejected": f"A boat, {number}.\nAnd a line.",
        "segments": (Segment(side="chosen", start=2, end=8, label="edit"),),
    }
    return Preference(**(given | changed))


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """An arm's folder as a build leaves it."""
    write_preferences(tmp_path / "arm", [pair(n) for n in range(5)], {})
    return tmp_path / "arm"


def exporter(name: str, **settings: Any) -> Any:
    method = methods.find("mlalign.export", name)
    return method(method.Settings(**settings))


def read_back(name: str, out: Path, **settings: Any) -> list[Any]:
    source = NEIGHBOURS[name]
    return list(source(source.Settings(path=str(out), **settings)).pairs(None, 0))


@pytest.mark.parametrize("name", sorted(NEIGHBOURS))
def test_what_is_exported_reads_back_the_same(name: str, built: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = export(exporter(name), built, out)
    assert done == {"pairs": 5, "skipped": {}, "left_out": {"segments": 5}}
    found = read_back(name, out)
    assert [(p.prompt, p.chosen, p.rejected, p.image.read(), p.image_sha256) for p in found] == [
        (p.prompt, p.chosen, p.rejected, p.image.read(), p.image_sha256)
        for p in map(pair, range(5))
    ]
    assert all(p.id.endswith(f"ours-{n}") for n, p in enumerate(found))


def test_trl_columns(built: Path, tmp_path: Path) -> None:
    import datasets
    from trl.data_utils import is_conversational

    export(exporter("trl"), built, tmp_path / "out")
    data = datasets.load_dataset(
        str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert data.column_names == ["id", "images", "prompt", "chosen", "rejected"]
    first = data[0]
    assert is_conversational(first)
    [image] = first["images"]
    assert image.size == (12, 9) and image.convert("RGB").getpixel((0, 0)) == (0, 60, 200)
    assert first["prompt"] == [{"role": "user", "content": pair(0).prompt}]
    assert first["chosen"] == [{"role": "assistant", "content": pair(0).chosen}]


def test_trl_collates_it(built: Path, tmp_path: Path, tiny_llava: Path) -> None:
    import datasets
    from transformers import AutoProcessor
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    export(exporter("trl"), built, tmp_path / "out")
    data = datasets.load_dataset(
        str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache")
    )
    processor = AutoProcessor.from_pretrained(tiny_llava)
    batch = DataCollatorForVisionPreference(processor)([data[0], data[1]])
    assert batch["input_ids"].shape[0] == 4 and batch["pixel_values"].shape[0] == 4
    assert batch["completion_mask"].any(dim=1).all(), "every row has tokens to learn from"


def test_llama_factory_files(built: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(exporter("llama_factory", dataset="halluc", tag="<image>\n"), built, out)
    entry = json.loads((out / "dataset_info.json").read_text(encoding="utf-8"))
    assert entry == {
        "halluc": {
            "file_name": "halluc.jsonl",
            "formatting": "sharegpt",
            "ranking": True,
            "columns": {
                "messages": "conversations",
                "chosen": "chosen",
                "rejected": "rejected",
                "images": "images",
            },
        }
    }
    lines = (out / "halluc.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for number, row in enumerate(rows):
        [turn] = row["conversations"]
        assert turn == {"from": "human", "value": "<image>\n" + pair(number).prompt}
        # It refuses a row whose tags and images differ in number.
        assert turn["value"].count("<image>") == len(row["images"]) == 1
        assert row["chosen"] == {"from": "gpt", "value": pair(number).chosen}
        assert not Path(row["images"][0]).is_absolute() and (out / row["images"][0]).is_file()
    kinds = {Path(row["images"][0]).suffix for row in rows}
    assert kinds == {".png", ".jpg"}
    assert len(list((out / "images").iterdir())) == 4, "an image that two pairs share is one file"
    assert rows[3]["images"] == rows[4]["images"]


def test_ms_swift_files(tmp_path: Path) -> None:
    other = ImageRef(path="other.png", data=picture(7))
    write_preferences(tmp_path / "arm", [pair(0), pair(1, rejected_image=other)], {})
    out = tmp_path / "out"
    done = export(exporter("ms_swift"), tmp_path / "arm", out)
    assert done["left_out"] == {"segments": 2}, "the second image is kept"
    text = (out / "train.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert rows[0] == {
        "id": "ours-0",
        "messages": [
            {"role": "user", "content": "<image>" + pair(0).prompt},
            {"role": "assistant", "content": pair(0).chosen},
        ],
        "rejected_response": pair(0).rejected,
        "images": rows[0]["images"],
    }
    for row in rows:
        for image in row["images"] + row.get("rejected_images", []):
            assert Path(image).is_absolute() and Path(image).is_file()
    assert read_back("ms_swift", out)[1].rejected_image.read() == picture(7)
    export(exporter("ms_swift", paths="relative"), tmp_path / "arm", tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "elsewhere")
    found = read_back("ms_swift", tmp_path / "elsewhere")
    assert [p.image.read() for p in found] == [picture(0), picture(1, "JPEG")]


def test_a_second_image_that_a_format_has_no_place_for_is_told(tmp_path: Path) -> None:
    other = ImageRef(path="other.png", data=picture(7))
    write_preferences(tmp_path / "arm", [pair(0, rejected_image=other), pair(1)], {})
    for name in ("trl", "llama_factory"):
        done = export(exporter(name), tmp_path / "arm", tmp_path / name)
        assert done["left_out"] == {"rejected_image": 1, "segments": 2}


def broken_file(folder: Path) -> Path:
    (folder / "whole.png").write_bytes(picture(0))
    (folder / "cut.png").write_bytes(picture(1)[:40])
    row = {"images": ["whole.png"], "prompt": "What?", "chosen": "A.", "rejected": "B."}
    rows = [row, {**row, "images": ["cut.png"]}, {**row, "rejected": "A."}, row | {"images": []}]
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


@pytest.mark.parametrize("name", sorted(NEIGHBOURS))
def test_faulty_rows_are_all_told_or_all_counted(name: str, tmp_path: Path) -> None:
    file, out = broken_file(tmp_path), tmp_path / "out"
    with pytest.raises(ExportError, match=r"(?s)3 faulty record.*cut\.png.*equal to chosen.*0 im"):
        export(exporter(name), file, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.png", "pairs.jsonl", "whole.png"]
    done = export(exporter(name), file, out, skip_bad=True)
    assert done["pairs"] == 1 and sum(done["skipped"].values()) == 3
    assert len(read_back(name, out)) == 1


def test_nothing_is_overwritten_and_nothing_is_left_half(tmp_path: Path) -> None:
    write_preferences(tmp_path / "arm", [pair(0), pair(1)], {})
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(ExportError, match="is there already"):
        export(exporter("trl"), tmp_path / "arm", out)
    assert (out / "mine.txt").read_text() == "kept"

    class Stopped(Exception):
        pass

    class Half:
        lacks: frozenset[str] = frozenset()

        def write(self, pairs: Any, folder: Path, final: Path) -> None:
            next(iter(pairs))
            (folder / "half").write_text("half")
            raise Stopped

    with pytest.raises(Stopped):
        export(Half(), tmp_path / "arm", tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["arm", "out"]
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ExportError, match="no pair to export"):
        export(exporter("trl"), tmp_path / "none.jsonl", tmp_path / "new")


def test_command_line(built: Path, tmp_path: Path) -> None:
    run = CliRunner()
    out = tmp_path / "out"
    command = ["export", str(built), str(out), "dataset=mine", "tag=<image>\\n"]
    done = run.invoke(app, [*command, "--to", "llama_factory"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "5 pairs for llama_factory" in done.output
    assert "pairs that lose: 5 x segments" in done.output
    first = json.loads((out / "mine.jsonl").read_text().splitlines()[0])
    assert first["conversations"][0]["value"].startswith("<image>\nWhat")
    for wrong, said in (
        (["--to", "trlx"], "Did you mean 'trl'"),
        (["datset=x", "--to", "llama_factory"], "did you mean 'dataset'"),
        (["name=x", "--to", "trl"], "write key=value"),
    ):
        failed = run.invoke(app, ["export", str(built), str(tmp_path / "new"), *wrong])
        assert failed.exit_code != 0
        assert said in f"{failed.output} {failed.exception}"
    assert not (tmp_path / "new").exists()


def test_a_file_of_another_framework_can_be_exported(built: Path, tmp_path: Path) -> None:
    export(exporter("trl"), built, tmp_path / "trl")
    again = export(exporter("ms_swift"), tmp_path / "trl" / "data", tmp_path / "swift")
    assert again == {"pairs": 5, "skipped": {}, "left_out": {}}
    rebuilt = dataclasses.replace(pair(2), segments=())
    found = read_back("ms_swift", tmp_path / "swift")[2]
    assert (found.prompt, found.image.read()) == (rebuilt.prompt, rebuilt.image.read())
