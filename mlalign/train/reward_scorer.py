"""A trained reward model on the policy's own frozen base: a second adapter and a scalar head.

Nothing of the base is loaded twice. While it scores, its adapter stands in the place of the
policy's; no gradient, and which weights train does not change.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from mlalign.models._adapters import adapter_in_place
from mlalign.models._scalar import ScalarModel, load_head
from mlalign.models._vlm import VLM
from mlalign.rewards.reward_model import Query
from mlalign.train._scored import Asking, ScoreCollator, ScoredRow, row_of

ADAPTER = "reward"
BATCH = 8
"""Images per forward pass."""


class RewardScorer:
    """``RewardContext.score``: queries to a score for each of their spans."""

    def __init__(self, vlm: VLM, folder: str | Path, attention: str = "auto") -> None:
        """``vlm.model`` is the policy as a PeftModel, before a trainer wraps it.

        Raises ValueError where the model is none, and where the folder's adapter does not fit.
        """
        model: Any = vlm.model
        if not isinstance(model, PeftModel):
            raise ValueError("a reward model shares a frozen base: train an adapter, not all of it")
        folder = Path(folder)
        settings = json.loads((folder / "reward_model.json").read_text(encoding="utf-8"))
        self.asking = Asking(**{key: settings[key] for key in Asking.model_fields})
        self.vlm, self.attention = vlm, attention
        found = model.load_adapter(str(folder), ADAPTER, is_trainable=False)
        missing = [key for key in found.missing_keys if f".{ADAPTER}." in key]
        if missing or found.unexpected_keys:
            names = ", ".join([*missing, *found.unexpected_keys][:3])
            raise ValueError(
                f"reward_model: {folder} does not fit this model ({names}). It was trained on "
                "another base: name the one that belongs to model.path"
            )
        self.scalar = ScalarModel(model)
        load_head(self.scalar, folder)
        self.scalar.score.requires_grad_(False)
        self.collator = ScoreCollator(vlm, [])

    def __call__(self, queries: Sequence[Query]) -> list[list[float]]:
        """For each query a score of each of its spans."""
        out: list[list[float]] = []
        rows = self._rows(queries)
        inner: Any = self.vlm.model
        self.scalar.score.to(self.vlm.device)
        with torch.no_grad(), adapter_in_place(inner, ADAPTER), _evaluating(inner):
            for start in range(0, len(rows), BATCH):
                batch = self.collator.collate(rows[start : start + BATCH]).to(self.vlm.device)
                self.scalar.backbone = inner
                score_M = self.scalar(
                    self.vlm.encode(batch.rows), batch.row_M, batch.position_M, self.attention
                )
                found: list[list[float]] = [[] for _ in range(len(batch.rows.row_C))]
                for answer, value in zip(
                    batch.completion_M.tolist(), score_M.tolist(), strict=True
                ):
                    found[answer].append(value)
                out += found
        return out

    def _rows(self, queries: Sequence[Query]) -> list[ScoredRow]:
        """Queries of one image, as they stand together, share a row."""
        rows: list[ScoredRow] = []
        start = 0
        while start < len(queries):
            example = queries[start].completion.example
            stop = start
            while stop < len(queries) and queries[stop].completion.example.id == example.id:
                stop += 1
            texts = [query.completion.text for query in queries[start:stop]]
            prompt = self.asking.prompt(example.prompt, example.facts, example.id)
            rows.append(
                row_of(
                    self.vlm,
                    example.id,
                    example.image,
                    example.image_sha256,
                    prompt,
                    texts,
                    self.asking,
                )
            )
            start = stop
        return rows


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
