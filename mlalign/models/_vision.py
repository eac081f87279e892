"""Images to features, once per image; and what a model's masks need to know of the layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mlalign.branching.batch import PrefixBatch
from mlalign.branching.layout import LayoutError
from mlalign.branching.logps import unwrap


def encode(model: nn.Module, family: Any, batch: PrefixBatch) -> PrefixBatch:
    """``VLM.encode``."""
    if batch.features is not None:
        return batch
    core = unwrap(model)
    found = features(core, family, batch.images)
    _check_counts(core, family, batch, [len(each) for each in found.pooler_output])
    return replace(batch, features=family.arrange(found, batch.image_G), images={})


def features(core: Any, family: Any, images: dict[str, Tensor]) -> Any:
    """``Family.features`` of collated images, on the model's device; without a gradient where
    nothing that they pass through trains."""
    weight = core.get_input_embeddings().weight
    images = {key: _cast(value, weight) for key, value in images.items()}
    still = frozen(core, family)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled() and not still))
        # Under gradient checkpointing transformers makes the tower's embeddings require gradients,
        # and a frozen tower would be run backwards for nothing.
        for tower in family.frozen_towers(core):
            if not any(p.requires_grad for p in tower.parameters()):
                stack.enter_context(_without_gradient(tower))
            else:
                break
        stack.enter_context(_gathered([getattr(core.model, name) for name in family.bare]))
        stack.enter_context(_one_dtype(core, family, weight))
        return family.features(core, images)


def frozen(core: Any, family: Any) -> bool:
    """Whether nothing between pixels and language model trains."""
    modules = family.frozen_towers(core)
    parameters = [p for module in modules for p in module.parameters()]
    parameters += [getattr(core.model, name) for name in family.bare]
    return not any(parameter.requires_grad for parameter in parameters)


def with_masks(core: Any, family: Any, batch: PrefixBatch) -> PrefixBatch:
    """The batch with what its masks need: sliding windows, image blocks.

    Raises LayoutError for layers that mix positions by anything but attention.
    """
    text = core.config.get_text_config()
    kinds = list(dict.fromkeys(getattr(text, "layer_types", None) or ()))
    strange = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if strange:
        raise LayoutError(
            f"{text.model_type} has layers of {', '.join(strange)}: a completion would see its "
            "siblings. Branching is exact for attention only, and there is no other layout here"
        )
    window = getattr(text, "sliding_window", None)
    if not getattr(text, "use_sliding_window", True):
        window = None
    windows: tuple[tuple[str, int | None], ...] = ()
    if "sliding_attention" in kinds:
        sizes = {"full_attention": None, "sliding_attention": window}
        windows = tuple(sizes.items())
    elif window is not None and not kinds:
        windows = (("", int(window)),)
    block_RT = _blocks(core, family, batch) if family.image_blocks(core) else None
    return replace(batch, windows=windows, block_RT=block_RT)


def _blocks(core: Any, family: Any, batch: PrefixBatch) -> Tensor:
    """Number of the run of image tokens that each token is in, -1 where in none."""
    image_RT = (batch.input_ids_RT == family.image_token_id(core)) & (batch.segment_RT == 0)
    before_RT = torch.nn.functional.pad(image_RT, (1, 0))[:, :-1]
    number_RT = (image_RT & ~before_RT).cumsum(1) - 1
    return number_RT.masked_fill(~image_RT, -1)


def _cast(value: Tensor, like: Tensor) -> Tensor:
    """On the model's device; numbers in its dtype, indices and masks as they are."""
    return value.to(like.device, like.dtype if value.is_floating_point() else None)


def _check_counts(core: Any, family: Any, batch: PrefixBatch, features: list[int]) -> None:
    """Every prefix must have as many image tokens as its image has features."""
    image_RT = (batch.input_ids_RT == family.image_token_id(core)) & (batch.segment_RT >= 0)
    before_RT = torch.nn.functional.pad(image_RT.cumsum(1), (1, 0)).tolist()
    wanted = iter(batch.image_G)
    for row, groups in enumerate(batch.groups_R):
        for group in groups:
            start, shared, end = group.start, group.stops[0], group.stops[-1]
            tokens = before_RT[row][shared] - before_RT[row][start]
            strays = before_RT[row][end] - before_RT[row][shared]
            count = features[next(wanted)]
            if tokens == count and not strays:
                continue
            what = f"{tokens} image tokens in the prompt, but {count} features of its image"
            if strays:
                what = f"{strays} image tokens in a completion"
            raise LayoutError(
                f"{_name(batch, row, shared)}: {what}. The prompt needs the image once, and "
                "processor and model must be of one kind (patch size, strategy, tiles)"
            )


def _name(batch: PrefixBatch, row: int, shared: int) -> str:
    """Record id of the group whose prefix ends at ``shared`` in ``row``."""
    first_C = (batch.row_C == row) & (batch.source_CS[:, 0] == shared - 1)
    found = first_C.nonzero()[:, 0].tolist()
    return batch.ids_C[found[0]] if batch.ids_C and found else f"row {row}"


def _one_dtype(core: Any, family: Any, weight: Tensor) -> Any:
    """Autocast where tower, projector and embedding are not of one dtype: a trained projector is
    kept in float32 beside a bfloat16 tower."""
    parameters = (p for module in family.frozen_towers(core) for p in module.parameters())
    kinds = {p.dtype for p in parameters if p.is_floating_point()} | {weight.dtype}
    if len(kinds) == 1:
        return contextlib.nullcontext()
    return torch.autocast(weight.device.type, min(kinds, key=lambda kind: kind.itemsize))


@contextlib.contextmanager
def _without_gradient(module: nn.Module) -> Iterator[None]:
    """Calls of ``module`` inside keep nothing for a backward pass."""
    before: list[bool] = []

    def enter(*_: Any) -> None:
        before.append(torch.is_grad_enabled())
        torch.set_grad_enabled(False)

    def leave(*_: Any) -> None:
        torch.set_grad_enabled(before.pop())

    # A list is never called itself: its members are.
    called = list(module) if isinstance(module, nn.ModuleList) else [module]
    hooks = [each.register_forward_pre_hook(enter, prepend=True) for each in called]
    hooks += [each.register_forward_hook(leave, always_call=True) for each in called]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """The parameters whole, where ZeRO-3 has sharded them."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    from deepspeed.zero import GatheredParameters

    with GatheredParameters(parameters):
        yield
