"""Hold named activations during one forward pass; nothing is left behind.

    with capture({"mlp.3": layers[3].mlp.down_proj}, inputs={"mlp.3"}) as held:
        model(...)
    held["mlp.3"]

Each module may fire once: a second call (gradient checkpointing recomputes, a reference pass runs
through the same modules) would mix two passes into one, and raises.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

Reduce = Callable[[str, Tensor], Any]
"""(name, activation without gradient) -> what is held in its place."""


@contextlib.contextmanager
def capture(
    modules: Mapping[str, nn.Module],
    *,
    inputs: Collection[str] = (),
    reduce: Reduce | None = None,
) -> Iterator[dict[str, Any]]:
    """Hold the output of every module under its name; of those named in ``inputs``, the input.

    A module that returns a tuple gives its first element; the input is the first positional
    tensor. ``reduce`` runs inside the forward pass, so that nothing large is kept. Hooks are gone
    after the context, also after an error. Raises RuntimeError for a module that fires twice.
    """
    unknown = set(inputs) - set(modules)
    if unknown:
        raise ValueError(f"inputs names no module: {', '.join(sorted(unknown))}")
    held: dict[str, Any] = {}

    def hold(name: str, value: Any) -> None:
        if name in held:
            raise RuntimeError(f"{name} fired twice in one capture: open one capture per forward")
        tensor = value[0] if isinstance(value, tuple) else value
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} gave {type(tensor).__name__}, not a tensor")
        tensor = tensor.detach()
        held[name] = tensor if reduce is None else reduce(name, tensor)

    # A hook that returns anything but None would replace the activation.
    def before(name: str) -> Callable[..., None]:
        return lambda _module, args: hold(name, args)

    def after(name: str) -> Callable[..., None]:
        return lambda _module, _args, output: hold(name, output)

    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            handle = (
                module.register_forward_pre_hook(before(name))
                if name in inputs
                else module.register_forward_hook(after(name))
            )
            hooks.callback(handle.remove)
        yield held
