"""The rewards of a recipe, with what the run lends them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from mlalign import methods
from mlalign.models._vlm import VLM
from mlalign.objects import vocabulary
from mlalign.recipe import MethodRef, Recipe, RecipeError, configure
from mlalign.rewards import _combine
from mlalign.rewards._reward import RewardContext


class RewardRef(MethodRef):
    """A file of mlalign/rewards, its weight and its settings."""

    weight: float = 1.0
    """Of its scores in the sum."""


class RewardSettings(BaseModel):
    """What completions are worth."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    rewards: tuple[RewardRef, ...] = Field(min_length=1)
    """The terms of the weighted sum, e.g. [{name: object_checker}, {name: coverage, weight: 2}]."""
    reward_model: str | None = None
    """Adapter folder of a trained reward model, which shares the policy's frozen base; what the
    term reward_model asks."""
    detector: str | None = None
    """package.module:Name, called for a detector: image -> what is seen in it."""


def build(settings: RewardSettings, recipe: Recipe, vlm: VLM, score: Any = None) -> Any:
    """The rewards. Raises RecipeError naming the term, its key and the mend."""
    terms = []
    for ref in settings.rewards:
        method = methods.find(_combine.ROOM, ref.name)
        own = configure(method, MethodRef(name=ref.name, **ref.settings()), "rewards")
        terms.append((ref.name, ref.weight, own.model_dump()))
    detector = None
    if settings.detector is not None:
        if ":" not in settings.detector:
            raise RecipeError(f"detector: {settings.detector!r}. Write package.module:Name")
        detector = methods.find("", settings.detector)()
    words = vocabulary(recipe.data.vocabulary)
    context = RewardContext(
        vocabulary=words, judge=_judge(recipe, vlm, words), score=score, detector=detector
    )
    try:
        return _combine.build(terms, context)
    except ValueError as error:
        raise RecipeError(f"rewards: {error}") from error


def _judge(recipe: Recipe, vlm: VLM, words: Any) -> Any:
    ref = recipe.data.judge
    if ref is None:
        return None
    method = methods.find("mlalign.judges", ref.name)
    return method(configure(method, ref, "data.judge"), vlm=vlm, vocabulary=words)


def reward_folder(settings: RewardSettings) -> Path | None:
    """The reward model's folder. Raises RecipeError where a term needs one, or it is not there."""
    wanted = any(ref.name == "reward_model" for ref in settings.rewards)
    if settings.reward_model is None:
        if wanted:
            raise RecipeError(
                "rewards: reward_model needs a trained one: reward_model: runs/NAME/ARM/adapter"
            )
        return None
    folder = Path(settings.reward_model).expanduser()
    if not (folder / "reward_model.json").is_file():
        raise RecipeError(
            f"reward_model: {folder} holds no reward_model.json. Train one with "
            "train.algorithm: reward_model, and name its adapter folder"
        )
    return folder
