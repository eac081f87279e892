"""What the answer loses when the image's columns are hidden from it: causal, not correlational.

In a third of the decoder blocks (early, middle, late), or in all, no later token attends to any
image token; the image tokens still see each other (the intervention of Geva et al., arXiv
2304.14767, and Zhang et al., 2411.18620). With pi_B the model under it, teacher-forced on y:

    drop_<B>              log pi(y | x, v) - log pi_B(y | x, v)           nats per response
    drop_<B>_per_token    the same / tokens of y                          nats per token
    drop_<B>_auroc        of the drop per token: P(a real word's exceeds an absent one's)
    margin_<B>            log pi_B(chosen) - log pi_B(rejected)           nats
    kept_<B>              share of pairs whose margin has the same sign under pi and pi_B

B is early, middle, late or all. Groups: own, chosen, rejected are the tokens of those answers, end
of turn included; real and absent are object words that the facts affirm or not, each word the mean
of its tokens. Sides: base, adapted, and delta (adapted minus base). Means over answers or words,
intervals over records; the noise is the mean absolute difference between two runs of the same model
(for an AUROC, the difference of the two).

A drop can be negative: the image then spoke against the answer. Drops of the thirds do not add up
to that of all blocks: what one third is denied another may fetch, and what an earlier block moved
to a text token stays there. Hidden columns are not what the model was trained with (attention that
was on the image goes elsewhere), and a part of the drop can be due to that rather than to what the
image shows: read it beside image_reliance, which changes the image and leaves the attention free.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from mlalign.branching.batch import ProbeReading
from mlalign.models._vlm import VLM
from mlalign.probes._gaps import (
    Quantity,
    TokenWatch,
    entries,
    preferences,
    spread,
    words_apart,
)
from mlalign.probes._probe import KNOCKOUTS, RARE, Probe, ProbeBatch, Watch


class Settings(BaseModel):
    """No settings: the blocks are fixed, so that runs compare."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AttentionKnockout(Probe):
    """The probe; see the module's first lines for what it reads."""

    Settings = Settings
    name = "attention_knockout"
    prefix = "probe/attention_knockout"
    headline = "adapted"
    needs = frozenset(KNOCKOUTS)
    tier = RARE

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def watch(self, vlm: VLM, batch: ProbeBatch) -> Watch:
        """Keeps log-probs of every view."""
        return TokenWatch(batch)

    def compare(self, batch: ProbeBatch, before: Watch, after: Watch) -> list[Any]:
        """Sums over tokens of both sides, by item."""
        assert isinstance(before, TokenWatch) and isinstance(after, TokenWatch)
        return entries(batch, before, after)

    def readings(
        self, step: int, values: list[Any], noise: list[Any], weights: Any
    ) -> list[ProbeReading]:
        """Per record and over the set, by blocks and group; separation and margins over the set."""
        records = [value for rank in values for value in rank]
        repeats = [value for rank in noise for value in rank]
        fixed: dict[str, Any] = {"step": step, "probe": self.name}
        made: list[ProbeReading] = []
        for view in KNOCKOUTS:
            blocks = view.rpartition(".")[2]
            drop, name = _drop(view), f"drop_{blocks}"
            made += spread(fixed, name, records, repeats, drop, per_token=False)
            made += spread(fixed, f"{name}_per_token", records, repeats, drop, per_token=True)
            made += words_apart(fixed, f"{name}_auroc", records, repeats, drop)
            made += preferences(fixed, records, repeats, view, blocks)
        return made


def _drop(view: str) -> Quantity:
    return lambda kept: kept["image"] - kept[view]


METHOD = AttentionKnockout
