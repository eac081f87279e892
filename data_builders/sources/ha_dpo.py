"""HA-DPO's pairs (Zhao et al., 2311.16839): juliozhao/hadpo-data, one set for each of three models.

    hadpo/{llava-v1.5, minigpt4, instructblip}/desc_data.json    descriptions, three paraphrases
    hadpo/{llava-v1.5, minigpt4, instructblip}/pope_data.json    yes/no questions

Descriptions are a mapping of Visual Genome image ids to ``chosen`` and ``rejected``, three texts
each (LLaVA), or a list with ``image_id`` (MiniGPT-4). Questions are a list of ``image_id, question,
chosen, reject, answer, correct``; the rejected side is spelled ``reject``. Image ids are turned
into files by Visual Genome's ``image_data.json``: the last two parts of an entry's url.

As the released loader for LLaVA: the questions come first, then the descriptions twice; a question
that the model answered correctly is left out; a description's prompt is drawn from four. It draws
one of three paraphrases for either side on its own (``paraphrases: one``; the authors say that the
paper used all: ``all`` pairs the k-th with the k-th). What is drawn hangs on the seed and the image
alone, so the draws are not those of the released code. The four prompts are this project's own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field

from data_builders.sources._common import faulty
from data_builders.sources._fields import as_text, image_of, question_of, text_of, value_of
from data_builders.sources._released import (
    PairSource,
    Released,
    Row,
    SourceError,
    load_json,
    locate,
    read,
)
from mlalign.records import ImageRef, Preference, RecordError, Skip

CORRECT = "answered correctly"

Model = Literal["llava-v1.5", "minigpt4", "instructblip"]
MODELS: tuple[str, ...] = get_args(Model)

PROMPTS = (
    "Give a detailed description of this picture.",
    "What can be seen in this image? Describe it thoroughly.",
    "Tell me in detail what this photo shows.",
    "Look closely at the image and describe everything in it.",
)


class Settings(Released):
    """Where the release and Visual Genome lie, and what the released loader does."""

    images: str
    """Folder of Visual Genome, with VG_100K and VG_100K_2 in it."""
    index: str | None = None
    """Visual Genome's image_data.json; None: the one in ``images``."""
    model: Model = "llava-v1.5"
    """Whose mistakes: the rejected texts are that model's own."""
    parts: tuple[Literal["questions", "descriptions"], ...] = ("questions", "descriptions")
    """What is read, in this order."""
    paraphrases: Literal["one", "all"] = "one"
    """one: a paraphrase of either side, drawn; all: a pair for each."""
    repeat_descriptions: int = Field(default=2, ge=1)
    """Times that the descriptions are read; the released loader has them twice."""
    keep_correct: bool = False
    """Keep questions that the model answered correctly; the loader for MiniGPT-4 does."""
    prompts: tuple[str, ...] = Field(default=PROMPTS, min_length=1)
    """Requests for a description; one is drawn for each pair."""


class HaDpo(PairSource):
    """The source."""

    Settings = Settings
    name = "ha_dpo"
    expected = frozenset({f"correct: {CORRECT}"})

    def files(self) -> list[Path]:
        """The files of the parts that are read, in their order. Raises SourceError."""
        if self._files is None:
            self._files = [self._file(part) for part in self.settings.parts]
        return self._files

    def fingerprint(self) -> dict[str, Any]:
        """What was read; the index says which images the ids mean."""
        return {**super().fingerprint(), "images_indexed": len(self._index)}

    def pairs(self, limit: int | None, seed: int) -> Iterator[Preference | Skip]:
        """Pairs and skips of the first ``limit`` rows of all parts; streams."""
        makers = {"questions": self._question, "descriptions": partial(self._description, seed)}
        rows = chain.from_iterable(
            self._rows(part, file)
            for part, file in zip(self.settings.parts, self.files(), strict=True)
        )
        return read(
            self.name,
            rows,
            lambda row: f"{row['part'][:4]}-{row['image_id']}" if "image_id" in row else None,
            lambda row, record_id: makers[row["part"]](row, record_id),
            limit,
        )

    def _file(self, part: str) -> Path:
        name = "pope_data.json" if part == "questions" else "desc_data.json"
        model = self.settings.model
        patterns = (f"hadpo/{model}/{name}", f"{model}/{name}", name)
        found = locate(self.settings.path, patterns, self.settings.revision)
        if found == [Path(self.settings.path).expanduser()] and len(self.settings.parts) > 1:
            raise SourceError(
                f"path: {found[0]} is one file, but parts names two. Give the folder that holds "
                "both files, or the one part that it is"
            )
        if len(found) > 1 or found[0].parent.name in set(MODELS) - {model}:
            raise SourceError(
                f"path: {self.settings.path} holds {name} of another model than {model} "
                f"({found[0].parent}). Set model, or give the folder of one model"
            )
        return found[0]

    def _rows(self, part: str, file: Path) -> Iterator[Row]:
        raw = load_json(file)
        if isinstance(raw, dict):
            raw = [{"image_id": k, **v} if isinstance(v, dict) else v for k, v in raw.items()]
        if not isinstance(raw, list):
            raise SourceError(f"{file}: neither a list nor a mapping by image. Give another file")
        times = self.settings.repeat_descriptions if part == "descriptions" else 1
        for _ in range(times):
            for number, row in enumerate(raw, start=1):
                value = {**row, "part": part} if isinstance(row, dict) else row
                yield Row(file=file, number=number, value=value)

    def _question(self, row: dict[str, Any], record_id: str) -> Iterator[Preference | Skip]:
        if not self.settings.keep_correct and value_of(row, "correct", record_id):
            raise RecordError(record_id, "correct", CORRECT, "Set keep_correct to keep such rows")
        prompt = question_of(text_of(row, "question", record_id), "question", record_id)
        image, digest = self._image(row, record_id)
        yield Preference(
            id=record_id,
            image=image,
            image_sha256=digest,
            prompt=prompt,
            chosen=text_of(row, "chosen", record_id),
            rejected=text_of(row, "reject", record_id),
            origin=self.origin(
                row=row["image_id"],
                part="questions",
                model=self.settings.model,
                answer=row.get("answer"),
            ),
        )

    def _description(
        self, seed: int, row: dict[str, Any], record_id: str
    ) -> Iterator[Preference | Skip]:
        value_of(row, "image_id", record_id)
        sides = [_texts(row, side, record_id) for side in ("chosen", "rejected")]
        # Not by the record's id: a row that is read twice gives the same pair, as in the loader.
        rng = random.Random(f"{self.name}/{row['image_id']}/{seed}")
        if self.settings.paraphrases == "one":
            drawn = [rng.choice(list(enumerate(texts))) for texts in sides]
            pairs = [(record_id, drawn[0], drawn[1])]
        elif len(sides[0]) != len(sides[1]):
            problem = "not as many paraphrases as chosen"
            raise RecordError(record_id, "rejected", problem, "Set paraphrases: one")
        else:
            pairs = [
                (f"{record_id}-{k}", (k, chosen), (k, rejected))
                for k, (chosen, rejected) in enumerate(zip(*sides, strict=True))
            ]
        image, digest = self._image(row, record_id)
        for pair_id, (first, chosen), (second, rejected) in pairs:
            try:
                yield Preference(
                    id=pair_id,
                    image=image,
                    image_sha256=digest,
                    prompt=rng.choice(self.settings.prompts),
                    chosen=chosen,
                    rejected=rejected,
                    origin=self.origin(
                        row=row["image_id"],
                        part="descriptions",
                        model=self.settings.model,
                        paraphrases=[first, second],
                        seed=seed,
                    ),
                )
            except RecordError as error:
                yield faulty(error)

    def _image(self, row: dict[str, Any], record_id: str) -> tuple[ImageRef, str]:
        image_id = str(value_of(row, "image_id", record_id))
        if image_id not in self._index:
            problem = "is not in Visual Genome's index"
            raise RecordError(record_id, "image_id", problem, "Give the whole image_data.json")
        return image_of(self._index[image_id], record_id, self.settings.images)

    @cached_property
    def _index(self) -> dict[str, str]:
        """Visual Genome's file of each image id, below its folder."""
        given = self.settings.index
        default = Path(self.settings.images).expanduser() / "image_data.json"
        file = Path(given).expanduser() if given else default
        raw = load_json(file)
        try:
            return {str(entry["image_id"]): "/".join(entry["url"].split("/")[-2:]) for entry in raw}
        except (TypeError, KeyError, AttributeError) as error:
            raise SourceError(
                f"index: {file} is not a list of image_id and url ({error!r}). Give Visual "
                "Genome's image_data.json"
            ) from error


def _texts(row: dict[str, Any], key: str, record_id: str) -> list[str]:
    value = value_of(row, key, record_id)
    if not isinstance(value, list) or not value:
        raise RecordError(record_id, key, "is not a list of paraphrases", "Mend or remove the row")
    return [as_text(text, key, record_id) for text in value]


METHOD = HaDpo
