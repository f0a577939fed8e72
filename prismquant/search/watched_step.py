"""Tensors of a step that options change, in one call: outputs of layers, keys and values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prismquant.engine.walk import Unit
from prismquant.models.attention import attention_hooked
from prismquant.runtime.kv_cache import KVWatch
from prismquant.search.option_errors import Option, StepErrors


@dataclass(frozen=True, eq=False)
class WatchedCall:
    """Tensors that options change, as one call makes them.

    Attributes:
        errors: The options.
        layers: Names of layers, with their inputs and outputs.
        caches: Keys and values.
    """

    errors: StepErrors
    layers: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    caches: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def tensors(self) -> list[Tensor]:
        """Outputs of layers, then keys and values."""
        return [out for *_, out in self.layers] + [x for pair in self.caches for x in pair]

    def changes(self) -> Iterator[tuple[int, Option, Tensor]]:
        """Errors that options make in these tensors.

        Yields:
            Number of the tensor, the option, and the error ``[rows, features]``.
        """
        for number, (name, x, _) in enumerate(self.layers):
            for option, error in self.errors.outputs(name, x):
                yield number, option, error
        number = len(self.layers)
        for key, value in self.caches:
            for option, quantizer in self.errors.caches.items():
                rounded = quantizer(key.detach(), value.detach())
                for index, (own, x) in enumerate(zip(rounded, (key, value), strict=True)):
                    yield number + index, option, (own - x.detach()).reshape(-1, x.shape[-1])
            number += 2


@contextlib.contextmanager
def watched(unit: Unit, errors: StepErrors) -> Iterator[WatchedCall]:
    """Within the block, what passes a step's layers, keys and values is kept.

    Where gradients are enabled, they can be taken at all of it.

    Args:
        unit: The step; loaded.
        errors: Tells the layers.
    """
    call, model = WatchedCall(errors), unit.main.model

    def taken(x: Tensor) -> Tensor:
        return x.requires_grad_(True) if torch.is_grad_enabled() else x

    def see_layer(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            call.layers.append((name, args[0].detach(), taken(output)))

        return hook

    def see_cache(key: Tensor, value: Tensor) -> None:
        call.caches.append((taken(key), taken(value)))

    with contextlib.ExitStack() as stack:
        for name in errors.by_layer:
            handle = model.get_submodule(name).register_forward_hook(see_layer(name))
            stack.callback(handle.remove)
        if errors.attention is not None:
            attention = model.get_submodule(errors.attention)
            stack.enter_context(attention_hooked(attention, KVWatch(see_cache)))
        yield call
