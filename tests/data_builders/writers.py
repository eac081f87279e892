"""Writers for tests: one that answers from a script, one that knows the microworld."""

from __future__ import annotations

import json
import re
from collections import Counter

from data_builders import prompts
from data_builders._microworld import MicroworldLanguage
from mlalign.judges import Written
from mlalign.judges.facts import FactsJudge
from mlalign.microworld import world
from mlalign.objects import vocabulary

OPENINGS = {
    name: prompts._read(name).split("\n")[0][:45]
    for name in ("split", "paraphrase", "question", "rate")
}


def kind_of(text: str) -> str:
    """Which instruction a task is."""
    for name, opening in OPENINGS.items():
        if text.startswith(opening):
            return name
    if "Answer each question about the image from that alone" in text:
        return "check"
    if "some things that are wrong" in text:
        return "correct"
    return "corrupt"


class Scripted:
    """Answers with what ``say(task)`` returns: text, or a Written."""

    def __init__(self, say):
        self.say = say
        self.calls = []

    def write_many(self, tasks, *, max_new_tokens, temperature=0.0, seed=0):
        self.calls.append((list(tasks), max_new_tokens, temperature, seed))
        answers = [self.say(task) for task in tasks]
        return [a if isinstance(a, Written) else Written(a) for a in answers]

    def tasks(self):
        return [task for call in self.calls for task in call[0]]


class Oracle(Scripted):
    """Knows every microworld scene and the rules; ``spoil(kind, task)`` may answer in its place."""

    def __init__(self, spoil=lambda kind, task: None):
        super().__init__(self._answer)
        self.spoil = spoil
        self.asked = Counter()
        words = vocabulary("microworld")
        self.rules = MicroworldLanguage(words)
        self.judge = FactsJudge(FactsJudge.Settings(), vocabulary=words)

    def _answer(self, task):
        kind = kind_of(task.text)
        self.asked[kind] += 1
        spoilt = self.spoil(kind, task)
        if spoilt is not None:
            return spoilt
        _, split, index = task.id.split("-")
        facts = world.example(split, int(index)).facts
        return json.dumps(getattr(self, f"_{kind}")(task.text, facts))

    def _split(self, text, facts):
        found = self.rules.statements(_last(text))
        return {"claims": [{"claim": s.text, "question": s.question} for s in found]}

    def _check(self, text, facts):
        said = {True: "yes", False: "no", None: "unknown"}
        asked = _numbered(text.split("Questions:\n")[1])
        return {"answers": [said[self.judge.answer(facts, q).verdict] for q in asked]}

    def _correct(self, text, facts):
        claimed = set(_numbered(text.split("These are wrong:\n")[1]))
        statements = self.rules.statements(_last(text))
        wrong = [s for s in statements if s.text in claimed]
        return {"corrected": self.rules.corrected(_last(text), wrong, facts)}

    def _paraphrase(self, text, facts):
        styles = prompts.lines("paraphrase_styles")
        number = next(n for n, style in enumerate(styles) if f"is to be: {style}\n" in text)
        return {"text": self.rules.paraphrase(_last(text), facts, number)}

    def _question(self, text, facts):
        stated = _numbered(text.split("Statements:\n")[1])
        return {"questions": [self.rules.statements(s)[0].question for s in stated]}


def _last(text: str) -> str:
    """What stands below the last heading."""
    return text.rsplit(":\n", 1)[1]


def _numbered(text: str) -> list[str]:
    """The numbered lines at the start of a text."""
    out = []
    for line in text.splitlines():
        match = re.match(r"\d+\. (.*)", line)
        if match is None:
            break
        out.append(match[1])
    return out
