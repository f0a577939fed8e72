"""Passes of a batch through the vision tower, and the pixels that they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from prismquant.data.batches import Batch
from prismquant.engine.calls import TowerPass
from prismquant.models.arch import ArchSpec

# Of a picture: channels, height, width.
_PICTURE_DIMENSIONS = 3


def without_pixels(
    batch: Batch, arch: ArchSpec, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """A batch's inputs on a device; of pixels only the shape, which takes no memory.

    Args:
        batch: The batch.
        arch: Names the pixels.
        device: Where the inputs go.
        dtype: Of inputs in floating point.
    """
    pixels = {group[0] for group in arch.input_groups}
    return {
        key: hollow(_moved(value.new_zeros(1), device, dtype), value.shape)
        if key in pixels
        else _moved(value, device, dtype)
        for key, value in batch.inputs.items()
    }


def vision_passes(
    inputs: dict[str, Any], batch: Batch, number: int, arch: ArchSpec, dtype: torch.dtype
) -> list[TowerPass]:
    """One pass for each group of vision inputs that the batch has, e.g. images, then videos.

    Args:
        inputs: From :func:`without_pixels`.
        batch: The batch.
        number: Its number.
        arch: Names the groups.
        dtype: Of pixels.
    """
    vision_keys = {key for group in arch.input_groups for key in group} | {*arch.audio_inputs}

    def of_group(group: Sequence[str]) -> dict[str, Any]:
        return {k: v for k, v in inputs.items() if k not in vision_keys or k in group}

    def pixels(key: str) -> dict[str, Tensor]:
        return {key: _moved(batch.whole().inputs[key], inputs[key].device, dtype)}

    return [
        TowerPass(
            partial(of_group, group),
            None,
            kind="video" if "video" in group[0] else "image",
            batch=number,
            pixels=partial(pixels, group[0]),
        )
        for group in arch.input_groups
        if inputs.get(group[0]) is not None
    ]


def hollow(x: Tensor, shape: torch.Size | None = None) -> Tensor:
    """Zeros of a shape, by default a tensor's own, that take no memory."""
    return x.new_zeros(1).expand(x.shape if shape is None else shape)


def zeros_like(value: Any) -> Any:
    """A value, nested in tuples and dictionaries or not, with zeros that take no memory."""
    return pytree.tree_map_only(Tensor, hollow, value)


def lighter(pixels: dict[str, Tensor]) -> Iterator[Callable[[], dict[str, Tensor]] | None]:
    """Substitutes for pixels that were read, the lightest first.

    Yields:
        None: their shape; then, which pictures are blank, as blank ones may be padding.
    """
    yield None
    marks = {}
    for key, value in pixels.items():
        kept = max(1, value.dim() - _PICTURE_DIMENSIONS)
        mark = (value != 0).flatten(kept).any(-1) if value.dim() > kept else value != 0
        mark = mark.to(value.dtype).reshape(*value.shape[:kept], *[1] * (value.dim() - kept))
        marks[key] = mark.expand(value.shape)
    yield lambda: marks


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)
