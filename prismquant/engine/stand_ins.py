"""Stand-ins: functions that run in place of the forward passes of a model's modules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prismquant.engine.calls import TowerPass


class Captured(Exception):  # noqa: N818 - it ends a pass, nothing is wrong
    """Ends a forward pass at the step in question; carries how the step was called."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args_of_step = args
        self.kwargs_of_step = kwargs


class Enough(Exception):  # noqa: N818 - likewise
    """Raised by a hook that has seen all that it needs; ends a step's forward pass early."""


def capture_here(*args: Any, **kwargs: Any) -> Any:
    raise Captured(args, kwargs)


def chain_link(
    name: str, state: Callable[[], TowerPass], *, tapped: bool = False, length: int | None = None
) -> Callable[..., Any]:
    """The last finished step gives its output; every other hands its input through.

    What finished steps have written into the dictionaries that they were given is there again.

    Args:
        name: Of the step.
        state: Gives the pass.
        tapped: Whether its output was kept, if it is not the last, as later steps look back at it.
        length: Number of values that it gives as a tuple; None: it gives a tensor.
    """

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        now = state()
        if now.latest == name:
            for key, entries in now.written.items():
                kwargs[key].update({entry: value() for entry, value in entries.items()})
            return now.hidden()
        if tapped and name in now.finished:
            return now.finished[name]()
        return as_output(length, *args, **kwargs)

    return stand_in


def as_output(length: int | None, *args: Any, **kwargs: Any) -> Any:
    """The first tensor that a step is given, as the step gives its output."""
    first = first_tensor((*args, *kwargs.values()))
    return first if length is None else (first, *[None] * (length - 1))


@contextlib.contextmanager
def replaced_forwards(model: nn.Module, forwards: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Within the block, the modules named run other functions in place of their ``forward``."""
    modules = {model.get_submodule(name): forward for name, forward in forwards.items()}
    # A step that is itself a layer may be replaced already.
    before = {module: vars(module).get("forward") for module in modules}
    for module, forward in modules.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del module.forward
            else:
                module.forward = own


@contextlib.contextmanager
def numbers_unknown(tables: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block, weights that are not read have NaN for numbers, which take no memory.

    Code that looks at one runs; what it makes of it, if anything goes on from there, is refused as
    any other NaN is.
    """
    before = [table._parameters["weight"] for table in tables]
    for table, weight in zip(tables, before, strict=True):
        if weight is not None and weight.is_meta:
            unknown = torch.full((1,), torch.nan, dtype=weight.dtype).expand(weight.shape)
            table._parameters["weight"] = nn.Parameter(unknown, requires_grad=False)
    try:
        yield
    finally:
        for table, weight in zip(tables, before, strict=True):
            table._parameters["weight"] = weight


def no_embedding(table: Tensor) -> Callable[..., Any]:
    """Zeros for every token, which take no memory."""

    def embed(ids: Tensor) -> Tensor:
        zero = torch.zeros(1, dtype=table.dtype, device=ids.device)
        return zero.expand(*ids.shape, table.shape[1])

    return embed


def first_tensor(args: tuple[Any, ...]) -> Tensor:
    return next(value for value in args if isinstance(value, Tensor))
