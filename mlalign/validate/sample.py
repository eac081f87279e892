"""One pair as training sees it: which tokens carry loss, read off the batch itself."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from mlalign.branching.batch import PREFIX, PrefixBatch
from mlalign.data.collate import Collator, TokenisedPair
from mlalign.models._vlm import VLM


@dataclass(frozen=True)
class Span:
    """A run of tokens of one kind."""

    text: str
    """Decoded, special tokens too; "" for image tokens."""
    tokens: int
    loss: bool
    """Whether its tokens are predicted, and their log-probs enter the loss."""
    image: bool = False

    @property
    def shown(self) -> str:
        """The text, or how many image tokens stand there."""
        return f"[{self.tokens} image tokens]" if self.image else self.text


@dataclass(frozen=True)
class Sample:
    """A pair, decoded."""

    record: str
    prompt: tuple[Span, ...]
    chosen: tuple[Span, ...]
    rejected: tuple[Span, ...]


def sample_of(vlm: VLM, made: TokenisedPair, *, blank: bool = False) -> Sample:
    """The pair in the rows that it is trained in. Raises LayoutError, ValueError and RecordError as
    training would."""
    batch = Collator(vlm, [made], blank=blank).collate([made])
    row_T = batch.segment_RT[0]
    ids = batch.input_ids_RT[0].tolist()
    prefix = [(ids[t], False) for t in (row_T == PREFIX).nonzero()[:, 0].tolist()]
    sides = [_side(batch, number) for number in (0, 1)]
    return Sample(
        record=made.pair.id,
        prompt=_spans(vlm, prefix),
        chosen=_spans(vlm, sides[0]),
        rejected=_spans(vlm, sides[1]),
    )


def _side(batch: PrefixBatch, number: int) -> list[tuple[int, bool]]:
    """(id, whether it carries loss) of the tokens of a completion, in order."""
    row = int(batch.row_C[number])
    # In place of the position of the hidden state that predicts it, the token's own.
    stands = (batch.segment_RT[row] == number + 1).nonzero()[:, 0].tolist()
    mask = batch.mask_CS[number].tolist()
    targets = batch.target_CS[number].tolist()
    ids = batch.input_ids_RT[row].tolist()
    return [
        (ids[t], place < len(mask) and mask[place] and targets[place] == ids[t])
        for place, t in enumerate(stands)
    ]


def _spans(vlm: VLM, tokens: list[tuple[int, bool]]) -> tuple[Span, ...]:
    """Runs of text with and without loss; what lies between the first and the last image token of
    a prompt (rows, tiles) is counted in."""
    image: Any = vlm.image_token_id
    places = [place for place, (token, _) in enumerate(tokens) if token == image]
    first, last = (places[0], places[-1]) if places else (0, -1)

    def kind(item: tuple[int, tuple[int, bool]]) -> tuple[bool, bool]:
        place, (_, loss) = item
        return first <= place <= last, loss

    spans = []
    for (seen, loss), run in groupby(enumerate(tokens), key=kind):
        ids = [token for _, (token, _) in run]
        text = "" if seen else vlm.tokenizer.decode(ids, skip_special_tokens=False)
        spans.append(Span(text=text, tokens=len(ids), loss=loss, image=seen))
    return tuple(spans)
