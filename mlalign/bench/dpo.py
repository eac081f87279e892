"""A DPO step: the shared-prefix row, the best padded pair, and stock TRL.

A side's step is everything from the pairs to gradients: collating (images decoded and processed
once before, the same for all), the reference pass where it is live, the policy's forward, the loss,
the backward. The optimiser, which is the same for all, is left out.

    stock    ``trl.DPOTrainer`` as it comes: its collator, its fused head, images doubled
    padded   our trainer with one row per completion: head at completion positions only, no backward
             through the frozen tower, one tower call per image. What is left to gain over it is
             branching alone
    shared   our trainer
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from mlalign.bench.setting import Setting, new_pairs, new_vlm
from mlalign.bench.side import Side, plant
from mlalign.branching.batch import TokenLogps
from mlalign.branching.logps import completion_logps
from mlalign.data.collate import Collator, tokenise
from mlalign.images import open_image
from mlalign.models.loading import lora_config
from mlalign.objectives.dpo import Dpo, DpoSettings
from mlalign.runlog import RunLog
from mlalign.sections import LoraSection
from mlalign.train.trainer import DPOConfig, PreferenceTrainer

BETA = 0.1
SIDES = ("shared", "padded", "stock")


class Ours(Side):
    """Our trainer's step, shared or padded."""

    def __init__(self, setting: Setting, layout: str, cached: bool = False) -> None:
        self.trainer, tokenised = _trainer(setting)
        self.use(layout, tokenised, cached)

    def use(self, layout: str, tokenised: list[Any], cached: bool) -> None:
        """Take a layout. ``cached``: reference log-probs are at hand, as from an earlier epoch."""
        self.tokenised = tokenised
        self.model = self.trainer.model
        self.collator = Collator(self.trainer.vlm, tokenised, layout=layout)
        self.reference: TokenLogps | None = None
        if cached:
            self.reference = self.trainer.reference_logps(self.collator.collate(tokenised))

    def step(self) -> float:
        self.model.zero_grad(set_to_none=True)
        batch = self.collator.collate(self.tokenised)
        live = self.trainer.reference_logps
        if self.reference is not None:
            self.trainer.reference_logps = lambda _: self.reference  # type: ignore[method-assign]
        try:
            loss: Any = self.trainer.compute_loss(self.model, {"batch": batch})
        finally:
            self.trainer.reference_logps = live  # type: ignore[method-assign]
        loss.backward()
        return float(loss.detach())

    def logps(self) -> dict[Any, Tensor]:
        batch = self.collator.collate(self.tokenised)
        with torch.no_grad():
            found = completion_logps(self.model, self.trainer.vlm.encode(batch))
        keys = zip(batch.ids_C, batch.sides_C, strict=True)
        return {
            key: logps_S[mask_S]
            for key, logps_S, mask_S in zip(keys, found.logps_CS, found.mask_CS, strict=True)
        }

    def margin(self) -> float:
        """Mean size of (policy - reference)(chosen) - (policy - reference)(rejected)."""
        batch = self.collator.collate(self.tokenised)
        with torch.no_grad():
            policy = completion_logps(self.model, self.trainer.vlm.encode(batch))
        ratio = policy.sum_C() - self.trainer.reference_logps(batch).sum_C()
        return float((ratio[0::2] - ratio[1::2]).abs().mean())


class Stock(Side):
    """``trl.DPOTrainer`` as it comes; only dropout, precision and checkpointing are set alike."""

    def __init__(self, setting: Setting) -> None:
        from trl import DPOTrainer

        vlm = new_vlm(setting)
        pairs = new_pairs(setting, vlm)
        # TRL's collator wants prompts padded on the left, and the model's own attention.
        vlm.processor.tokenizer.padding_side = "left"
        vlm.core.set_attn_implementation({"text_config": "sdpa"})
        self.rows = [
            {
                "images": [open_image(p.image, p.id)],
                "prompt": [{"role": "user", "content": p.prompt}],
                "chosen": [{"role": "assistant", "content": p.chosen}],
                "rejected": [{"role": "assistant", "content": p.rejected}],
            }
            for p in pairs
        ]
        self.ids = [p.id for p in pairs]
        with tempfile.TemporaryDirectory() as folder:
            self.trainer = DPOTrainer(
                model=vlm.model,
                args=_arguments(setting, Path(folder)),
                train_dataset=Dataset.from_list([{**row, "images": []} for row in self.rows]),
                processing_class=vlm.processor,
                peft_config=lora_config(LoraSection(rank=setting.rank, alpha=32), vlm),
            )
        self.model = self.trainer.model
        plant(self.model)
        self.model.train()

    def _collate(self) -> dict[str, Tensor]:
        # The collator writes into the rows that it is given.
        rows = [{k: v if k == "images" else copy.deepcopy(v) for k, v in r.items()}
                for r in self.rows]  # fmt: skip
        collate: Any = self.trainer.data_collator
        return collate(rows)

    def step(self) -> float:
        self.model.zero_grad(set_to_none=True)
        loss: Any = self.trainer.compute_loss(self.model, self._collate())
        loss.backward()
        return float(loss.detach())

    def logps(self) -> dict[Any, Tensor]:
        batch = self._collate()
        mask = batch.pop("completion_mask")
        labels = batch["input_ids"].masked_fill(mask == 0, -100)
        with torch.no_grad():
            found = self.model(**batch, labels=labels, fused_lm_head=True).log_probs
        kept = mask[:, 1:].bool()
        half = len(self.ids)
        return {
            (self.ids[row % half], "chosen" if row < half else "rejected"): found[row][kept[row]]
            for row in range(2 * half)
        }


def sides(setting: Setting, cached: bool, names: tuple[str, ...] = SIDES) -> dict[str, Side]:
    """The sides by name. Shared and padded use one model; stock has its own with equal weights."""
    if unknown := [name for name in names if name not in SIDES]:
        raise ValueError(f"bench: no side {unknown[0]!r}; there are: {', '.join(SIDES)}")
    made: dict[str, Side] = {}
    first: Ours | None = None
    for name in names:
        if name == "stock":
            made[name] = Stock(setting)
        elif first is None:
            made[name] = first = Ours(setting, name, cached)
        else:
            other = copy.copy(first)
            other.use(name, first.tokenised, cached)
            made[name] = other
    return made


def _trainer(setting: Setting) -> tuple[PreferenceTrainer, list[Any]]:
    vlm = new_vlm(setting)
    tokenised, skips = tokenise(vlm, new_pairs(setting, vlm), None)
    if skips:
        raise ValueError(f"bench: {skips[0].detail}")
    folder = Path(tempfile.mkdtemp(prefix="mlalign-bench-"))
    trainer = PreferenceTrainer(
        model=vlm.model,
        vlm=vlm,
        args=_arguments(setting, folder),
        data_collator=Collator(vlm, tokenised),
        # An images column tells TRL that this is a vision data set.
        train_dataset=Dataset.from_dict(
            {"index": list(range(len(tokenised))), "images": [[] for _ in tokenised]}
        ),
        processing_class=vlm.processor,
        peft_config=lora_config(LoraSection(rank=setting.rank, alpha=32), vlm),
        objective=Dpo(DpoSettings(beta=BETA)),
        log=RunLog(folder, enabled=False),
        arm="bench",
        checkpoint_facts={},
    )
    vlm.model = trainer.accelerator.unwrap_model(trainer.model)
    plant(vlm.model)
    vlm.model.train()
    return trainer, tokenised


def _arguments(setting: Setting, folder: Path) -> DPOConfig:
    return DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=setting.pairs,
        beta=BETA,
        max_length=None,
        gradient_checkpointing=setting.checkpointing,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=setting.dtype == "bfloat16",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
