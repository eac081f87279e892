"""A tiny random LLaVA and a probe set of microworld scenes: what the probes' tests run on."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mlalign.branching.batch import ProbeReading
from mlalign.microworld import language, world
from mlalign.microworld.model import IMAGE_TOKENS, PATCH_SIZE, new_processor
from mlalign.microworld.scenes import IMAGE_SIZE, make_scene
from mlalign.models._vlm import VLM
from mlalign.models.llava import Llava
from mlalign.objects import vocabulary
from mlalign.probes._pass import ProbePass
from mlalign.probes._probe import Probe
from mlalign.probes._records import ProbeRecord

LAYERS, HEADS, WIDTH, NEURONS = 3, 4, 32, 48


def new_vlm(kv_heads: int = 2, seed: int = 0, text: Any = LlamaConfig, **more: Any) -> VLM:
    """A LLaVA whose weights are large enough that attention is far from uniform.

    ``text``: config class of its language model; ``more``: further keys of that config.
    """
    processor = new_processor()
    tokenizer = processor.tokenizer  # type: ignore[attr-defined]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
        ),
        text_config=text(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=NEURONS,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=kv_heads,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=0.2,
            **more,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval()
        # CLIP's own initialisation is so small that every image gives the same features.
        for parameter in model.model.vision_tower.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return VLM(model=model, processor=processor, family=Llava)


def with_lora(vlm: VLM, b_std: float = 0.0, targets: str | None = None, seed: int = 1) -> VLM:
    """The same with a LoRA adapter of rank 4, its B drawn with ``b_std`` (0: the base, exactly)."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets or Llava.lora_targets(vlm.core))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vlm.model = get_peft_model(vlm.model, config).eval()
        for name, parameter in vlm.model.named_parameters():
            if "lora_B" in name and b_std:
                torch.nn.init.normal_(parameter, std=b_std)
    return vlm


def records(count: int, seed: int = 0) -> list[ProbeRecord]:
    """Scenes with a true caption, one with an absent object, and one of another length."""
    made = []
    for index in range(count):
        example = world.example("heldout", index, seed)
        scene = make_scene("heldout", index, seed)
        true = language.true_mentions(scene)
        absent = sorted(set(vocabulary("microworld").names) - example.facts.names())
        truth = language.caption(scene.kind, true)
        made.append(
            ProbeRecord(
                id=example.id,
                image=example.image,
                prompt=language.CAPTION_PROMPTS[index % 2],
                own=language.caption(scene.kind, true[: 1 + index % 2]),
                chosen=truth,
                rejected=truth.replace(true[0].name, absent[index]),
                facts=example.facts,
            )
        )
    return made


def new_pass(vlm: VLM, methods: list[Any], count: int = 4, **keywords: Any) -> ProbePass:
    """A pass over ``count`` scenes in batches of two."""
    keywords = {"batch_size": 2, **keywords}
    return ProbePass(vlm, records(count), methods, vocabulary("microworld"), **keywords)


def run(vlm: VLM, method: Probe, step: int = 0, **keywords: Any) -> list[ProbeReading]:
    """The readings of one probe."""
    return new_pass(vlm, [method], **keywords).run(step)


def pick(readings: list[ProbeReading], **wanted: Any) -> list[ProbeReading]:
    """The readings with these field values."""
    return [r for r in readings if all(getattr(r, k) == v for k, v in wanted.items())]


def one(readings: list[ProbeReading], metric: str, **wanted: Any) -> ProbeReading:
    """The one reading over the set, layers and heads, unless ``wanted`` says otherwise."""
    wanted = {"record": "", "layer": -1, "head": -1, **wanted}
    found = pick(readings, metric=metric, **wanted)
    assert len(found) == 1, (metric, wanted, len(found))
    return found[0]
