"""LLaVA-RLHF's human comparisons (Sun et al., 2309.14525): zhiqings/LLaVA-Human-Preference-10K.

A JSON list of ``image, conversations, output_1, output_2, preference``: a conversation of
``{from: human | gpt, value}`` whose last answer stands for either output (``{from, value}``), and
1 or 2 for the better one. ``image`` names a file of COCO train2017. Some rows wrap the
conversation in a list of one.

Many rows ask their question after earlier turns, which a record, being one question, does not
have. ``history`` says what becomes of them: left out (counted), or written before the question in
LLaVA-1.5's own roles, which that model's template reads almost as it reads turns (the end-of-text
tokens between turns are missing).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from data_builders.sources._fields import as_mapping, image_of, text_of, value_of
from data_builders.sources._released import PairSource, Released, SourceError, load_json
from data_builders.sources.povid import turns_of
from mlalign.records import Facts, Preference, RecordError, Skip

HISTORY = "asked after earlier turns"


class Settings(Released):
    """Where the release and its images lie, and what a row with earlier turns gives."""

    images: str
    """Folder of the images: COCO train2017."""
    history: Literal["skip", "join"] = "skip"
    """skip: a row with earlier turns is left out; join: they are written before the question."""
    captions: str | None = None
    """The release's ``image_to_caption.json`` (file name -> captions): the facts that its reward
    model reads; None: pairs without facts."""


class LlavaRlhf(PairSource):
    """The source."""

    Settings = Settings
    name = "llava_rlhf"
    patterns = ("*preference*.json", "*.json", "*.jsonl", "*.parquet")
    expected = frozenset({f"conversations: {HISTORY}"})

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._captions = Captions(settings.captions)

    def key(self, row: dict[str, Any]) -> Any:
        return row.get("id")

    def made(self, row: dict[str, Any], record_id: str) -> Iterator[Preference | Skip]:
        """One pair."""
        said = value_of(row, "conversations", record_id)
        if isinstance(said, list) and len(said) == 1 and isinstance(said[0], list):
            said = said[0]
        turns = turns_of({"conversations": said}, "conversations", record_id)
        if len(turns) > 1 and self.settings.history == "skip":
            mend = "Set history: join to write them before the question"
            raise RecordError(record_id, "conversations", HISTORY, mend)
        better = value_of(row, "preference", record_id)
        if type(better) is not int or better not in (1, 2):
            raise RecordError(record_id, "preference", "neither 1 nor 2", "Mend or remove the row")
        chosen, rejected = (
            _output(row, f"output_{number}", record_id) for number in (better, 3 - better)
        )
        named = value_of(row, "image", record_id)
        image, digest = image_of(named, record_id, self.settings.images)
        yield Preference(
            id=record_id,
            image=image,
            image_sha256=digest,
            prompt=joined(turns),
            chosen=chosen,
            rejected=rejected,
            facts=Facts(captions=self._captions.of(named)),
            origin=self.origin(row=row.get("id"), image=named, turns=len(turns), preference=better),
        )


class Captions:
    """The release's ``image_to_caption.json``, read when it is first asked for."""

    def __init__(self, file: str | None) -> None:
        """``file``: None where there is none, and no image has captions."""
        self._file = file
        self._table: dict[str, Any] | None = None

    def of(self, image: Any, prefix: str = "") -> tuple[str, ...]:
        """What the file says of an image, by its name; with ``prefix`` "aok_" the rationales of
        A-OKVQA. Nothing where it says nothing. Raises SourceError."""
        if self._file is None or not isinstance(image, str):
            return ()
        if self._table is None:
            file = Path(self._file).expanduser()
            self._table = load_json(file)
            if not isinstance(self._table, dict):
                raise SourceError(f"captions: {file} is not a mapping of file names to captions")
        name = prefix + Path(image).name
        found = self._table.get(name, [])
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise SourceError(f"captions: {name} has no list of texts. Mend the file")
        return tuple(found)


def joined(turns: list[tuple[str, str]]) -> str:
    """The last question, with earlier turns before it in LLaVA-1.5's roles."""
    *before, (last, _) = turns
    if not before:
        return last
    told = "\n".join(f"USER: {question}\nASSISTANT: {answer}" for question, answer in before)
    # The template itself writes the first role.
    return f"{told.removeprefix('USER: ')}\nUSER: {last}"


def _output(row: dict[str, Any], key: str, record_id: str) -> str:
    return text_of(as_mapping(value_of(row, key, record_id), key, record_id), "value", record_id)


METHOD = LlavaRlhf
