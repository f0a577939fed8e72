"""Cholesky factorization from the last column to the first, in place, with or without pivoting.

``H = R R^T`` with R upper triangular, for the column loop of
:mod:`prismquant.algorithms.gptq.column_loop`. Working from the end, the column of R that each step
finds is just the line of factors that the loop reads at that position, so the lines are stored as
rows, and nothing is computed twice. Where the order of the loop is chosen by pivots, choosing it
*is* the factorization.

Most of the work is to subtract from what remains what finished lines explain of it. These products
may round their factors to bfloat16, which some processors multiply more than twice as fast. The
errors are in proportion to what a line explains: where that is many times what is left, as with the
mean of all inputs, which the first lines hold, they would drown it. Such lines keep float32, so
errors stay in proportion to what is left, and pivots, however small, are good to a thousandth or so
(at the worst two hundredths).

Everything happens in the lower triangle of the matrix, diagonal included. What is above belongs to
somebody else: no result depends on it, and none of it changes, at any moment. Blocks on the
diagonal therefore go through a copy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismquant.kernels import pivots, products

if TYPE_CHECKING:
    from collections.abc import Iterator

# Columns eliminated between two updates of what remains. Larger blocks make faster products; lines
# inside a block are brought up to date one by one, or a few at a time.
_PIVOT_BLOCK = 256
# Without pivots a block's lines come from one product.
_PLAIN_BLOCK = 256
# Rows of a triangle updated at once.
_PANEL = 512
# How much of what is left of the diagonal, summed over columns, a line explains that is rounded.
_HEAVY = 4.0
# Lines that are divided at once.
_DIVIDED = 256
# Of a block on the diagonal both halves are computed where it is no larger than this.
_TIP = 128


def factorize_in_place(matrix: Tensor, *, rounded: bool = False) -> bool:
    """Factorize as ``R R^T`` in the given order.

    Args:
        matrix: Symmetric ``[n, n]``, float32 or float64, given by its lower triangle. Line k of it
            becomes column k of R. What is above the diagonal is neither used nor changed.
        rounded: Whether factors of products may be rounded to bfloat16, where :func:`can_round`.

    Returns:
        Whether the matrix is positive definite in its precision; if not, the lower triangle is
        spoilt.
    """
    rounded, end = rounded and can_round(matrix), len(matrix)
    while end:
        start = max(0, end - _PLAIN_BLOCK)
        ahead, own = matrix[start:end, :start], matrix[start:end, start:end].tril()
        if not rounded:
            # Left-looking: a block is touched once, by all the lines found so far.
            factors = matrix[end:, start:end]
            ahead.addmm_(factors.T, matrix[end:, :start], alpha=-1)
            own.addmm_(factors.T, factors, alpha=-1)
        # The factorization from the end is the usual one of the reversed block.
        lower, failed = torch.linalg.cholesky_ex(own.T.flip(0, 1))
        if int(failed):
            return False
        own = lower.flip(0, 1)
        # From the right, because BLAS then finds a line's numbers next to one another.
        ahead.T.copy_(torch.linalg.solve_triangular(own.T, ahead.T, upper=False, left=False))
        _write_lower(matrix[start:end, start:end], own.T)
        end = start
        if rounded:
            _explain(matrix[:end, :end], ahead, rounded=True)
    return bool(torch.isfinite(matrix.diagonal()).all())


def factorize_smallest_last(matrix: Tensor, *, rounded: bool = False) -> Tensor | None:
    """Factorize as ``R R^T`` after putting the column with the smallest pivot last, over and over.

    A column's pivot is its variance given all columns that come later: with columns that correlate
    strongly, the diagonal alone says little about it. Rounding errors of early columns are
    compensated, those of late columns stay, so the late ones should be cheap.

    The blocked form of a pivoted Cholesky factorization (Higham, "Analysis of the Cholesky
    decomposition of a semi-definite matrix", 1990; LAPACK's ``pstrf``), from the end and with the
    smallest pivot in place of the largest. Lines that are finished follow later moves only at the
    end, each by one permutation.

    Args:
        matrix: Symmetric ``[n, n]``, float32 or float64, given by its lower triangle. Line k of it
            becomes the column of R at position k. What is above the diagonal is neither used nor
            changed.
        rounded: Whether factors of products may be rounded to bfloat16, where :func:`can_round`.

    Returns:
        Column at each position, int64 ``[n]``; ``None`` when a pivot is not positive, and then the
        lower triangle is spoilt.
    """
    rounded, end = rounded and can_round(matrix), len(matrix)
    compiled = pivots.supports(matrix.device)
    pick = _pick_compiled if compiled else _pick_smallest
    move_columns = pivots.move_columns if compiled else _move_columns
    moves: list[_Move] = []
    while end:
        rest = matrix[:end, :end]
        lines, picked = pick(rest)
        if len(picked) < len(lines):
            return None
        move = _Move.of(picked, end, matrix.device)
        moved = move.columns_of(rest)
        move.store(lines, rest)
        end -= len(picked)
        rest = matrix[:end, :end]
        for rows in blocks(end, _PANEL):
            move_columns(rest, moved, move.free, rows)
        _explain(rest, lines[:, :end], rounded=rounded)
        moves.append(move)
    return _follow(matrix, moves)


def can_round(matrix: Tensor) -> bool:
    """Whether products that change a matrix can round their factors to bfloat16, and gain by it."""
    return products.subtracts(matrix)


def blocks(count: int, size: int, first: int = 0) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``range(first, count)``."""
    for start in range(first, count, size):
        yield slice(start, min(start + size, count))


@dataclass(frozen=True, eq=False)
class _Move:
    """Move of ``m`` columns when ``b`` of them are eliminated.

    Those of the last ``b`` columns that stay take the places of those further ahead that go. Lines
    and columns of the matrix move alike.

    Attributes:
        free: Places of those further ahead that go, int64 ``[f]``, ascending.
        late: The columns that take them, int64 ``[f]``, ascending.
        gone: The columns that go, the first last, int64 ``[b]``.
        end: How many columns there were, ``m``.
    """

    free: Tensor
    late: Tensor
    gone: Tensor
    end: int

    @classmethod
    def of(cls, picked: list[int], end: int, device: torch.device) -> _Move:
        """Move that eliminates the columns ``picked``, in this order."""
        start, gone = end - len(picked), set(picked)
        free = sorted(i for i in picked if i < start)
        late = [i for i in range(start, end) if i not in gone]

        def tensor(places: list[int]) -> Tensor:
            return torch.tensor(places, dtype=torch.int64, device=device)

        return cls(tensor(free), tensor(late), tensor(picked[::-1]), end)

    @property
    def start(self) -> int:
        """Number of columns that stay."""
        return self.end - len(self.gone)

    def columns_of(self, matrix: Tensor) -> Tensor:
        """The columns that move, where they meet those that stay, ``[f, m - b]``.

        Args:
            matrix: ``[m, m]``, before anything moved; its lower triangle is read.
        """
        start, late = self.start, self.late - self.start
        # Left of the diagonal a column of the lower triangle is a line of it. Only where two that
        # move meet, one of them may be ahead.
        moved = matrix[start:, :start].index_select(0, late)
        meeting = matrix[start:, start:].tril()
        meeting += meeting.tril(-1).T
        return moved.index_copy_(1, self.free, meeting[late][:, late])

    def store(self, lines: Tensor, matrix: Tensor) -> None:
        """Move the columns of the lines of factors, and store the lines at the end.

        Args:
            lines: In the order of elimination, ``[b, m]``; their first ``m - b`` columns are left
                in the new arrangement.
            matrix: ``[m, m]``, whose last lines receive them in the lower triangle.
        """
        start = self.start
        own = lines.index_select(1, self.gone)
        lines.index_copy_(1, self.free, lines.index_select(1, self.late))
        matrix[start:, :start] = lines[:, :start].flip(0)
        _write_lower(matrix[start:, start:], own.flip(0))

    def before(self, places: Tensor) -> Tensor:
        """Column that came to each place.

        Args:
            places: Where those that stayed are after later moves, int64 ``[m - b]``: the place
                that this move gave to each.

        Returns:
            Their places before it, and those of the columns that went, int64 ``[m]``.
        """
        came = torch.arange(self.start, device=places.device).index_copy_(0, self.free, self.late)
        return torch.cat((came[places], self.gone))


def _follow(matrix: Tensor, moves: list[_Move]) -> Tensor:
    """Let lines that were stored after each move follow the moves that came after.

    Args:
        matrix: ``[n, n]``, full of lines.
        moves: From the first to the last.

    Returns:
        The column at each place in the end, int64 ``[n]``.
    """
    places = torch.empty(0, dtype=torch.int64, device=matrix.device)
    for move in reversed(moves):
        start, end = move.start, move.end
        # Whole rows are indexed, because torch copies all of a narrower slice before.
        matrix[start:end, :start] = matrix[start:end].index_select(1, places)
        places = move.before(places)
    return places


def _pick_smallest(matrix: Tensor) -> tuple[Tensor, list[int]]:
    """Eliminate up to a block of columns, each time the one with the smallest pivot.

    Args:
        matrix: What remains, ``[m, m]``; not changed.

    Returns:
        Their lines of factors ``[b, m]`` and their indices in the order of elimination; fewer of
        these than lines when a pivot is not positive.
    """
    count = min(_PIVOT_BLOCK, len(matrix))
    left = matrix.diagonal().clone()
    lines = matrix.new_empty(count, len(matrix))
    picked: list[int] = []
    for line, before in zip(lines, range(count), strict=True):
        smallest, place = left.min(0)
        pivot, index = float(smallest), int(place)
        if not 0 < pivot < math.inf:
            break
        # The two halves of the column, of which only the lower triangle is up to date.
        line[:index] = matrix[index, :index]
        line[index:] = matrix[index:, index]
        if before:
            line.addmv_(lines[:before].T, lines[:before, index], alpha=-1)
        line.div_(math.sqrt(pivot))
        line[index] = math.sqrt(pivot)
        left.addcmul_(line, line, value=-1)
        left[index] = math.inf
        picked.append(index)
    return lines, picked


def _pick_compiled(matrix: Tensor) -> tuple[Tensor, list[int]]:
    """Do as :func:`_pick_smallest`, in one kernel."""
    lines = matrix.new_empty(min(_PIVOT_BLOCK, len(matrix)), len(matrix))
    return lines, pivots.pick_smallest(matrix, lines)


def _move_columns(matrix: Tensor, moved: Tensor, free: Tensor, rows: slice) -> None:
    """See :func:`prismquant.kernels.pivots.move_columns`."""
    bounds = torch.searchsorted(free, free.new_tensor([rows.start, rows.stop]))
    before, behind = (int(bound) for bound in bounds)
    inside, ahead = slice(before, behind), matrix[rows, : rows.start]
    ahead.index_copy_(1, free[:before], moved[:before, rows].T)
    ahead.index_copy_(0, free[inside] - rows.start, moved[inside, : rows.start])
    own, coming = matrix[rows, rows].tril(), moved[inside, rows]
    own.index_copy_(1, free[inside] - rows.start, coming.T)
    own.index_copy_(0, free[inside] - rows.start, coming)
    _write_lower(matrix[rows, rows], own)


def _explain(matrix: Tensor, lines: Tensor, *, rounded: bool) -> None:
    """Subtract from a lower triangle what lines of factors explain, ``l^T l``."""
    if rounded:
        heavy = _heavy(matrix, lines)
        products.subtract_products(matrix, lines[~heavy])
        lines = lines[heavy]
    if len(lines):
        for rows in blocks(len(matrix), _PANEL):
            _update(matrix, lines, rows)


def _heavy(matrix: Tensor, lines: Tensor) -> Tensor:
    """Lines that explain so much of what is left that they must not be rounded, bool ``[b]``.

    Args:
        matrix: ``[m, m]``, of which nothing was subtracted.
        lines: ``[b, m]``.
    """
    squares = lines.square()
    left = matrix.diagonal() - squares.sum(0)
    return ~((squares / left).sum(1) <= _HEAVY)


def _update(matrix: Tensor, lines: Tensor, rows: slice) -> None:
    """Subtract what lines of factors explain from some rows of the lower triangle."""
    ahead = slice(0, rows.start)
    matrix[rows, ahead].addmm_(lines[:, rows].T, lines[:, ahead], alpha=-1)
    for tip in blocks(rows.stop, _TIP, rows.start):
        inside = slice(rows.start, tip.start)
        matrix[tip, inside].addmm_(lines[:, tip].T, lines[:, inside], alpha=-1)
        # Above the diagonal zeros are subtracted.
        matrix[tip, tip].sub_((lines[:, tip].T @ lines[:, tip]).tril_())


def _write_lower(target: Tensor, values: Tensor) -> None:
    """Copy the lower triangle, and touch nothing else."""
    places = tuple(torch.tril_indices(*target.shape, device=target.device))
    target[places] = values[places]


def divide_lines(matrix: Tensor, divisors: Tensor) -> None:
    """Divide what is below a diagonal, line by line.

    Args:
        matrix: ``[n, n]``, changed below its diagonal.
        divisors: ``[n]``, in its dtype.
    """
    for block in blocks(len(matrix), _DIVIDED):
        below = divisors[block].unsqueeze(1)
        matrix[block, : block.start] /= below
        own = matrix[block, block]
        own.copy_(torch.where(below_diagonal(own), own / below, own))


def below_diagonal(matrix: Tensor) -> Tensor:
    """Mask of the entries of a square matrix below its diagonal, bool."""
    return torch.ones_like(matrix, dtype=torch.bool).tril_(-1)
