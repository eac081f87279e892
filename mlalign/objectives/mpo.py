"""A weighted sum of other objectives, by name: mixed preference optimisation.

    loss = sum over parts of weight * loss of the part

Wang et al., 2024 (InternVL, arXiv 2411.10442): a preference, a quality and a generation loss. The
default is theirs: 0.8 ``dpo`` + 0.2 ``bco_pair`` + 1.0 ``sft``, each with its own file's reduction
(sums, sums, mean over the tokens of the chosen answer); the sum is a mean over pairs, taken by the
trainer. TRL 1.16 writes it ``loss_type=["sigmoid", "bco_pair", "sft"]`` with
``loss_weights=[0.8, 0.2, 1.0]``; it is that number with ``average: batch`` for ``sft``. It is not
the paper's or ms-swift's to the digit: their quality loss subtracts a running mean of the rewards,
which ``bco_pair`` here, as in TRL, does not. At policy = reference it is the weighted sum of the
parts' closed forms, and has none where a part has none. By hand: beta 0.1, log-ratios 2 and -1,
chosen log-probs of -1 a token: 0.8 * 0.554355 + 0.2 * 1.242536 + 1 = 1.691991.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mlalign import methods
from mlalign.branching.batch import ObjectiveOut, TokenLogps

ROOM = "mlalign.objectives"


class MpoPart(BaseModel):
    """One objective of the sum: ``{name: dpo, weight: 0.8, beta: 0.1}``.

    All keys but name and weight are settings of that objective, validated by its own class.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str
    """A file of mlalign/objectives, or ``package.module:Name``."""
    weight: float = Field(gt=0, allow_inf_nan=False)
    """Factor of this objective's loss. Leave a part out rather than weigh it 0."""

    @model_validator(mode="after")
    def _known(self) -> MpoPart:
        if self.name == "mpo":
            raise ValueError("mpo cannot be a part of itself: list its parts here")
        self.objective()
        return self

    def objective(self) -> Any:
        """The part, made with its settings. Raises ValueError naming the part and the key."""
        method = methods.find(ROOM, self.name)
        try:
            return method(method.Settings(**(self.model_extra or {})))
        except ValidationError as error:
            known = ", ".join(method.Settings.model_fields)
            faults = "; ".join(
                f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()
            )
            raise ValueError(f"part {self.name!r}: {faults}. Its settings are: {known}") from error


class MpoSettings(BaseModel):
    """Settings of the sum."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    parts: tuple[MpoPart, ...] = Field(
        (
            MpoPart(name="dpo", weight=0.8),
            MpoPart(name="bco_pair", weight=0.2),
            MpoPart(name="sft", weight=1.0),
        ),
        min_length=1,
    )
    """Each name once. Each part has a beta of its own; the rewards and margins that are logged are
    those of the first part."""

    @field_validator("parts")
    @classmethod
    def _each_once(cls, parts: tuple[MpoPart, ...]) -> tuple[MpoPart, ...]:
        names = [part.name for part in parts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"listed twice: {', '.join(twice)}. Give each name once")
        return parts


class Mpo:
    """Weighted sum of the losses of other objectives."""

    Settings = MpoSettings

    def __init__(self, settings: MpoSettings) -> None:
        self.settings = settings
        self.parts = [(part.name, part.weight, part.objective()) for part in settings.parts]
        views = [view for *_, part in self.parts for view in getattr(part, "views", ())]
        self.views = tuple(dict.fromkeys(views))
        """All that its parts look at."""
        self.edits = any(getattr(part, "edits", False) for *_, part in self.parts)

    @property
    def at_reference(self) -> float | None:
        """The loss where the policy is the reference; None where a part has no closed form."""
        total = 0.0
        for _, weight, part in self.parts:
            form = getattr(part, "at_reference", None)
            if form is None:
                return None
            total += weight * form
        return total

    def __call__(self, policy: TokenLogps, reference: TokenLogps) -> ObjectiveOut:
        """Completions are chosen and rejected by turns: ``logps_CS`` of shape (2N, S).

        Metrics: the mean unweighted loss of each part as ``loss/<part>``, and a part's own metrics
        with its name behind them.
        """
        outs = [(name, weight, part(policy, reference)) for name, weight, part in self.parts]
        metrics: dict[str, Any] = {}
        for name, _, out in outs:
            metrics[f"loss/{name}"] = out.per_pair_N.detach().mean()
            metrics |= {f"{key}/{name}": value for key, value in out.metrics.items()}
        _, first_weight, first = outs[0]
        loss_N = first_weight * first.per_pair_N
        for _, weight, out in outs[1:]:
            loss_N = loss_N + weight * out.per_pair_N
        return ObjectiveOut(
            per_pair_N=loss_N,
            margins_N=first.margins_N,
            chosen_rewards_N=first.chosen_rewards_N,
            rejected_rewards_N=first.rejected_rewards_N,
            metrics=metrics,
        )


METHOD = Mpo
