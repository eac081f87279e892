"""The loss step of a GRPO group: the shared-prefix row, a row per completion, and stock TRL.

One prompt with its image and K completions that are given, token by token, with their rewards;
nothing is sampled and nothing is scored by a model. TRL's own defaults: ``loss_type`` dapo, clip
0.2, one inner iteration, so that the old log-probs are those of the step itself, and ``beta`` 0;
with ``beta`` above 0 the reference pass (adapter off) is part of the step.

    stock    ``trl.GRPOTrainer`` as it comes, with the inputs that it makes itself: image, prompt
             and completion for each of K rows. Timed are the reference pass, the loss and the
             backward; what it does before them (images processed, texts tokenised, advantages) is
             not
    padded   our trainer with one row per completion: head at completion positions only, one tower
             call for the group. What is left to gain over it is branching alone
    shared   our trainer. Timed besides, here and in padded: laying out the rows, the tower, the
             advantages

Where the old log-probs are the step's own, every ratio is 1 and the policy's part of the loss is
the mean advantage by token, whatever the model says: what tells two sides apart there are the
log-probs and the gradients.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from mlalign.bench.setting import Group, Setting, new_group, new_vlm
from mlalign.bench.side import Side, plant
from mlalign.branching.batch import PrefixBatch
from mlalign.branching.logps import completion_logps
from mlalign.credit.group import Settings as CreditSettings
from mlalign.images import open_image
from mlalign.models._vlm import VLM
from mlalign.models.loading import lora_config
from mlalign.records import Example
from mlalign.rewards._combine import Combined, Rewards
from mlalign.rewards._offsets import completion_of
from mlalign.rewards._reward import Completion
from mlalign.runlog import RunLog
from mlalign.sections import LoraSection
from mlalign.train.group_trainer import GroupTrainer
from mlalign.train.rollouts import Roller, Sampling

KL = 0.04
"""``beta`` of the work with a reference pass (DeepSeekMath, 2402.03300)."""


class Ours(Side):
    """Our trainer's step, shared or padded."""

    def __init__(self, setting: Setting, layout: str, beta: float) -> None:
        vlm = new_vlm(setting)
        self.group = new_group(setting, vlm)
        self.use(layout, _Given(vlm, self.group, layout))
        folder = Path(tempfile.mkdtemp(prefix="mlalign-bench-"))
        self.trainer: Any = GroupTrainer(
            model=vlm.model,
            args=_arguments(setting, folder, beta=0.0),
            train_dataset=Dataset.from_dict({"prompt": [_turn("")], "index": [0]}),
            processing_class=vlm.processor,
            peft_config=lora_config(LoraSection(rank=setting.rank, alpha=32), vlm),
            vlm=vlm,
            roller=self.roller,
            credit=CreditSettings(form="sequence"),
            examples=[self.group.example],
            beta=beta,
            attention="auto",
            log=RunLog(folder, enabled=False),
            arm="bench",
            checkpoint_facts={},
        )
        self.model = vlm.model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        _ready(self.trainer)

    def use(self, layout: str, roller: _Given) -> None:
        """Take a layout."""
        self.layout, self.roller = layout, roller

    def step(self) -> float:
        self.model.zero_grad(set_to_none=True)
        self.trainer.roller = self.roller
        rows = [{"index": 0}] * len(self.group.completions)
        inputs = self.trainer._prepare_inputs(rows)
        loss: Any = self.trainer.compute_loss(self.model, inputs)
        loss.backward()
        return float(loss.detach())

    def logps(self) -> dict[Any, Tensor]:
        found = self._policy()
        keys = [completion.token_ids for completion in self.roller.completions]
        rows = zip(keys, found.logps_CS, found.mask_CS, strict=True)
        return {key: logps_S[mask_S] for key, logps_S, mask_S in rows}

    def margin(self) -> float:
        """Mean size of the log-ratio of a completion, policy less reference."""
        policy = self._policy().sum_C()
        with self.trainer.vlm.adapter_off():
            reference = self._policy().sum_C()
        return float((policy - reference).abs().mean())

    def _policy(self) -> Any:
        vlm = self.trainer.vlm
        batch = self.roller.rows(self.roller.completions).to(vlm.device)
        with torch.no_grad():
            return completion_logps(self.model, vlm.encode(batch))


class Stock(Side):
    """``trl.GRPOTrainer`` as it comes; only dropout, precision and checkpointing are set alike."""

    def __init__(self, setting: Setting, beta: float) -> None:
        vlm = new_vlm(setting)
        group = new_group(setting, vlm)
        # TRL wants prompts padded on the left, and the model's own attention.
        vlm.processor.tokenizer.padding_side = "left"
        vlm.core.set_attn_implementation({"text_config": "sdpa"})

        def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
            """What was sampled, behind TRL's own tokens of the prompts."""
            ids = trainer._tokenize_prompts(prompts)[0]
            return {"prompt_ids": ids, "completion_ids": group.completions, "logprobs": None}

        def worth(completions: list[Any], **_: Any) -> list[float | None]:
            return [*group.rewards]

        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            # That giving completions is experimental is said to whom it concerns: this file.
            warnings.filterwarnings("ignore", "You are using 'rollout_func'")
            self.trainer: Any = GRPOTrainer(
                model=vlm.model,
                reward_funcs=worth,
                args=_arguments(setting, Path(folder), beta=beta),
                train_dataset=Dataset.from_dict({"prompt": [_turn("")]}),
                processing_class=vlm.processor,
                peft_config=lora_config(LoraSection(rank=setting.rank, alpha=32), vlm),
                rollout_func=rollout,
            )
        self.model = self.trainer.model
        _ready(self.trainer)
        image = open_image(group.example.image, group.example.id)
        row = {"images": [image], "prompt": _turn(group.example.prompt)}
        self.inputs = self.trainer._prepare_inputs([row] * len(group.completions))

    def step(self) -> float:
        self.model.zero_grad(set_to_none=True)
        inputs = dict(self.inputs)
        if self.trainer.beta:
            with self.model.disable_adapter():
                inputs["ref_per_token_logps"] = self._policy()
        loss: Any = self.trainer.compute_loss(self.model, inputs)
        loss.backward()
        return float(loss.detach())

    def logps(self) -> dict[Any, Tensor]:
        ids, mask = self.inputs["completion_ids"], self.inputs["completion_mask"].bool()
        rows = zip(ids, self._policy(), mask, strict=True)
        return {tuple(i[m].tolist()): logps_S[m] for i, logps_S, m in rows}

    @torch.no_grad()
    def _policy(self) -> Tensor:
        """(K, S), as the trainer makes old and reference log-probs."""
        given = self.inputs
        parts = ("ids", "mask")
        ids, mask = (
            torch.cat([given[f"prompt_{part}"], given[f"completion_{part}"]], 1) for part in parts
        )
        length = given["completion_ids"].shape[1]
        image = {k: given[k] for k in ("pixel_values", "image_sizes", "num_images") if k in given}
        found = self.trainer._get_per_token_logps_and_entropies
        return found(self.model, ids, mask, length, **image)[0]


class _Given(Roller):
    """Gives a group that is there already, with what it is worth."""

    def __init__(self, vlm: VLM, group: Group, layout: str) -> None:
        sampling = Sampling(group=len(group.completions))
        super().__init__(vlm, _Known(group.rewards), sampling, seed=0)
        self.layout = layout
        ends = [vlm.tokenizer.eos_token_id]
        self.completions = [
            completion_of(vlm.tokenizer, ends, group.example, ids, sample=number)
            for number, ids in enumerate(group.completions)
        ]

    def sample(self, examples: Sequence[Example], step: int) -> list[Completion]:
        return self.completions

    def rows(self, completions: Sequence[Completion], size: int | None = None) -> PrefixBatch:
        return super().rows(completions, 1 if self.layout == "padded" else size)


class _Known(Rewards):
    """Rewards that are numbers already, of answers as a whole."""

    def __init__(self, rewards: list[float]) -> None:
        self.rewards = rewards

    def score_group(self, completions: Sequence[Completion]) -> list[Combined]:
        return [
            Combined(id=c.id, spans=(), level=worth, total=worth, terms={}, counts={})
            for c, worth in zip(completions, self.rewards, strict=True)
        ]


def sides(setting: Setting, beta: float) -> dict[str, Any]:
    """The sides by name. Shared and padded use one model; stock has its own with equal weights."""
    shared = Ours(setting, "shared", beta)
    padded = copy.copy(shared)
    padded.use("padded", _Given(shared.trainer.vlm, shared.group, "padded"))
    return {"shared": shared, "padded": padded, "stock": Stock(setting, beta)}


def _ready(trainer: Any) -> None:
    plant(trainer.accelerator.unwrap_model(trainer.model))
    trainer.model.train()
    # Set by ``Trainer.train``.
    trainer.current_gradient_accumulation_steps = 1


def _arguments(setting: Setting, folder: Path, beta: float) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=setting.group,
        gradient_accumulation_steps=1,
        num_generations=setting.group,
        max_completion_length=setting.completions[1],
        beta=beta,
        gradient_checkpointing=setting.checkpointing,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=setting.dtype == "bfloat16",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )


def _turn(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
