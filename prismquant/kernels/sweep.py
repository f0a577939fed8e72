"""A block of GPTQ's columns: rounded one by one, each answering for the others.

In torch this takes some four operations a column, :data:`INNER` columns between two products. Where
a compiler is at hand, one kernel does it for the whole block: on GPUs a program holds the targets
of all columns of its rows in registers, takes the first, rounds it, and lets its error pull at the
rest (``triton``); on CPUs the targets of one column are summed up in registers, from errors that
lie in the innermost cache (``numba``). The arithmetic is torch's, operation by operation, in
float32 and rounded alike, except that pulls of columns are added one after the other, each fused
with its multiplication, and not by matrix products. Codes differ only where that last bit decides.

The kernels need the package ``triton`` (the extra ``gpu``) or ``numba``. Nothing is imported before
a device asks for it, and what is missing or does not work leaves the columns to torch.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import subprocess
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.errors import FormatError
from prismquant.kernels.dispatch import allows, compiled_loops
from prismquant.kernels.rounding import Aim, Kernel, LossAccumulator, Rounding, ScaleLines
from prismquant.numerics.grids import IntGrid

if TYPE_CHECKING:
    from prismquant.numerics.grids import Grid

# Columns that a kernel holds, and of how many rows one of a GPU.
MOST_COLUMNS = 128
TILE_ROWS = 32
# Columns that torch rounds between two products.
INNER = 16
# Offsets inside a block are 32 bits wide.
_MOST_ROWS = 2**31 // MOST_COLUMNS - 1
# The first GPU generation that the compiler is kept working for.
_CAPABILITY = (8, 0)


def kernel_for(device: torch.device) -> Kernel:
    """The kernel that rounds columns fastest on a device.

    Args:
        device: Where the columns lie.

    Returns:
        The first that :func:`supports` says works, or ``torch``.
    """
    kernels: tuple[Kernel, ...] = ("triton", "numba")
    return next((one for one in kernels if supports(one, device)), "torch")


def supports(kernel: Kernel, device: torch.device) -> bool:
    """Whether a kernel works on a device, and no other is asked for.

    Args:
        kernel: Its name.
        device: Where the columns lie.
    """
    if kernel == "torch":
        return True
    if device.type != ("cuda" if kernel == "triton" else "cpu"):
        return False
    if kernel == "triton":
        return allows(kernel) and _triton_works(device)
    return compiled_loops("cpu_sweep") is not None


@functools.cache
def _triton_works(device: torch.device) -> bool:
    """Whether Triton rounds a number on a device; a process finds it out once.

    It needs, beside its package and an NVIDIA GPU of the generation of 2020 or later, a C compiler
    at run time, which small images lack.
    """
    try:
        return _new_enough(device) and _tried(device)
    except (ImportError, OSError, RuntimeError, AttributeError, subprocess.SubprocessError):
        return False


def _tried(device: torch.device) -> bool:
    """True, once one number was rounded by Triton; else its error."""
    one = torch.ones(1, 1, device=device)
    scales = ScaleLines(one, None, torch.zeros(1, dtype=torch.int64, device=device))
    given = (one.clone(), one, one, scales, IntGrid(4))
    round_columns("triton", *given, errors=one.clone(), points=one.clone())
    return True


def _new_enough(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= _CAPABILITY


def round_columns(
    kernel: Kernel,
    targets: Tensor,
    weights: Tensor,
    coefficients: Tensor,
    scales: ScaleLines,
    grid: Grid,
    *,
    errors: Tensor,
    points: Tensor,
    aim: Aim = "before",
    accumulator: LossAccumulator | None = None,
) -> None:
    """Round ``b`` columns one by one: column k from ``t_k + sum over j of c_kj e_j``.

    The sum is over the columns before k, or all others. All matrices are float32 with rows of the
    weight next to one another in memory. Source of the recurrence: Frantar et al., arXiv
    2210.17323, in the left-looking form of ``prismquant/algorithms/gptq/reference.py``.

    Args:
        kernel: One that :func:`supports`.
        targets: ``t``, ``[b, r]``; replaced by those sums.
        weights: ``[b, r]``.
        coefficients: ``c``, ``[b, b]``; read where columns pull.
        scales: Of these columns.
        grid: What to round to.
        errors: ``[b, r]``, to be filled with ``e = w - q``.
        points: ``[b, r]``, to be filled with what ``grid`` rounds to; or int8, for the codes.
        aim: What they are rounded to.
        accumulator: To be added to.

    Raises:
        FormatError: There are too many rows for a kernel, or it meets a line that is not
            contiguous.
        ImportError: The kernel's package is missing.
    """
    found = points
    if points.dtype == torch.int8 and not (kernel == "numba" and isinstance(grid, IntGrid)):
        found = torch.empty_like(targets)
    for columns in _inner(len(targets), INNER if kernel == "torch" else MOST_COLUMNS):
        outside = [slice(0, columns.start)]
        if aim == "others":
            outside.append(slice(columns.stop, len(targets)))
        for others in outside:
            if others.start < others.stop:
                targets[columns].addmm_(coefficients[columns, others], errors[others])
        _round_together(
            kernel,
            targets[columns],
            weights[columns],
            coefficients[columns, columns],
            scales.of(columns),
            grid,
            errors[columns],
            found[columns],
            aim,
            None if accumulator is None else accumulator.of(columns),
        )
    if found is not points:
        grid.write(found, points)


def _inner(count: int, size: int) -> list[slice]:
    ends = [*range(0, count, size), count]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def _round_together(
    kernel: Kernel,
    targets: Tensor,
    weights: Tensor,
    coefficients: Tensor,
    scales: ScaleLines,
    grid: Grid,
    errors: Tensor,
    points: Tensor,
    aim: Aim,
    accumulator: LossAccumulator | None,
) -> None:
    """Round as many columns as a kernel holds."""
    if kernel != "torch":
        matrices = (targets, weights, coefficients, scales.steps, scales.zeros, errors, points)
        _check(targets, matrices)
    former = None
    if aim == "others":
        former = errors.clone()
        targets.addmm_(coefficients.triu(1), former)
    if kernel == "numba":
        from prismquant.kernels import cpu_sweep

        counted = accumulator if former is None else None
        rounding, nearest = Rounding.of(grid), aim == "nearest"
        cpu_sweep.launch(
            targets, weights, coefficients, scales, rounding, errors, points, nearest, counted
        )
        if counted is not None:
            return
    elif aim == "nearest":
        round_alone(weights, scales, grid, errors=errors, points=points)
        targets.addmm_(coefficients.tril(-1), errors)
    elif kernel == "triton":
        from prismquant.kernels import triton_sweep

        with _current(targets.device):
            triton_sweep.launch(
                targets,
                weights,
                coefficients,
                scales,
                Rounding.of(grid),
                errors,
                points,
                block=MOST_COLUMNS,
                tile=TILE_ROWS,
            )
    else:
        _round_in_torch(targets, weights, coefficients, scales, grid, errors, points)
    if accumulator is not None:
        accumulator.add(targets - weights, errors, former)


def _round_in_torch(
    targets: Tensor,
    weights: Tensor,
    coefficients: Tensor,
    scales: ScaleLines,
    grid: Grid,
    errors: Tensor,
    points: Tensor,
) -> None:
    """The reference."""
    unbound = (part.unbind() for part in (targets, weights, errors, points))
    lines = scales.lines.tolist()
    for i, (target, weight, error, point, line) in enumerate(zip(*unbound, lines, strict=True)):
        if i:
            target.addmv_(errors[:i].T, coefficients[i, :i])
        step = scales.steps[line]
        torch.div(target, step, out=point)
        if scales.zeros is None:
            torch.addcmul(weight, grid.round_(point), step, value=-1, out=error)
            continue
        zero = scales.zeros[line]
        grid.round_(point.add_(zero))
        torch.addcmul(weight, point - zero, step, value=-1, out=error)


def round_alone(
    weights: Tensor, scales: ScaleLines, grid: Grid, *, errors: Tensor, points: Tensor
) -> None:
    """Round weights to nearest, in torch.

    Args:
        weights: float32 ``[b, r]``.
        scales: Of the columns.
        grid: What to round to.
        errors: ``[b, r]``, to be filled.
        points: ``[b, r]``, to be filled with what ``grid`` rounds to.
    """
    steps = scales.steps[scales.lines]
    torch.div(weights, steps, out=points)
    if scales.zeros is None:
        torch.addcmul(weights, grid.round_(points), steps, value=-1, out=errors)
        return
    zeros = scales.zeros[scales.lines]
    grid.round_(points.add_(zeros))
    torch.addcmul(weights, points - zeros, steps, value=-1, out=errors)


def _check(targets: Tensor, matrices: tuple[Tensor | None, ...]) -> None:
    """Whether a kernel can address its matrices."""
    given = [m for m in matrices if m is not None]
    if targets.shape[1] > _MOST_ROWS:
        raise FormatError(
            f"the sweep kernel takes columns of {_MOST_ROWS} rows, not {targets.shape[1]}"
        )
    if any(m.shape[1] > 1 and m.stride(1) != 1 for m in given):
        raise FormatError(
            f"the sweep kernel reads contiguous lines, not strides {[m.stride() for m in given]}"
        )


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device of the process."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
