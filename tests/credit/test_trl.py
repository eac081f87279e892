"""Sequence advantages and the loss against the installed TRL: its trainers run, on a tiny model.

TRL generates from an untrained language model of words, rewards come from a list, and its own
``_generate_and_score_completions`` and ``_compute_loss`` say what advantages and loss are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from mlalign.credit.group import Settings, group_credit
from mlalign.credit.losses import policy_loss
from mlalign.credit.spans import lay_spans
from mlalign.microworld.model import new_processor

GROUPS, K = 3, 4
REWARDS = [0.5, -1.25, 2.0, 0.75, 3.0, 3.5, -4.0, 0.0, 0.25, 0.5, 0.75, -0.125]
WITH_TIES = [*REWARDS[:4], 1.0, 1.0, 1.0, 1.0, *REWARDS[8:]]


def trainer(kind: str, folder: Path, rewards: list[float], **options: Any) -> Any:
    tokenizer = new_processor().tokenizer  # type: ignore[attr-defined]
    tokenizer.padding_side = "left"
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    with_k = {
        "output_dir": str(folder),
        "per_device_train_batch_size": GROUPS * K,
        "num_generations": K,
        "max_completion_length": 6,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "gradient_checkpointing": False,
        "beta": 0.0,
    }
    make, configure = {
        "grpo": (GRPOTrainer, GRPOConfig),
        "rloo": (RLOOTrainer, RLOOConfig),
    }[kind]
    return make(
        model=LlamaForCausalLM(config),
        reward_funcs=lambda completions, **_: rewards,
        args=configure(**(with_k | options)),  # type: ignore[arg-type]
        train_dataset=Dataset.from_dict({"prompt": ["is there a red pot"] * GROUPS}),
        processing_class=tokenizer,
    )


def scored(theirs: Any) -> dict[str, torch.Tensor]:
    """What TRL hands to its loss."""
    theirs.model.train()
    return theirs._generate_and_score_completions([{"prompt": "is there a red pot"}] * GROUPS * K)


def ours(rewards: list[float], mask: torch.Tensor, **settings: Any) -> torch.Tensor:
    return group_credit(
        Settings(form="sequence", **settings),
        total_R=torch.tensor(rewards),
        level_R=torch.tensor(rewards),
        spans=lay_spans([[]] * len(rewards), [[]] * len(rewards), mask.shape[1]),
        mask_RT=mask,
        group_size=K,
    ).advantages_RT


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("grpo", {"scale_rewards": "group"}, {"scale": "group"}),
    ("grpo", {"scale_rewards": "batch"}, {"scale": "batch"}),
    ("grpo", {"scale_rewards": "none"}, {"scale": "none"}),
    ("rloo", {"normalize_advantages": False}, {"baseline": "leave_one_out", "scale": "none"}),
    ("rloo", {"normalize_advantages": True}, {"baseline": "leave_one_out", "scale": "batch"}),
]


@pytest.mark.parametrize("rewards", [REWARDS, WITH_TIES], ids=["different", "ties"])
@pytest.mark.parametrize(("kind", "options", "settings"), CASES)
def test_sequence_advantages_are_trls(
    kind: str, options: Any, settings: Any, rewards: list[float], tmp_path: Path
):
    theirs = scored(trainer(kind, tmp_path, rewards, **options))
    mask = theirs["completion_mask"].bool()
    found = ours(rewards, mask, **settings)
    expected = theirs["advantages"][:, None] * mask
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("loss_type", "reduction"), [("grpo", "sequences"), ("bnpo", "tokens")])
def test_loss_and_gradient_are_trls(loss_type: str, reduction: Any, tmp_path: Path):
    """With our advantages per token in the place of TRL's, and our loss in the place of its."""
    theirs = trainer("grpo", tmp_path, REWARDS, loss_type=loss_type)
    inputs = scored(theirs)
    lengths = torch.tensor([1 + row % 6 for row in range(GROUPS * K)])
    inputs["completion_mask"] *= torch.arange(inputs["completion_ids"].shape[1]) < lengths[:, None]
    model, mask = theirs.model, inputs["completion_mask"].bool()
    # A policy that has moved since it sampled: some ratios are beyond the clip.
    inputs["old_per_token_logps"] = _logps(theirs, inputs).detach() + 0.3 * torch.randn(mask.shape)

    def graded(loss: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        value = loss()
        value.backward()
        return value.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    theirs.current_gradient_accumulation_steps = 1
    plain = graded(lambda: theirs._compute_loss(model, inputs))
    per_token = inputs | {"advantages": ours(REWARDS, mask)}
    spread = graded(lambda: theirs._compute_loss(model, per_token))
    own = graded(
        lambda: (
            policy_loss(
                _logps(theirs, inputs),
                inputs["old_per_token_logps"],
                per_token["advantages"],
                mask,
                reduction=reduction,
            ).loss
        )
    )
    assert plain[1].abs().max() > 1e-3
    for value, gradient in (spread, own):
        assert value == pytest.approx(plain[0], abs=1e-6)
        torch.testing.assert_close(gradient, plain[1], atol=1e-6, rtol=1e-5)


def _logps(theirs: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logps, *_ = theirs._get_per_token_logps_and_entropies(
        theirs.model, ids, mask, inputs["completion_ids"].shape[1]
    )
    return logps
