"""Sampling by the model that trains, where it is: transformers' own generation.

Nothing is copied, and the same seed gives the same answers in any batch (``mlalign.generate``).
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from mlalign.generate import Decoding, Request, generate_ids
from mlalign.models._vlm import VLM


class Settings(BaseModel):
    """Nothing to set."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Transformers:
    """The engine."""

    Settings = Settings

    def __init__(self, settings: Settings, vlm: VLM) -> None:
        self.vlm = vlm

    def sample(
        self, requests: Sequence[Request], decoding: Decoding, batch_size: int
    ) -> list[list[list[int]]]:
        """``[request][sample]``; no gradient."""
        return generate_ids(
            self.vlm,
            requests,
            decoding,
            batch_size=batch_size,
            desc="sampling",
            # It would stand for an image that is not there.
            never=[self.vlm.image_token_id],
        )


METHOD = Transformers
