"""What reference log-probs were computed with, as the key of their cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from mlalign.branching.reference_key import CacheKey, fingerprint_files, fingerprint_json
from mlalign.models._vlm import VLM
from mlalign.models.loading import dtype_of, resolve_path
from mlalign.sections import ModelSection


def reference_key(section: ModelSection, vlm: VLM, data: str, *, blank: bool = False) -> CacheKey:
    """The key of the base model (adapter off) that a recipe's model section loads.

    ``data``: name of the pairs. ``blank``: images are replaced by uniform ones. Raises OSError
    where the weights' files are not found.
    """
    path = resolve_path(section.path)
    processor: Any = vlm.processor
    seen = {
        "image_processor": processor.image_processor.to_dict(),
        "image": section.image,
        "blank": blank,
        "image_text": vlm.family.image_text(processor, (640, 480)),
    }
    template = processor.chat_template or vlm.tokenizer.chat_template
    start = section.start_adapter
    return CacheKey(
        data=data,
        model=section.path,
        revision=section.revision or "none",
        weights=fingerprint_files(_weights(path, section.revision)),
        dtype=str(dtype_of(section)).removeprefix("torch."),
        quantization=section.quantize,
        adapter="none" if start is None else fingerprint_files(_weights(start, None)),
        processor=fingerprint_json(seen),
        chat_template=fingerprint_json(template),
    )


def _weights(path: str, revision: str | None) -> list[Path]:
    """Weight files of a folder, or of a Hub id's snapshot on this machine, and the configs that
    change what they compute (rotary base, feature layer, lora_alpha)."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = Path(str(cached_file(path, "config.json", revision=revision))).parent
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise OSError(f"{folder}: no weights (*.safetensors) to key the reference cache by")
    configs = (folder / name for name in ("config.json", "adapter_config.json"))
    return files + [config for config in configs if config.is_file()]
