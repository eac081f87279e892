"""A reward model on the policy's base: its scores are those of a model of its own, in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText

from mlalign import methods, store
from mlalign.images import open_image
from mlalign.microworld import world
from mlalign.models._scalar import save_head
from mlalign.models.loading import load_vlm_from, lora_config
from mlalign.recipe import configure, from_dict
from mlalign.records import Example
from mlalign.rewards._offsets import completion_of
from mlalign.rewards.reward_model import Query
from mlalign.runlog import read_lines
from mlalign.sections import LoraSection
from mlalign.train._scored import Asking
from mlalign.train.reward_scorer import RewardScorer
from tests.train.test_group_trainer import adapted

TEXTS = ("A red kettle. A blue lamp is at the top.", "A green ball.", "A red dog. A pot.")


@pytest.fixture(scope="module")
def folder(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model as it is saved: an adapter that is not zero, a head, what it is shown."""
    out = tmp_path_factory.mktemp("reward") / "adapter"
    vlm = load_vlm_from(tiny_llava, dtype="float32")
    torch.manual_seed(7)
    model: Any = get_peft_model(vlm.model, lora_config(LoraSection(rank=8), vlm))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(out)
    width = vlm.core.config.get_text_config().hidden_size
    weight = torch.randn(1, width) * (width + 1) ** -0.5
    save_head({"score.weight": weight, "score.bias": torch.randn(1)}, out)
    (out / "reward_model.json").write_text(json.dumps(Asking().model_dump()), encoding="utf-8")
    return out


class Alone:
    """The reward model by itself in float64: one answer at a time, no branches, no policy."""

    def __init__(self, base: Path, folder: Path) -> None:
        from safetensors.torch import load_file

        loaded = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float64)
        self.model: Any = PeftModel.from_pretrained(loaded, folder).eval()
        head = load_file(folder / "scalar_head.safetensors")
        self.weight, self.bias = head["weight"].double(), head["bias"].double()
        self.vlm = load_vlm_from(base, dtype="float32")

    def __call__(self, example: Example, text: str) -> tuple[list[int], torch.Tensor]:
        """Ids of the answer, end of turn included, and the head's number at each."""
        image = open_image(example.image, example.id)
        prefix, (ids,) = self.vlm.branch_ids(example.prompt, [text], image.size)
        pixels = self.vlm.image(image).tensors["pixel_values"].double()
        with torch.no_grad():
            hidden = self.model.get_base_model().model(
                input_ids=torch.tensor([prefix + ids]), pixel_values=pixels
            )
        values = hidden.last_hidden_state[0] @ self.weight[0] + self.bias
        return ids, values[-len(ids) :]


@pytest.mark.parametrize("form", ["answer", "sentence"])
def test_scores_are_those_of_the_model_alone(form: str, tiny_llava: Path, folder: Path) -> None:
    vlm = adapted(tiny_llava)
    scorer, alone = RewardScorer(vlm, folder), Alone(tiny_llava, folder)
    scorer.asking = Asking(form=form)  # type: ignore[arg-type]
    vlm.model.train()
    state = standing(vlm.model)
    queries, expected = [], []
    for index in (0, 0, 1):
        example = world.example("pairs", index)
        for sample, text in enumerate(TEXTS):
            ids, values = alone(example, text)
            made = completion_of(vlm.tokenizer, ids[-1:], example, ids, sample=sample)
            queries.append(Query(made, tuple(scorer.asking.spans(text))))
            dots = [i for i, token in enumerate(ids) if vlm.tokenizer.decode([token]) == "."]
            expected.append(values[dots if form == "sentence" else [-1]].tolist())
    given = scorer(queries)
    assert [len(each) for each in given] == [len(each) for each in expected]
    for own, other in zip(given, expected, strict=True):
        assert own == pytest.approx(other, abs=1e-5)
    assert len({round(value, 4) for each in expected[:3] for value in each}) > 2
    # The policy stands as it stood: its adapter, what trains, which modules are in training mode.
    assert standing(vlm.model) == state


def test_rewards_of_a_group_run_are_those_of_the_model_alone(
    tiny_llava: Path, folder: Path, tmp_path: Path
) -> None:
    raw: dict[str, Any] = {
        "name": "run",
        "seed": 3,
        "model": {"path": str(tiny_llava), "dtype": "float32", "adapter": {"rank": 4}},
        "data": {"source": "microworld", "vocabulary": "microworld", "prompts": 4},
        "train": {
            "algorithm": {
                "name": "grpo",
                "group": 3,
                "max_new_tokens": 12,
                "rewards": [{"name": "reward_model", "offset": 0.5, "scale": 2.0, "weight": 3.0}],
                "reward_model": str(folder),
            },
            "learning_rate": 1e-2,
            "batch_size": 2,
            "micro_batch_size": 1,
            "steps": 2,
            "schedule": "constant",
        },
        "launch": {"launcher": "none", "processes": 1, "zero": 0},
    }
    examples = {e.id: e for e in (world.example("pairs", i) for i in range(4))}
    run = tmp_path / "runs/run"
    store.write_examples(run / "data/grpo", list(examples.values()), {})
    recipe = from_dict(raw)
    ref = recipe.train.algorithm
    method = methods.find("mlalign.train.algorithms", ref.name)
    trainer = method(configure(method, ref, "train.algorithm")).train(recipe, "grpo", run)
    lines, alone = read_lines(run / "rollouts.jsonl"), Alone(tiny_llava, folder)
    assert len(lines) == 2 * 2 * 3
    for line in lines:
        _, values = alone(examples[line["id"]], line["completion"])
        score = (float(values[-1]) - 0.5) * 2.0
        assert line["terms"]["reward_model"] == pytest.approx(score, abs=1e-4)
        assert line["reward"] == pytest.approx(3.0 * score, abs=3e-4)
    # The policy has trained, the reward model has not.
    kept = PeftModel.from_pretrained(load_vlm_from(tiny_llava, dtype="float32").model, folder)
    own = dict(kept.named_parameters())
    found = dict(trainer.vlm.model.named_parameters())
    names = [name for name in found if ".reward." in name]
    assert names and all(
        torch.equal(found[name], own[name.replace(".reward.", ".default.")]) for name in names
    )
    moved = [p for name, p in found.items() if "lora_B.default" in name]
    assert max(float(p.detach().abs().max()) for p in moved) > 1e-4


def standing(model: Any) -> dict[str, Any]:
    """What a caller must find as it was."""
    return {
        "trains": [name for name, p in model.named_parameters() if p.requires_grad],
        "modes": [module.training for module in model.modules()],
        "active": model.active_adapters,
        "layers": [m.active_adapters for m in model.modules() if hasattr(m, "lora_A")],
    }
