"""CHAIR's released synonym list, counted as CHAIR's script counts it (Rohrbach et al., 2018)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import simplemma

from mlalign.objects import Span, Vocabulary, VocabularyError

_TOKEN = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_ANIMALS = (
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe",
    "animal", "cub",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OfficialVocabulary(Vocabulary):
    """CHAIR's own counting over its released list, with its faults. Comparison only.

    Lower case, word tokens, lemma, pairs of words merged where the list (or CHAIR's own few rules)
    has them, "seat" dropped beside "toilet", words of the list kept. Known faults, kept here: an
    entry with a leading blank never matches (" motor bike", " cheesecake"), three-word entries
    never match as one ("stove top oven" is two ovens), a verb's lemma counts ("skiing" is skis),
    the adjective "orange" is the fruit, hyphenated words never match. The lemma is simplemma's,
    not WordNet's with a part of speech, so single words may differ from the script's.
    """

    entries: Mapping[str, str] = field(default_factory=dict)
    """Word as the list has it -> class."""
    pairs: Mapping[str, str] = field(default_factory=dict)
    """Two words that count as one -> what they become."""

    @classmethod
    def read(cls, path: Path) -> OfficialVocabulary:
        """The list in the released form: one class per line, its words divided by ", "."""
        entries: dict[str, str] = {}
        pairs: dict[str, str] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            words = line.strip().split(", ")
            for word in words if words[0] else ():
                entries[word] = words[0]
                if len(word.split()) == 2:
                    pairs[word.strip()] = word.strip()
        if not entries:
            raise VocabularyError(f"{path}: no class in it. Give CHAIR's synonyms.txt")
        for animal in _ANIMALS:
            pairs |= {f"baby {animal}": animal, f"adult {animal}": animal}
        pairs |= {f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")}
        pairs |= {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"}
        return cls(
            name=str(path),
            names=tuple(dict.fromkeys(entries.values())),
            attribute_groups={},
            relation_groups={},
            companions={},
            entries=entries,
            pairs=pairs,
        )

    def objects(self, text: str) -> list[Span]:
        """CHAIR's node words in order, at the words that gave them."""
        words = [
            (simplemma.lemmatize(m[0], "en").lower(), m.start(), m.end())
            for m in _TOKEN.finditer(text.lower())
        ]
        merged = self._merged(words)
        said = {word for word, _, _ in merged}
        if "toilet" in said and "seat" in said:
            merged = [m for m in merged if m[0] != "seat"]
        return [
            Span(self.entries[word], start, end, "object", text[start:end])
            for word, start, end in merged
            if word in self.entries
        ]

    def canonical(self, word: str) -> str | None:
        """The class of a word of the list; None where it has none."""
        return self.entries.get(word.lower())

    def _merged(self, words: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
        merged, i = [], 0
        while i < len(words):
            both = " ".join(word for word, _, _ in words[i : i + 2])
            if both in self.pairs:
                merged.append((self.pairs[both], words[i][1], words[i + 1][2]))
                i += 2
            else:
                merged.append(words[i])
                i += 1
        return merged
