"""The affine map between real values and codes.

    point = round_half_even(clamp(x / scale + zero_point, qmin, qmax))
    value = (point - zero_point) * scale

A point lies on a grid of :mod:`prismquant.numerics.grids`: an integer is its own code, a small
floating-point number (which has no zero point) is coded as its bit pattern.

Two invariants hold everywhere. A scale is rounded to what will be stored *before* codes are chosen
(:mod:`prismquant.numerics.scales`), so what is simulated is what is stored. And all arithmetic is
float32 on the stored scale, so :func:`simulate` equals :func:`dequantize` of :func:`quantize` bit
for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.errors import FormatError
from prismquant.numerics.finite import all_finite, check_finite
from prismquant.numerics.grids import IntGrid, integer_grid
from prismquant.numerics.grouping import pieces, to_groups
from prismquant.numerics.kinds import Granularity, check_group_size
from prismquant.numerics.scales import AnyScale, as_scale_format

if TYPE_CHECKING:
    from prismquant.numerics.grids import Grid


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
        Scale and zero point, shaped as :mod:`prismquant.numerics.grouping` says. An empty unit has
        scale 1.

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
        scale: Stored scale, shaped as :mod:`prismquant.numerics.grouping` says.
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
    for values, out, step, zero in pieces(x, codes, scale, zero_point, granularity, group_size):
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
        scale: Stored scale, shaped as :mod:`prismquant.numerics.grouping` says.
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
    for values, out, step, zero in pieces(
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
        scale: Stored scale, shaped as :mod:`prismquant.numerics.grouping` says.
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
    for values, out, step, zero in pieces(x, result, scale, zero_point, granularity, group_size):
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
        scale: Stored scale, shaped as :mod:`prismquant.numerics.grouping` says.
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
    parts = zip(pieces(x, codes, *unit), pieces(x, result, *unit), strict=True)
    for (values, code, step, zero), (_, out, _, _) in parts:
        real = _round_to_points(values, step, zero, grid)
        grid.write(real, code)
        if integers:
            # As in simulate: integer codes know no negative zero.
            real = real.add_(0.0)
        if zero is not None:
            real = real.sub_(zero)
        torch.mul(real, step, out=out)
    return codes, result


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
