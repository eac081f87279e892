"""Train the photographs surrogate: first the projector, then projector and LoRA.

    python -m mlalign.photos.train_base recipes/photos/base.yaml OUT data=FOLDER

One row per photograph: the image once, then every caption, description and question as a branch
of its own (``branching.layout``), so that an answer can only be read off the image. The loss is
the mean over answer tokens. The frozen tower runs once per photograph; its grids are kept in
memory. Weights that train have float32 copies that AdamW steps; the arithmetic is bfloat16.
OUT gets ``projector.safetensors`` and a PEFT adapter, both bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import yaml
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, Field
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from mlalign.branching.batch import PrefixBatch
from mlalign.branching.layout import common_prefix, lay_out
from mlalign.branching.logps import additive_mask
from mlalign.images import open_image
from mlalign.models._vlm import VLM
from mlalign.objects import vocabulary
from mlalign.photos._attention import NAME as MATMUL
from mlalign.photos.compose import PROJECTOR_FILE, compose
from mlalign.photos.sft_data import Mix, Row, read_photos, rows
from mlalign.records import ImageRef

SIZE = (224, 224)
"""Any size: this model has as many image tokens for every one."""


class Stage(BaseModel):
    """One stage of training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: float = Field(gt=0)
    steps: int = Field(ge=1)
    warmup: int = 20
    rows: int = Field(default=4, ge=1)
    """Photographs per optimiser step."""
    minutes: float | None = Field(default=None, gt=0)
    """Stop after so long even if steps are left; the schedule follows whichever is further on. The
    log says how many steps were taken."""


class BaseRecipe(BaseModel):
    """``recipes/photos/base.yaml``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    """Folder with images/, captions.jsonl and train.txt."""
    vocabulary: str = "coco"
    seed: int = 0
    projector: Stage
    lora: Stage
    rank: int = 28
    alpha: int = 56
    targets: str = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj"
    weight_decay: float = 0.0
    captions: int = 3
    """Captions in a row."""
    questions: int = 6
    """Yes/no questions of objects in a row, at most."""
    question_weight: float = Field(default=1.0, gt=0)
    """Weight of a token of a yes/no answer in the loss, where a token of a text has 1."""
    limit: int | None = None
    """Take only so many photographs (for a trial)."""
    dtype: str = "bfloat16"
    stages: tuple[Literal["projector", "lora"], ...] = ("projector", "lora")
    """lora alone goes on from OUT's projector."""
    go_on: bool = False
    """The lora stage goes on from OUT's adapter too."""
    first_epoch: int = Field(default=0, ge=0)
    """Number of the first epoch: another one draws other rows."""
    sample_every: int = 100
    """Steps between printed samples on photographs kept out of training (never the dev split)."""
    save_every: int = 200
    held_out: int = 64
    """Last photographs of the train split that are not trained on."""


class Masters:
    """AdamW on float32 copies of what trains."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], weight_decay: float) -> None:
        self.parameters = list(parameters)
        self.copies = [p.detach().float().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.copies, lr=1.0, betas=(0.9, 0.98), weight_decay=weight_decay
        )

    @torch.no_grad()
    def step(self, learning_rate: float, max_norm: float = 1.0) -> float:
        """One step; returns the gradient's norm before clipping."""
        for copy, parameter in zip(self.copies, self.parameters, strict=True):
            copy.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        norm = float(torch.nn.utils.clip_grad_norm_(self.copies, max_norm))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        for copy, parameter in zip(self.copies, self.parameters, strict=True):
            parameter.copy_(copy)
        return norm


class Trainer:
    """The model, its photographs' grids, and the loss."""

    def __init__(self, vlm: VLM, recipe: BaseRecipe, out: Path) -> None:
        self.vlm, self.recipe, self.out = vlm, recipe, out
        self.log = (out / "train.jsonl").open("a", encoding="utf-8")
        photos = read_photos(recipe.data, "train")[: recipe.limit]
        kept = len(photos) - recipe.held_out
        self.photos, self.held_out = photos[:kept], photos[kept:]
        self.features = self._features([p.name for p in photos])
        self.vocabulary = vocabulary(recipe.vocabulary)
        self.branches: dict[tuple[str, str], list[int]] = {}

    def run(self, name: str, stage: Stage, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Train these parameters for one stage."""
        masters = Masters(parameters, self.recipe.weight_decay)
        batches = self._batches(stage.rows)
        started = time.monotonic()
        for step in range(1, stage.steps + 1):
            loss, tokens, hits = self.loss(next(batches))
            loss.backward()
            minutes = (time.monotonic() - started) / 60
            done = max(step / stage.steps, minutes / stage.minutes if stage.minutes else 0.0)
            rate = stage.learning_rate * _schedule(step, min(done, 1.0), stage)
            norm = masters.step(rate)
            line = {
                "stage": name, "step": step, "loss": round(float(loss), 4), "tokens": tokens,
                "mean_token_accuracy": round(hits / tokens, 4), "grad_norm": round(norm, 3),
                "learning_rate": rate, "seconds": round(time.monotonic() - started, 1),
            }  # fmt: skip
            self.log.write(json.dumps(line) + "\n")
            self.log.flush()
            if step % 10 == 0:
                print(line, flush=True)
            last = done >= 1
            if step % self.recipe.sample_every == 0 or last:
                self.sample()
            if step % self.recipe.save_every == 0 or last:
                self.save()
            if last:
                break

    def loss(self, batch: list[Row]) -> tuple[Tensor, int, int]:
        """(weighted mean of the answer tokens' negative log-probs, their number, argmax hits)."""
        laid, answer_CS = self._lay_out(batch)
        short_C = torch.tensor([a in ("Yes", "No") for row in batch for _, a in row.branches])
        weight_C = torch.where(short_C, self.recipe.question_weight, 1.0)
        hidden_RTD = self._hidden(laid, [row.name for row in batch])
        row_CS = laid.row_C[:, None].expand_as(laid.source_CS)
        hidden_ND = hidden_RTD[row_CS[answer_CS], laid.source_CS[answer_CS]]
        logits_NV = self.vlm.core.lm_head(hidden_ND).float()
        target_N = laid.target_CS[answer_CS]
        hits = int((logits_NV.detach().argmax(-1) == target_N).sum())
        weight_N = weight_C[:, None].expand_as(answer_CS)[answer_CS]
        nll_N = F.cross_entropy(logits_NV, target_N, reduction="none")
        return (nll_N * weight_N).sum() / weight_N.sum(), len(target_N), hits

    def _hidden(self, laid: PrefixBatch, names: Sequence[str]) -> Tensor:
        core = self.vlm.core
        core.set_attn_implementation({"text_config": MATMUL})
        grid = torch.stack([self.features[name] for name in names])
        projected = core.model.multi_modal_projector(grid)
        return core.model(
            input_ids=laid.input_ids_RT,
            attention_mask=additive_mask(laid, projected.dtype),
            position_ids=laid.position_ids,
            mm_encoder_outputs={"image": SimpleNamespace(pooler_output=list(projected))},
            use_cache=False,
        ).last_hidden_state

    def _lay_out(self, batch: list[Row]) -> tuple[PrefixBatch, Tensor]:
        """Rows, and which completion tokens belong to answers (end of turn included)."""
        prefixes, completions, lengths = [], [], []
        for row in batch:
            ids = [self._ids(*branch) for branch in row.branches]
            shared = common_prefix([whole for whole, _ in ids])
            shared = min(shared, *(start - 1 for _, start in ids))
            prefixes.append(ids[0][0][:shared])
            completions.append([whole[shared:] for whole, _ in ids])
            lengths += [len(whole) - start for whole, start in ids]
        # No images: the projector's output is given in their place.
        laid = lay_out(prefixes, completions, pad_id=self.vlm.pad_id)
        total_C = laid.mask_CS.sum(-1)
        place_S = torch.arange(laid.mask_CS.shape[1])
        first_C = total_C - torch.tensor(lengths)
        return laid, laid.mask_CS & (place_S >= first_C[:, None])

    def _ids(self, prompt: str, answer: str) -> tuple[list[int], int]:
        """(ids of the whole turn pair, where the answer starts)."""
        prefix, (completion,) = self.vlm.branch_ids(prompt, [answer], SIZE)
        return [*prefix, *completion], len(prefix)

    def _batches(self, size: int) -> Iterator[list[Row]]:
        """Batches for ever; every epoch draws its branches anew."""
        mix = Mix(captions=self.recipe.captions, questions=self.recipe.questions)
        epoch = self.recipe.first_epoch
        while True:
            drawn = rows(self.photos, self.vocabulary, mix, self.recipe.seed + 1000 * epoch)
            for start in range(0, len(drawn) - size + 1, size):
                yield drawn[start : start + size]
            epoch += 1

    @torch.no_grad()
    def _features(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The frozen tower's grid (49, 1280) of each photograph, in float32; kept in OUT."""
        file = self.out / "features.safetensors"
        if file.is_file():
            kept = load_file(str(file))
            if set(names) <= set(kept):
                return kept
        tower, out = self.vlm.core.model.vision_tower, {}
        dtype = getattr(torch, self.recipe.dtype)
        folder = Path(self.recipe.data) / "images"
        for start in track(range(0, len(names), 16), "vision tower"):
            part = names[start : start + 16]
            images = [open_image(ImageRef(path=str(folder / name)), name) for name in part]
            seen = [self.vlm.image(image) for image in images]
            pixels = self.vlm.family.collate(seen)["pixel_values"]
            grids = tower(pixels).last_hidden_state.to(dtype)
            out.update(
                {
                    name: grid.clone(memory_format=torch.contiguous_format)
                    for name, grid in zip(part, grids, strict=True)
                }
            )
        save_file(out, str(file))
        return out

    @torch.no_grad()
    def sample(self) -> None:
        """Print what the model says of photographs that are not trained on."""
        asked = ("Describe this image in one sentence.", "Describe this image in detail.")
        asked += ("Is there a dog in the image?", "Is there a person in the image?")
        for photo in random.Random(1).sample(self.held_out, min(4, len(self.held_out))):
            print(photo.name, "|", photo.captions[0])
            for prompt in asked:
                print("   ", self.say(photo.name, prompt), flush=True)

    def say(self, name: str, prompt: str, most: int = 60) -> str:
        """Greedy answer on a photograph whose grid is at hand."""
        core = self.vlm.core
        core.set_attn_implementation({"text_config": "sdpa"})
        ids = torch.tensor([self.vlm.prefix_ids(prompt, SIZE)])
        projected = core.model.multi_modal_projector(self.features[name][None])
        embeds = core.get_input_embeddings()(ids)
        embeds[ids == self.vlm.image_token_id] = projected[0].to(embeds.dtype)
        said = core.generate(
            inputs_embeds=embeds, attention_mask=torch.ones_like(ids), max_new_tokens=most,
            do_sample=False,
        )  # fmt: skip
        return self.vlm.tokenizer.decode(said[0], skip_special_tokens=True).strip()

    def save(self) -> None:
        """Projector and adapter, bfloat16, into OUT."""
        core = self.vlm.core
        projector = core.model.multi_modal_projector.state_dict()
        tensors = {key: value.to(torch.bfloat16).contiguous() for key, value in projector.items()}
        save_file(tensors, str(self.out / PROJECTOR_FILE))
        if hasattr(self.vlm.model, "peft_config"):
            state = get_peft_model_state_dict(self.vlm.model)
            adapter = {k: v.to(torch.bfloat16).contiguous() for k, v in state.items()}
            save_file(
                adapter, str(self.out / "adapter_model.safetensors"), metadata={"format": "pt"}
            )
            self.vlm.model.peft_config["default"].save_pretrained(str(self.out))


def train(recipe: BaseRecipe, out: Path) -> None:
    """Both stages; the trained parts end up in ``out``."""
    from mlalign.models.loading import load_vlm_from

    torch.manual_seed(recipe.seed)
    out.mkdir(parents=True, exist_ok=True)
    base = compose(out / "untrained", weights=None)
    vlm = load_vlm_from(base, dtype="float32")
    trainer = Trainer(vlm, recipe, out)
    vlm.model.to(getattr(torch, recipe.dtype)).requires_grad_(False)
    vlm.tokenizer.padding_side = "left"
    projector = vlm.core.model.multi_modal_projector.requires_grad_(True)
    if "projector" in recipe.stages:
        trainer.run("projector", recipe.projector, list(projector.parameters()))
    else:
        projector.load_state_dict(load_file(str(out / PROJECTOR_FILE)))
    if "lora" not in recipe.stages:
        return
    config = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, target_modules=recipe.targets, task_type="CAUSAL_LM"
    )
    vlm.model = get_peft_model(vlm.model, config, autocast_adapter_dtype=False)
    if recipe.go_on:
        state = load_file(str(out / "adapter_model.safetensors"))
        if set_peft_model_state_dict(vlm.model, state).unexpected_keys:
            raise ValueError(f"{out}: the adapter there has another rank or other targets")
    projector.requires_grad_(True)
    trainer.run("lora", recipe.lora, [p for p in vlm.model.parameters() if p.requires_grad])


def _schedule(step: int, done: float, stage: Stage) -> float:
    """Linear warm-up, then a cosine down to a twentieth; ``done``: share of the stage."""
    return min(1.0, step / stage.warmup) * (0.05 + 0.475 * (1 + math.cos(math.pi * done)))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. lora.steps=10")
    args = parser.parse_args()
    raw: dict[str, Any] = yaml.safe_load(args.recipe.read_text(encoding="utf-8"))
    for item in args.overrides:
        key, _, text = item.partition("=")
        *path, last = key.split(".")
        node = raw
        for part in path:
            node = node[part]
        node[last] = yaml.safe_load(text)
    train(BaseRecipe.model_validate(raw), args.out)


if __name__ == "__main__":
    main()
