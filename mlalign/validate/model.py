"""The model without its weights: config, tokenizer and image processor, modules on ``meta``."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from mlalign.models._processor import load_processor
from mlalign.models._vlm import VLM
from mlalign.models.loading import (
    ModelError,
    dtype_of,
    family_of,
    register_towers,
    resolve_path,
)
from mlalign.sections import ModelSection
from mlalign.validate.findings import Finding, fault, note, split_mend

UNREACHED = ("offline", "connect", "cached files", "internet")
"""Words of the Hub client's errors where it could not ask, so that nobody knows."""


def empty_vlm(section: ModelSection, where: str) -> tuple[VLM | None, list[Finding]]:
    """The model with every module and no weight, and what keeps it from loading.

    None where there is nothing to look at. A Hub id that is not in the cache and cannot be asked
    for is a note: it is not on this machine.
    """
    try:
        path = resolve_path(section.path)
    except ModelError as error:
        problem, mend = split_mend(str(error).removeprefix("model.path: "))
        return None, [fault(where, "model.path", problem, mend, absent=True)]
    register_towers()
    try:
        config = AutoConfig.from_pretrained(path, revision=section.revision)
        family = family_of(config)
        processor = load_processor(path, section.revision)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype_of(section))
    except ModelError as error:
        return None, [fault(where, "model.path", *split_mend(str(error)))]
    except (OSError, ValueError, ImportError) as error:
        return None, [_unread(path, where, error)]
    vlm = VLM(
        model=model,
        processor=processor,
        family=family,
        image_mode=section.image,
        name=section.path,
    )
    found = _template_faults(vlm, where)
    return (None, found) if found else (vlm, _image_faults(vlm, where))


def _unread(path: str, where: str, error: Exception) -> Finding:
    said = " ".join(str(error).split())
    if not Path(path).is_dir() and any(word in said.lower() for word in UNREACHED):
        return note(
            where,
            "model.path",
            f"{path} is not on this machine: neither a folder here nor in the Hub's cache, and the "
            "Hub could not be asked",
            "Fetch it, then check again: model, adapter and lengths were left out",
            absent=True,
        )
    return fault(where, "model.path", f"{path} cannot be read ({said})", "Check the path")


def _template_faults(vlm: VLM, where: str) -> list[Finding]:
    """A chat template that is missing, or leaves the image out."""
    try:
        ids = vlm.prefix_ids("What is this?", (64, 64))
    except (ValueError, TypeError, AttributeError, KeyError, NotImplementedError) as error:
        problem = f"the chat template of {vlm.name} cannot be applied ({error})"
        return [fault(where, "model.path", problem, "Add chat_template.jinja to its folder")]
    if vlm.image_token_id in ids:
        return []
    problem = f"the chat template of {vlm.name} leaves the image out"
    return [fault(where, "model.path", problem, "Mend the chat template")]


def _image_faults(vlm: VLM, where: str) -> list[Finding]:
    """An image mode that is another family's."""
    try:
        vlm.image(Image.new("RGB", (64, 64)))
    except ValueError as error:
        problem, mend = split_mend(str(error).removeprefix("model.image: "))
        return [fault(where, "model.image", problem, mend)]
    return []
