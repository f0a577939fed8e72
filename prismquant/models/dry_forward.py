"""A forward pass of a model without weights, which finds what only the model's own code refuses.

Some faults of a configuration show in no shape: sliding attention without a window, or rotary
sections that do not fit a head. transformers builds such a model, and fails when it is first
called. Here it is called at once, with some tokens and a small picture. Modules that hold
parameters run on the meta device, which has shapes and no numbers, and return zeros; all code
between them runs as it is. It takes a second or two for the largest models.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from prismquant.errors import brief
from prismquant.memory import memory_error
from prismquant.models.config import config_value
from prismquant.models.told_device import tell_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from prismquant.models.arch import ArchSpec
    from prismquant.models.bound import BoundStep

__all__ = ["bounds_logits", "forward_findings"]

# More than any real model has: such a pass would take long, or much memory.
_MOST_STEPS = 300
_MOST_ROWS = 1 << 21
# Of a text, and of the small picture in each direction.
_TOKENS = 4
_CELLS = 2
# A number that every bound on logits changes.
_LARGE = 1e4


class _NoNumbersError(Exception):
    """Ends a pass in which a module needs numbers, not only shapes: nothing can be said then."""


def forward_findings(
    model: nn.Module, arch: ArchSpec, config: Any, steps: Sequence[BoundStep]
) -> list[str]:
    """Findings on a configuration from the model's own code, first of a text, then of a picture.

    Args:
        model: Without weights; it cannot be used afterwards.
        arch: Its architecture.
        config: Its native config.
        steps: All modules that are to run, at the latest for a picture.

    Returns:
        Nothing where all passes come to their end, or where that cannot be told: also for a model
        larger than any real one.
    """
    rows = max((p.shape[0] for p in model.parameters() if p.dim() > 1), default=0)
    if len(steps) > _MOST_STEPS or rows > _MOST_ROWS:
        return []
    left = {step.name for step in steps}
    for name in left.copy():
        model.get_submodule(name).register_forward_pre_hook(lambda *_, n=name: left.discard(n))
    _without_numbers(model, arch)
    entry = next((site for step in steps for site in step.sites if step.kind == "entry"), None)
    picture = None if entry is None else _picture(arch, config, entry.in_features)
    passes = {"": _text(arch, config)} | ({" for pictures": picture} if picture else {})
    try:
        for kind, inputs in passes.items():
            if said := _refusal(model, inputs):
                return [f"config.json: the model's own code refuses it{kind}: {said}"]
    except _NoNumbersError:
        return []
    never = sorted(left) if picture else []
    return [f"{name}: the model's own code never runs it" for name in never]


def bounds_logits(model: nn.Module, arch: ArchSpec, config: Any) -> bool:
    """Whether a model changes what its head puts out before it is a logit, as Gemma 2 does.

    Args:
        model: Without weights; it cannot be used afterwards.
        arch: Its architecture.
        config: Its native config.

    Returns:
        False also where that cannot be told without numbers.
    """
    _without_numbers(model, arch)
    head: Any = model.get_submodule(arch.head)
    forward = head.forward
    head.forward = lambda *args: torch.full_like(forward(*args), _LARGE)
    try:
        with torch.no_grad(), torch.device("cpu"):
            logits: Tensor = model(**_text(arch, config), use_cache=False).logits
    except _NoNumbersError:
        return False
    return bool((logits != _LARGE).any())


def _without_numbers(model: nn.Module, arch: ArchSpec) -> None:
    """Let modules that hold parameters compute shapes, and put out zeros."""
    for module in _outermost_holders(model):
        if module._modules or any(not tensor.is_meta for tensor in _own_tensors(module)):
            module.to("meta")
        module.forward = _on_shapes(module.forward)
    tell_device(model, torch.device("cpu"))
    table = _module_at(model, arch.embeddings)
    if isinstance(table, nn.Embedding):
        # Some code between modules reads a row of it.
        zeros = torch.zeros(1, dtype=table.weight.dtype, device="cpu").expand(table.weight.shape)
        table.weight = nn.Parameter(zeros, requires_grad=False)
        setattr(table, "forward", _zeros_for(zeros[0]))  # noqa: B010 - mypy takes it for a method


def _own_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers that a module holds itself."""
    held = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in held if tensor is not None]


def _module_at(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path; None where there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _zeros_for(row: Tensor) -> Callable[[Tensor], Tensor]:
    """A look-up that finds one row everywhere."""

    def look_up(ids: Tensor) -> Tensor:
        return row.expand(*ids.shape, -1)

    return look_up


def _outermost_holders(module: nn.Module) -> Iterator[nn.Module]:
    """Modules that hold parameters themselves, and lie in no such module."""
    left = [module]
    while left:
        last = left.pop()
        if any(parameter is not None for parameter in last._parameters.values()):
            yield last
        else:
            left += reversed(list(last.children()))


def _on_shapes(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that computes shapes on the meta device, and returns zeros of them."""

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
        try:
            result = forward(*args, **kwargs)
        except (NotImplementedError, RuntimeError) as error:
            if isinstance(error, NotImplementedError) or "meta" in str(error):
                raise _NoNumbersError from error
            raise
        return pytree.tree_map_only(Tensor, lambda x: torch.zeros_like(x, device="cpu"), result)

    return call


def _refusal(model: nn.Module, inputs: dict[str, Any]) -> str | None:
    """Objection of the model to a call; None where it can be called."""
    try:
        # Its code makes tensors on the default device, which may be the caller's choice.
        with torch.no_grad(), torch.device("cpu"):
            model(**inputs, use_cache=False)
    except _NoNumbersError:
        raise
    except Exception as error:
        if memory_error(error) is not None:
            raise
        # Some code reads parameters of modules that it does not call.
        if isinstance(error, RuntimeError) and re.search(r"\bmeta\b", str(error)):
            raise _NoNumbersError from error
        return brief(error)
    return None


def _text(arch: ArchSpec, config: Any) -> dict[str, Any]:
    """A row of tokens that stand for no picture and no clip."""
    media = {int(config_value(config, key)) for key in arch.vision_token_ids}
    token = next(number for number in range(len(media) + 1) if number not in media)
    ids = torch.full((1, _TOKENS), token, device="cpu")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _picture(arch: ArchSpec, config: Any, width: int) -> dict[str, Any] | None:
    """A row with a small picture; None for an architecture that is given pictures otherwise.

    Args:
        arch: Names the inputs.
        config: Its native config.
        width: Numbers of a patch.
    """
    group = arch.input_groups[0] if arch.input_groups else ()
    if not any(key.endswith("grid_thw") for key in group):
        return None
    made: dict[str, Tensor] = {}
    merge = getattr(config.vision_config, "spatial_merge_size", 1)
    if any(key.endswith("merge_sizes") for key in group):
        merge = 1
    side = _CELLS * merge
    for key in group:
        if key.startswith("pixel"):
            made[key] = torch.zeros(side * side, width, device="cpu")
        elif key.endswith("grid_thw"):
            made[key] = torch.tensor([[1, side, side]], device="cpu")
        elif key.endswith("merge_sizes"):
            made[key] = torch.tensor([merge], device="cpu")
        else:
            return None
    marks = torch.tensor([[0] * 2 + [1] * _CELLS**2 + [0] * 2], device="cpu")
    token = int(config_value(config, arch.vision_token_ids[0]))
    ids = torch.where(marks > 0, token, _text(arch, config)["input_ids"][0, 0])
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return text | made | ({"mm_token_type_ids": marks} if merge > 1 else {})
