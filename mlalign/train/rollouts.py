"""Completions that the policy samples now, scored, with credit for each token.

Groups are whole: the completions of a prompt stay together on one process and in one micro-batch,
where they branch from one prefix. What a completion is made of is what was sampled: its token ids
are never found by tokenising its text again. Seeds come from (run's seed, optimiser step, record,
sample), so that a step that is redone after a kill samples the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor
from trl.trainer.utils import RepeatSampler

from mlalign import methods
from mlalign.branching.batch import PrefixBatch
from mlalign.credit.spans import TokenSpans, lay_spans
from mlalign.data.pictures import Pictures
from mlalign.generate import Decoding, Request, end_ids, row_seed
from mlalign.images import image_size
from mlalign.models._vlm import VLM
from mlalign.recipe import MethodRef, configure
from mlalign.records import Example
from mlalign.rewards._combine import Combined, Rewards
from mlalign.rewards._offsets import completion_of
from mlalign.rewards._reward import Completion, RewardUnavailable
from mlalign.sections import Ref

ENGINES = "mlalign.train.engines"


class Sampling(BaseModel):
    """How the policy answers. What is trained is what is sampled: at the same temperature, and from
    all tokens (top-p 1)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    group: int = Field(default=8, ge=2)
    """Completions of a prompt."""
    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits while sampling, and in every log-prob of policy and reference (online_dpo:
    while sampling only, its objective is of the model as it is)."""
    sample_batch: int = Field(default=64, ge=1)
    """Sequences per forward pass while sampling."""
    engine: Ref = MethodRef(name="transformers")
    """Who samples: a file of mlalign/train/engines and its settings."""
    attempts: int = Field(default=5, ge=1)
    """Times that rewards are asked for where what they ask is down, before training stops."""
    wait: float = Field(default=5.0, ge=0)
    """Seconds before the second attempt; doubled for each further one."""

    @field_validator("engine")
    @classmethod
    def _is_there(cls, engine: MethodRef) -> MethodRef:
        _engine(engine)
        return engine


class RewardsFailed(RuntimeError):
    """The rewards of one process or more failed, or stayed out of reach; all of them stop."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Groups of completions of this process, one after the other."""

    completions: list[Completion]
    combined: list[Combined]
    spans: TokenSpans
    mask_RT: Tensor
    """bool; T is the longest completion of the rollout."""

    @property
    def total_R(self) -> Tensor:
        """Reward of each completion, float64."""
        return torch.tensor([c.total for c in self.combined], dtype=torch.float64)

    @property
    def level_R(self) -> Tensor:
        """The part of it that no span carries."""
        return torch.tensor([c.level for c in self.combined], dtype=torch.float64)


class Roller:
    """Samples groups and has them scored."""

    def __init__(self, vlm: VLM, rewards: Rewards, sampling: Sampling, seed: int) -> None:
        """Raises what the engine raises where it cannot be had."""
        method, settings = _engine(sampling.engine)
        self.engine = method(settings, vlm)
        self.vlm = vlm
        self.rewards = rewards
        self.sampling = sampling
        self.seed = seed
        self._pictures = Pictures(vlm)

    def sample(self, examples: Sequence[Example], step: int) -> list[Completion]:
        """``group`` completions of each example, group by group; no gradient."""
        own = self.sampling
        decoding = Decoding(
            max_new_tokens=own.max_new_tokens,
            temperature=own.temperature,
            samples=own.group,
            seed=row_seed(self.seed, "rollout", step),
        )
        requests = [Request(e.id, e.image, e.prompt) for e in examples]
        sampled = self.engine.sample(requests, decoding, own.sample_batch)
        ends = end_ids(self.vlm)
        return [
            completion_of(self.vlm.tokenizer, ends, example, ids, sample=number)
            for example, group in zip(examples, sampled, strict=True)
            for number, ids in enumerate(group)
        ]

    def score(self, completions: list[Completion]) -> Rollout:
        """What they are worth. Asks again where a reward cannot be reached; raises
        RewardUnavailable after the last attempt, and RewardError."""
        wait = self.sampling.wait
        for attempt in range(1, self.sampling.attempts + 1):
            try:
                combined = self.rewards.score_group(completions)
                break
            except RewardUnavailable as error:
                if attempt == self.sampling.attempts:
                    raise
                print(f"{error}; attempt {attempt + 1} in {wait:g} s", flush=True)
                time.sleep(wait)
                wait *= 2
        lengths = [len(c.token_ids) for c in completions]
        width = max(lengths)
        return Rollout(
            completions=completions,
            combined=combined,
            spans=lay_spans([c.spans for c in combined], [c.offsets for c in completions], width),
            mask_RT=torch.arange(width) < torch.tensor(lengths)[:, None],
        )

    def rows(self, completions: Sequence[Completion], size: int | None = None) -> PrefixBatch:
        """Whole groups (of ``size``; None: as sampled) as rows of one prefix each, on the CPU."""
        size = size or self.sampling.group
        groups = [completions[i : i + size] for i in range(0, len(completions), size)]
        heads = [group[0].example for group in groups]
        return self.vlm.rows(
            [self.vlm.prefix_ids(e.prompt, image_size(e.image, e.id)) for e in heads],
            [[list(c.token_ids) for c in group] for group in groups],
            [self._pictures(e.image, e.id, e.image_sha256) for e in heads],
            ids=[[c.id for c in group] for group in groups],
        )


def _engine(ref: MethodRef) -> tuple[Any, Any]:
    """The engine's class and its settings. Raises UnknownMethod and RecipeError."""
    method = methods.find(ENGINES, ref.name)
    return method, configure(method, ref, "train.algorithm.engine")


class GroupSampler(RepeatSampler):
    """TRL's order of prompts, each epoch by a seed of its own: a run that is resumed in a later
    epoch goes on in the order that it would have had."""

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader."""
        self.generator.manual_seed((self.seed or 0) + epoch)


def table(rollout: Rollout) -> list[dict[str, Any]]:
    """A line per completion for the run's log: text, reward, terms, the spans and their scores."""
    return [
        {
            "id": c.example.id,
            "sample": c.sample,
            "prompt": c.example.prompt,
            "completion": c.text,
            "tokens": len(c.token_ids),
            "stopped": c.stopped,
            "reward": worth.total,
            "terms": dict(worth.terms),
            "spans": [[s.start, s.end, s.score, s.term] for s in worth.spans],
        }
        for c, worth in zip(rollout.completions, rollout.combined, strict=True)
    ]


def scored(roller: Roller, completions: list[Completion], processes: int) -> Rollout:
    """``roller.score``; a process whose rewards fail stops all of them, not only itself."""
    if processes == 1:
        return roller.score(completions)
    rollout, fault = None, ""
    try:
        rollout = roller.score(completions)
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    faults = [each for each in gather_object([fault]) if each]
    if faults or rollout is None:
        raise RewardsFailed(f"rewards failed on {len(faults)} process(es): {faults[0]}")
    return rollout


def prompts_of(rows: Sequence[dict[str, Any]], size: int) -> list[int]:
    """Index of each group's prompt. Raises ValueError where a group is not whole here."""
    indices = [int(row["index"]) for row in rows]
    heads = indices[::size]
    if indices != [head for head in heads for _ in range(size)]:
        raise ValueError(
            "the completions of a prompt are scattered over processes: rows per process must be a "
            f"multiple of the group's {size}"
        )
    return heads
