"""The claim judge: what is claimed and asked, what each claim is worth, a judge that is down."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mlalign import methods
from mlalign.judges import UNDECIDED, Answer
from mlalign.judges.facts import METHOD as FactsJudge
from mlalign.judges.server import METHOD as Server
from mlalign.microworld import language, world
from mlalign.microworld.language import Mention
from mlalign.objects import vocabulary
from mlalign.records import Example
from mlalign.rewards._claims import splitter
from mlalign.rewards._reward import (
    RewardContext,
    RewardError,
    RewardUnavailable,
    SpanScore,
    checked,
)
from mlalign.rewards.claim_judge import ClaimJudge, merged
from tests.judges._fake_server import Cut, FakeServer, Slow, Status, chat
from tests.rewards.answers import COCO, context, example, said, words

METHOD = methods.find("mlalign.rewards", "claim_judge")


YES, NO = Answer(0.9, 0.1), Answer(0.2, 0.6)


class Says:
    """A judge that answers by a table and keeps what it was asked."""

    def __init__(self, default: Answer = YES, **answers: Answer) -> None:
        self.default = default
        self.answers = answers
        self.asked: list[list[Sequence[str]]] = []

    def ask_many(
        self, examples: Sequence[Example], questions: Sequence[Sequence[str]]
    ) -> list[list[Answer]]:
        self.asked.append([*questions])
        return [[self._answer(q) for q in each] for each in questions]

    def _answer(self, question: str) -> Answer:
        return next((a for key, a in self.answers.items() if key in question), self.default)


def reward(judge: Any, **settings: Any) -> ClaimJudge:
    return METHOD(METHOD.Settings(**settings), context(judge=judge))


def test_each_claim_has_its_words_and_the_judges_verdict():
    answer = said("A brown dog and a cat lie on a bench.")
    judge = Says(brown=NO, cat=NO)
    (out,) = checked("claim_judge", reward(judge), [answer])
    assert words(answer, out.spans) == [("brown", -1), ("dog", 0), ("cat", -1), ("bench", 0)]
    assert out.total == -2
    assert out.counts == {"claims": 4, "rejected": 2, "undecided": 0}


def test_a_tie_is_no_rejection():
    assert reward(Says(Answer(0.4, 0.4)))([said("a dog")])[0].total == 0


def test_worth_of_claims_can_be_set_and_graded():
    answer = said("a dog and a cat")
    judge = Says(Answer(0.75, 0.25), cat=Answer(0.1, 0.4))
    assert reward(judge, right=1.0, wrong=-2.0)([answer])[0].total == -1
    (graded,) = reward(judge, right=1.0, wrong=-1.0, graded=True)([answer])
    assert [s.score for s in graded.spans] == pytest.approx([0.5, -0.6])


def test_undecided_claims_are_counted_and_score_as_set():
    judge = Says(cat=UNDECIDED)
    (out,) = reward(judge, undecided=-0.5)([said("a dog and a cat")])
    assert [s.score for s in out.spans] == [0, -0.5]
    assert out.counts["undecided"] == 1
    (graded,) = reward(judge, undecided=-0.5, graded=True)([said("a cat")])
    assert graded.total == -0.5


def test_a_group_is_asked_together_and_equal_questions_once():
    first, second = example("one"), example("two")
    judge = Says()
    group = [said("a dog and a cat", first), said("a cat, a cat", first), said("a dog", second)]
    out = reward(judge, right=1.0)(group)
    assert judge.asked == [
        [
            ["Is there a dog in the image?", "Is there a cat in the image?"],
            ["Is there a dog in the image?"],
        ]
    ]
    # Said twice, it is scored twice: repeats are no way out.
    assert [s.total for s in out] == [2, 2, 1]


def test_an_answer_without_claims_is_worth_nothing():
    judge = Says()
    (empty, vague) = reward(judge)([said(""), said("How nice this is.")])
    assert (empty.total, empty.spans, vague.total) == (0, (), 0)
    assert empty.counts == {"claims": 0, "rejected": 0, "undecided": 0}


class Claim(NamedTuple):
    start: int
    end: int
    question: str


def test_claims_of_the_runs_own_splitter_may_share_characters():
    claims = [Claim(0, 9, "Is it so?"), Claim(2, 5, "cat?"), Claim(10, 14, "cat?")]
    own = RewardContext(judge=Says(cat=NO), split=lambda text: claims)
    made = METHOD(METHOD.Settings(), own)
    answer = said("a dog and cats")
    (out,) = checked("claim_judge", made, [answer])
    assert out.spans == (SpanScore(0, 9, -1), SpanScore(10, 14, -1))


def test_merged_keeps_the_sum():
    spans = [SpanScore(3, 6, 1), SpanScore(0, 4, 2), SpanScore(5, 9, 4), SpanScore(9, 10, 8)]
    assert merged(spans) == [SpanScore(0, 9, 7), SpanScore(9, 10, 8)]


def test_claims_of_the_built_in_world_are_judged_by_its_facts():
    words_of = vocabulary("microworld")
    example = world.example("pairs", 3)
    true = [Mention(o.position or "", o.attributes[0], o.name) for o in example.facts.objects]
    free = next(o for o in words_of.names if o not in example.facts.names())
    told = [*true[:-1], Mention(true[-1].position, true[-1].color, free)]
    judge = FactsJudge(FactsJudge.Settings(), vocabulary=words_of)
    made = METHOD(METHOD.Settings(language="microworld"), RewardContext(judge=judge))
    for style in range(language.N_STYLES):
        answer = said(language.caption(example.facts.scene or "", told, style), example)
        (out,) = checked("claim_judge", made, [answer])
        assert [s.score for s in out.spans] == [0] * (len(told) - 1) + [-1]
        assert answer.text[out.spans[-1].start : out.spans[-1].end].endswith(free)


def test_english_claims():
    text = "A red and white cat, two big dogs; the horse is brown."
    asked = [(text[c.start : c.end], c.question) for c in splitter("english", COCO)(text)]
    assert asked == [
        ("red", "Is the cat red?"),
        ("white", "Is the cat white?"),
        ("cat", "Is there a cat in the image?"),
        ("big", "Is the dog big?"),
        ("dogs", "Is there a dog in the image?"),
        ("horse", "Is there a horse in the image?"),
    ]


def test_english_claims_need_a_vocabulary_and_the_reward_a_judge():
    with pytest.raises(ValueError, match=r"give data\.vocabulary"):
        METHOD(METHOD.Settings(), RewardContext(judge=Says()))
    with pytest.raises(ValueError, match="claim_judge has no judge"):
        METHOD(METHOD.Settings(), context())


@pytest.mark.parametrize(("told", "what"), [([], "gave 0 answers"), ([[Answer(1, 0)]], "gave 1")])
def test_a_judge_that_answers_too_little(told: Any, what: str):
    class Short(Says):
        def ask_many(self, examples: Any, questions: Any) -> Any:
            return told

    with pytest.raises(RewardError, match=f"record 'e': the judge {what}.* to 2 questions"):
        reward(Short())([said("a dog and a cat")])


def test_a_judge_that_answers_for_too_many():
    class Long(Says):
        def ask_many(self, examples: Any, questions: Any) -> Any:
            return [[Answer(1, 0)], [Answer(1, 0)]]

    with pytest.raises(RewardError, match="for 2 images of 1"):
        reward(Long())([said("a dog")])


def served(url: str, folder: Path, server: Any = None, **settings: Any) -> ClaimJudge:
    quick = {"attempts": 2, "backoff_s": 0.0, "timeout_s": 5, **(server or {})}
    asked = Server.Settings(base_url=url, model="m", cache=str(folder), **quick)
    return reward(Server(asked), **settings)


def photograph() -> Example:
    """One whose image can be sent."""
    return world.example("pairs", 0)


def test_a_server_that_is_down_and_comes_back(tmp_path: Path):
    fake = FakeServer()
    with fake.running():
        url = fake.url
    asleep = served(url, tmp_path)
    with pytest.raises(RewardUnavailable, match="claim_judge cannot be reached: no server listens"):
        checked("claim_judge", asleep, [said("a dog", photograph())])
    with FakeServer().running() as awake:
        (out,) = checked("claim_judge", served(awake.url, tmp_path), [said("a dog", photograph())])
    assert out.counts == {"claims": 1, "rejected": 0, "undecided": 0}


MENDED_BY_WAITING = {
    "500": Status(500),
    "503": Status(503),
    "429": Status(429),
    "time": Slow(1.0),
    "connection": Cut(),
}


@pytest.mark.parametrize("trouble", MENDED_BY_WAITING.values(), ids=MENDED_BY_WAITING)
def test_what_waiting_mends_can_be_scored_later(trouble: Any, tmp_path: Path):
    """Two claims, one of them answered: only the other is asked again."""
    with FakeServer().running() as fake:
        asked = "Is there a cat in the image?"
        fake.script[asked] = [trouble] * 2
        judge = served(fake.url, tmp_path, server={"timeout_s": 0.3})
        answers = [said("a dog and a cat", photograph())]
        with pytest.raises(RewardUnavailable, match="no answer to 1 of 2 questions, the first: no"):
            checked("claim_judge", judge, answers)
        (out,) = checked("claim_judge", judge, answers)
        assert out.counts == {"claims": 2, "rejected": 0, "undecided": 0}
        assert fake.count == {asked: 3, "Is there a dog in the image?": 1}


@pytest.mark.parametrize(
    ("status", "mend"),
    [
        (400, "judge.omit"),
        (401, "judge.api_key_env"),
        (403, "judge.api_key_env"),
        (404, "judge.model"),
    ],
)
def test_what_it_does_not_mend_is_an_error_that_names_the_key(
    status: int, mend: str, tmp_path: Path
):
    with FakeServer(Status(status)).running() as fake:
        problem = rf"claim_judge, record 'microworld-pairs-0#0'.*HTTP {status}.*{mend}"
        with pytest.raises(RewardError, match=problem):
            checked("claim_judge", served(fake.url, tmp_path), [said("a dog", photograph())])
        assert fake.total == 1


def test_a_share_of_failed_questions_can_be_borne(tmp_path: Path):
    with FakeServer(Status(503)).running() as ill:
        patient = served(ill.url, tmp_path, max_failed=1.0)
        (out,) = checked("claim_judge", patient, [said("a dog", photograph())])
        assert out.counts["undecided"] == 1


def test_a_judge_that_never_decides_is_no_server_that_is_down(tmp_path: Path):
    with FakeServer(chat("Maybe.")).running() as fake:
        strict = served(fake.url, tmp_path, max_undecided=0.5)
        with pytest.raises(RewardError, match=r"left 1 of 1 questions undecided.*max_undecided"):
            checked("claim_judge", strict, [said("a dog", photograph())])
