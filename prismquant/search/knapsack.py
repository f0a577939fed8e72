"""The multiple-choice knapsack: one option for every item, within limits, at the least cost.

It is solved by HiGHS through :func:`scipy.optimize.milp`, to a gap of zero where that is proved
within the number of nodes allowed. HiGHS computes with tolerances; here nothing is taken on trust:
whatever it returns is added up again in exact arithmetic, and an answer that is over a limit by a
hair is forbidden and the problem solved again. So no answer is ever outside of its limits.

HiGHS's tolerances are absolute, 1e-6: so costs and amounts are first counted from the least of
their item and scaled, and bounds of whole amounts are laid between two possible sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, vstack

from prismquant.errors import NumericsError
from prismquant.search.c_output import c_output_dropped

Table = tuple[tuple[int | float, ...], ...]
"""A number of every option of every item."""

MAX_NODES = 20_000
"""Nodes of the search tree after which the best answer is taken, with the gap that is left."""

# Costs are scaled to this: HiGHS stops at an absolute gap of 1e-6.
_COST_SCALE = 1e6
_AMOUNT_SCALE = 1e3
# Larger than any sum of amounts in that scale, and smaller than what HiGHS takes for infinity.
_BEYOND = Fraction(10**15)
# Answers that are over a limit by less than HiGHS's tolerance, and are forbidden one by one; if
# there are more, the limit is drawn tighter, and the gap tells what that may cost.
_MOST_FORBIDDEN = 20
_MOST_ROUNDS = 60
# A status of scipy.optimize.milp.
_INFEASIBLE = 2


@dataclass(frozen=True)
class Limit:
    """Bounds of a sum over the chosen options.

    Attributes:
        name: What errors call it.
        amounts: Amount of each option of each item.
        most: The sum is at most this; None: there is no upper bound.
        least: The sum is at least this; None: there is no lower bound.
    """

    name: str
    amounts: Table
    most: int | float | Fraction | None = None
    least: int | float | Fraction | None = None

    def total(self, chosen: Sequence[int]) -> Fraction:
        """Exact sum of the amounts of an answer."""
        return total(self.amounts, chosen)

    def holds(self, chosen: Sequence[int]) -> bool:
        """Whether an answer is within the bounds, exactly."""
        return self.excess(chosen) == 0

    def excess(self, chosen: Sequence[int]) -> Fraction:
        """Distance of an answer from the bounds; 0 within."""
        sum_ = self.total(chosen)
        over = sum_ - Fraction(self.most) if self.most is not None else Fraction(0)
        under = Fraction(self.least) - sum_ if self.least is not None else Fraction(0)
        return max(over, under, Fraction(0))


@dataclass(frozen=True)
class Solved:
    """Answer to a knapsack.

    Attributes:
        chosen: Index of the option of each item.
        cost: Sum of its costs.
        gap: What is proved of it: no answer within the limits costs less by more than this.
    """

    chosen: tuple[int, ...]
    cost: float
    gap: float


def total(table: Table, chosen: Sequence[int]) -> Fraction:
    """Exact sum of one number of each row."""
    return sum((Fraction(row[at]) for row, at in zip(table, chosen, strict=True)), Fraction(0))


def solve(costs: Table, limits: Sequence[Limit], *, max_nodes: int = MAX_NODES) -> Solved | None:
    """Choose one option for every item.

    Args:
        costs: Of each option of each item; negative ones are costs like others. All are finite.
        limits: What the answer must keep to.
        max_nodes: Nodes of the search tree after which the best answer so far is taken.

    Returns:
        An answer within all limits; the same for the same input. None: there is none.

    Raises:
        NumericsError: HiGHS gave up.
    """
    kept = _undominated(costs, limits)
    small = _kept(costs, kept)
    own = [replace(limit, amounts=_kept(limit.amounts, kept)) for limit in limits]
    problem = _Problem(small, own, max_nodes)
    found = problem.solve()
    if found is None:
        return None
    at, bound = found
    chosen = tuple(options[index] for options, index in zip(kept, at, strict=True))
    if not all(limit.holds(chosen) for limit in limits):
        raise NumericsError("an answer of HiGHS is outside of its limits")
    cost = total(costs, chosen)
    gap, grain = max(cost - bound, Fraction(0)), _grain(small, problem.bases)
    # Costs that are multiples of a number differ by multiples of it.
    return Solved(chosen, float(cost), float(gap // grain * grain if grain else gap))


def _kept(table: Table, kept: Sequence[Sequence[int]]) -> Table:
    return tuple(tuple(row[at] for at in options) for row, options in zip(table, kept, strict=True))


def _undominated(costs: Table, limits: Sequence[Limit]) -> list[list[int]]:
    """Options of each item that some other does not beat, or equal and come before."""
    signs = [_signs(limit) for limit in limits]
    kept = []
    for item, row in enumerate(costs):
        keys = []
        for option, cost in enumerate(row):
            key: list[int | float] = [cost]
            for limit, sides in zip(limits, signs, strict=True):
                key += [sign * limit.amounts[item][option] for sign in sides]
            keys.append(key)
        kept.append([at for at in range(len(row)) if not _is_beaten(at, keys)])
    return kept


def _signs(limit: Limit) -> list[int]:
    """Directions in which an amount is worse."""
    return [1] * (limit.most is not None) + [-1] * (limit.least is not None)


def _is_beaten(at: int, keys: Sequence[Sequence[int | float]]) -> bool:
    own = keys[at]
    return any(
        all(theirs <= ours for theirs, ours in zip(other, own, strict=True))
        and (other != own or place < at)
        for place, other in enumerate(keys)
        if place != at
    )


class _Problem:
    """A knapsack as HiGHS takes it, with the answers that are forbidden."""

    def __init__(self, costs: Table, limits: Sequence[Limit], max_nodes: int) -> None:
        self.costs = costs
        self.limits = list(limits)
        self.max_nodes = max_nodes
        self.sizes = [len(row) for row in costs]
        self.starts = np.cumsum([0, *self.sizes])
        self.forbidden: list[tuple[int, ...]] = []
        self.bases, self.cost_step = _scaled(costs, _COST_SCALE)
        # What each limit is drawn tighter by, where forbidding answers did not do.
        self.margins = [Fraction(0)] * len(self.limits)

    def solve(self) -> tuple[tuple[int, ...], Fraction] | None:
        """An answer within the limits and a bound below all of them; None: there is none."""
        bound: Fraction | None = None
        for _ in range(_MOST_ROUNDS):
            result = self._highs()
            if result.status == _INFEASIBLE:
                return None
            if result.x is None:
                raise NumericsError(
                    f"HiGHS found no answer: {result.message}",
                    remedy="relax a limit, or leave one out",
                )
            if bound is None:
                # Later problems are narrower: only the first bound is one of them all.
                bound = self._bound(result)
            chosen = self._chosen(result.x)
            if all(limit.holds(chosen) for limit in self.limits):
                return chosen, min(bound, total(self.costs, chosen))
            self._forbid(chosen)
        raise NumericsError(
            "every answer of HiGHS is over a limit by less than its tolerance",
            remedy="change the budget by a little",
        )

    def _forbid(self, chosen: tuple[int, ...]) -> None:
        if len(self.forbidden) < _MOST_FORBIDDEN:
            self.forbidden.append(chosen)
            return
        for place, limit in enumerate(self.limits):
            self.margins[place] += 2 * limit.excess(chosen)

    def _bound(self, result: Any) -> Fraction:
        """A bound below the cost of every answer, from the one that HiGHS has proved."""
        base = sum((Fraction(least) for least in self.bases), Fraction(0))
        found = result.mip_dual_bound
        if found is None or not math.isfinite(found):
            return base
        return base + Fraction(float(found)) * self.cost_step

    def _chosen(self, x: npt.NDArray[np.float64]) -> tuple[int, ...]:
        return tuple(
            int(np.argmax(x[start : start + size]))
            for start, size in zip(self.starts, self.sizes, strict=False)
        )

    def _highs(self) -> Any:
        count = int(self.starts[-1])
        rows, low, high = self._limit_rows()
        ones = coo_array(
            (np.ones(count), (np.repeat(np.arange(len(self.sizes)), self.sizes), np.arange(count))),
            shape=(len(self.sizes), count),
        )
        constraints = [LinearConstraint(ones, 1, 1)]
        if rows:
            constraints.append(LinearConstraint(vstack(rows), low, high))
        with c_output_dropped():
            return milp(
                _flat(self.costs, self.bases, self.cost_step),
                integrality=np.ones(count),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": 0.0, "node_limit": self.max_nodes},
            )

    def _limit_rows(self) -> tuple[list[Any], list[float], list[float]]:
        """A row for each limit and for each answer that is forbidden, with their bounds."""
        rows, low, high = [], [], []
        for limit, margin in zip(self.limits, self.margins, strict=True):
            bases, step = _scaled(limit.amounts, _AMOUNT_SCALE)
            base = sum((Fraction(least) for least in bases), Fraction(0))
            rows.append(coo_array(_flat(limit.amounts, bases, step)[None]))
            grain = _grain(limit.amounts, bases)
            least = None if limit.least is None else Fraction(limit.least) + margin - base
            most = None if limit.most is None else Fraction(limit.most) - margin - base
            low.append(-math.inf if least is None else _finite(_lower(least, grain) / step))
            high.append(math.inf if most is None else _finite(-_lower(-most, grain) / step))
        for chosen in self.forbidden:
            columns = [start + at for start, at in zip(self.starts, chosen, strict=False)]
            entries = (np.ones(len(columns)), (np.zeros(len(columns), dtype=int), columns))
            rows.append(coo_array(entries, shape=(1, int(self.starts[-1]))))
            low.append(-math.inf)
            high.append(len(columns) - 1)
        return rows, low, high


def _finite(bound: Fraction) -> float:
    """A bound as a float; one that no sum comes near is cut to a number that none comes near."""
    return float(min(max(bound, -_BEYOND), _BEYOND))


def _lower(bound: Fraction, grain: Fraction) -> Fraction:
    """A lower bound that lies between two possible sums, so that none is close to it."""
    return bound if grain == 0 else (math.ceil(bound / grain) - Fraction(1, 2)) * grain


def _grain(table: Table, bases: Sequence[int | float]) -> Fraction:
    """The number of which all amounts, counted from the least, are multiples; 0: not whole ones."""
    if not all(isinstance(number, int) for row in table for number in row):
        return Fraction(0)
    rests = (number - base for row, base in zip(table, bases, strict=True) for number in row)
    return Fraction(math.gcd(*(int(rest) for rest in rests)))


def _scaled(table: Table, scale: float) -> tuple[list[int | float], Fraction]:
    """The least number of each row, and the step in which the rest is counted up to a scale."""
    bases = [min(row) for row in table]
    rests = (
        Fraction(number) - Fraction(base)
        for row, base in zip(table, bases, strict=True)
        for number in row
    )
    largest = max(rests, default=Fraction(0))
    return bases, largest / Fraction(scale) if largest else Fraction(1)


def _flat(table: Table, bases: Sequence[int | float], step: Fraction) -> npt.NDArray[np.float64]:
    return np.array(
        [
            float((Fraction(number) - Fraction(base)) / step)
            for row, base in zip(table, bases, strict=True)
            for number in row
        ]
    )
