"""The affine map between real values and codes, and which values share one scale.

    point = round_half_even(clamp(x / scale + zero_point, qmin, qmax))
    value = (point - zero_point) * scale

A point lies on a grid of :mod:`prismquant.numerics.grids`: an integer is its own code, a small
floating-point number (which has no zero point) is coded as its bit pattern.

Two invariants hold everywhere. A scale is rounded to what will be stored *before* codes are chosen
(:mod:`prismquant.numerics.scales`), so what is simulated is what is stored. And all arithmetic is
float32 on the stored scale, so :func:`simulate` equals :func:`dequantize` of :func:`quantize` bit
for bit.

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

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.errors import FormatError, NumericsError
from prismquant.numerics.grids import IntGrid, integer_grid
from prismquant.numerics.kinds import Granularity, block_rows, check_group_size
from prismquant.numerics.scales import AnyScale, as_scale_format

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from prismquant.numerics.grids import Grid

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


def scale_zero_point(
    low: Tensor,
    high: Tensor,
    grid: Grid,
    symmetric: bool,
    scale_dtype: AnyScale,
) -> tuple[Tensor, Tensor | None]:
    """Turn ranges into the scale, and the zero point, that will be stored.

    The range is widened to hold zero, so that zero is always represented exactly. A symmetric grid
    with all its integers puts the largest magnitude midway between its two outermost ones, -qmin
    and qmax (``absmax / ((2^b - 1) / 2)``: absmax / 7.5 for 4 bits), the rule of the
    compressed-tensors library; a narrow one, and a floating-point one, puts it on the outermost
    point. An asymmetric scale is the range over the number of steps, and its zero point is taken
    from the scale as rounded.

    Args:
        low: Lower ends of the ranges, any shape.
        high: Upper ends, same shape.
        grid: The points and their codes.
        symmetric: Keep zero at code 0; otherwise a zero point is chosen.
        scale_dtype: How the scale is stored: float32, bfloat16, float16, or any other format.

    Returns:
        The scale as it is kept in memory, and the zero point as int8 or ``None``, both shaped like
        ``low``. A scale is a positive normal number: 1 (or the E4M3 number 1) for a range of zero
        width, and clamped into what can be stored where it would underflow or overflow.

    Raises:
        NumericsError: A range is not finite.
        FormatError: No scale is stored in this dtype, or a floating-point grid or a scale of few
            bits is not to be symmetric.
    """
    form = as_scale_format(scale_dtype)
    check_finite(low, "the lower end of a range")
    check_finite(high, "the upper end of a range")
    low = low.to(torch.float32).clamp(max=0.0)
    high = high.to(torch.float32).clamp(min=0.0)
    if symmetric:
        return form.of_magnitude(torch.maximum(-low, high), grid), None
    integers = integer_grid(grid)
    if form.coded:
        raise FormatError(
            f"an asymmetric format cannot have scales of the kind {form.kind}",
            remedy="use a symmetric format, or float scales",
        )
    steps = integers.levels - 1
    # A range wider than float32 can express is divided before it is subtracted.
    scale = (high - low) / steps
    scale = torch.where(scale.isinf(), high / steps - low / steps, scale)
    stored = form.stored(scale, grid)
    zero = integers.qmin - low / stored.to(torch.float32)
    return stored, zero.round_().clamp_(integers.qmin, integers.qmax).to(torch.int8)


def dynamic_scale_zero_point(
    x: Tensor,
    grid: Grid,
    symmetric: bool,
    granularity: Granularity,
    group_size: int | None = None,
    scale_dtype: AnyScale | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scales of an activation from its own extremes, as dynamic quantization takes them.

    Args:
        x: Activation ``[..., in]``.
        grid: The points and their codes.
        symmetric: Keep zero at code 0.
        granularity: token, group or tensor (or channel, to treat ``x`` as a weight).
        group_size: For group granularity.
        scale_dtype: How the scale is stored; by default in the dtype of ``x``.

    Returns:
        Scale and zero point, shaped as the module's table says. An empty unit has scale 1.

    Raises:
        NumericsError: ``x`` holds NaN or an infinity.
        FormatError: The group size does not divide the features.
    """
    low, high = extremes(x, granularity, group_size)
    return scale_zero_point(low, high, grid, symmetric, scale_dtype or x.dtype)


def extremes(
    x: Tensor, granularity: Granularity, group_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of everything that shares one scale.

    Args:
        x: Weight ``[out, in]`` or activation ``[..., in]``.
        granularity: What shares one scale.
        group_size: For group granularity.

    Returns:
        Two tensors of the scale's shape, in the dtype of ``x``; zeros where there are no values.

    Raises:
        NumericsError: ``x`` holds NaN or an infinity.
        FormatError: The group size does not divide the features.
    """
    if granularity == Granularity.BLOCK:
        return _block_extremes(x, check_group_size(x.shape[-1], group_size))
    groups = to_groups(x, granularity, group_size)
    if groups.shape[-1] == 0:
        nothing = groups.new_zeros(groups.shape[:-1])
        return nothing, nothing.clone()
    # NaN and infinities survive the reductions: the values themselves need no mask. Two reductions
    # are vectorised on a CPU where the one that yields both ends is not.
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    if not (all_finite(low) and all_finite(high)):
        check_finite(x, "the tensor")
    return low, high


def _block_extremes(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Expansion of blocks, the last of which may be cut off: along features, then down rows."""
    across = extremes(x, Granularity.GROUP, size)
    if not len(x):
        return across
    down = (
        [part.amin(0) for part in across[0].split(size)],
        [part.amax(0) for part in across[1].split(size)],
    )
    return torch.stack(down[0]), torch.stack(down[1])


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: Grid,
    granularity: Granularity,
    group_size: int | None = None,
) -> Tensor:
    """Round values to the nearest points of a grid, and give their codes.

    Args:
        x: Values, any floating dtype, weight ``[out, in]`` or activation ``[..., in]``.
        scale: Stored scale, shaped as the module's table says.
        zero_point: int8, shaped like the scale; ``None`` for a symmetric format.
        grid: The points and their codes.
        granularity: What shares one scale.
        group_size: For group granularity.

    Returns:
        int8 codes, shaped like ``x``.

    Raises:
        NumericsError: ``x`` holds NaN or an infinity.
        FormatError: The shapes do not fit.
    """
    _check_values(x)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    for values, out, step, zero in _pieces(x, codes, scale, zero_point, granularity, group_size):
        grid.write(_round_to_points(values, step, zero, grid), out)
    return codes


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    granularity: Granularity,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    grid: Grid | None = None,
) -> Tensor:
    """Turn codes back into values: ``(point - zero_point) * scale``, rounded once, to ``dtype``.

    Args:
        codes: int8, weight ``[out, in]`` or activation ``[..., in]``.
        scale: Stored scale, shaped as the module's table says.
        zero_point: int8, shaped like the scale; ``None`` for a symmetric format.
        granularity: What shares one scale.
        group_size: For group granularity.
        dtype: Dtype of the result.
        grid: What the codes stand for; may be left out for integers, which stand for themselves.

    Returns:
        Values shaped like ``codes``.

    Raises:
        FormatError: The shapes do not fit.
    """
    result = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for values, out, step, zero in _pieces(
        codes, result, scale, zero_point, granularity, group_size
    ):
        real = values.to(torch.float32) if grid is None else grid.read(values)
        if zero is not None:
            real = real.sub_(zero)
        out.copy_(real.mul_(step))
    return result


def simulate(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: Grid,
    granularity: Granularity,
    group_size: int | None = None,
) -> Tensor:
    """Quantize and dequantize in one pass, without storing codes.

    Args:
        x: Values, any floating dtype, weight ``[out, in]`` or activation ``[..., in]``.
        scale: Stored scale, shaped as the module's table says.
        zero_point: int8, shaped like the scale; ``None`` for a symmetric format.
        grid: The points and their codes.
        granularity: What shares one scale.
        group_size: For group granularity.

    Returns:
        Values on the grid, in the shape and dtype of ``x``; bit for bit what
        ``dequantize(quantize(x))`` gives.

    Raises:
        NumericsError: ``x`` holds NaN or an infinity.
        FormatError: The shapes do not fit.
    """
    _check_values(x)
    integers = isinstance(grid, IntGrid)
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for values, out, step, zero in _pieces(x, result, scale, zero_point, granularity, group_size):
        real = _round_to_points(values, step, zero, grid)
        if integers:
            # Integer codes know no negative zero; adding zero removes the one that rounding leaves.
            real = real.add_(0.0)
        if zero is not None:
            real = real.sub_(zero)
        out.copy_(real.mul_(step))
    return result


def quantize_with_values(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: Grid,
    granularity: Granularity,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes and the values that they stand for, from one pass over ``x``.

    Args:
        x: Values, any floating dtype, weight ``[out, in]`` or activation ``[..., in]``.
        scale: Stored scale, shaped as the module's table says.
        zero_point: int8, shaped like the scale; ``None`` for a symmetric format.
        grid: The points and their codes.
        granularity: What shares one scale.
        group_size: For group granularity.

    Returns:
        What :func:`quantize` gives, and what :func:`dequantize` makes of it in float32, bit for
        bit.

    Raises:
        NumericsError: ``x`` holds NaN or an infinity.
        FormatError: The shapes do not fit.
    """
    _check_values(x)
    integers = isinstance(grid, IntGrid)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    result = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    unit = (scale, zero_point, granularity, group_size)
    pieces = zip(_pieces(x, codes, *unit), _pieces(x, result, *unit), strict=True)
    for (values, code, step, zero), (_, out, _, _) in pieces:
        real = _round_to_points(values, step, zero, grid)
        grid.write(real, code)
        if integers:
            # As in simulate: integer codes know no negative zero.
            real = real.add_(0.0)
        if zero is not None:
            real = real.sub_(zero)
        torch.mul(real, step, out=out)
    return codes, result


def check_finite(x: Tensor, what: str) -> None:
    """Refuse NaN and infinities; say how many, where the first one is, and how large the rest.

    Args:
        x: Any tensor.
        what: What to call it in the error.

    Raises:
        NumericsError: ``x`` holds a value that is not finite.
    """
    if x.numel() == 0 or not x.is_floating_point() or all_finite(x):
        return
    bad = (~torch.isfinite(x)).nonzero()
    first = tuple(int(i) for i in bad[0])
    raise NumericsError(
        f"{what} holds {finiteness(x)}; the first is {float(x[first])} at index {list(first)}",
        remedy="check the checkpoint and the calibration data, or compute in a wider dtype",
    )


def finiteness(x: Tensor) -> str:
    """The values that are not finite, counted, and the extremes of those that are, for an error.

    Args:
        x: Any shape, any floating dtype.

    Returns:
        E.g. ``2 NaN and 1 infinite of 4096 values, the finite ones from -3.1 to 2.7``.
    """
    finite = x[torch.isfinite(x)]
    said = _counted(x)
    if not finite.numel():
        return said
    return f"{said}, the finite ones from {float(finite.min()):.4g} to {float(finite.max()):.4g}"


def nonfinite(x: Tensor) -> str:
    """The values of a tensor of any dtype that are not finite, counted.

    Returns:
        E.g. ``2 NaN and 1 infinite of 4096 values``; empty where all are finite, as integers are.
    """
    if not x.is_floating_point():
        return ""
    # Of single bytes there is no arithmetic, and bfloat16 holds them all.
    values = x.to(torch.bfloat16) if x.itemsize == 1 else x
    return "" if all_finite(values) else _counted(values)


def _counted(x: Tensor) -> str:
    nans, infinite = int(torch.isnan(x).sum()), int(torch.isinf(x).sum())
    return f"{nans} NaN and {infinite} infinite of {x.numel()} values"


def all_finite(x: Tensor) -> bool:
    """Whether all values are finite, read once as a rule, and without a mask of the tensor's size.

    Args:
        x: Any shape, any floating dtype.
    """
    # A sum tells at once, unless it overflows by itself.
    if x.numel() == 0 or math.isfinite(float(x.sum())):
        return True
    low, high = torch.aminmax(x)
    return math.isfinite(float(low)) and math.isfinite(float(high))


def _check_values(x: Tensor) -> None:
    if not x.is_floating_point():
        raise FormatError(f"only floating-point values can be quantized, not {x.dtype}")
    check_finite(x, "the tensor to quantize")


def _round_to_points(values: Tensor, step: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """Points of the grid as float32; ``values`` is left as it is."""
    points = values.to(torch.float32) / step
    if zero is not None:
        points = points.add_(zero)
        grid = integer_grid(grid)
    return grid.round_(points)


def _pieces(
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
