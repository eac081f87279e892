"""The whole way: sampled tokens, claims asked of a model, credit of every token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mlalign.credit.group import Settings, group_credit
from mlalign.credit.spans import lay_spans
from mlalign.judges.facts import METHOD as FactsJudge
from mlalign.judges.local_model import METHOD as LocalModel
from mlalign.microworld import language, world
from mlalign.microworld.language import Mention
from mlalign.models.loading import load_vlm_from
from mlalign.objects import vocabulary
from mlalign.records import Example
from mlalign.rewards._combine import build
from mlalign.rewards._offsets import completion_of
from mlalign.rewards._reward import Completion, RewardContext

WORDS = vocabulary("microworld")
TERMS: list[tuple[str, float, dict[str, Any]]] = [
    ("claim_judge", 1.0, {"language": "microworld"}),
    ("coverage", 0.5, {}),
    ("no_stop", 0.25, {}),
    ("length_penalty", 1.0, {"limit": 96}),
]


def told(example: Example) -> list[str]:
    """The truth; one object wrong; nothing."""
    true = [Mention(o.position or "", o.attributes[0], o.name) for o in example.facts.objects]
    absent = next(n for n in WORDS.names if n not in example.facts.names())
    wrong = [Mention(true[0].position, true[0].color, absent), *true[1:]]
    kind = example.facts.scene or ""
    return [language.caption(kind, mentions) for mentions in (true, wrong, [])]


def sampled(tokenizer: Any, example: Example) -> list[Completion]:
    """The texts as if the policy had written them, the last one cut before it ended."""
    end = tokenizer.eos_token_id
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in told(example)]
    ids = [[*ids[0], end], [*ids[1], end, end], ids[2]]
    return [completion_of(tokenizer, [end], example, row, sample=i) for i, row in enumerate(ids)]


def test_the_token_of_the_wrong_word_is_told_apart(tiny_llava: Path):
    vlm = load_vlm_from(str(tiny_llava), device="cpu")
    examples = [world.example("pairs", i) for i in (0, 1)]
    group = [c for example in examples for c in sampled(vlm.tokenizer, example)]
    judge = FactsJudge(FactsJudge.Settings(), vocabulary=WORDS)
    rewards = build(TERMS, RewardContext(vocabulary=WORDS, judge=judge))
    combined = rewards.score_group(group)
    width = max(len(c.token_ids) for c in group)
    mask = torch.tensor([[t < len(c.token_ids) for t in range(width)] for c in group])
    spans = lay_spans([c.spans for c in combined], [c.offsets for c in group], width)
    out = group_credit(
        Settings(),
        total_R=torch.tensor([c.total for c in combined]),
        level_R=torch.tensor([c.level for c in combined]),
        spans=spans,
        mask_RT=mask,
        group_size=3,
    )
    for first in (0, 3):
        wrong = combined[first + 1]
        (false,) = [s for s in wrong.spans if s.score < 0]
        row = out.advantages_RT[first + 1]
        low = {t for t in range(width) if mask[first + 1, t] and row[t] == row.min()}
        tokens = [vlm.tokenizer.decode([group[first + 1].token_ids[t]]) for t in sorted(low)]
        assert " ".join(tokens) == wrong_words(group[first + 1], false)
        sums = (out.advantages_RT - out.sequence_R[:, None]) * mask
        assert sums.sum(1).abs().max() < 1e-4
        assert combined[first].total > wrong.total
        assert combined[first + 2].counts["no_stop/cut"] == 1


def wrong_words(completion: Completion, span: Any) -> str:
    return completion.text[span.start : span.end]


def test_a_local_model_judges_a_group_in_one_pass(tiny_llava: Path):
    vlm = load_vlm_from(str(tiny_llava), device="cpu")
    passes = []
    vlm.model.register_forward_pre_hook(lambda *_: passes.append(1))
    example = world.example("pairs", 0)
    group = sampled(vlm.tokenizer, example)
    judge = LocalModel(LocalModel.Settings(), vlm=vlm)
    settings = {"language": "microworld", "graded": True}
    rewards = build([("claim_judge", 1.0, settings)], RewardContext(judge=judge))
    combined = rewards.score_group(group)
    assert len(passes) == 1
    claims = [len(c.spans) for c in combined]
    assert claims == [len(example.facts.objects)] * 2 + [0]
    # Equal claims get equal answers, and what no claim says gets nothing.
    assert [s.score for s in combined[0].spans[1:]] == [s.score for s in combined[1].spans[1:]]
    assert all(-1 <= s.score <= 0 for c in combined for s in c.spans)
    assert combined[2].total == 0
