"""A local model that answers yes/no questions about an image by the probability of its next token,
and writes text by greedy decoding or seeded sampling (``mlalign.generate``).

RLAIF-V's "conquer" step (2405.17220, section 3.2): p_yes is the probability that the first token
of the answer is one of the spellings of yes, summed over them; p_no likewise. Nothing is sampled.
All questions of an image branch from one row, so the image is computed once: the shared prefix is
the chat template up to the first token in which the questions differ. Where both probabilities
underflow to 0 the answer is undecided.

It is not a calibrated probability of truth, and it is not asked to explain itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from mlalign.branching.logps import next_token_logps
from mlalign.generate import Decoding, Request, generate
from mlalign.images import open_image
from mlalign.judges import UNDECIDED, Answer, Task, Written
from mlalign.judges._parse import EMPTY
from mlalign.models._family import ImageInputs
from mlalign.records import Example, ImageRef


class Settings(BaseModel):
    """How the model is asked."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str | None = None
    """Folder or Hub id of a judge of its own; None: the caller's model, adapter off."""
    image: str = "crop"
    """pad or crop, for a judge of its own."""
    images_per_batch: int = Field(default=8, ge=1)
    """Rows (images) per forward pass."""
    questions_per_row: int = Field(default=32, ge=1)
    """Questions that branch from one row; an image with more takes several rows."""
    yes: tuple[str, ...] = ("yes", "Yes", "YES")
    """Spellings of yes; each stands for the first token that it has as an answer."""
    no: tuple[str, ...] = ("no", "No", "NO")
    """Spellings of no."""
    template: str = "{question}"
    """What is asked, e.g. "{question}\\nAnswer the question using a single word or phrase."."""


class LocalModel:
    """The judge. ``vlm``: the model to ask where the settings name none."""

    Settings = Settings

    def __init__(self, settings: Settings, *, vlm: Any = None, vocabulary: Any = None) -> None:
        if "{question}" not in settings.template:
            raise ValueError("judge.template: write {question} where the question belongs")
        if settings.model is not None:
            from mlalign.models.loading import load_vlm_from

            vlm = load_vlm_from(settings.model, device="auto", image=settings.image)
        if vlm is None:
            raise ValueError(
                "judge local_model has no model: give judge.model, or a run with a model"
            )
        self.settings = settings
        self.vlm = vlm
        self._answer_ids: tuple[list[int], list[int]] | None = None

    def ask(self, example: Example, questions: Sequence[str]) -> list[Answer]:
        """One answer per question. Raises RecordError for an image that cannot be opened."""
        return self.ask_many([example], [questions])[0]

    def ask_many(
        self, examples: Sequence[Example], questions: Sequence[Sequence[str]]
    ) -> list[list[Answer]]:
        """Answers by example; rows are batched over images."""
        size = self.settings.questions_per_row
        rows = [
            (index, start)
            for index, asked in enumerate(questions)
            for start in range(0, len(asked), size)
        ]
        # Rows of like length together: less padding. The answers do not depend on it.
        rows.sort(key=lambda row: min(size, len(questions[row[0]]) - row[1]))
        found: dict[tuple[int, int], list[Answer]] = {}
        for start in range(0, len(rows), self.settings.images_per_batch):
            batch = rows[start : start + self.settings.images_per_batch]
            answers = self._forward(
                [examples[index] for index, _ in batch],
                [list(questions[index][first : first + size]) for index, first in batch],
            )
            found.update(zip(batch, answers, strict=True))
        return [
            [answer for start in range(0, len(asked), size) for answer in found[index, start]]
            for index, asked in enumerate(questions)
        ]

    def write_many(
        self,
        tasks: Sequence[Task],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[Written]:
        """One result per task, in order, ``images_per_batch`` at a time; adapter off.

        A text depends on neither its batch nor the order of tasks. An empty one is a failure.
        Raises RecordError for an image that cannot be read.
        """
        requests = [Request(task.id, task.image, task.text) for task in tasks]
        drawn = Decoding(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        with self._base():
            texts = generate(
                self.vlm,
                requests,
                drawn,
                batch_size=self.settings.images_per_batch,
                desc="writing",
            )
        return [Written(text) if text else Written(None, EMPTY) for (text,) in texts]

    def _base(self) -> contextlib.AbstractContextManager[Any]:
        vlm = self.vlm
        return vlm.adapter_off() if hasattr(vlm, "adapter_off") else contextlib.nullcontext()

    def _forward(self, examples: list[Example], questions: list[list[str]]) -> list[list[Answer]]:
        vlm = self.vlm
        inputs: dict[ImageRef, ImageInputs] = {}
        rows = []
        for example, asked in zip(examples, questions, strict=True):
            if example.image not in inputs:
                inputs[example.image] = vlm.image(open_image(example.image, example.id))
            prompts = [self.settings.template.format(question=question) for question in asked]
            rows.append(vlm.question_ids(prompts, inputs[example.image].size))
        batch = vlm.rows(
            [prefix for prefix, _ in rows],
            [branches for _, branches in rows],
            [inputs[example.image] for example in examples],
            ids=[[e.id] * len(asked) for e, asked in zip(examples, questions, strict=True)],
        ).to(vlm.device)
        with torch.inference_mode(), self._base():
            logps_CV = next_token_logps(vlm.model, vlm.encode(batch))
        yes, no = self._ids()
        p_yes = logps_CV[:, yes].exp().sum(-1).tolist()
        p_no = logps_CV[:, no].exp().sum(-1).tolist()
        # Where both underflow to 0 the model has said neither; 0 against 0 would read as a yes.
        made = [Answer(y, n) if y or n else UNDECIDED for y, n in zip(p_yes, p_no, strict=True)]
        answers = iter(made)
        return [[next(answers) for _ in asked] for asked in questions]

    def _ids(self) -> tuple[list[int], list[int]]:
        """Token ids of the two answers: each spelling's first token after the chat template."""
        if self._answer_ids is None:
            yes, no = (self._first_ids(words) for words in (self.settings.yes, self.settings.no))
            if set(yes) & set(no):
                raise ValueError(
                    "judge.yes and judge.no begin with the same token in this tokenizer; "
                    "give spellings that differ in their first token"
                )
            self._answer_ids = yes, no
        return self._answer_ids

    def _first_ids(self, words: Sequence[str]) -> list[int]:
        unknown = self.vlm.tokenizer.unk_token_id
        ids = set()
        for word in words:
            _, completions = self.vlm.branch_ids("Is it so?", [word], (64, 64))
            ids.add(completions[0][0])
        # A spelling that the tokenizer does not have would count every unknown word as an answer.
        known = sorted(token for token in ids if token != unknown)
        if not known:
            raise ValueError(f"judge: the tokenizer knows none of the spellings {', '.join(words)}")
        return known


METHOD = LocalModel
