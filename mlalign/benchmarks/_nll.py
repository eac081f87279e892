"""Negative log-likelihood of clean reference captions: does the model still speak?

A model that was pushed away from language has no hallucinations either, so this stands beside every
hallucination rate. Mean over tokens, the end-of-turn token included, over all captions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from mlalign.benchmarks._items import Metric, Row, by_image, ratio
from mlalign.branching.logps import completion_logps
from mlalign.generate import undisturbed
from mlalign.images import open_image
from mlalign.models._vlm import VLM
from mlalign.records import Example

NAME = "nll"
KEY = "lm/clean_caption_nll"


def measure(vlm: VLM, examples: Sequence[Example], batch_size: int) -> list[Row]:
    """Nats and tokens of each example's first reference caption; examples without one give no row.

    Raises ValueError where none has one.
    """
    told = [example for example in examples if example.facts.captions]
    if not told:
        raise ValueError(f"{KEY}: no example has a reference caption. Give a source with captions")
    rows: list[Row] = []
    bar = tqdm(total=len(told), desc="clean captions", unit="text", disable=len(told) <= batch_size)
    with bar, undisturbed(vlm), torch.no_grad():
        for start in range(0, len(told), batch_size):
            chunk = told[start : start + batch_size]
            rows += _measure_batch(vlm, chunk)
            bar.update(len(chunk))
    return rows


def metrics(rows: Sequence[Row]) -> dict[str, Metric]:
    """Nats per token."""
    images = by_image(rows)
    nats = [sum(row["nll"] for row in group) for group in images]
    return {KEY: ratio(nats, [float(sum(row["tokens"] for row in group)) for group in images])}


def _measure_batch(vlm: VLM, examples: Sequence[Example]) -> list[Row]:
    seen = [vlm.image(open_image(e.image, e.id)) for e in examples]
    branches = [
        vlm.branch_ids(e.prompt, [e.facts.captions[0]], inputs.size, e.id)
        for e, inputs in zip(examples, seen, strict=True)
    ]
    batch = vlm.rows(
        [prefix for prefix, _ in branches],
        [completions for _, completions in branches],
        seen,
        ids=[[e.id] for e in examples],
    )
    out = completion_logps(vlm.model, vlm.encode(batch.to(vlm.device)))
    sums, lengths = out.sum_C().tolist(), out.lengths_C().tolist()
    return [
        {
            "id": example.id,
            "example_id": example.id,
            "prompt": example.prompt,
            "caption": example.facts.captions[0],
            "nll": -total,
            "tokens": length,
        }
        for example, total, length in zip(examples, sums, lengths, strict=True)
    ]
