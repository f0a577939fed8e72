"""Values that kernels take which round columns: grids, scales, and where losses are added up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from prismquant.numerics.grids import IntGrid

if TYPE_CHECKING:
    from prismquant.numerics.grids import Grid

Kernel = Literal["torch", "triton", "numba"]
# What a column is rounded to: the point nearest to its target, at which the columns before it
# pull, or all others, of which those behind still have the errors of an earlier pass; or the one
# nearest to its weight, where the target of the first kind only shows what that costs.
Aim = Literal["before", "others", "nearest"]

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
        """The scales of some of the columns."""
        return ScaleLines(self.steps, self.zeros, self.lines[columns])


@dataclass(frozen=True, eq=False)
class LossAccumulator:
    """Sums of squares, row by row, as columns are rounded.

    Attributes:
        costs: float32 ``[3, columns]``: of the distance between a target and its value, and, twice,
            of an error.
        sums: float64 ``[3, r]``, added to: each square times its cost, less that of the value that
            is replaced where columns are rounded again.
    """

    costs: Tensor
    sums: Tensor

    def of(self, columns: slice) -> LossAccumulator:
        """The accumulator of some of the columns."""
        return LossAccumulator(self.costs[:, columns], self.sums)

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
        """The rounding to any grid."""
        if isinstance(grid, IntGrid):
            ends = float(grid.qmin), float(grid.qmax)
            return Rounding(*ends, 1.5 * 2.0**_MANTISSA, 0.0, 0, grid.bits - 1)
        shift = 1.5 * 2.0 ** (_MANTISSA - grid.mantissa)
        ends, own = (-grid.largest, grid.largest), (grid.mantissa, grid.bits - 1)
        return Rounding(*ends, shift, grid.smallest_normal, *own)


def _weigh(costs: Tensor, values: Tensor) -> Tensor:
    """Squares ``[b, r]`` times costs of their lines ``[.., b]``, summed: float64 ``[.., r]``."""
    return costs.to(torch.float64) @ values.square().to(torch.float64)
