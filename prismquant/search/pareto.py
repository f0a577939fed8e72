"""The front of sizes and losses: the best mix at many sizes, solved exactly, and its knee."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from prismquant.errors import PrismQuantError
from prismquant.export.exporter import Progress
from prismquant.memory import readable_bytes
from prismquant.search.allocate import Allocation, Mix, all_weights, set_up
from prismquant.search.constraints import Constraints
from prismquant.search.knapsack import Limit, solve, total
from prismquant.search.limits import unmet
from prismquant.search.sensitivity import Sensitivity

MAX_POINTS = 1000


@dataclass(frozen=True)
class Front:
    """Mixes of which no other is both smaller and better.

    Attributes:
        mixes: By size, the smallest first; losses fall.
        knee: Index of the mix where more bytes begin to buy little: the one farthest below the
            straight line between the two ends, with both axes scaled to the range of the front
            (the "kneedle" of Satopää et al., 2011); of a front of two mixes, the larger one.
    """

    mixes: tuple[Mix, ...]
    knee: int


def pareto_front(
    found: Sensitivity,
    constraints: Constraints,
    points: int = 64,
    progress: Progress = lambda done, total, name: None,
) -> Front:
    """The best mixes at sizes from the smallest possible to that beyond which nothing gets better.

    Args:
        found: The sensitivity.
        constraints: What every mix must keep to. The total, where there is one, only adds a point.
        points: Sizes at which a mix is looked for, evenly spaced in bytes; several may have the
            same best mix.
        progress: Is told how many sizes are done, of how many, and the next one.

    Raises:
        PlanError: No mix keeps to the constraints.
        DataError: The table of latencies lacks times.
    """
    search = set_up(found, replace(constraints, total=None))
    ends = _ends(search)
    if ends is None:
        raise unmet(found, search.constraints, search.units, search.limits, search.notes)
    budgets = _budgets(search, constraints, *ends, points)
    mixes = []
    for number, budget in enumerate(budgets):
        progress(number, len(budgets), readable_bytes(budget + found.fixed_bytes))
        solved = solve(search.losses, [*search.limits, Limit("size", search.sizes, most=budget)])
        if solved is not None:
            mixes.append(search.mix(solved))
    kept = _undominated_mixes(mixes)
    if not kept:
        raise PrismQuantError("no mix was found at any size", remedy="please report it")
    return Front(tuple(kept), knee_of([(mix.stored_bytes, mix.loss) for mix in kept]))


def knee_of(points: Sequence[tuple[float, float]]) -> int:
    """Index of the knee of a falling curve, as :class:`Front` says it.

    Args:
        points: Sizes and losses, by size; at least one.
    """
    (left, high), (right, low) = points[0], points[-1]
    if len(points) < 3 or left == right or high == low:
        # Nothing bends: the smallest, for the largest may be to leave everything alone.
        return 0
    below = [1 - (x - left) / (right - left) - (y - low) / (high - low) for x, y in points]
    return max(range(len(points)), key=below.__getitem__)


def _ends(search: Allocation) -> tuple[int, int] | None:
    """Bytes of options of the smallest mix, and of the smallest one of those that lose least."""
    smallest = solve(search.sizes, search.limits)
    if smallest is None:
        return None
    least = int(total(search.sizes, smallest.chosen))
    every = int(sum(max(row) for row in search.sizes))
    # The bound changes nothing but that of equal losses the fewest bytes are taken.
    best = solve(search.losses, [*search.limits, Limit("size", search.sizes, most=every)])
    most = every if best is None else int(total(search.sizes, best.chosen))
    return least, max(most, least)


def _budgets(
    search: Allocation, constraints: Constraints, least: int, most: int, points: int
) -> list[int]:
    """Bytes that options may take, in rising order."""
    steps = max(points - 1, 1)
    found = {least + (most - least) * step // steps for step in range(points)} | {most}
    if constraints.total is not None:
        asked = constraints.total.of(all_weights(search.found)) - search.found.fixed_bytes
        if asked >= least:
            found.add(int(asked))
    return sorted(found)


def _undominated_mixes(mixes: Sequence[Mix]) -> list[Mix]:
    """Mixes by size, without those than which a smaller one loses no more."""
    kept: list[Mix] = []
    for mix in sorted(mixes, key=lambda mix: (mix.stored_bytes, mix.loss)):
        if not kept or mix.loss < kept[-1].loss:
            kept.append(mix)
    return kept
