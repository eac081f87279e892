"""Group training: TRL's losses on the same rollouts, whole groups, resuming, two processes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from mlalign.branching.logps import completion_logps
from mlalign.credit.group import Settings as CreditSettings
from mlalign.microworld import world
from mlalign.models.loading import load_vlm_from, lora_config
from mlalign.objectives.dpo import Dpo, DpoSettings
from mlalign.rewards._combine import build
from mlalign.rewards._offsets import completion_of
from mlalign.rewards._reward import RewardContext, RewardUnavailable
from mlalign.runlog import RunLog
from mlalign.sections import LoraSection
from mlalign.train._rollout_run import prompt_rows
from mlalign.train.group_trainer import GroupTrainer, LeaveOneOutTrainer
from mlalign.train.online_trainer import OnlineTrainer
from mlalign.train.rollouts import Roller, Sampling, prompts_of

GROUP = 3
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 2 * GROUP,
    "gradient_accumulation_steps": 1,
    "num_generations": GROUP,
    "max_completion_length": 16,
    "remove_unused_columns": False,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_dropout": True,
}


def adapted(folder: Path) -> Any:
    """A model with a non-zero adapter; the same at every call."""
    vlm = load_vlm_from(folder, dtype="float32")
    torch.manual_seed(0)
    vlm.model = get_peft_model(vlm.model, lora_config(LoraSection(rank=4), vlm))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in vlm.model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return vlm


def ours(folder: Path, out: Path, kind: Any = GroupTrainer, **keys: Any) -> Any:
    vlm = adapted(folder)
    config = RLOOConfig if kind is LeaveOneOutTrainer else GRPOConfig
    beta = keys.pop("beta", 0.0)
    extra = {"objective": keys.pop("objective")} if "objective" in keys else {}
    sampling = Sampling(group=GROUP, max_new_tokens=16, temperature=keys.get("temperature", 1.0))
    credit = keys.pop("credit", CreditSettings(form="sequence"))
    examples = [world.example("pairs", i) for i in range(4)]
    rewards = build([("length_penalty", 1.0, {})], RewardContext())
    trainer = kind(
        model=vlm.model,
        args=config(output_dir=str(out), beta=0.0, **{**COMMON, **keys}),
        train_dataset=prompt_rows(4),
        processing_class=vlm.processor,
        vlm=vlm,
        roller=Roller(vlm, rewards, sampling, 0),
        credit=credit,
        examples=examples,
        beta=beta,
        attention="auto",
        log=RunLog(out, enabled=False),
        arm="arm",
        checkpoint_facts={},
        **extra,
    )
    vlm.model = trainer.accelerator.unwrap_model(trainer.model)
    return trainer


def stock(folder: Path, out: Path, kind: Any = GRPOTrainer, **keys: Any) -> Any:
    vlm = adapted(folder)
    config = GRPOConfig if kind is GRPOTrainer else RLOOConfig
    beta = keys.pop("beta", 0.0)
    arguments: Any = config(output_dir=str(out), beta=0.0, **{**COMMON, **keys})
    trainer = kind(
        model=vlm.model,
        reward_funcs=[lambda **_: [0.0]],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": "a"}]] * 4}),
        processing_class=vlm.processor,
    )
    trainer.beta = beta
    return trainer


def two_groups(trainer: Any) -> list[Any]:
    """Completions of two prompts: unequal lengths, made of words of the vocabulary."""
    generator = torch.Generator().manual_seed(3)
    made = []
    eos = trainer.vlm.tokenizer.eos_token_id
    for index in range(2):
        for sample in range(GROUP):
            length = int(torch.randint(3, 12, (1,), generator=generator))
            ids = torch.randint(20, 200, (length,), generator=generator).tolist()
            example = trainer.examples[index]
            made.append(
                completion_of(trainer.vlm.tokenizer, [eos], example, [*ids, eos], sample=sample)
            )
    return made


def padded(trainer: Any, completions: list[Any]) -> dict[str, Any]:
    """The same completions as TRL lays them out: prompts left-padded, an image for each."""
    vlm = trainer.vlm
    prompts, pixels = [], []
    for completion in completions:
        image = trainer.roller._pictures(completion.example.image, completion.id)
        prompts.append(vlm.prefix_ids(completion.example.prompt, image.size))
        pixels.append(image.tensors["pixel_values"].reshape(1, 3, 96, 96))
    wide, long = max(map(len, prompts)), max(len(c.token_ids) for c in completions)
    shape = (len(completions), wide), (len(completions), long)
    out = {
        "prompt_ids": torch.full(shape[0], vlm.pad_id),
        "prompt_mask": torch.zeros(shape[0], dtype=torch.long),
        "completion_ids": torch.full(shape[1], vlm.pad_id),
        "completion_mask": torch.zeros(shape[1], dtype=torch.long),
    }
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids = completion.token_ids
        out["prompt_ids"][row, wide - len(prompt) :] = torch.tensor(prompt)
        out["prompt_mask"][row, wide - len(prompt) :] = 1
        out["completion_ids"][row, : len(ids)] = torch.tensor(ids)
        out["completion_mask"][row, : len(ids)] = 1
    return {**out, "pixel_values": torch.cat(pixels), "num_images": [1] * len(completions)}


def stock_logps(trainer: Any, batch: dict[str, Any]) -> torch.Tensor:
    """TRL's own log-probs of the completions."""
    with torch.no_grad():
        return trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
            batch["completion_ids"].shape[1],
            pixel_values=batch["pixel_values"],
            num_images=batch["num_images"],
        )[0]


def shared_extras(batch: dict[str, Any]) -> dict[str, Any]:
    """Advantages by token, and old and reference log-probs some way off, so that clips bite."""
    generator = torch.Generator().manual_seed(5)
    mask = batch["completion_mask"].float()

    def drawn(size: float) -> torch.Tensor:
        return torch.randn(mask.shape, generator=generator) * size * mask

    near = batch["near"]
    return {
        "advantages": drawn(1.0),
        "old_per_token_logps": near + drawn(0.3),
        "ref_per_token_logps": near + drawn(0.2),
        "num_items_in_batch": mask.sum(),
    }


def gradients(trainer: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize(
    ("loss_type", "temperature"),
    [("grpo", 1.0), ("dapo", 1.0), ("bnpo", 1.0), ("dr_grpo", 1.0), ("grpo", 0.7)],
)
def test_the_loss_is_stock_trls_on_the_same_rollouts(
    tiny_llava: Path, tmp_path: Path, loss_type: str, temperature: float
) -> None:
    keys: dict[str, Any] = {"loss_type": loss_type, "beta": 0.1, "temperature": temperature}
    mine, theirs = ours(tiny_llava, tmp_path, **keys), stock(tiny_llava, tmp_path, **keys)
    for trainer in (mine, theirs):
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
    completions = two_groups(mine)
    plain = padded(mine, completions)
    wide = stock_logps(theirs, plain)
    with theirs.accelerator.unwrap_model(theirs.model).disable_adapter():
        reference = stock_logps(theirs, plain)
    extras = shared_extras({**plain, "near": wide * plain["completion_mask"]})
    rollout = mine.roller.score(completions)
    mine.num_iterations = 2  # so that the log-probs at sampling are made, too
    micro = mine._micro_batch(rollout, list(range(len(completions))))
    mask = plain["completion_mask"]
    for name, value in {"old": wide, "ref": reference}.items():
        own = micro[f"{name}_per_token_logps"]
        torch.testing.assert_close(own * mask, value * mask, atol=1e-5, rtol=0)
    loss = mine._compute_loss(mine.model, {**micro, **extras})
    expected = theirs._compute_loss(theirs.model, {**plain, **extras})
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    one, other = gradients(mine, loss), gradients(theirs, expected)
    for name, value in other.items():
        torch.testing.assert_close(
            one[name], value, atol=1e-5 * float(value.abs().max()) + 1e-9, rtol=0
        )
    assert mine._metrics["train"]["kl"] == pytest.approx(theirs._metrics["train"]["kl"], abs=1e-5)
    clipped = mine._metrics["train"]["clip_ratio/region_mean"]
    assert clipped == pytest.approx(theirs._metrics["train"]["clip_ratio/region_mean"], abs=1e-6)
    assert clipped[0] > 0.05


def test_rloo_is_stock_trls_on_the_same_rollouts(tiny_llava: Path, tmp_path: Path) -> None:
    mine = ours(tiny_llava, tmp_path, LeaveOneOutTrainer)
    theirs = stock(tiny_llava, tmp_path, RLOOTrainer)
    completions = two_groups(mine)
    plain = padded(mine, completions)
    rows = torch.linspace(-1, 1, len(completions))
    micro = mine._micro_batch(mine.roller.score(completions), list(range(len(completions))))
    old = micro["old_logps"] + 0.1 * rows
    loss = mine._compute_loss(mine.model, {**micro, "old_logps": old, "advantages": rows})
    expected = theirs._compute_loss(theirs.model, {**plain, "old_logps": old, "advantages": rows})
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)


def test_no_credit_by_token_and_one_span_are_plain_grpo(tiny_llava: Path, tmp_path: Path) -> None:
    """The same rollout three times: its advantages are one number per completion."""
    trainer = ours(tiny_llava, tmp_path)
    trainer.roller.rewards = build(
        [("object_checker", 1.0, {"right": 1.0})], RewardContext(vocabulary=_words())
    )
    sampled = [
        completion_of(
            trainer.vlm.tokenizer,
            [trainer.vlm.tokenizer.eos_token_id],
            trainer.examples[index],
            [*trainer.vlm.tokenizer(text)["input_ids"], trainer.vlm.tokenizer.eos_token_id],
            sample=sample,
        )
        for index in range(2)
        for sample, text in enumerate(
            ("A red kettle.", "A blue lamp and a red dog.", "A green ball.")
        )
    ]
    rollout = trainer.roller.score(sampled)
    trainer.roller.sample = lambda examples, step: sampled
    trainer.roller.score = lambda completions: rollout
    found = {}
    for name, credit in {
        "plain": CreditSettings(form="sequence"),
        "off": CreditSettings(form="spans", strength=0.0),
        "on": CreditSettings(form="spans", strength=1.0),
    }.items():
        trainer.credit = credit
        (batch,) = trainer._roll([0, 1])
        found[name] = batch["advantages"], batch["completion_mask"].bool()
    for name in ("plain", "off"):
        advantages, mask = found[name]
        for row, seen in zip(advantages, mask, strict=True):
            assert (row[seen] == row[seen][0]).all() and (row[~seen] == 0).all()
        torch.testing.assert_close(advantages, found["plain"][0], atol=1e-7, rtol=0)
    on, mask = found["on"]
    assert (on - found["plain"][0]).abs().max() > 0.1
    torch.testing.assert_close((on * mask).sum(1), (found["plain"][0] * mask).sum(1))


def test_micro_batches_hold_whole_groups(tiny_llava: Path, tmp_path: Path) -> None:
    trainer = ours(tiny_llava, tmp_path, per_device_train_batch_size=GROUP, steps_per_generation=4)
    batches = trainer._roll([0, 1, 2, 3])
    heads = []
    for batch in batches:
        rows = batch["batch"]
        assert rows.row_C.tolist() == [0] * GROUP  # one prefix, computed once
        names = {name.rpartition("#")[0] for name in rows.ids_C}
        assert len(names) == 1
        heads += names
    assert sorted(heads) == sorted(e.id for e in trainer.examples)
    assert heads != [e.id for e in trainer.examples]  # shuffled, by group


def test_the_private_names_that_are_touched_are_there() -> None:
    for kind in (GRPOTrainer, RLOOTrainer):
        for name in (
            "_prepare_inputs",
            "_get_train_sampler",
            "_get_per_token_logps_and_entropies",
            "_compute_loss",
            "_save_checkpoint",
        ):
            assert callable(getattr(kind, name)), (kind, name)
    assert callable(Trainer._get_dataloader)


def test_scattered_groups_are_refused() -> None:
    assert prompts_of([{"index": i} for i in (4, 4, 2, 2)], 2) == [4, 2]
    with pytest.raises(ValueError, match="multiple of the group's 2"):
        prompts_of([{"index": i} for i in (4, 2, 2, 4)], 2)


def test_rewards_that_are_down_are_asked_again_and_then_stop(
    tiny_llava: Path, tmp_path: Path
) -> None:
    trainer = ours(tiny_llava, tmp_path)
    completions = two_groups(trainer)
    roller, calls = trainer.roller, []
    roller.sampling = Sampling(group=GROUP, attempts=3, wait=0.0)
    real = roller.rewards.score_group

    def flaky(given: Any) -> Any:
        calls.append(1)
        if len(calls) < 3:
            raise RewardUnavailable("judge", ConnectionError("refused"))
        return real(given)

    roller.rewards.score_group = flaky
    assert len(roller.score(completions).combined) == len(completions) and len(calls) == 3
    roller.sampling = Sampling(group=GROUP, attempts=2, wait=0.0)
    calls.clear()
    with pytest.raises(RewardUnavailable, match="judge cannot be reached"):
        roller.score(completions)
    assert len(calls) == 2


def test_online_dpo_is_dpo_on_the_best_and_the_worst(tiny_llava: Path, tmp_path: Path) -> None:
    trainer = ours(
        tiny_llava, tmp_path, OnlineTrainer, objective=Dpo(DpoSettings(beta=0.3)), beta=0.0
    )
    completions = two_groups(trainer)
    rollout = trainer.roller.score(completions)
    totals = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 5.0])
    worth = [replace(c, total=float(t)) for c, t in zip(rollout.combined, totals, strict=True)]
    trainer.roller.sample = lambda examples, step: completions
    trainer.roller.score = lambda given: replace(rollout, combined=worth)
    trainer.current_gradient_accumulation_steps = 1
    (inputs,) = trainer._roll([0, 1])
    loss = float(trainer._compute_loss(trainer.model, inputs).detach())
    # The first group's best and worst by plain rows; the second prefers nothing.
    batch = trainer.roller.rows([completions[1], completions[0]], size=1)
    batch = trainer.vlm.encode(batch)
    with torch.no_grad():
        policy = completion_logps(trainer.vlm.model, batch).sum_C()
        with trainer.vlm.adapter_off():
            reference = completion_logps(trainer.vlm.model, batch).sum_C()
    ratio = policy - reference
    margin = 0.3 * float(ratio[0] - ratio[1])
    assert loss == pytest.approx(math.log1p(math.exp(-margin)) / 2, abs=1e-5)
    assert trainer._metrics["train"]["online/ties"] == [0.5]


def _words() -> Any:
    from mlalign.objects import vocabulary

    return vocabulary("microworld")
