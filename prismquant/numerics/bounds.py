"""Bounds on the losses of many scales at once, so that few of them need be weighed exactly.

A value ``w`` of a unit whose width is ``W`` lies at ``t = (w / W) * (W / s)`` on the grid of a
trial whose scale is ``s``. For a ladder of factors on the extremes, ``W / s`` is the same in every
unit but for the rounding of the stored scale. So its loss ``|t - point|^p`` is a function of the
trial and of ``w / W`` alone: one table, with a row for every bin of ``w / W`` and a column for
every trial, serves all units, and the loss of a unit is a weighted sum of rows, of all trials
together, which an embedding bag computes at the speed of memory.

In each bin the table holds the tangent of the loss (so that the place within the bin, and how far
a stored scale is from the ladder, count to first order) and a bound on what it misses. Hence the
invariant: the loss, as float32 arithmetic computes it, lies between the two sums. A trial whose
lower bound is above another's upper bound cannot be the best; what is left is weighed exactly.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from prismquant.numerics.grids import IntGrid

if TYPE_CHECKING:
    from collections.abc import Callable

    from prismquant.numerics.grids import Grid

# Bins to the distance of neighbouring integers where the range is the whole one; and at most.
_BINS_A_STEP = 128
_MOST_BINS = 4096
# Tables that are kept; of integers of 4 bits, all of a search are some 12 MB.
_KEPT = 64
# Values of one call. Calls cost more than the cache that larger ones leave.
_CHUNK = 1 << 18
# Rows of tables are whole vectors of any processor.
_VECTOR = 8
# What float32 arithmetic may add to a quotient, to a power and to a sum, relatively.
_QUOTIENT, _POWER, _SUM = 4e-7, 2e-5, 1.2e-7
# Losses below have lost digits to underflow; of widths below, and above the reciprocal, products
# with the number of bins might leave float32.
_TINY, _NARROWEST = 1e-36, 1e-30


def bins_of(grid: Grid) -> int:
    """How many bins the tables of a grid have, for ``w / W`` from -1 to 1."""
    levels = grid.levels if isinstance(grid, IntGrid) else 1 << grid.bits
    return min(_MOST_BINS, _BINS_A_STEP * levels)


def points_of(grid: Grid, zero: int = 0) -> Tensor:
    """All points of a grid, ascending, float64, moved down by the zero point."""
    if isinstance(grid, IntGrid):
        return torch.arange(grid.qmin - zero, grid.qmax - zero + 1, dtype=torch.float64)
    codes = torch.arange(1 << grid.bits, dtype=torch.int32)
    values = grid.read((codes - ((codes >> 7) << 8)).to(torch.int8)).to(torch.float64)
    distinct: Tensor = values[values.isfinite()].unique()
    return distinct


@dataclass(frozen=True)
class LossTable:
    """Of every bin and trial the tangent of the loss, and what it may miss.

    Attributes:
        ratios: float32 ``[trials]``, ``W / s``.
        rows: float32 ``[bins, 3 * columns]``: the loss at the middle of the bin, its derivative by
            the logarithm of ``W / s``, and the bound on the error; columns are the trials, and
            zeros up to whole vectors.
        slopes: float32 ``[bins, columns]``: the derivative by ``w / W``.
    """

    ratios: Tensor
    rows: Tensor
    slopes: Tensor


@functools.lru_cache(maxsize=_KEPT)
def loss_table(
    grid: Grid,
    zero: int,
    factors: tuple[float, ...],
    bins: int,
    norm: float,
    tolerance: float,
    terms: int,
) -> LossTable:
    """Tabulate the losses of trials; the layers of a model share the tables.

    Args:
        grid: The points.
        zero: The zero point, by which the points move down.
        factors: ``W / s`` of every trial; negative for negative scales.
        bins: Number of bins for ``w / W`` from -1 to 1.
        norm: Exponent of the loss, at least 1.
        tolerance: By how much, relatively, ``W / s`` of a unit may differ from ``ratios``.
        terms: How many values a unit has.

    Returns:
        The table.
    """
    points = points_of(grid, zero)
    ratios = torch.tensor(factors, dtype=torch.float64)
    half = 1 / bins + _QUOTIENT
    middle = ((2 * torch.arange(bins, dtype=torch.float64) + 1) / bins - 1).unsqueeze(-1)
    t = middle * ratios
    reach = ratios.abs() * (half + (middle.abs() + half) * (tolerance + _QUOTIENT))
    between = (points[1:] + points[:-1]) / 2
    index = torch.bucketize(t, between)
    nearest = points[index]
    fence = torch.cat([points.new_tensor([-math.inf]), points, points.new_tensor([math.inf])])
    # Within these the loss falls and rises once around the nearest point, and beyond it only falls
    # towards the next one: there the tangent errs most at the ends of the reach, or where the
    # nearest point's own branch, which the loss is never above, would be there.
    smooth = (t - reach >= fence[index]) & (t + reach <= fence[index + 2])
    error = t - nearest
    base = _power(error, norm)
    slope = norm * _power(error, norm - 1) * error.sign() * smooth
    least, most = torch.zeros_like(t), torch.zeros_like(t)
    for end in (reach, -reach):
        tangent = base + slope * end
        there = t + end
        loss = _power(there - points[torch.bucketize(there, between)], norm)
        least = torch.minimum(least, loss - tangent)
        most = torch.maximum(most, _power(error + end, norm) - tangent)
    # Elsewhere: the distance from the nearest point changes no faster than the place.
    least = torch.where(smooth, least, -base)
    most = torch.where(smooth, most, _power(error.abs() + reach, norm) - base)
    steep = slope * ratios
    missed = (most - least) / 2 + steep.abs() * (half * tolerance + 2 * _QUOTIENT)
    missed += (_POWER + _SUM * terms) * (base + slope.abs() * reach + missed)
    rows = [_padded(x) for x in (base + (most + least) / 2, steep * middle, missed)]
    return LossTable(ratios.to(torch.float32), torch.cat(rows, dim=1), _padded(steep))


def _padded(columns: Tensor) -> Tensor:
    """As float32, with columns of zeros up to whole vectors."""
    missing = -columns.shape[1] % _VECTOR
    return functional.pad(columns, (0, missing)).to(torch.float32)


def _power(x: Tensor, norm: float) -> Tensor:
    """``|x|^norm``, through logarithms, which are several times faster than pow."""
    # Zero to the power of zero is to be a number.
    return x.abs().clamp_(min=1e-300).log_().mul_(norm).exp_()


class BinnedUnits:
    """The values of many units, by bin; made once, asked of any ladder.

    Args:
        values: float32 ``[units, values]``.
        width: float32 ``[units]``: no value is larger.
        costs: Importance ``[G, values]`` or ``None``; unit ``n`` has that of row ``n % G``.
        bins: Number of bins.
    """

    def __init__(self, values: Tensor, width: Tensor, costs: Tensor | None, bins: int) -> None:
        self._costs = costs
        self._bins = bins
        self._index = torch.empty(values.shape, dtype=torch.int32)
        # The places within the bins, times the costs.
        self._offset = torch.empty_like(values)
        self._size = values.shape[-1]
        # The losses of others, zero width among them, stay unknown.
        known = (width > _NARROWEST) & (width < 1 / _NARROWEST)
        self._width = width.masked_fill(~known, math.nan)
        inverse = torch.where(known, bins / 2 / width, 0.0)
        for part in torch.arange(len(values)).split(max(1, _CHUNK // self._size)):
            span = slice(int(part[0]), int(part[-1]) + 1)
            place = (values[span] * inverse[span].unsqueeze(-1)).add_(bins / 2)
            index, offset = self._index[span], self._offset[span]
            torch.floor(place, out=offset).clamp_(0, bins - 1)
            index.copy_(offset)
            torch.sub(place, offset, out=offset).sub_(0.5).mul_(2 / bins)
            if costs is not None:
                offset.mul_(costs.index_select(0, part % len(costs)))

    def undecided(
        self,
        scales: Tensor,
        per_step: Tensor,
        classes: Tensor,
        table_of: Callable[[int, int], LossTable | None],
        tolerance: float,
    ) -> Tensor:
        """Find the trials that may be the best of their unit.

        Args:
            scales: float32 ``[units, trials]``; NaN for those that tables do not know.
            per_step: What losses in steps of each scale are multiplied by, ``[units, trials]``.
            classes: int64 ``[units]``: units of a class share a table.
            table_of: The table of a class that has so many units, or ``None``.
            tolerance: That of the tables.

        Returns:
            bool ``[units, trials]``: False where another trial of the unit loses less, for sure. It
            is True where a scale is not that of the table, or there is no table.
        """
        left = torch.ones(scales.shape, dtype=torch.bool)
        order = classes.argsort(stable=True)
        kinds, counts = classes[order].unique_consecutive(return_counts=True)
        for kind, members in zip(kinds.tolist(), order.split(counts.tolist()), strict=True):
            table = table_of(kind, len(members))
            if table is None:
                continue
            for units in members.split(max(1, _CHUNK // self._size)):
                lower, upper = self._bounds(units, scales.index_select(0, units), table, tolerance)
                weights = per_step.index_select(0, units)
                bar = upper.mul_(weights).nan_to_num_(math.inf, math.inf).amin(-1, keepdim=True)
                hopeless = lower.mul_(weights) > bar.mul_(1 + _POWER)
                hopeless &= lower < math.inf
                left.index_copy_(0, units, hopeless.logical_not_())
        return left

    def _bounds(
        self, units: Tensor, scales: Tensor, table: LossTable, tolerance: float
    ) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds on the losses of some units ``[n, trials]``; NaN for unknown."""
        drift = self._width[units].unsqueeze(-1) / scales
        drift.div_(table.ratios).sub_(1)
        drift.masked_fill_(drift.abs() > tolerance, math.nan)
        index = self._index.index_select(0, units).view(-1)
        offset = self._offset.index_select(0, units).view(-1)
        starts = torch.arange(0, len(index), self._size, dtype=torch.int32)
        cost = None
        if self._costs is not None:
            cost = self._costs.index_select(0, units % len(self._costs)).view(-1)
        sums = _bag(index, table.rows, starts, cost).chunk(3, dim=1)
        loss, by_ratio, missed = (x[:, : len(table.ratios)] for x in sums)
        within = _bag(index, table.slopes, starts, offset)[:, : len(table.ratios)]
        loss = torch.addcmul(loss, drift, by_ratio).add_(within)
        missed = missed + _TINY
        return loss - missed, loss.add_(missed)


def _bag(index: Tensor, table: Tensor, starts: Tensor, weights: Tensor | None) -> Tensor:
    """Weighted sums of rows of a table, one for every unit."""
    return functional.embedding_bag(index, table, starts, mode="sum", per_sample_weights=weights)
