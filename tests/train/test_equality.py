"""Our step against the installed TRL's, on the same pairs and a non-zero adapter, in float32."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from trl import DPOConfig, DPOTrainer

from mlalign.branching.logps import completion_logps
from mlalign.data.collate import Collator, tokenise
from mlalign.images import open_image
from mlalign.models._vlm import VLM
from mlalign.models.loading import load_vlm_from, lora_config
from mlalign.objectives.dpo import Dpo, DpoSettings
from mlalign.runlog import RunLog
from mlalign.sections import LoraSection
from mlalign.train.gate import GateError
from mlalign.train.trainer import PreferenceTrainer
from tests.train.pairs import make_pairs

BETA = 0.1


def test_logps_loss_gradients_and_steps_equal_stock_trl(tiny_llava: Path, tmp_path: Path) -> None:
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        stock, theirs = _stock(tiny_llava, folder / "stock", checkpointing)
        ours, batches = _ours(tiny_llava, folder / "ours", checkpointing)
        _same_start(stock, ours)

        _assert_equal(stock, theirs, ours, batches)


def test_equal_again_after_five_optimiser_steps(tiny_llava: Path, tmp_path: Path) -> None:
    stock, theirs = _stock(tiny_llava, tmp_path / "stock", False, steps=5)
    ours, batches = _ours(tiny_llava, tmp_path / "ours", False, steps=5)
    _same_start(stock, ours)
    with pytest.raises(GateError, match="policy and reference differ"):
        ours.train()
    ours.gate = None
    ours._check_start = lambda *_: None  # type: ignore[method-assign]
    before = {n: p.detach().clone() for n, p in _adapter(ours.model).items()}
    stock.train()
    ours.train()
    stock.model.zero_grad()
    ours.model.zero_grad()
    for name, parameter in _adapter(stock.model).items():
        assert (parameter - before[name]).abs().max() > 2e-4, name
    _assert_equal(stock, theirs, ours, batches)


def test_margins_are_not_trivial(tiny_llava: Path, tmp_path: Path) -> None:
    trainer, batches = _ours(tiny_llava, tmp_path, False)
    _plant(trainer.model)
    margins = []
    for batch in batches:
        with torch.no_grad():
            policy = completion_logps(trainer.model, trainer.vlm.encode(batch))
        ratio = policy.sum_C() - trainer.reference_logps(batch).sum_C()
        margins += (ratio[0::2] - ratio[1::2]).abs().tolist()
    assert sum(margin > 0.1 for margin in margins) >= 3


def test_private_names_that_we_override_are_still_there() -> None:
    for name in ("_get_num_items_in_batch", "_save_checkpoint", "log", "compute_loss"):
        assert callable(getattr(DPOTrainer, name))


def _assert_equal(stock: DPOTrainer, theirs: dict, ours: PreferenceTrainer, batches: list) -> None:
    logps_theirs, loss_theirs = _stock_logps(stock, theirs)
    logps_ours, loss_ours = _our_logps(ours, batches)
    assert set(logps_ours) == set(logps_theirs) and len(logps_ours) == 8
    for key, expected in logps_theirs.items():
        torch.testing.assert_close(logps_ours[key], expected, atol=1e-5, rtol=0)
    assert loss_ours == pytest.approx(loss_theirs, abs=1e-5)
    assert abs(loss_theirs - 0.6931) > 1e-3  # a fresh adapter would make any layout agree

    gradients = _gradients(ours.model)
    for name, expected in _gradients(stock.model).items():
        scale = expected.abs().max()
        assert scale > 0, name
        assert (gradients[name] - expected).abs().max() <= 1e-5 * scale, name


def _arguments(folder: Path, checkpointing: bool, micro: int, steps: int) -> DPOConfig:
    return DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=-(-4 // micro),
        max_steps=steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        beta=BETA,
        max_length=None,
        gradient_checkpointing=checkpointing,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_drop_last=False,
        seed=0,
        # Above the rounding noise of the gradients, which Adam would scale up to a whole step.
        adam_epsilon=1e-5,
    )


def _stock(model: Path, folder: Path, checkpointing: bool, steps: int = 1) -> tuple:
    vlm = load_vlm_from(model, dtype="float32")
    pairs = make_pairs(4)
    rows = [
        {
            "images": [open_image(p.image, p.id)],
            "prompt": [{"role": "user", "content": p.prompt}],
            "chosen": [{"role": "assistant", "content": p.chosen}],
            "rejected": [{"role": "assistant", "content": p.rejected}],
        }
        for p in pairs
    ]
    vlm.processor.tokenizer.padding_side = "left"
    trainer = DPOTrainer(
        model=_peft(vlm),
        args=_arguments(folder, checkpointing, 4, steps),
        train_dataset=Dataset.from_list([{**r, "images": []} for r in rows]),
        processing_class=vlm.processor,
    )
    collate = trainer.data_collator
    # TRL's collator writes into the rows that it is given.
    trainer.data_collator = lambda _: collate(copy.deepcopy(rows))
    # TRL copies a non-zero adapter as the reference; ours is the base model. Zero the copy.
    for name, parameter in trainer.model.named_parameters():
        if ".ref." in name:
            parameter.data.zero_()
    return trainer, collate(copy.deepcopy(rows))


def _ours(model: Path, folder: Path, checkpointing: bool, steps: int = 1) -> tuple:
    vlm = load_vlm_from(model, dtype="float32")
    tokenised, skips = tokenise(vlm, make_pairs(4), None)
    assert not skips
    collator = Collator(vlm, tokenised)
    trainer = PreferenceTrainer(
        model=vlm.model,
        vlm=vlm,
        args=_arguments(folder, checkpointing, 3, steps),
        data_collator=collator,
        train_dataset=Dataset.from_dict({"index": [0, 1, 2, 3], "images": [[]] * 4}),
        processing_class=vlm.processor,
        peft_config=_config(vlm),
        objective=Dpo(DpoSettings(beta=BETA)),
        log=RunLog(folder),
        arm="arm",
        checkpoint_facts={},
    )
    return trainer, [collator.collate(tokenised[:3]), collator.collate(tokenised[3:])]


def _config(vlm: VLM) -> object:
    return lora_config(LoraSection(rank=8, alpha=64), vlm)


def _peft(vlm: VLM) -> object:
    return get_peft_model(vlm.model, _config(vlm))  # type: ignore[arg-type]


def _plant(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(_adapter(model).items()):
        std = 0.02 if "lora_B" in name else 0.1
        parameter.data.normal_(0, std, generator=generator)


def _same_start(stock: DPOTrainer, ours: PreferenceTrainer) -> None:
    _plant(stock.model)
    _plant(ours.model)


def _adapter(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if "lora_" in n and ".default." in n}


def _gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in _adapter(model).items() if p.grad is not None}


def _stock_logps(trainer: DPOTrainer, batch: dict) -> tuple[dict, float]:
    """Per-token log-probs by (pair, side), and the loss; leaves gradients on the model."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    keys = {k: v for k, v in batch.items() if k != "completion_mask"}
    with torch.no_grad():
        logps = trainer.model(**keys, labels=labels, fused_lm_head=True).log_probs
    kept = batch["completion_mask"][:, 1:].bool()
    out = {}
    for row in range(8):
        out[row % 4, "chosen" if row < 4 else "rejected"] = logps[row][kept[row]]
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return out, float(loss.detach())


def _our_logps(trainer: PreferenceTrainer, batches: list) -> tuple[dict, float]:
    out, loss = {}, 0.0
    trainer.model.train()
    pairs = trainer._get_num_items_in_batch([{"batch": b} for b in batches], torch.device("cpu"))
    assert int(pairs) == 4
    for batch in batches:
        with torch.no_grad():
            logps = completion_logps(trainer.model, trainer.vlm.encode(batch))
        for index, (name, side) in enumerate(zip(batch.ids_C, batch.sides_C, strict=True)):
            number = int(name.rpartition("-")[2])
            out[number, side] = logps.logps_CS[index][logps.mask_CS[index]]
        part = trainer.compute_loss(trainer.model, {"batch": batch}, num_items_in_batch=pairs)
        part.backward()
        loss += float(part.detach())
    return out, loss
