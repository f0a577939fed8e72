"""Values that share one scale, and how a tensor is arranged and cut by them.

The shape of a scale says what it covers (``x`` is a weight ``[out, in]`` or an activation
``[..., in]``):

    ==========  ===============  ========================================
    tensor      ``[1]``          the whole of ``x``
    channel     ``[out, 1]``     one row of a weight
    token       ``[..., 1]``     one token's features
    group       ``[..., G]``     ``in / G`` consecutive features of a row
    block       ``[R, G]``       a square of ``in / G`` features and as many rows; the last row of
                                 squares may be cut off
    ==========  ===============  ========================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.errors import FormatError
from prismquant.numerics.kinds import Granularity, block_rows, check_group_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Elementwise passes run over pieces of this many elements: on a CPU a piece stays in the
# second-level cache between passes, elsewhere it only bounds the temporary memory.
_CPU_PIECE = 1 << 17
_DEVICE_PIECE = 1 << 26


def to_groups(x: Tensor, granularity: Granularity, group_size: int | None = None) -> Tensor:
    """Arrange a tensor so that its last axis is what shares one scale.

    The leading axes of the result are the shape of the scale, so a reduction over the last axis
    yields one number for each scale. No data is copied unless ``x`` is strided and the granularity
    is the tensor, or it is the block. Rows that a last block lacks are filled with zeros.

    Args:
        x: Weight ``[out, in]`` or activation ``[..., in]``.
        granularity: What shares one scale.
        group_size: Consecutive features to a group or block; for those granularities only.

    Returns:
        tensor ``[1, n]``, channel and token ``[..., 1, in]``, group ``[..., G, group_size]``, block
        ``[R, G, group_size^2]``.

    Raises:
        FormatError: The group size does not divide the last axis, or is missing.
    """
    if granularity == Granularity.TENSOR:
        return x.reshape(1, -1)
    if x.ndim == 0:
        raise FormatError(f"a scalar has no features to give {granularity} granularity")
    if granularity == Granularity.GROUP:
        size = check_group_size(x.shape[-1], group_size)
        return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    if granularity == Granularity.BLOCK:
        size = check_group_size(x.shape[-1], group_size)
        lines = block_rows(len(x), size)
        if lines * size != len(x):
            x = torch.cat([x, x.new_zeros(lines * size - len(x), x.shape[-1])])
        squares = x.reshape(lines, size, x.shape[-1] // size, size).transpose(1, 2)
        return squares.reshape(lines, -1, size * size)
    return x.unsqueeze(-2)


def from_groups(
    groups: Tensor, shape: Sequence[int], granularity: Granularity | None = None
) -> Tensor:
    """Undo :func:`to_groups`.

    Args:
        groups: What :func:`to_groups` returned, or something of its shape.
        shape: The shape of the tensor before grouping.
        granularity: May be left out unless it is the block.

    Returns:
        The values in that shape.
    """
    if granularity != Granularity.BLOCK:
        return groups.reshape(tuple(shape))
    rows, features = shape
    lines, across = groups.shape[:2]
    size = features // max(across, 1)
    squares = groups.reshape(lines, across, size, size).transpose(1, 2)
    return squares.reshape(lines * size, features)[:rows]


def pieces(
    source: Tensor,
    target: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    granularity: Granularity,
    group_size: int | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Cut a tensor into pieces of whole rows, each with its scale and zero point in float32.

    Args:
        source: Values or codes.
        target: Contiguous result of the same shape; the pieces are views of it.
        scale: As the module's table says.
        zero_point: Like the scale.
        granularity: What shares one scale.
        group_size: For group granularity.

    Yields:
        Pieces ``[rows, G, group]`` of source and target, and ``[rows or 1, G, 1]`` of scale and
        zero point.
    """
    if source.numel() == 0:
        return
    features = source.shape[-1] if source.ndim else 1
    size = features
    if granularity.grouped:
        size = check_group_size(features, group_size)
    shape = (source.numel() // features, features // size, size)
    step = _as_rows(scale, "scale", shape, granularity)
    zero = None if zero_point is None else _as_rows(zero_point, "zero point", shape, granularity)
    values, out = source.reshape(shape), target.view(shape)
    limit = _CPU_PIECE if source.device.type == "cpu" else _DEVICE_PIECE
    height = max(1, limit // features)
    shared = step.shape[0] == 1
    for start in range(0, shape[0], height):
        rows = slice(start, start + height)
        yield (
            values[rows],
            out[rows],
            step if shared else step[rows],
            zero if zero is None or shared else zero[rows],
        )


def _as_rows(
    scale: Tensor, name: str, shape: tuple[int, int, int], granularity: Granularity
) -> Tensor:
    """Bring a scale or zero point to float32 ``[rows or 1, G, 1]``, or say why it does not fit."""
    rows, groups, size = shape
    lines = block_rows(rows, size) if granularity == Granularity.BLOCK else rows
    if granularity == Granularity.TENSOR or (lines == rows and scale.numel() == groups):
        lines = 1
    if scale.numel() != lines * groups:
        raise FormatError(
            f"a {name} of shape {list(scale.shape)} does not fit {rows} rows of {groups} groups",
            remedy=f"check that it was made with {granularity} granularity",
        )
    wide = scale.to(torch.float32).reshape(lines, groups, 1)
    if granularity == Granularity.BLOCK:
        return wide.repeat_interleave(size, dim=0)[:rows]
    return wide
