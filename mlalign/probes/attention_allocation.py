"""How attention is shared out over system, image, user and response, and how much each token gets.

For the rows that produce response tokens (row t - 1 for the token at t), by layer, with A the
attention weights (mean over heads) and g one of four groups of columns:

    alloc_<g>   sum over g of A                                share, 0..1; the four sum to 1
    eff_<g>     alloc_<g> / (tokens of g that the row may see)  share per token

FastV, arXiv 2403.06764. Groups of columns: "system" is the prefix before the first image token,
"user" its other text, template marks included; "response" the answer's own earlier tokens, never
those of another answer. A row that may see no token of a group has no efficiency (the first token
of every answer has none for "response"). With a sliding window, tokens outside of it still count.

Means over rows: "response" is every token of the own, chosen and rejected answers; "real" and
"absent" are object words that the facts affirm or not. ``alloc_image_auroc``: P(a real word has
more on the image than an absent one); chance 0.5. Not an explanation: the first token soaks up
attention that does nothing (it is in "system"), so a small image share is not proof of blindness.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mlalign.models._vlm import VLM
from mlalign.probes._attention_rows import RESPONSE, ROWS, RowProbe, RowWatch, columns
from mlalign.probes._probe import ProbeBatch, Watch

COLUMNS = ("system", "image", "user", "response")
ALLOC = tuple(f"alloc_{name}" for name in COLUMNS)
EFF = tuple(f"eff_{name}" for name in COLUMNS)


class Settings(BaseModel):
    """No settings: the groups are fixed, so that runs compare."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def allocation(weights_HQT: Tensor, group_GT: Tensor, visible_GQ: Tensor) -> Tensor:
    """(2G, H, Q): mass on each group of columns, then the same per visible token of the group.

    ``group_GT``: bool. ``visible_GQ``: tokens of each group that each row may see; 0 gives NaN.
    """
    mass_GHQ = torch.stack([weights_HQT[..., columns_T].sum(-1) for columns_T in group_GT])
    seen_GHQ = visible_GQ[:, None].expand_as(mass_GHQ)
    return torch.cat([mass_GHQ, torch.where(seen_GHQ > 0, mass_GHQ / seen_GHQ, float("nan"))])


class _Allocation(RowWatch):
    def read(self, layer: int, row: int, weights_HQT: Tensor) -> Tensor:
        """Masses and efficiencies of one block's rows."""
        found = columns(self.batch, row)
        group_GT = torch.stack([found[name] for name in COLUMNS])
        visible_GQ = group_GT.sum(1)[:, None].repeat(1, weights_HQT.shape[1]).float()
        # The row that produces an answer's token i sees the i tokens before it, and no sibling.
        visible_GQ[COLUMNS.index("response")] = torch.cat(
            [torch.arange(len(rows)).float() for rows in self.batch.queries(row)]
        )
        device = weights_HQT.device
        return allocation(weights_HQT, group_GT.to(device), visible_GQ.to(device))


class AttentionAllocation(RowProbe):
    """The probe; see the module's first lines for what it reads."""

    Settings = Settings
    name = "attention_allocation"
    metrics = (*ALLOC, *EFF)
    separates = ("alloc_image",)

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def groups(self, metric: str) -> tuple[str, ...]:
        """Masses in every group; per token over the response alone."""
        return ROWS if metric in ALLOC else (RESPONSE,)

    def watch(self, vlm: VLM, batch: ProbeBatch) -> Watch:
        """Sums attention rows as they come."""
        return _Allocation(batch, self)


METHOD = AttentionAllocation
