"""The kernel of :mod:`prismquant.kernels.sweep`, in Triton's language.

A program has a warp, and each thread of it a row with all columns of the block, so that nothing is
passed between threads. Everything is rounded as torch rounds it: the division to nearest (that of
the language may be off by two units in the last place), and no multiplication is fused with an
addition behind its back, which the launch forbids; where the kernel fuses, it says so.

Only :mod:`prismquant.kernels.sweep` imports this file, which needs the package ``triton``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

    from prismquant.kernels.rounding import Rounding, ScaleLines

# Of a float32: the exponent's bits, and the sign.
_EXPONENT = tl.constexpr(0x7F80_0000)
_SIGN = tl.constexpr(-(2**31))
# What the compiler is told beside the constants.
OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}


def launch(
    targets: Tensor,
    weights: Tensor,
    coefficients: Tensor,
    scales: ScaleLines,
    rounding: Rounding,
    errors: Tensor,
    points: Tensor,
    block: int,
    tile: int,
) -> None:
    """Run the kernel; arguments are those of :func:`prismquant.kernels.sweep.round_columns`.

    Args:
        targets: ``[b, r]``, completed in place.
        weights: ``[b, r]``.
        coefficients: ``[b, b]``.
        scales: Of the ``b`` columns.
        rounding: To the grid.
        errors: ``[b, r]``, filled.
        points: ``[b, r]``, filled.
        block: Columns that a program has registers for, a power of two, at least ``b``.
        tile: Rows of a program, as many as a warp has threads.
    """
    columns, rows = targets.shape
    round_columns_kernel[(triton.cdiv(rows, tile),)](
        targets,
        weights,
        coefficients,
        scales.steps,
        scales.zeros,
        scales.lines,
        errors,
        points,
        columns,
        rows,
        targets.stride(0),
        weights.stride(0),
        coefficients.stride(0),
        scales.steps.stride(0),
        0 if scales.zeros is None else scales.zeros.stride(0),
        errors.stride(0),
        points.stride(0),
        LOWEST=rounding.lowest,
        HIGHEST=rounding.highest,
        SHIFT=rounding.shift,
        SMALLEST=rounding.smallest,
        BLOCK=block,
        TILE=tile,
        **OPTIONS,
    )


@triton.jit
def _rounded(x, SHIFT: tl.constexpr, SMALLEST: tl.constexpr):
    """The nearest points to values between the outermost ones."""
    if SMALLEST == 0:
        return (x + SHIFT) - SHIFT
    bits = x.to(tl.int32, bitcast=True)
    power = (bits & _EXPONENT).to(tl.float32, bitcast=True)
    shift = tl.maximum(power, SMALLEST) * SHIFT
    # The shift leaves no sign to a zero, but floating-point codes have one.
    point = ((x + shift) - shift).to(tl.int32, bitcast=True)
    return ((point & ~_SIGN) | (bits & _SIGN)).to(tl.float32, bitcast=True)


@triton.jit
def round_columns_kernel(
    targets,
    weights,
    coefficients,
    steps,
    zeros,
    lines,
    errors,
    points,
    columns,
    rows,
    target_line,
    weight_line,
    coefficient_line,
    step_line,
    zero_line,
    error_line,
    point_line,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    SHIFT: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Round the columns of ``TILE`` rows; ``*_line`` is what lies between two lines of a matrix."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < rows
    column = tl.arange(0, BLOCK)
    pending = tl.load(
        targets + column[:, None] * target_line + row[None, :],
        mask=(column < columns)[:, None] & inside[None, :],
        other=0.0,
    )
    for k in range(columns):
        # Registers cannot be picked by a running number: all columns but one are hidden, and their
        # bits added up, which keeps even the sign of a zero.
        shown = tl.where(column[:, None] == k, pending.to(tl.int32, bitcast=True), 0)
        target = tl.sum(shown, axis=0).to(tl.float32, bitcast=True)
        tl.store(targets + k * target_line + row, target, mask=inside)
        line = tl.load(lines + k)
        step = tl.load(steps + line * step_line + row, mask=inside, other=1.0)
        scaled = tl.div_rn(target, step)
        if zeros is not None:
            zero = tl.load(zeros + line * zero_line + row, mask=inside, other=0.0)
            scaled = scaled + zero
        point = _rounded(tl.minimum(tl.maximum(scaled, LOWEST), HIGHEST), SHIFT, SMALLEST)
        tl.store(points + k * point_line + row, point, mask=inside)
        if zeros is not None:
            point = point - zero
        error = tl.load(weights + k * weight_line + row, mask=inside, other=0.0) - point * step
        tl.store(errors + k * error_line + row, error, mask=inside)
        below = (column > k) & (column < columns)
        pull = tl.load(coefficients + column * coefficient_line + k, mask=below, other=0.0)
        pending = tl.fma(pull[:, None], error[None, :], pending)
