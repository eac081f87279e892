"""Load a model by its recipe section: family, quantisation, adapters. Refuses what it cannot do."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from mlalign import methods
from mlalign.branching.attention import use
from mlalign.models._processor import load_processor
from mlalign.models._vlm import VLM
from mlalign.sections import LoraSection, ModelSection

BUILTIN = "builtin:"


class ModelError(ValueError):
    """A model that cannot be loaded as asked. The message names it and the mend."""


def resolve_path(path: str) -> str:
    """The folder of a built-in model, else the path or Hub id as it is.

    Raises ModelError where something that looks like a folder is not there.
    """
    if path.startswith(BUILTIN):
        name = path.removeprefix(BUILTIN)
        folder = Path(__file__).parents[1] / name / "base"
        if not folder.is_dir():
            raise ModelError(f"model.path: there is no built-in model {name!r}")
        return str(folder)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_local and not Path(path).expanduser().is_dir():
        raise ModelError(
            f"model.path: the folder {path} does not exist. Give a folder, or a Hub id like "
            "llava-hf/llava-1.5-7b-hf"
        )
    return str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path


def dtype_of(section: ModelSection) -> torch.dtype:
    """The dtype of weights and activations. auto: bfloat16 on a GPU that has it, else float32."""
    if section.dtype != "auto":
        return getattr(torch, section.dtype)
    has = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has else torch.float32


def family_of(config: Any) -> Any:
    """The family that serves a config's architecture. Raises ModelError with the list otherwise."""
    return family_named((getattr(config, "architectures", None) or ["none"])[0])


def family_named(architecture: str) -> Any:
    """The family that serves a class of models. Raises ModelError with the list otherwise."""
    served = {}
    for name in methods.names("mlalign.models"):
        family = methods.find("mlalign.models", name)
        for each in family.architectures:
            served[each] = family
    if architecture not in served:
        raise ModelError(
            f"no model family serves {architecture}; there are: {', '.join(sorted(served))}"
        )
    return served[architecture]


def load_vlm(
    model: ModelSection, *, adapter: str | Path | None = None, device: str | None = None
) -> VLM:
    """The model in eval mode, with ``adapter`` (a PEFT folder) on it where given.

    ``device``: where to put it ("auto": the GPU where there is one); None leaves it where it
    loads, which a trainer wants. Raises ModelError for a missing folder, an unserved family, and
    an adapter of which any weight is missing or left over.
    """
    path = resolve_path(model.path)
    register_towers()
    try:
        config = AutoConfig.from_pretrained(path, revision=model.revision)
    except OSError as error:
        raise ModelError(f"model.path: cannot load {path}: {error}") from error
    family = family_of(config)
    keywords: dict[str, Any] = {"dtype": dtype_of(model), "revision": model.revision}
    if model.quantize != "none":
        keywords["quantization_config"] = _quantization(model, family)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(path, **keywords)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else None
    processor = load_processor(path, model.revision)
    if model.start_adapter is not None:
        if model.quantize != "none":
            raise ModelError(
                "model.start_adapter cannot be merged into a quantised model: merge it first"
            )
        loaded = load_adapter(loaded, model.start_adapter).merge_and_unload()
    if adapter is not None:
        loaded = load_adapter(loaded, adapter)
    if device is not None and model.quantize == "none":
        loaded = loaded.to(device)
    loaded.eval()
    vlm = VLM(
        model=loaded, processor=processor, family=family, image_mode=model.image, name=model.path
    )
    # What it cannot reproduce keeps its own function, and the dense mask.
    with contextlib.suppress(ValueError):
        use(vlm.core)
    return vlm


def load_vlm_from(path: str | Path, *, device: str | None = None, **keys: Any) -> VLM:
    """``load_vlm`` of a path and other keys of the model section."""
    return load_vlm(ModelSection(path=str(path), **keys), device=device)


def load_adapter(model: Any, folder: str | Path) -> Any:
    """A PeftModel with every weight of the folder in its place, and no other.

    Raises ModelError otherwise: PEFT itself only warns, and an adapter that is silently not
    applied is a known failure.
    """
    from peft import PeftConfig, get_peft_model
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    where = Path(folder)
    if not (where / "adapter_config.json").is_file():
        raise ModelError(f"{where}: no adapter_config.json; give the folder of a PEFT adapter")
    wrapped = get_peft_model(
        model, PeftConfig.from_pretrained(str(where)), autocast_adapter_dtype=False
    )
    weights = load_peft_weights(str(where), device="cpu")
    outcome = set_peft_model_state_dict(wrapped, weights)
    own = (f".{getattr(wrapped.base_model, 'prefix', 'lora_')}", ".modules_to_save.")
    missing = [key for key in outcome.missing_keys if any(part in key for part in own)]
    faults = [("missing", missing), ("without a place", list(outcome.unexpected_keys))]
    named = [f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in faults if keys]
    if named:
        raise ModelError(
            f"{where}: the adapter does not fit the model; of its weights are "
            f"{' and '.join(named)}. Give the model it was trained on, or save the adapter again"
        )
    return wrapped


def lora_config(section: LoraSection, vlm: VLM) -> Any:
    """PEFT's configuration for a recipe's adapter. Raises ModelError for targets that hit nothing,
    the vision tower or the head."""
    import re

    from peft import LoraConfig

    targets = section.targets or vlm.family.lora_targets(vlm.core)
    hit = [n for n, m in vlm.core.named_modules() if re.fullmatch(targets, n) and _is_linear(m)]
    if not hit:
        raise ModelError(f"model.adapter.targets: {targets!r} matches no linear of {vlm.name}")
    strays = [name for name in hit if vlm.family.language_model not in name]
    if strays:
        raise ModelError(
            f"model.adapter.targets: {targets!r} also hits {strays[0]} and {len(strays) - 1} more "
            "outside the language model. Name the projector in modules_to_save; the tower is frozen"
        )
    tied = getattr(vlm.core.config, "tie_word_embeddings", False)
    heads = [n for n in section.modules_to_save if n in ("lm_head", "embed_tokens")]
    if tied and heads:
        raise ModelError(
            f"model.adapter.modules_to_save: {heads[0]} is tied in {vlm.name}: the trained copy "
            "would be lost when the model is merged and loaded again. Untie the model first"
        )
    return LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=targets,
        modules_to_save=list(section.modules_to_save) or None,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ in (
        "Linear4bit",
        "Linear8bitLt",
    )


def _quantization(model: ModelSection, family: Any) -> Any:
    from transformers import BitsAndBytesConfig

    # The tower and projector stay as they are: they are small, and their error would reach
    # every image token.
    skip = [*(rf".*{name}" for name in family.towers), "lm_head"]
    if model.quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype_of(model),
        llm_int8_skip_modules=skip,
    )


def register_towers() -> None:
    """Make the vision towers that this package adds known to transformers' Auto classes."""
    import importlib
    import pkgutil

    import mlalign.models as room

    for module in pkgutil.iter_modules(room.__path__):
        if module.name.endswith("_tower"):
            importlib.import_module(f"{room.__name__}.{module.name}")
