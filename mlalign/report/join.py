"""Everything that a run knows of one record, joined by its id."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from mlalign.records import Facts, ImageRef, Preference
from mlalign.report.folder import Run


@dataclass
class Known:
    """What is known of one id. Fields stay empty where the run says nothing."""

    id: str
    image: ImageRef | None = None
    prompt: str = ""
    facts: Facts = field(default_factory=Facts)
    own: str = ""
    """The base model's own answer in the probe set."""
    pairs: dict[str, Preference] = field(default_factory=dict)
    """Arm -> its pair."""
    probe_pair: tuple[str, str] | None = None
    """Chosen and rejected of the probe set."""
    answers: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    """Benchmark -> arm or "base" -> rows of raw answers."""
    logged: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Arm -> its lines of pairs.jsonl, by step."""
    maps: list[dict[str, Any]] = field(default_factory=list)
    """Attention maps, all arms and steps."""


class Index:
    """All records of a run by id."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.by_id: dict[str, Known] = {}
        self.by_example: dict[str, list[str]] = defaultdict(list)
        """Id of an example -> ids of the pairs that were made of it."""
        for example in run.heldout.values():
            known = self._known(example.id)
            known.image, known.prompt, known.facts = example.image, example.prompt, example.facts
        for arm, pairs in run.preferences.items():
            for pair in pairs:
                self._add_pair(arm, pair)
        for identity, record in run.probe_set.items():
            known = self._known(identity)
            known.image, known.prompt = known.image or record["image"], record["prompt"]
            known.facts = known.facts if known.facts.objects else record["facts"]
            known.own = record["own"]
            known.probe_pair = (record["chosen"], record["rejected"])
        for (arm, benchmark), rows in run.evals.items():
            for row in rows:
                place = self._known(row["example_id"]).answers.setdefault(benchmark, {})
                place.setdefault(arm, []).append(row)
        for row in run.pairs:
            self._known(row["id"]).logged.setdefault(row["arm"], []).append(row)
        for row in run.maps:
            self._known(row["record"]).maps.append(row)

    def _add_pair(self, arm: str, pair: Preference) -> None:
        known = self._known(pair.id)
        known.pairs[arm] = pair
        known.image = known.image or pair.image
        known.prompt = known.prompt or pair.prompt
        if not known.facts.objects:
            known.facts = pair.facts
        example = pair.origin.get("example")
        if example and example != pair.id:
            self.by_example[str(example)].append(pair.id)

    def _known(self, identity: str) -> Known:
        return self.by_id.setdefault(identity, Known(identity))


def answer_of(row: dict[str, Any]) -> str:
    """What an evaluation row says: the raw answer, or the loss of a clean caption."""
    if "answer" in row:
        return str(row["answer"])
    return f"{row['nll']:.2f} nats over {row['tokens']} tokens: {row['caption']}"
