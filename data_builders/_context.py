"""What a run lends to its builders."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from data_builders._jobs import Scribe
from data_builders._language import Language, RuleScribe, find_language
from data_builders._model_language import ModelLanguage


@dataclass(frozen=True, kw_only=True)
class BuildContext:
    """Model, judge, writer and words, shared by every builder of a run."""

    vocabulary: Any
    """mlalign.objects.Vocabulary: what objects, attributes and relations are called."""
    language: str
    """How texts are split and rewritten; the source's ``language``: "microworld" or "english"."""
    seed: int = 0
    vlm: Any = None
    """The model to be aligned (mlalign.models VLM), for builders that need its own answers."""
    judge: Any = None
    """A judge of mlalign.judges, or None for the builder's own default."""
    writer: Any = None
    """A mlalign.judges.Writer that splits, corrects and rewrites; None: rules do."""
    writer_name: str = ""
    """The writer's model, as records name it."""

    def words(self) -> Language:
        """The language's splitter, question writer and rewriter, by rule."""
        return find_language(self.language, self.vocabulary)

    def scribe(self) -> Scribe:
        """Who does language work: the writer where there is one, else the rules."""
        if self.writer is None:
            return RuleScribe(self.words())
        return ModelLanguage(
            self.writer,
            name=self.writer_name,
            words=self.words(),
            vocabulary=self.vocabulary,
            seed=self.seed,
        )

    def rng(self, *key: object) -> random.Random:
        """A generator that depends on the seed and the key alone, never on the order of records."""
        return random.Random("/".join(map(str, (self.seed, *key))))

    def need_vlm(self, builder: str) -> Any:
        """The model, or a ValueError that says who needs it."""
        if self.vlm is None:
            raise ValueError(f"builder {builder} needs a model to describe images: give model.path")
        return self.vlm
