"""A preference set as LLaMA-Factory takes it: sharegpt with ``ranking`` in dataset_info.json.

    dataset_info.json    {name: {file_name, formatting: sharegpt, ranking: true, columns, tags}}
    row                  conversations [{from, value}], chosen {from, value}, rejected, images

Column and tag names are those that the entry gives. ``path`` is the folder with dataset_info.json,
or a file or a data set on the Hub without one, whose columns then are the default names. Image
paths are
looked up as LLaMA-Factory does: below ``images`` (its media_dir), which is the folder of the file.
One question and one image for each row; a system text or earlier turns are faults, since a record
is one question.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_builders.sources._fields import as_mapping, image_of, question_of, text_of, value_of
from data_builders.sources._released import (
    PairSource,
    Released,
    SourceError,
    folder_of,
    load_json,
)
from mlalign.records import Preference, RecordError, Skip

INFO = "dataset_info.json"
COLUMNS = {
    "messages": "conversations",
    "chosen": "chosen",
    "rejected": "rejected",
    "images": "images",
    "system": "system",
}
TAGS = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}


class Settings(Released):
    """Where the set lies."""

    dataset: str | None = None
    """Entry of dataset_info.json; None: the only one with ranking."""
    images: str | None = None
    """Folder that image paths start from (media_dir); None: the folder of the data file."""


class LlamaFactory(PairSource):
    """The source."""

    Settings = Settings
    name = "llama_factory"
    patterns = (INFO, "*.parquet", "*.jsonl", "*.json")

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._columns, self._tags = dict(COLUMNS), dict(TAGS)

    def files(self) -> list[Path]:
        """The data files, by way of dataset_info.json where there is one. Raises SourceError."""
        if self._files is None:
            found = super().files()
            if found[0].name == INFO and len(found) > 1:
                raise SourceError(f"path: several {INFO} below {self.settings.path}; give one")
            self._files = [self._entry(found[0])] if found[0].name == INFO else found
        return self._files

    def key(self, row: dict[str, Any]) -> Any:
        return row.get("id")

    def made(self, row: dict[str, Any], record_id: str) -> Iterator[Preference | Skip]:
        """One pair."""
        names, tags = self._columns, self._tags
        if row.get(names["system"]):
            problem = "a system text, which a record does not have"
            raise RecordError(record_id, "system", problem, "Remove it or the row")
        said = value_of(row, names["messages"], record_id)
        if not isinstance(said, list) or len(said) != 1:
            problem = "is not a list of one question"
            raise RecordError(record_id, names["messages"], problem, "Mend or remove the row")
        given = value_of(row, names["images"], record_id)
        images = self.settings.images or folder_of(self.files())
        image, digest = image_of(given, record_id, images, own=True)
        yield Preference(
            id=record_id,
            image=image,
            image_sha256=digest,
            prompt=question_of(
                self._text(said[0], "messages", tags["user_tag"], record_id), "prompt", record_id
            ),
            chosen=self._text(row.get(names["chosen"]), "chosen", tags["assistant_tag"], record_id),
            rejected=self._text(
                row.get(names["rejected"]), "rejected", tags["assistant_tag"], record_id
            ),
            origin=self.origin(row=row.get("id")),
        )

    def _text(self, turn: Any, column: str, role: str, record_id: str) -> str:
        key, tags = self._columns[column], self._tags
        if turn is None:
            raise RecordError(record_id, key, "missing", "Mend or remove the row")
        turn = as_mapping(turn, key, record_id)
        if turn.get(tags["role_tag"]) != role:
            raise RecordError(record_id, key, f"is not said by {role}", "Mend or remove the row")
        return text_of(turn, tags["content_tag"], record_id)

    def _entry(self, info: Path) -> Path:
        """The data file of the entry that is read; takes over its column and tag names."""
        entries = load_json(info)
        if not isinstance(entries, dict):
            raise SourceError(f"{info}: is not a mapping of data sets")
        ranked = [
            name for name, e in entries.items() if isinstance(e, dict) and e.get("ranking") is True
        ]
        wanted = self.settings.dataset or (ranked[0] if len(ranked) == 1 else None)
        if wanted not in ranked:
            raise SourceError(
                f"dataset: {wanted or 'not given'}; {info} has with ranking: "
                f"{', '.join(ranked) or 'none'}. Name one of them"
            )
        entry = entries[wanted]
        if entry.get("formatting") != "sharegpt" or not isinstance(entry.get("file_name"), str):
            raise SourceError(
                f"{info}: {wanted} is not a sharegpt file (formatting and file_name). Only these "
                "are read; for a data set on the Hub give its id to the source that reads it"
            )
        self._columns |= entry.get("columns") or {}
        self._tags |= entry.get("tags") or {}
        file = info.parent / entry["file_name"]
        if not file.is_file():
            raise SourceError(f"{info}: {wanted} names {file}, which is not there")
        return file


METHOD = LlamaFactory
