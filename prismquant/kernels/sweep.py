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
import itertools
import subprocess
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prismquant.errors import FormatError
from prismquant.numerics.grids import Grid, IntGrid

Kernel = Literal["torch", "triton", "numba"]
# What a column is rounded to: the point nearest to its target, at which the columns before it pull,
# or all others, of which those behind still have the errors of an earlier pass; or the one nearest
# to its weight, where the target of the first kind only shows what that costs.
Aim = Literal["before", "others", "nearest"]

# Columns that a kernel holds, and of how many rows one of a GPU.
MOST_COLUMNS = 128
TILE_ROWS = 32
# Columns that torch rounds between two products.
INNER = 16
# Offsets inside a block are 32 bits wide.
_MOST_ROWS = 2**31 // MOST_COLUMNS - 1
# The first GPU generation that the compiler is kept working for.
_CAPABILITY = (8, 0)
# Digits of a float32 behind the leading one.
_MANTISSA = 23


@dataclass(frozen=True, eq=False)
class ScaleLines:
    """Scales of ``r`` rows, and which of them each column uses.

    Attributes:
        steps: float32 ``[G, r]``, rows next to one another.
        zeros: Zero points, likewise, or ``None``.
        lines: Which of the ``G`` lines each column uses, int64 ``[columns]``.
    """

    steps: Tensor
    zeros: Tensor | None
    lines: Tensor

    def of(self, columns: slice) -> ScaleLines:
        """Those of some of the columns."""
        return ScaleLines(self.steps, self.zeros, self.lines[columns])


@dataclass(frozen=True, eq=False)
class Tally:
    """What squares come to, row by row, as columns are rounded.

    Attributes:
        costs: float32 ``[3, columns]``: of the distance between a target and its value, and, twice,
            of an error.
        sums: float64 ``[3, r]``, added to: each square times its cost, less that of the value that
            is replaced where columns are rounded again.
    """

    costs: Tensor
    sums: Tensor

    def of(self, columns: slice) -> Tally:
        """That of some of the columns."""
        return Tally(self.costs[:, columns], self.sums)

    def add(self, pulls: Tensor, errors: Tensor, former: Tensor | None) -> None:
        """Count columns that were rounded.

        Args:
            pulls: Between weights and targets, ``[b, r]``; spoilt.
            errors: ``[b, r]``.
            former: Those of the values that were replaced, if they count; spoilt.
        """
        if former is not None:
            self.sums[1:] -= _weigh(self.costs[1:], former)
            self.sums[0] -= _weigh(self.costs[0], former.add_(pulls))
        self.sums[1:] += _weigh(self.costs[1:], errors)
        self.sums[0] += _weigh(self.costs[0], pulls.add_(errors))


@dataclass(frozen=True)
class Rounding:
    """A grid as the kernel knows it: rounding is adding a number, and taking it away again.

    Adding 1.5 * 2^23 times the grid's spacing leaves float32 no digit below that spacing, and so
    rounds half to even. All integers have one spacing; that of floating-point grids is a fraction
    of the power of two at or below the value, and stays the same below the smallest normal number.

    Attributes:
        lowest: The lowest point.
        highest: The highest point.
        shift: What is added, of floating-point grids at a value of 1.
        smallest: The smallest normal number of a floating-point grid; 0 of integers.
        mantissa: Bits of its mantissa that codes hold; 0 of integers.
        sign: Which bit of a code is the sign.
    """

    lowest: float
    highest: float
    shift: float
    smallest: float
    mantissa: int
    sign: int

    @staticmethod
    def of(grid: Grid) -> Rounding:
        """That of any grid."""
        if isinstance(grid, IntGrid):
            ends = float(grid.qmin), float(grid.qmax)
            return Rounding(*ends, 1.5 * 2.0**_MANTISSA, 0.0, 0, grid.bits - 1)
        shift = 1.5 * 2.0 ** (_MANTISSA - grid.mantissa)
        ends, own = (-grid.largest, grid.largest), (grid.mantissa, grid.bits - 1)
        return Rounding(*ends, shift, grid.smallest_normal, *own)


def kernel_for(device: torch.device, grid: Grid) -> Kernel:
    """The kernel that rounds columns fastest.

    Args:
        device: Where the columns lie.
        grid: What they are rounded to.

    Returns:
        The first that :func:`supports` says works, or ``torch``.
    """
    kernels: tuple[Kernel, ...] = ("triton", "numba")
    return next((one for one in kernels if supports(one, device, grid)), "torch")


def supports(kernel: Kernel, device: torch.device, grid: Grid) -> bool:
    """Whether a kernel works here: tries it on one number.

    Triton needs, beside its package and an NVIDIA GPU of the generation of 2020 or later, a C
    compiler at run time, which small images lack; numba may not know the processor, or be of
    another version than what it needs. A trial finds out.

    Args:
        kernel: Which.
        device: Where the columns lie.
        grid: What they are rounded to.

    Returns:
        Whether it does.
    """
    if kernel == "torch":
        return True
    if device.type != ("cuda" if kernel == "triton" else "cpu"):
        return False
    if kernel == "triton" and not _new_enough(device):
        return False
    one = torch.ones(1, 1, device=device)
    scales = ScaleLines(one, None, torch.zeros(1, dtype=torch.int64, device=device))
    own = one.clone()
    try:
        round_columns(kernel, own, one, one, scales, grid, errors=one.clone(), points=one.clone())
    except (ImportError, OSError, RuntimeError, AttributeError, subprocess.SubprocessError):
        return False
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
    tally: Tally | None = None,
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
        tally: To be added to.

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
            None if tally is None else tally.of(columns),
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
    tally: Tally | None,
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

        counted = tally if former is None else None
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
    if tally is not None:
        tally.add(targets - weights, errors, former)


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


def _weigh(costs: Tensor, values: Tensor) -> Tensor:
    """Squares ``[b, r]`` times costs of their lines ``[.., b]``, summed: float64 ``[.., r]``."""
    return costs.to(torch.float64) @ values.square().to(torch.float64)


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device of the process."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
