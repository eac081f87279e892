"""mDPO's pairs (Wang et al., 2406.11839): fwnlp/mDPO-preference-data, 10K of VLFeedback.

A JSON list of ``img_path, prompt, chosen, rejected``. The prompt is a whole chat as Bunny's
template has it: a system line, ``USER: <image>`` and the question, ``ASSISTANT:``. Only the
question is kept, since the model's own chat template is put around it. The worse image of mDPO's
second term is cropped while training: the release has none, and so has the pair.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from data_builders.sources._fields import image_of, question_of, text_of, value_of
from data_builders.sources._released import PairSource, Released
from mlalign.records import Preference, RecordError, Skip

_ROLE = re.compile(r"(?:^|\s)USER:")
_CHAT = re.compile(r"(?:^|.*\s)USER:\s*(?P<question>.*?)\s*ASSISTANT:\s*", re.DOTALL)


class Settings(Released):
    """Where the release and its images lie."""

    images: str
    """Folder that ``img_path`` starts from, or that holds the files themselves."""


class Mdpo(PairSource):
    """The source."""

    Settings = Settings
    name = "mdpo"
    patterns = ("*.json", "*.jsonl", "*.parquet")

    def key(self, row: dict[str, Any]) -> Any:
        return None

    def made(self, row: dict[str, Any], record_id: str) -> Iterator[Preference | Skip]:
        """One pair."""
        prompt = question_in(text_of(row, "prompt", record_id), record_id)
        chosen, rejected = (text_of(row, side, record_id) for side in ("chosen", "rejected"))
        named = value_of(row, "img_path", record_id)
        image, digest = image_of(named, record_id, self.settings.images)
        yield Preference(
            id=record_id,
            image=image,
            image_sha256=digest,
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            origin=self.origin(row=record_id.partition("-row")[2], image=named),
        )


def question_in(prompt: str, record_id: str) -> str:
    """The question of a chat prompt; a prompt without roles is one. Raises RecordError."""
    roles = len(_ROLE.findall(prompt))
    if roles > 1:
        raise RecordError(record_id, "prompt", "several questions", "Mend or remove the row")
    match = _CHAT.fullmatch(prompt)
    if roles and match is None:
        problem = "a chat that does not end with ASSISTANT:"
        raise RecordError(record_id, "prompt", problem, "Mend or remove the row")
    return question_of(match["question"] if match else prompt, "prompt", record_id)


METHOD = Mdpo
