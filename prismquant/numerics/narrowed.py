"""The search for scales, narrowed by bounds: the same scales, for a fraction of the work.

The search of :mod:`prismquant.numerics.search` weighs every trial of every unit. Here tables bound
all losses first (:mod:`prismquant.numerics.bounds`), and only trials that the bounds cannot tell
apart are weighed, with the same arithmetic; of equal losses the first wins in both. So what is
chosen is the same, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.numerics.bounds import BinnedUnits, LossTable, bins_of, loss_table
from prismquant.numerics.grids import FloatGrid, IntGrid
from prismquant.numerics.search import pair_losses_in_steps

if TYPE_CHECKING:
    from prismquant.numerics.search import Search

# Tables cost about as much as weighing so many values by brute force.
_LEAST_VALUES = 1 << 18
# An asymmetric grid needs tables for every zero point.
_MOST_SHIFTED_BITS = 4
# Relative spacing of scales beyond which floating-point grids of 6 and 8 bits blur.
_FINE = 2.0**-9
# Zero points and trials share the number of a class.
_SHIFTS = 256
# Zero points from -128 are counted from 0, where there are any.
_ZERO = -128
# A table is not worth making for fewer values to a bin: their trials are weighed sooner.
_LEAST_BY_BIN = 50
# What the factors of a ladder may be off by in float32, and the bounds when multiplied.
_ROUNDING = 2e-6


def narrows(search: Search, weight: Tensor, stride: int) -> bool:
    """Whether :class:`NarrowedSearch` serves a weight, and pays.

    Args:
        search: What is searched.
        weight: Of any shape.
        stride: Of the first look at the ladder.

    Returns:
        False for scales of few bits, other rules than ``mse``, norms below 1 (whose losses are not
        convex around a point), wide asymmetric grids, wide floating-point grids under scales so
        coarse that bounds tell little apart, small weights, and off the CPU.
    """
    grid = search.grid
    shifted = not search.symmetric and grid.bits > _MOST_SHIFTED_BITS
    if search.form.coded:
        return False
    blurred = isinstance(grid, FloatGrid) and grid.bits > 4
    blurred = blurred and torch.finfo(search.form.dtype).eps > _FINE
    return (
        weight.device.type == "cpu"
        and weight.numel() >= _LEAST_VALUES
        and search.rule.kind == "mse"
        and search.rule.norm >= 1
        and stride > 1
        and not shifted
        and not blurred
    )


@dataclass(frozen=True, eq=False)
class _Trials:
    """Scales to compare, each field ``[trials, units]``."""

    factors: Tensor
    scales: Tensor
    zeros: Tensor | None
    per_step: Tensor

    def chosen(self, index: Tensor) -> _Trials:
        """The one of each unit, ``[1, units]``."""
        zeros = None if self.zeros is None else self.zeros.gather(0, index)
        fields = (self.factors, self.scales, self.per_step)
        factors, scales, per_step = (x.gather(0, index) for x in fields)
        return _Trials(factors, scales, zeros, per_step)

    def then(self, other: _Trials) -> _Trials:
        """These and, after them, others."""
        zeros = None
        if self.zeros is not None and other.zeros is not None:
            zeros = torch.cat([self.zeros, other.zeros])
        return _Trials(
            torch.cat([self.factors, other.factors]),
            torch.cat([self.scales, other.scales]),
            zeros,
            torch.cat([self.per_step, other.per_step]),
        )


class NarrowedSearch:
    """A search over units of one size, with the tables that its pieces share.

    Args:
        search: What is searched.
        stride: Look at every so-manieth factor first.
        pieces: In how many pieces of about the same size the units will come.
    """

    def __init__(self, search: Search, stride: int, pieces: int) -> None:
        self._search = search
        self._stride = stride
        self._pieces = pieces
        self._coarse = search.coarse(stride, torch.device("cpu"))
        self._tolerance = torch.finfo(search.form.dtype).eps / 2 + _ROUNDING
        self._tables: dict[tuple[bool, int], LossTable] = {}

    def best(
        self, low: Tensor, high: Tensor, piece: Tensor, importance: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What the search's own ``best`` finds.

        Args:
            low: Lower extremes ``[rows, G]``.
            high: Upper extremes ``[rows, G]``.
            piece: Their values ``[rows, G, values]``.
            importance: ``[G, values]`` or ``None``.

        Returns:
            Stored scale and zero point ``[rows, G]``.
        """
        shape = low.shape
        low, high = low.reshape(-1).to(torch.float32), high.reshape(-1).to(torch.float32)
        values = piece.to(torch.float32).reshape(-1, piece.shape[-1])
        below, above = low.clamp(max=0.0), high.clamp(min=0.0)
        symmetric = self._search.symmetric
        width = torch.maximum(-below, above) if symmetric else above - below
        self._terms = piece.shape[-1]
        units = BinnedUnits(values, width, importance, self._bins)
        trials = self._trials(low, high, self._coarse.unsqueeze(-1).expand(-1, len(low)))
        shift = _shift(trials)
        first = self._pick(units, values, importance, trials, shift, shift, fine=False)
        found = trials.chosen(first)
        around = self._search.around(found.factors[0], self._stride)
        trials = found.then(self._trials(low, high, around))
        kinds = first[0] * _SHIFTS + shift
        last = self._pick(units, values, importance, trials, kinds, shift, fine=True)
        found = trials.chosen(last)
        zero = None if found.zeros is None else found.zeros.view(shape)
        return found.scales.view(shape), zero

    @property
    def _bins(self) -> int:
        # Half of the bins lie outside the range of an asymmetric unit.
        return bins_of(self._search.grid) * (1 if self._search.symmetric else 2)

    def _trials(self, low: Tensor, high: Tensor, factors: Tensor) -> _Trials:
        scales, zeros = self._search.scales(low, high, factors)
        unit, _ = self._search.scales(low, high, torch.ones(()))
        return _Trials(factors, scales, zeros, self._search.per_step(scales, unit))

    def _pick(
        self,
        units: BinnedUnits,
        values: Tensor,
        importance: Tensor | None,
        trials: _Trials,
        kinds: Tensor,
        shift: Tensor,
        *,
        fine: bool,
    ) -> Tensor:
        """Which trial is the best of each unit, the first of equals, ``[1, units]``."""
        steps = trials.scales.T.to(torch.float32, memory_format=torch.contiguous_format)
        if trials.zeros is not None:
            # Tables know one zero point; trials that have another are weighed.
            other = trials.zeros != shift + _ZERO
            steps = steps.masked_fill(other.T, torch.nan)
        per_step = trials.per_step.T.contiguous()
        table_of = partial(self._table, fine)
        left = units.undecided(steps, per_step, kinds, table_of, self._tolerance)
        left &= ~_repeats(trials)
        best = left.view(torch.uint8).argmax(-1)
        contested = (left.sum(-1) > 1).nonzero().squeeze(-1)
        row, trial = left.index_select(0, contested).nonzero(as_tuple=True)
        unit = contested[row]
        zeros = None if trials.zeros is None else trials.zeros[trial, unit]
        scales = trials.scales[trial, unit]
        exact = pair_losses_in_steps(values, unit, scales, zeros, self._search, importance)
        exact *= per_step[unit, trial]
        losses = per_step.new_full((len(contested), len(trials.scales)), torch.inf)
        losses[row, trial] = exact.nan_to_num_(torch.inf, torch.inf)
        best[contested] = losses.argmin(-1)
        return best.unsqueeze(0)

    def _table(self, fine: bool, kind: int, count: int) -> LossTable | None:
        """The table of a class, made when it is first asked for.

        There is none where too few units of a piece, ``count``, belong to the class.
        """
        share = count * self._terms * self._pieces
        if (fine, kind) not in self._tables:
            if share < _LEAST_BY_BIN * self._bins:
                return None
            self._tables[fine, kind] = self._made(fine, kind)
        return self._tables[fine, kind]

    def _made(self, fine: bool, kind: int) -> LossTable:
        search = self._search
        grid = search.grid
        index, shift = divmod(kind, _SHIFTS) if fine else (0, kind)
        factors = self._coarse
        if fine:
            factor = self._coarse[index : index + 1]
            factors = torch.cat([factor, search.around(factor[0], self._stride)])
        span = grid.span
        if not search.symmetric and isinstance(grid, IntGrid):
            span = grid.levels - 1
        ratios = tuple((span / factors.to(torch.float64)).tolist())
        more = (self._bins, search.rule.norm, self._tolerance, self._terms)
        return loss_table(grid, shift + _ZERO, ratios, *more)


def _repeats(trials: _Trials) -> Tensor:
    """Which trials have the scale and zero point of the first one or of their neighbour before.

    The earlier one wins the tie, so that they need no look. Bool ``[units, trials]``.
    """
    repeats = torch.zeros(trials.scales.shape, dtype=torch.bool)
    for earlier in (slice(0, 1), slice(0, -1)):
        same = trials.scales[1:] == trials.scales[earlier]
        if trials.zeros is not None:
            same &= trials.zeros[1:] == trials.zeros[earlier]
        repeats[1:] |= same
    return repeats.T


def _shift(trials: _Trials) -> Tensor:
    """Of each unit the number of its zero point, that of the min-max range, int64 ``[units]``."""
    if trials.zeros is None:
        return torch.full(trials.scales.shape[1:], -_ZERO)
    return trials.zeros[0].to(torch.int64) - _ZERO
