"""What the tokenizer makes of a pair: lengths, a side without a token, stray image tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

from mlalign.branching.layout import LayoutError
from mlalign.data.collate import TokenisedPair, tokenise
from mlalign.images import image_size
from mlalign.models._vlm import VLM
from mlalign.records import Preference, Skip
from mlalign.sections import TrainSection


class Unfit(NamedTuple):
    """Why a pair cannot be trained on as it is: the fields of a Finding."""

    key: str
    problem: str
    mend: str
    kind: str


class Tokens:
    """Tokenises pairs one at a time, as training does."""

    def __init__(self, vlm: VLM, train: TrainSection, *, edits: bool) -> None:
        """``edits``: the objective weighs segments."""
        self.vlm, self.max_length, self.edits = vlm, train.max_length, edits
        self._image_tokens: dict[tuple[int, int], int] = {}

    def look(self, pair: Preference) -> TokenisedPair | Unfit:
        """The pair's tokens, or why there are none."""
        try:
            done, skips = tokenise(self.vlm, [pair], self.max_length, quiet=True, edits=self.edits)
        except (LayoutError, ValueError) as error:
            return Unfit("tokens", str(error), "", "tokens: cannot be laid out")
        if skips:
            return self._no_room(pair, skips[0])
        strays = self._strays(pair, done[0])
        if strays:
            return Unfit(
                "tokens",
                f"the text holds {strays} of the model's own image tokens",
                "Remove them: the chat template places the one image of a record",
                "tokens: image tokens in the text",
            )
        return done[0]

    def is_cut(self, pair: Preference, made: TokenisedPair) -> bool:
        """Whether a side has lost its end to the limit."""
        if len(made.prefix) + max(len(made.chosen), len(made.rejected)) < self._limit:
            return False
        sides, size = [pair.chosen, pair.rejected], image_size(pair.image, pair.id)
        _, whole = self.vlm.branch_ids(pair.prompt, sides, size, pair.id)
        return [made.chosen, made.rejected] != whole

    @property
    def _limit(self) -> int:
        return min(self.max_length or self.vlm.max_positions, self.vlm.max_positions)

    def _no_room(self, pair: Preference, skip: Skip) -> Unfit:
        """A side that keeps no token: by max_length, or by the model's own positions."""
        size: Any = image_size(pair.image, pair.id)
        prefix = len(self.vlm.prefix_ids(pair.prompt, size))
        if prefix >= self.vlm.max_positions:
            return Unfit(
                "tokens",
                f"image ({size[0]} x {size[1]}) and prompt take {prefix} tokens, and the model has "
                f"{self.vlm.max_positions} positions: no train.max_length fits",
                "Shorten the prompt, or resize the image",
                "tokens: longer than the model's positions",
            )
        problem, _, mend = skip.detail.partition(": ")[2].rpartition(". ")
        return Unfit("train.max_length", problem, mend, skip.reason)

    def _strays(self, pair: Preference, made: TokenisedPair) -> int:
        size, token = image_size(pair.image, pair.id), self.vlm.image_token_id
        if size not in self._image_tokens:
            self._image_tokens[size] = self.vlm.prefix_ids("What is this?", size).count(token)
        ids = [*made.prefix, *made.chosen, *made.rejected]
        return ids.count(token) - self._image_tokens[size]
