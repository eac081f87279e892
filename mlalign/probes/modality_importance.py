"""Which modality do heads look at, and do they link an object's word with the object's place?

VALUE (Cao et al., arXiv 2005.07310) reads BERT-like models that see both ways: modality importance
is what the [CLS] row gives to image and to text tokens, cross-modal attention what linked pairs of
image region and phrase give each other. In a decoder nothing before the image can be looked at by
it, so only text looks at the image, and there is no [CLS]. Defined here instead, by layer and head,
with A the attention weights of a row, I the image tokens and X the other tokens but the row's first
(which soaks up attention whatever the input; the paper leaves special tokens out likewise):

    importance      sum over I of A / (sum over I of A + sum over X of A)   0 text .. 1 image
    looks_at_image  importance > 1/2                                         rate, 0..1
    linked          max of A over G, the tokens inside the boxes of the word's object   0..1
    unlinked        mean over the record's other boxed objects of the same over their boxes
    linked_gap      linked - unlinked                                         chance about 0

The row that stands for [CLS] is the one that has read all of the input and produces the answer's
first token ("summary"). Further groups of importance: "question", the prefix tokens after the image
at their own rows; "response", every token of the three answers; "real" and "absent" object words
(row t - 1 for the token at t), with the AUROC of importance. ``linked`` is read at real words with
a box ("real"), ``unlinked`` where the record has another boxed object; tokens that the two share
are left out of the other's box. A box serves as linked and as unlinked, but not equally often: over
few records sizes differ. A mean over heads hides the few that link: read the heads. Does not show
that a modality mattered (knock-out and blank image do), only where heads look.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mlalign.models._vlm import VLM
from mlalign.probes._attention_rows import (
    REAL,
    ROWS,
    RowProbe,
    RowWatch,
    reduce_rows,
    words_of,
)
from mlalign.probes._probe import ATTENTION, PROMPT_ATTENTION, ProbeBatch, Watch

SUMMARY, QUESTION = "summary", "question"
SHARES = ("importance", "looks_at_image")
LINKS = ("linked", "unlinked", "linked_gap")


class Settings(BaseModel):
    """No settings: the groups are fixed, so that runs compare."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def importance(weights_HQT: Tensor, image_T: Tensor) -> Tensor:
    """(len(SHARES), H, Q); ``image_T``: bool. Padding and siblings have no weight."""
    image_HQ = weights_HQT[..., image_T].sum(-1)
    text_T = ~image_T
    text_T[0] = False
    share_HQ = image_HQ / (image_HQ + weights_HQT[..., text_T].sum(-1)).clamp_min(1e-30)
    looks_HQ = torch.where(share_HQ.isnan(), share_HQ, (share_HQ > 0.5).float())
    return torch.stack([share_HQ, looks_HQ])


def links(largest_WHP: Tensor, own_WP: Tensor, boxes_BP: Tensor) -> Tensor:
    """(len(LINKS), H, W): a word's largest attention in its own box, and in the others.

    ``largest_WHP``: attention on image tokens, largest over the word's rows. ``boxes_BP``: all
    boxes; tokens in the own one count as its alone, so the own box is no other. NaN where no other
    box has tokens of its own.
    """
    apart_WBP = boxes_BP & ~own_WP[:, None]
    linked_WH = largest_WHP.masked_fill(~own_WP[:, None], float("-inf")).max(-1).values
    filled_WHBP = largest_WHP[:, :, None].masked_fill(~apart_WBP[:, None], float("-inf"))
    some_WB = apart_WBP.any(-1)
    other_WHB = filled_WHBP.max(-1).values.masked_fill(~some_WB[:, None], 0.0)
    # 0 / 0 without another box.
    unlinked_WH = other_WHB.sum(-1) / some_WB.sum(-1, keepdim=True)
    return torch.stack([linked_WH, unlinked_WH, linked_WH - unlinked_WH]).transpose(1, 2)


class _Importance(RowWatch):
    def read(self, layer: int, row: int, weights_HQT: Tensor) -> Tensor:
        """(metrics, H, Q): shares of every row; links are added apart."""
        device = weights_HQT.device
        image_T = self.batch.image_RT[row].to(device)
        shares_MHQ = importance(weights_HQT, image_T)
        first_1Q = torch.zeros(1, weights_HQT.shape[1], device=device)
        # The same row produces the first token of every answer: read it once.
        first_1Q[0, self.starts[row][0]] = 1
        self._add(row, layer, SUMMARY, *reduce_rows(shares_MHQ, first_1Q))
        self._add_links(row, layer, weights_HQT[..., image_T])
        nothing = shares_MHQ.new_full((len(LINKS), *shares_MHQ.shape[1:]), float("nan"))
        return torch.cat([shares_MHQ, nothing])

    def prompt_attention(self, layer: int, row: int, weights_HQT: Tensor) -> None:
        """Shares of the question's rows."""
        image_T = self.batch.image_RT[row].to(weights_HQT.device)
        member_1Q = torch.ones(1, weights_HQT.shape[1], device=weights_HQT.device)
        sums, counts = reduce_rows(importance(weights_HQT, image_T), member_1Q)
        self._add(row, layer, QUESTION, sums, counts)

    def _add(
        self, row: int, layer: int, group: str, sums_1MH: np.ndarray, counts_1M: np.ndarray
    ) -> None:
        """Add shares of one group; there are no links in it."""
        none = len(LINKS)
        sums_MH = np.pad(sums_1MH[0], ((0, none), (0, 0)))
        self.add(row, layer, group, sums_MH, np.pad(counts_1M[0], (0, none)))

    def _add_links(self, row: int, layer: int, image_HQP: Tensor) -> None:
        """Add what the rows of each real word with a box give to boxes."""
        item, device = self.batch.items[row], image_HQP.device
        words = [
            ([self.starts[row][completion] + t for t in mention.tokens], mention.name)
            for completion, mention in words_of(item)
            if mention.real and mention.name in item.boxes
        ]
        if not words:
            return
        values_MHW = links(
            torch.stack([image_HQP[:, tokens].amax(1) for tokens, _ in words]),
            torch.stack([item.boxes[name] for _, name in words]).to(device),
            torch.stack(list(item.boxes.values())).to(device),
        )
        sums_GMH, counts_GM = reduce_rows(values_MHW, torch.ones(1, len(words), device=device))
        before = len(SHARES)
        sums_MH = np.pad(sums_GMH[0], ((before, 0), (0, 0)))
        self.add(row, layer, REAL, sums_MH, np.pad(counts_GM[0], (before, 0)))


class ModalityImportance(RowProbe):
    """The probe; see the module's first lines for what it reads."""

    Settings = Settings
    name = "modality_importance"
    needs = frozenset({ATTENTION, PROMPT_ATTENTION})
    metrics = (*SHARES, *LINKS)
    separates = ("importance",)
    heads = True

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def groups(self, metric: str) -> tuple[str, ...]:
        """Shares at all kinds of rows; links at the words that have a box."""
        return (SUMMARY, QUESTION, *ROWS) if metric in SHARES else (REAL,)

    def watch(self, vlm: VLM, batch: ProbeBatch) -> Watch:
        """Sums attention rows as they come."""
        return _Importance(batch, self)


METHOD = ModalityImportance
