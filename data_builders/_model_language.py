"""Language work by a model: instructions from ``prompts/``, answers read strictly.

The model is a ``Writer`` of ``mlalign.judges`` (a local one or a server). Every answer must be one
JSON object with the keys that the instruction names, bare or in one fenced block; anything else is
a ``Failed`` with a short reason, never a default. All jobs of a call go out together, so that a
server has many requests in flight. Decoding is greedy.

Case and blanks (``tidy``), object mentions and questions of presence stay with the rule language of
the source: they are no matter of taste.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from data_builders._jobs import (
    Check,
    Convert,
    Correct,
    Corrupt,
    Failed,
    Job,
    Paraphrase,
    Rate,
    Rating,
    Split,
)
from data_builders._language import Corruption, Language, Statement
from data_builders._model_answers import BadAnswer, number, read_object, strings, text_or_none
from data_builders.prompts import fill, lines
from mlalign.judges import UNDECIDED, Answer, Task, Writer
from mlalign.records import Facts

_VERDICTS = {"yes": Answer(1.0, 0.0), "no": Answer(0.0, 1.0), "unknown": UNDECIDED}
_CHANGES = {
    0: "Put it in the place of something that is mentioned; mention as many objects as before.",
    1: "Add it to what is mentioned, wherever it fits best.",
}
_LONG, _SHORT = 1024, 512
"""Tokens of an answer that holds a whole text, and of one that lists or rates."""


class ModelLanguage:
    """The scribe. ``name``: the writer's model, for ``origin``. ``words``: the source's rules."""

    how = "model"

    def __init__(
        self, writer: Writer, *, name: str, words: Language, vocabulary: Any, seed: int = 0
    ) -> None:
        self.writer = writer
        self.name = name
        self.words = words
        self.vocabulary = vocabulary
        self.seed = seed

    def origin(self) -> dict[str, str]:
        """``how`` and the writer's model."""
        return {"how": self.how, "writer": self.name}

    def do(self, jobs: Sequence[Job]) -> list[Any]:
        """The result of each job, in order, or ``Failed``."""
        results: list[Any] = [None] * len(jobs)
        groups: dict[int, list[tuple[int, Task]]] = {}
        for place, job in enumerate(jobs):
            task = self._task(job)
            if isinstance(task, Task):
                tokens = _LONG if isinstance(job, (Split, Correct, Paraphrase, Corrupt)) else _SHORT
                groups.setdefault(tokens, []).append((place, task))
            else:
                results[place] = task
        for tokens, group in groups.items():
            written = self.writer.write_many(
                [task for _, task in group], max_new_tokens=tokens, temperature=0.0, seed=self.seed
            )
            for (place, _), answer in zip(group, written, strict=True):
                verb = _VERBS[type(jobs[place])]
                if answer.text is None:
                    results[place] = Failed(f"{verb}: {answer.failure or 'no answer'}")
                    continue
                try:
                    results[place] = self._read(jobs[place], answer.text)
                except BadAnswer as fault:
                    results[place] = Failed(f"{verb}: {fault}", fault.detail or answer.text[:200])
        return results

    def _task(self, job: Job) -> Task | Any:
        """The instruction, or the result where there is nothing to ask."""
        if isinstance(job, Check) and not job.questions:
            return {}
        if isinstance(job, Convert) and not job.statements:
            return []
        if isinstance(job, Split) and not job.text.strip():
            return []
        needs_facts = isinstance(job, Check) or (isinstance(job, Rate) and job.show == "facts")
        if needs_facts and not known(job.example.facts):
            return Failed(f"{_VERBS[type(job)]}: nothing is known of the image")
        text = _INSTRUCTIONS[type(job)](job)
        sees = isinstance(job, Rate) and job.show in ("image", "both")
        return Task(job.example.id, text, job.example.image if sees else None)

    def _read(self, job: Job, text: str) -> Any:
        """The result that an answer holds. Raises BadAnswer."""
        match job:
            case Split():
                return self._statements(job, text)
            case Check():
                given = strings(read_object(text, "answers")["answers"], "answers")
                if len(given) != len(job.questions):
                    raise BadAnswer("not as many answers as questions")
                if unknown := [a for a in given if a not in _VERDICTS]:
                    raise BadAnswer("an answer is neither yes, no nor unknown", unknown[0])
                return dict(zip(job.questions, map(_VERDICTS.__getitem__, given), strict=True))
            case Correct():
                return self._text(read_object(text, "corrected")["corrected"], "corrected")
            case Paraphrase():
                return self._text(read_object(text, "text")["text"], "text", needed=True)
            case Corrupt():
                return self._corruption(job, text)
            case Convert():
                questions = strings(read_object(text, "questions")["questions"], "questions")
                if len(questions) != len(job.statements):
                    raise BadAnswer("not as many questions as statements")
                return questions
            case Rate():
                found = read_object(text, "rating", "rationale")
                (rationale,) = strings([found["rationale"]], "rationale")
                return Rating(number(found["rating"], "rating", 1, 5), rationale)
        raise TypeError(f"no such job: {type(job).__name__}")

    def _text(self, value: Any, key: str, needed: bool = False) -> str | None:
        text = text_or_none(value, key)
        if text is None:
            if needed:
                raise BadAnswer(f"{key} is null")
            return None
        tidied = self.words.tidy(text)
        if not tidied:
            raise BadAnswer(f"{key} is empty")
        return tidied

    def _statements(self, job: Split, text: str) -> list[Statement]:
        found = read_object(text, "claims")["claims"]
        if not isinstance(found, list) or not all(isinstance(claim, dict) for claim in found):
            raise BadAnswer("claims is no list of objects")
        out: dict[str, Statement] = {}
        for claim in found:
            if missing := [key for key in ("claim", "question") if key not in claim]:
                raise BadAnswer(f"a claim lacks the key {missing[0]}")
            said, question = strings([claim["claim"], claim["question"]], "claims")
            named = self.vocabulary.objects(said)
            # The same thing said twice is one claim.
            out.setdefault(
                question,
                Statement(
                    text=said,
                    question=question,
                    start=0,
                    end=len(job.text),
                    object=named[0].name if named else "",
                ),
            )
        return list(out.values())

    def _corruption(self, job: Corrupt, text: str) -> Corruption | None:
        found = read_object(text, "text", "put_in", "instead_of")
        changed = self._text(found["text"], "text")
        if changed is None:
            return None
        if not (isinstance(found["put_in"], str) and isinstance(found["instead_of"], str)):
            raise BadAnswer("put_in or instead_of is no text")
        put_in, was = found["put_in"].strip(), found["instead_of"].strip()
        if changed == self.words.tidy(job.text):
            raise BadAnswer("the text is unchanged")
        if not put_in or put_in.lower() not in changed.lower():
            raise BadAnswer("the text lacks what was put in", put_in)
        word = self._canonical(put_in)
        if job.kind == "object" and word in job.example.facts.names():
            raise BadAnswer("what was put in is there", put_in)
        return Corruption(text=changed, kind=job.kind, word=word, was=self._canonical(was))

    def _canonical(self, words: str) -> str:
        found = self.vocabulary.objects(words)
        return found[0].name if found else words


def known(facts: Facts) -> str:
    """What is known of an image, for an instruction; empty where nothing is."""
    parts = []
    if facts.scene:
        parts.append(f"Kind of scene: {facts.scene}")
    if facts.objects:
        rest = "this is all there is" if facts.exhaustive else "there may be more"
        parts.append(f"Objects in it ({rest}):")
        for fact in facts.objects:
            place = f", {fact.position}" if fact.position else ""
            parts.append(f"- {' '.join((*fact.attributes, fact.name))}{place}")
    if facts.captions:
        parts.append("Descriptions of it or of its regions, all true:")
        parts += [f"- {caption}" for caption in facts.captions]
    return "\n".join(parts)


def _listed(texts: Sequence[str]) -> str:
    return "\n".join(f"{place}. {text}" for place, text in enumerate(texts, start=1))


def _facts(job: Job) -> str:
    return known(job.example.facts) or "(nothing)"


def _correct(job: Any) -> str:
    wrong = _listed([statement.text for statement in job.wrong])
    return fill("correct", text=job.text, facts=_facts(job), wrong=wrong)


def _paraphrase(job: Any) -> str:
    return fill("paraphrase", text=job.text, style=lines("paraphrase_styles")[job.number])


def _corrupt(job: Any) -> str:
    fields = {"text": job.text, "facts": _facts(job), "avoid": ", ".join(job.avoid) or "(nothing)"}
    if job.kind == "object":
        fields["change"] = _CHANGES[max(job.change, 0)]
    return fill(f"corrupt_{job.kind}", **fields)


def _rate(job: Any) -> str:
    given = [] if job.show == "facts" else ["The image is attached."]
    if job.show != "image":
        given.append(f"This is known of the image:\n{_facts(job)}")
    return fill(
        "rate",
        aspect=job.aspect,
        rubric=fill(job.rubric),
        given="\n".join(given),
        instruction=job.example.prompt,
        text=job.text,
    )


_INSTRUCTIONS: dict[type, Callable[[Any], str]] = {
    Split: lambda job: fill("split", text=job.text),
    Check: lambda job: fill("check", facts=_facts(job), questions=_listed(job.questions)),
    Correct: _correct,
    Paraphrase: _paraphrase,
    Corrupt: _corrupt,
    Convert: lambda job: fill("question", statements=_listed(job.statements)),
    Rate: _rate,
}
_VERBS: dict[type, str] = {
    Split: "splitting",
    Check: "checking",
    Correct: "correcting",
    Paraphrase: "rewording",
    Corrupt: "corrupting",
    Convert: "asking",
    Rate: "rating",
}
