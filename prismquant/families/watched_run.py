"""A run of a small model, watched: which modules are called, in which order, on which tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["WatchedRun", "watch"]


@dataclass(frozen=True)
class WatchedRun:
    """Calls that forward hooks saw; a tensor is known by its memory, so that views are the same.

    Attributes:
        order: Module path -> number of its first call.
        reads: Module path -> memory of the first tensor that it was given, in its first call.
        writes: Module path -> memory of the first tensor that it put out.
        widths: Module path -> size of the last dimension of what it was given.
    """

    order: Mapping[str, int]
    reads: Mapping[str, int]
    writes: Mapping[str, int]
    widths: Mapping[str, int]
    _alive: list[Tensor] = field(default_factory=list, repr=False)

    def readers(self, source: str) -> list[str]:
        """Modules that were given what a module put out, in the order of their calls."""
        memory = self.writes.get(source)
        return [] if memory is None else [p for p, read in self.reads.items() if read == memory]


@torch.no_grad()
def watch(model: nn.Module, inputs: Mapping[str, Any]) -> WatchedRun:
    """Run a model once.

    Args:
        model: With its weights.
        inputs: Of a batch.
    """
    order: dict[str, int] = {}
    reads: dict[str, int] = {}
    writes: dict[str, int] = {}
    widths: dict[str, int] = {}
    alive: list[Tensor] = []

    def before(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if path in order:
                return
            order[path] = len(order)
            if (given := next(_tensors((args, kwargs)), None)) is not None:
                alive.append(given)
                reads[path] = given.data_ptr()
                widths[path] = given.shape[-1] if given.dim() else 1

        return hook

    def after(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if path not in writes and (made := next(_tensors(output), None)) is not None:
                alive.append(made)
                writes[path] = made.data_ptr()

        return hook

    hooks = []
    for path, module in model.named_modules():
        if path:
            hooks.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
            hooks.append(module.register_forward_hook(after(path)))
    try:
        model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return WatchedRun(order, reads, writes, widths, alive)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a call or a result, first ones first."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
