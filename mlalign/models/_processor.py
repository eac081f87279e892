"""A model folder's processor; from its parts where the whole cannot be built here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, ProcessorMixin
from transformers.utils import cached_file

CONFIG = "processor_config.json"


class Parts(ProcessorMixin):
    """Image processor and tokenizer of a processor whose video part cannot be built.

    Several families' processors insist on a video processor, which needs torchvision; a run on
    images needs neither. Other settings of ``processor_config.json`` are attributes, as they are of
    the whole processor, and defaults of its class stand where the file says nothing.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, settings: dict[str, Any]) -> None:
        # Not the mixin's own: it checks for the parts that are missing. Trainers ask for the type.
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.settings = settings
        self.chat_template = settings.get("chat_template") or tokenizer.chat_template

    def __getattr__(self, name: str) -> Any:
        settings = self.__dict__.get("settings", {})
        if name in settings:
            return settings[name]
        tokenizer = self.__dict__.get("tokenizer")
        # Special tokens of multimodal tokenizers (image_token and the like).
        if tokenizer is not None and name.endswith("_token") and hasattr(tokenizer, name):
            return getattr(tokenizer, name)
        raise AttributeError(f"the processor has no {name}: add it to {CONFIG}")

    def apply_chat_template(self, messages: list[dict[str, Any]], **keys: Any) -> Any:
        """The tokenizer's, with the processor's own template."""
        keys = {"tokenize": False, "chat_template": self.chat_template, **keys}
        return self.tokenizer.apply_chat_template(messages, **keys)

    def save_pretrained(self, folder: str | Path) -> None:
        """Both parts and the settings, so that the whole processor loads from it elsewhere."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        text = json.dumps(self.settings, indent=2, ensure_ascii=False)
        (Path(folder) / CONFIG).write_text(text + "\n", encoding="utf-8")


def load_processor(path: str, revision: str | None = None) -> Any:
    """The processor of a model folder or Hub id, with PIL-backed image processing.

    Raises OSError where there is none.
    """
    try:
        return AutoProcessor.from_pretrained(path, revision=revision, backend="pil")
    except (ImportError, ValueError) as error:
        # Without torchvision some video parts raise the one, some the other.
        if isinstance(error, ValueError) and "video processor" not in str(error):
            raise
        file = cached_file(
            path, CONFIG, revision=revision, _raise_exceptions_for_missing_entries=False
        )
        settings = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
        return Parts(
            AutoImageProcessor.from_pretrained(path, revision=revision, backend="pil"),
            AutoTokenizer.from_pretrained(path, revision=revision),
            settings,
        )
